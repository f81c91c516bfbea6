"""MambaLMHeadModel: keys, initial values, and one answer however the text is cut, packed or padded.

Judge: the same model over each text alone and whole.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.state import State
from ssm.utils.dispatch import use_backend

VOCAB, LENGTH = 13, 6


def model(dtype=torch.float64, **kwargs) -> MambaLMHeadModel:
    settings = {"d_model": 8, "n_layer": 2, "vocab_size": VOCAB, "ssm_cfg": {"d_state": 3}}
    return MambaLMHeadModel(MambaConfig(**{**settings, **kwargs}), dtype=dtype)


def tokens(batch=2, length=LENGTH):
    return torch.randint(0, VOCAB, (batch, length))


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


MAMBA2 = {"ssm_cfg": {"layer": "Mamba2", "d_state": 3, "headdim": 4, "ngroups": 2, "chunk_size": 4}}
SHAPES = [
    {},
    MAMBA2,
    {"d_intermediate": 4, "rms_norm": False, "tie_embeddings": False},
    {"fused_add_norm": False, "residual_in_fp32": False},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cut", range(LENGTH + 1))
def test_chunked_equals_whole(shape, cut):
    m, ids = model(**shape), tokens()
    want = m(ids).logits
    assert want.shape == (2, LENGTH, 16)
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [m(part, state=state).logits for part in ids.split([cut, LENGTH - cut], dim=1)]
    close(torch.cat(parts, 1), want)
    assert state.seqlen_offset == LENGTH


@pytest.mark.parametrize("shape", SHAPES)
def test_step_equals_scan(shape):
    m, ids = model(**shape), tokens()
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [m(ids[:, t : t + 1], state=state).logits for t in range(LENGTH)]
    close(torch.cat(parts, 1), m(ids).logits)


def test_inference_params_of_mamba_ssm():
    m, ids = model(), tokens()
    params = State(max_batch_size=2)
    with torch.no_grad():
        parts = [m(ids[:, :3], inference_params=params, num_last_tokens=1).logits]
        params.seqlen_offset += 3
        for t in range(3, LENGTH):
            parts.append(m(ids[:, t : t + 1], inference_params=params).logits)
            params.seqlen_offset += 1
    close(torch.cat(parts, 1), m(ids).logits[:, 2:])
    assert sorted(params.key_value_memory_dict) == [0, 1]


def test_truncated_backpropagation_equals_the_whole_when_not_truncated():
    m, ids = model(), tokens()
    want = torch.autograd.grad(m(ids).logits.square().sum(), m.parameters())
    state, loss = m.allocate_state(2), 0
    for part in ids.split(2, dim=1):
        loss = loss + m(part, state=state).logits.square().sum()
    for a, b in zip(torch.autograd.grad(loss, m.parameters()), want, strict=True):
        close(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_separate(shape):
    m, ids = model(**shape), tokens(1, 6)
    alone = torch.cat([m(part).logits for part in ids.split([1, 3, 2], dim=1)], 1)
    close(m(ids, cu_seqlens=torch.tensor([0, 1, 4, 6])).logits, alone)
    close(m(ids, seq_idx=torch.tensor([[0, 1, 1, 1, 2, 2]])).logits, alone)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", ["001111", "111100", "101101"])
def test_padding_content_does_not_matter(mask, shape):
    m, ids = model(**{**shape, "tie_embeddings": False}), tokens()
    keep = torch.tensor([[c == "1" for c in mask], [True] * LENGTH])
    with torch.no_grad():
        m.backbone.embedding.weight[VOCAB] = torch.nan
    ids[~keep] = VOCAB
    logits = m(ids, attention_mask=keep).logits
    for row in range(2):
        close(logits[row, keep[row]], m(ids[row, keep[row]][None]).logits[0])
    logits[keep].square().sum().backward()
    for name, parameter in m.named_parameters():
        if name != "backbone.embedding.weight":
            assert parameter.grad.isfinite().all(), name


def test_num_last_tokens():
    m, ids = model(), tokens()
    close(m(ids, num_last_tokens=2).logits, m(ids).logits[:, -2:])


def test_keys_are_those_of_state_spaces():
    m = model(d_intermediate=4, n_layer=1, tie_embeddings=False)
    assert sorted(m.state_dict()) == sorted(
        ["backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"]
        + [
            f"backbone.layers.0.{name}"
            for name in (
                *("norm.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"),
                *("mixer.A_log", "mixer.D", "mixer.in_proj.weight", "mixer.out_proj.weight"),
                *("mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.x_proj.weight"),
                *("mixer.dt_proj.weight", "mixer.dt_proj.bias"),
            )
        ]
    )
    m = model(n_layer=1, **MAMBA2)
    assert sorted(name.split("mixer.")[1] for name in m.state_dict() if "mixer" in name) == sorted(
        ["A_log", "D", "dt_bias", "in_proj.weight", "conv1d.weight", "conv1d.bias"]
        + ["norm.weight", "out_proj.weight"]
    )
    layer = model(rms_norm=False).backbone
    assert isinstance(layer.norm_f, nn.LayerNorm)


def test_tied_weights_are_one_parameter():
    tied, free = model(), model(tie_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert free.lm_head.weight is not free.backbone.embedding.weight
    assert copy.deepcopy(tied).lm_head.weight.shape == (16, 8)


def test_initial_values():
    m = model(d_model=32, n_layer=8, d_intermediate=256, dtype=torch.float32)
    assert abs(m.backbone.embedding.weight.std() - 0.02) < 0.002
    layer = m.backbone.layers[0]
    # kaiming_uniform(a=sqrt 5) is uniform within 1 / sqrt(fan_in); 16 residual branches.
    assert layer.mixer.out_proj.weight.abs().max() <= 64**-0.5 / 4
    assert layer.mlp.fc2.weight.abs().max() <= 256**-0.5 / 4
    assert layer.mixer.dt_proj.bias.abs().min() > 1
    m = model(d_model=32, n_layer=8, dtype=torch.float32, **MAMBA2)
    mixer = m.backbone.layers[0].mixer
    assert mixer.out_proj.weight.abs().max() <= 64**-0.5 / 8**0.5
    assert mixer.dt_bias.abs().min() > 1
    assert mixer.A_log.exp().min() >= 1
    wide = MambaLMHeadModel(
        MambaConfig(d_model=32, n_layer=8, vocab_size=VOCAB),
        initializer_cfg={"initializer_range": 0.5, "rescale_prenorm_residual": False},
    )
    assert wide.backbone.embedding.weight.std() > 0.4
    assert wide.backbone.layers[0].mixer.out_proj.weight.abs().max() > 64**-0.5 / 2


def test_gradient_checkpointing_changes_nothing_but_memory():
    m, ids, calls = model(), tokens(), []
    m.backbone.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    want = torch.autograd.grad(m(ids).logits.square().sum(), m.parameters())
    assert len(calls) == 1  # only where it is asked for
    m.gradient_checkpointing_enable()
    got = torch.autograd.grad(m(ids).logits.square().sum(), m.parameters())
    assert len(calls) == 3
    for a, b in zip(got, want, strict=True):
        close(a, b)
    # Another backend around one of the two passes: what is computed again takes that of the first.
    for first, second in (("python", "auto"), ("auto", "python")):
        with use_backend(first):
            loss = m(ids).logits.square().sum()
        with use_backend(second):
            got = torch.autograd.grad(loss, m.parameters())
        for a, b in zip(got, want, strict=True):
            close(a, b)
    m.gradient_checkpointing_disable()
    torch.autograd.grad(m(ids).logits.square().sum(), m.parameters())
    assert len(calls) == 8


@pytest.mark.parametrize("shape", [{}, MAMBA2])
def test_gradient_checkpointing_leaves_calls_with_a_state_alone(shape):
    """A state has moved on by the time the backward would compute a layer again."""
    m, ids = model(**shape), tokens()

    def gradients():
        state = m.allocate_state(2)
        loss = sum(m(part, state=state).logits.square().sum() for part in ids.split(2, dim=1))
        return torch.autograd.grad(loss, m.parameters())

    want = gradients()
    m.gradient_checkpointing_enable()
    for a, b in zip(gradients(), want, strict=True):
        close(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_learns(shape):
    m, ids = model(**{**shape, "d_intermediate": 4}), tokens(2, 8)
    loss = F.cross_entropy(m(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(16)) < 0.5
    loss.backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("shape", "dt_bias"), [({}, "dt_proj.bias"), (MAMBA2, "dt_bias")])
def test_bfloat16_model_runs_and_keeps_its_recurrence(shape, dt_bias):
    m = model(torch.bfloat16, **shape)
    names = {n for n, p in m.named_parameters() if p.dtype == torch.float32}
    stems = {name.split("mixer.")[1] for name in names}
    assert stems == {"A_log", "D", dt_bias}
    exact = model(**shape)
    exact.load_state_dict(m.state_dict())
    ids = tokens()
    logits = m(ids).logits
    assert logits.dtype == torch.bfloat16
    want = exact(ids).logits
    assert (logits - want).abs().max() < 10 * 2**-8 * want.abs().max()


@pytest.mark.parametrize("shape", [{}, MAMBA2])
def test_compiles_without_a_graph_break(shape):
    m, ids = model(n_layer=1, **shape), tokens()
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    close(compiled(ids).logits, m(ids).logits)
    want = torch.autograd.grad(m(ids).logits.square().sum(), m.parameters())
    got = torch.autograd.grad(compiled(ids).logits.square().sum(), m.parameters())
    for a, b in zip(got, want, strict=True):
        close(a, b)
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [compiled(part, state=state).logits for part in ids.split([4, 1, 1], dim=1)]
    close(torch.cat(parts, 1), m(ids).logits)


def test_deepcopy_and_pickle():
    m, ids = model(), tokens()
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(copied(ids).logits, m(ids).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"ssm_cfg": {"layer": "Mamba9"}},
            r"ssm_cfg\['layer'\] must be one of Mamba1, Mamba2, got 'Mamba9'",
        ),
        ({"ssm_cfg": {"d_stat": 3}}, "got 'd_stat' .did you mean 'd_state'"),
        ({"attn_layer_idx": [1]}, r"attn_cfg must hold 'num_heads', got \['causal'\]"),
        ({"ssm_cfg": {"headdim": 4}}, "ssm_cfg must hold arguments of Mamba1, got 'headdim'"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 4}}, "arguments of Mamba2, got 'dt_rank'"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "d_ssm must be a multiple of headdim = 64, got 16"),
    ],
)
def test_rejects_a_config_it_cannot_build(config, message):
    with pytest.raises(ValueError, match=message):
        model(**config)


def test_rejects_bad_inputs():
    m, ids = model(), tokens()
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, L\), got \(6,\)"):
        m(ids[0])
    with pytest.raises(ValueError, match="num_last_tokens must not be negative, got -1"):
        m(ids, num_last_tokens=-1)
    with pytest.raises(ValueError, match="state must not be given beside inference_params"):
        m(ids, inference_params=State(), state=State())
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_key_values'"):
        m(ids, past_key_values=None)


def test_a_refused_token_leaves_the_offset_alone():
    m = model()
    state = m.allocate_state(2)
    m(tokens(2, 3), state=state)
    with pytest.raises(ValueError, match="input_ids must lie in"):
        m(torch.full((2, 3), 99), state=state)
    assert state.seqlen_offset == 3
