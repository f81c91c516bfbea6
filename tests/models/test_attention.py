"""MHA without a state: its formula, its options, its refusals.

Judge: tests/attention.py, loops over heads and steps in float64.
"""

import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm.modules.attention import MHA
from ssm.modules.rotary import Rotary
from ssm.seq_meta import SeqMeta
from ssm.state import State
from tests.attention import (
    LENGTH,
    RAGGED,
    by_hand,
    close,
    compiled,
    each_variant,
    inputs,
    mha,
)


@each_variant
@pytest.mark.parametrize("causal", [True, False])
def test_matches_the_formula(variant, causal):
    m, x = mha(variant, causal=causal), inputs()
    close(m(x), torch.stack([by_hand(m, row, variant=variant) for row in x]))


def test_scale_and_mlp_are_what_they_say():
    """The judge above knows the defaults too; here they are spelled out."""
    m, x = mha("plain"), inputs(1, 2)
    other = copy.deepcopy(m)
    other.softmax_scale = 1 / math.sqrt(2)
    close(m(x), other(x))
    m = mha("mlp", out_proj_bias=False)
    with torch.no_grad():
        m.out_proj.weight[:, :8] = 0
    up, gate = m.in_proj(x)[..., 24:].chunk(2, -1)
    close(m(x), (up * F.silu(gate)) @ m.out_proj.weight[:, 8:].T)


def test_packed_bidirectional_attention_stays_within_its_sequence():
    m, x = mha(causal=False), inputs(1, 5)
    alone = torch.cat([m(part) for part in x.split([2, 3], dim=1)], 1)
    close(m(x, cu_seqlens=torch.tensor([0, 2, 5])), alone)


@pytest.mark.parametrize("ends", [[0, 9, 10, 11, 12], [0, 3, 6, 9, 12], [0, 0, 12], [0, 7, 7, 8]])
def test_sequences_of_any_lengths_attend_to_themselves(ends):
    """Padded to one batch or one after the other, whichever is less work."""
    m, x = mha(), inputs(1, 12).requires_grad_()
    wanted = [x, *m.parameters()]
    y = m(x, cu_seqlens=torch.tensor(ends))
    cuts = [x[:, begin:end] for begin, end in itertools.pairwise(ends)]
    alone = torch.cat([m(cut) for cut in cuts], 1)
    close(y[:, : ends[-1]], alone)
    got = torch.autograd.grad(y[:, : ends[-1]].square().sum(), wanted)
    want = torch.autograd.grad(alone.square().sum(), wanted)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_sequences_do_not_hear_the_nan_of_another():
    m, x = mha("rotary"), inputs(2, 6)
    want = m(x, cu_seqlens=torch.tensor([0, 2, 6, 9, 12]))
    x[0, 2:] = torch.nan
    got = m(x, cu_seqlens=torch.tensor([0, 2, 6, 9, 12]))
    close(got[1], want[1])
    close(got[0, :2], want[0, :2])
    mask = torch.ones(2, 6)
    mask[1, 0] = 0
    assert m(x, attention_mask=mask)[1].isfinite().all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_position_ids_turn_the_rotary_embedding(interleaved):
    variant = "interleaved" if interleaved else "all"
    m, x = mha(variant), inputs()
    positions = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [0, 1, 2, 3, 4, 5, 6]])
    want = [by_hand(m, x[r], positions[r].tolist(), variant) for r in range(2)]
    close(m(x, position_ids=positions), torch.stack(want))
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [
            m(part, state=state, position_ids=ids)
            for part, ids in zip(x.split([4, 1, 2], 1), positions.split([4, 1, 2], 1), strict=True)
        ]
    close(torch.cat(parts, 1), torch.stack(want))


def test_only_differences_of_positions_matter():
    m, x = mha(), inputs()
    positions = torch.arange(LENGTH).expand(2, -1)
    close(m(x, position_ids=positions + 1000), m(x), 1e-8)
    assert not torch.allclose(m(x, position_ids=2 * positions), m(x))


def test_rotary_angles_are_float32_in_a_bfloat16_model():
    rotary, x = Rotary(4), torch.randn(1, 1, 1, 6, dtype=torch.bfloat16)
    far = torch.tensor([[40003]])
    got, want = rotary(x, far), rotary(x.float(), far)
    assert got.dtype == torch.bfloat16
    # One rounding of the result; in bfloat16 the position alone would be off by up to 128.
    assert (got.float() - want).abs().max() <= 2**-8 * x.float().norm()
    assert torch.equal(got[..., 4:], x[..., 4:])
    assert list(mha().rotary_emb.state_dict()) == []


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("with_state", [False, True])
def test_empty(batch, length, with_state):
    m = mha()
    x = inputs(batch, length).requires_grad_()
    y = m(x, state=m.allocate_state(batch) if with_state else None)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in m.parameters())
    meta = SeqMeta(cu_seqlens=torch.tensor([0]))
    m(x, state=m.allocate_state(0), seq_meta=meta)
    m(inputs(), state=m.allocate_state(0), seq_meta=meta)


def test_keys_and_shapes_are_those_of_state_spaces():
    m = MHA(16, 6, 2, head_dim=8, mlp_dim=300, d_conv=4, rotary_emb_dim=4)
    assert {name: tuple(p.shape) for name, p in m.state_dict().items()} == {
        "in_proj.weight": (80 + 512, 16),
        "in_proj.bias": (80 + 512,),
        "conv1d.weight": (80, 1, 4),
        "conv1d.bias": (80,),
        "out_proj.weight": (16, 48 + 256),
        "out_proj.bias": (16,),
    }
    # The geometry of mamba2attn-2.7b, whose heads are wider than the model.
    m = MHA(
        2560,
        30,
        head_dim=128,
        qkv_proj_bias=False,
        out_proj_bias=False,
        d_conv=4,
        rotary_emb_dim=64,
        causal=True,
        device="meta",
    )
    assert {name: tuple(p.shape) for name, p in m.state_dict().items()} == {
        "in_proj.weight": (11520, 2560),
        "conv1d.weight": (11520, 1, 4),
        "conv1d.bias": (11520,),
        "out_proj.weight": (2560, 3840),
    }


def test_positional_order_is_that_of_mamba_ssm():
    assert list(inspect.signature(MHA).parameters) == [
        *("embed_dim", "num_heads", "num_heads_kv", "head_dim", "mlp_dim", "qkv_proj_bias"),
        *("out_proj_bias", "softmax_scale", "causal", "layer_idx", "d_conv", "rotary_emb_dim"),
        *("rotary_emb_base", "rotary_emb_interleaved", "device", "dtype"),
        *("process_group", "sequence_parallel"),
    ]


@pytest.mark.parametrize("cast", ["to", "half", "autocast"])
def test_low_precision_is_near_float32(cast):
    m, x = mha(dtype=torch.float32), inputs(dtype=torch.float32)
    want = m(x)
    low = torch.float16 if cast == "half" else torch.bfloat16
    if cast != "autocast":
        m, x = m.to(low), x.to(low)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        y, state = m(x), m.allocate_state(2)
        parts = [m(part, state=state) for part in x.split([4, 1, 2], dim=1)]
    assert y.dtype == x.dtype
    # bfloat16 has 8 bits; five roundings on the way.
    for got in (y, torch.cat(parts, 1)):
        assert (got.float() - want).abs().max() < 5 * 2**-8 * want.abs().max()
    assert state.key_value_memory_dict[0][0].dtype == m.out_proj.weight.dtype
    y.float().sum().backward()


def test_float32_is_near_float64():
    m, x = mha(dtype=torch.float32), inputs(dtype=torch.float32)
    want = copy.deepcopy(m).double()(x.double()).float()
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [m(part, state=state) for part in x.split([4, 1, 2], dim=1)]
    # Measured below 3e-7: sums of a few hundred products.
    close(m(x), want, 2e-6)
    close(torch.cat(parts, 1), want, 2e-6)


def test_rows_do_not_depend_on_each_other():
    m, x = mha(dtype=torch.float32), inputs(3, dtype=torch.float32)
    poisoned = x.clone()
    poisoned[1] = torch.nan
    got = m(poisoned)
    assert got[[0, 2]].isfinite().all()
    close(got[[0, 2]], m(x)[[0, 2]], 0)


def test_forward_hooks_fire_on_every_linear():
    m, fired = mha(), []
    for name, module in m.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: fired.append(name))
    m(inputs())
    assert fired == ["in_proj", "out_proj"]
    fired.clear()
    with torch.no_grad():
        m(inputs(length=1), state=m.allocate_state(2))
    assert fired == ["in_proj", "out_proj"]


def test_deepcopy_and_pickle():
    m, x = mha(), inputs()
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(copied(x), m(x))
        with torch.no_grad():
            copied.out_proj.weight += 1
        assert not torch.equal(copied(x), m(x))


@pytest.mark.parametrize("mask", [None, RAGGED])
def test_compiles_without_a_graph_break(mask):
    m, x = mha(), inputs()
    fast, parameters = compiled(m), list(m.parameters())
    y, want = (f(x, attention_mask=mask) for f in (fast, m))
    close(y, want)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(want.square().sum(), parameters),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 0}, "MHA: num_heads must be positive, got 0"),
        ({"num_heads": 3}, "MHA: num_heads must divide embed_dim = 8 without head_dim, got 3"),
        ({"num_heads_kv": 3}, "MHA: num_heads_kv must divide num_heads = 4, got 3"),
        ({"head_dim": -1}, "MHA: head_dim must be positive, got -1"),
        ({"d_conv": -1}, "MHA: d_conv must not be negative, got -1"),
        ({"mlp_dim": -1}, "MHA: mlp_dim must not be negative, got -1"),
        ({"rotary_emb_dim": 4}, "rotary_emb_dim must be even and at most head_dim = 2, got 4"),
        ({"rotary_emb_dim": 1}, "rotary_emb_dim must be even and at most head_dim = 2, got 1"),
        ({"softmax_scale": 0.0}, r"MHA: softmax_scale must be positive, got 0\.0"),
        ({"rotary_emb_base": -1}, "MHA: rotary_emb_base must be positive, got -1"),
    ],
)
def test_rejects_a_bad_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MHA(8, **{"num_heads": 4, **kwargs})


@pytest.mark.parametrize(("name", "value"), [("num_heads", 2.0), ("d_conv", True)])
def test_rejects_a_size_that_is_no_int(name, value):
    with pytest.raises(TypeError, match=f"MHA: {name} must be an int, got {value!r}"):
        MHA(8, **{"num_heads": 4, name: value})


def test_rejects_bad_inputs():
    m, x = mha(layer_idx=0), inputs()
    with pytest.raises(TypeError, match="unexpected keyword argument 'stat'"):
        m(x, stat=None)
    with pytest.raises(ValueError, match=r"x must have shape \(B, L, 8\), got \(2, 7, 5\)"):
        m(x[..., :5])
    with pytest.raises(ValueError, match=r"position_ids must have shape \(B, L\) = \(2, 7\), got"):
        m(x, position_ids=torch.arange(7))
    with pytest.raises(ValueError, match="state must not be given beside inference_params"):
        m(x, inference_params=State(), state=State())
    with pytest.raises(ValueError, match="state must hold 2 rows, got 3"):
        m(x, state=m.allocate_state(3))
    with pytest.raises(
        ValueError, match=r"state must have shapes \(2, \*, 2, 2, 6\), .*got \(2, 0"
    ):
        m(x, state=mha("plain").allocate_state(2))
    with pytest.raises(ValueError, match="layer_idx must be set"):
        mha()(x, inference_params=State())
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        m(x, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8\) in step"):
        m.step(x, *m.allocate_inference_cache(2, 9))
    with pytest.raises(ValueError, match="state must have shapes"):
        m.step(x[:1, :1], *m.allocate_inference_cache(2, 9))
    both_ways = mha(causal=False, layer_idx=0)
    for call in (
        lambda: both_ways(x, state=both_ways.allocate_state(2)),
        lambda: both_ways(x, State()),
        lambda: both_ways.step(x[:, :1], *both_ways.allocate_inference_cache(2, 9)),
    ):
        with pytest.raises(ValueError, match="MHA: causal must be True for a state, got False"):
            call()
