"""Block and RMSNorm: the residual policy, fused and not.

Judge: the formulas spelled out in PyTorch.
"""

from functools import partial

import pytest
import torch
from torch import nn

from ssm.modules.attention import MHA
from ssm.modules.block import Block
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mlp import GatedMLP
from ssm.modules.norm import RMSNorm, add_norm
from ssm.modules.parallel import ParallelMixer

DIM = 6


class Twice(nn.Module):
    """A mixer that records its arguments."""

    def __init__(self, dim):
        super().__init__()
        self.seen = None

    def forward(self, x, inference_params=None, **kwargs):
        self.seen = (inference_params, kwargs)
        return 2 * x


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_rms_norm_matches_the_formula():
    norm = RMSNorm(DIM, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_()
    x = torch.randn(2, 3, DIM)
    torch.testing.assert_close(norm(x), rms(x, norm.weight, 1e-3))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert list(norm.state_dict()) == ["weight"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("with_mlp", [False, True])
def test_matches_the_formula(fused, norm_cls, with_mlp):
    mlp_cls = partial(GatedMLP, hidden_features=4, multiple_of=2) if with_mlp else nn.Identity
    block = Block(DIM, Twice, mlp_cls, norm_cls, fused_add_norm=fused)
    x, residual = torch.randn(2, 2, 3, DIM).unbind()
    y, stream = block(x, residual)
    want_stream = x + residual
    want = 2 * nn.functional.layer_norm(want_stream, (DIM,))
    if norm_cls is RMSNorm:
        want = 2 * rms(want_stream, block.norm.weight)
    if with_mlp:
        want_stream = want_stream + want
        want = block.mlp(block.norm2(want_stream))
    torch.testing.assert_close(stream, want_stream)
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_of_the_stream(norm_cls, residual_in_fp32, dtype):
    x = torch.randn(2, 3, DIM, dtype=dtype)
    streams = []
    for fused in (False, True):
        block = Block(DIM, Twice, nn.Identity, norm_cls, fused, residual_in_fp32).to(dtype)
        hidden, residual = block(x)
        hidden, residual = block(hidden, residual)
        assert hidden.dtype == dtype
        keep = dtype != torch.bfloat16 or not residual_in_fp32
        assert residual.dtype == (dtype if keep else torch.float32)
        streams.append((hidden, residual))
    # One rounding of the model dtype may differ: unfused casts the stream before the norm.
    tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-5
    for a, b in zip(*streams, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_of_another_dtype_than_the_weights(residual_in_fp32, dtype):
    """Weights stay float32, as norms do where a model is lowered but for them."""
    x, given = torch.randn(2, 3, DIM).bfloat16(), torch.randn(2, 3, DIM).to(dtype)
    found = [
        Block(DIM, Twice, nn.Identity, RMSNorm, fused, residual_in_fp32)(x, given)
        for fused in (False, True)
    ]
    for hidden, residual in found:
        assert hidden.dtype == torch.bfloat16
        assert residual.dtype == (torch.float32 if residual_in_fp32 else dtype)
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("affine", [True, False])
def test_an_unfused_norm_reads_the_sum_unrounded(affine):
    """A stream far from zero, in which bfloat16 would lose what is added."""
    x, stream = torch.randn(3, DIM).bfloat16(), 100 + torch.randn(3, DIM)
    norm = nn.LayerNorm(DIM, elementwise_affine=affine)
    normed, total = add_norm(norm, x, stream, fused=False, residual_in_fp32=True)
    assert torch.equal(total, x.float() + stream)
    assert torch.equal(normed, norm(total).bfloat16())


def test_arguments_reach_the_mixer():
    block = Block(DIM, Twice)
    block(torch.zeros(1, 1, DIM), inference_params="params", seq_idx="ids")
    assert block.mixer.seen == ("params", {"seq_idx": "ids"})


def test_allocates_the_state_of_the_mixer():
    block = Block(DIM, partial(Mamba1, d_state=3))
    conv_state, ssm_state = block.allocate_inference_cache(2, 9, dtype=torch.bfloat16)
    assert conv_state.shape == (2, 12, 4)
    assert conv_state.dtype == torch.bfloat16
    assert ssm_state.shape == (2, 12, 3)


def test_allocates_the_states_of_all_mixers_there_are():
    mlp_alone = Block(DIM, nn.Identity, partial(GatedMLP, hidden_features=1))
    assert mlp_alone.allocate_inference_cache(2, 9) == ()
    attention = partial(MHA, num_heads=2, causal=True)
    pair = Block(DIM, partial(ParallelMixer, ssm_cls=Mamba1, attention_cls=attention))
    shapes = [tuple(state.shape) for state in pair.allocate_inference_cache(2, 9)]
    assert shapes == [(2, 12, 4), (2, 12, 16), (2, 9, 2, 2, 3), (2,)]


def test_keys_are_those_of_state_spaces():
    plain = Block(DIM, Twice, norm_cls=RMSNorm)
    assert list(plain.state_dict()) == ["norm.weight"]
    both = Block(DIM, Twice, partial(GatedMLP, hidden_features=1), RMSNorm)
    want = ["norm.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    assert sorted(both.state_dict()) == sorted(want)


def test_rejects_a_norm_that_cannot_be_fused():
    with pytest.raises(ValueError, match=r"Block: norm_cls must give an RMSNorm or a LayerNorm"):
        Block(DIM, Twice, norm_cls=nn.BatchNorm1d, fused_add_norm=True)
    plain = partial(nn.LayerNorm, elementwise_affine=False)
    with pytest.raises(ValueError, match=r"Block: norm_cls must give .* got LayerNorm$"):
        Block(DIM, Twice, norm_cls=plain, fused_add_norm=True)
    with pytest.raises(ValueError, match=r"Block: norm_cls must give .* got LayerNorm$"):
        Block(DIM, Twice, norm_cls=lambda dim: nn.LayerNorm((3, dim)), fused_add_norm=True)
