"""What layers do with a state that is not theirs, and with one of another library.

Judge: the state before the call, and the model without a state.
"""

import pytest
import torch

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.mamba1 import Mamba1
from ssm.state import State

VOCAB, LENGTH = 13, 6


class InferenceParams:
    """The attributes that mamba_ssm's class of that name has, and nothing else."""

    def __init__(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        self.batch_size_offset = 0
        self.key_value_memory_dict = {}
        self.lengths_per_sample = None


def model(**kwargs) -> MambaLMHeadModel:
    settings = {"d_model": 8, "n_layer": 3, "vocab_size": VOCAB, "ssm_cfg": {"d_state": 3}}
    return MambaLMHeadModel(MambaConfig(**{**settings, **kwargs}), dtype=torch.float64)


MAMBA2 = {"ssm_cfg": {"layer": "Mamba2", "d_state": 3, "headdim": 4}}
ATTENTION = {"num_heads": 2, "causal": True, "rotary_emb_dim": 4, "d_conv": 3}
HYBRID = {"attn_layer_idx": [2], "attn_cfg": ATTENTION}
kinds = pytest.mark.parametrize("kind", [{}, MAMBA2, HYBRID], ids=["mamba1", "mamba2", "hybrid"])


def tokens(batch=2, length=LENGTH):
    return torch.randint(0, VOCAB, (batch, length))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def contents(state) -> dict:
    return {k: [t.clone() for t in v] for k, v in state.key_value_memory_dict.items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        len(first[k]) == len(second[k])
        and all(torch.equal(a, b) for a, b in zip(first[k], second[k], strict=True))
        for k in first
    )


def spoilt(change, batch=2, **kwargs) -> State:
    """A state of the model after some tokens, with one layer changed."""
    m = model(**kwargs)
    state = m.allocate_state(batch)
    with torch.no_grad():
        m(tokens(batch), state=state)
    change(state.key_value_memory_dict)
    return state


def set_last(function):
    def change(memory):
        memory[2] = tuple(function(*memory[2]))

    return change


# The fault is in the last layer: the layers before it must not have been run.
MAMBA1_FAULTS = {
    "channels": (
        lambda conv, ssm: (conv[:, :5], ssm[:, :5]),
        r"Mamba1: state must have shapes \(2, 16, 4\), \(2, 16, 3\), got \(2, 5, 4\), \(2, 5, 3\)",
    ),
    "width": (lambda conv, ssm: (conv[..., 1:], ssm), r"must have shapes .* got \(2, 16, 3\), "),
    "dstate": (lambda conv, ssm: (conv, ssm[..., :1]), r"got \(2, 16, 4\), \(2, 16, 1\)"),
    "rows": (lambda conv, ssm: (conv[:1], ssm[:1]), "must hold 2 rows, got 1"),
    "rows of one": (lambda conv, ssm: (conv, ssm[:1]), r"got \(2, 16, 4\), \(1, 16, 3\)"),
    "number": (lambda conv, ssm: (conv,), r"must have shapes .*, got \(2, 16, 4\)$"),
    "integers": (lambda conv, ssm: (conv, ssm.long()), "a floating point dtype, got int64"),
    "complex": (lambda conv, ssm: (conv.cfloat(), ssm), "a floating point dtype, got complex64"),
    "device": (lambda conv, ssm: (conv, ssm.to("meta")), "state must be on cpu, got meta"),
}
MAMBA2_FAULTS = {
    "heads": (lambda conv, ssm: (conv, ssm[:, 1:]), r"got \(2, 22, 4\), \(2, 3, 4, 3\)"),
    "headdim": (lambda conv, ssm: (conv, ssm[:, :, 1:]), r"got \(2, 22, 4\), \(2, 4, 3, 3\)"),
    "axes": (lambda conv, ssm: (conv, ssm.flatten(1, 2)), r"got \(2, 22, 4\), \(2, 16, 3\)"),
}
MHA_FAULTS = {
    "heads": (lambda kv, conv, n: (kv[:, :, :, :1], conv, n), r"MHA: .* got \(2, \d+, 2, 1, 4\), "),
    "lengths": (lambda kv, conv, n: (kv, conv, n.double()), "an integer dtype, got float64"),
    "no lengths": (lambda kv, conv, n: (kv, conv), r"must have shapes \(2, \*, 2, 2, 4\), "),
    "rows": (lambda kv, conv, n: (kv, conv, n[:1]), r"got .*, \(1,\)$"),
}
FAULTS = {
    **{f"mamba1 {name}": ({}, *fault) for name, fault in MAMBA1_FAULTS.items()},
    **{f"mamba2 {name}": (MAMBA2, *fault) for name, fault in MAMBA2_FAULTS.items()},
    **{f"hybrid {name}": (HYBRID, *fault) for name, fault in MHA_FAULTS.items()},
}


@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("protocol", ["state", "inference_params"])
@pytest.mark.parametrize("fault", FAULTS)
def test_state_of_another_model_is_refused_and_left_alone(fault, protocol, length):
    kind, function, message = FAULTS[fault]
    state = spoilt(set_last(function), **kind)
    last = state.key_value_memory_dict.pop(2)
    before = contents(state)
    state.key_value_memory_dict[2] = last
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**kind)(tokens(length=length), **{protocol: state})
    assert state.seqlen_offset == LENGTH
    assert all(a is b for a, b in zip(state.key_value_memory_dict.pop(2), last, strict=True))
    assert same(contents(state), before)


@pytest.mark.parametrize(
    ("layers", "held"), [(1, "0, 1, 2"), (2, "0, 1, 2"), (4, "0, 1, 2"), (5, "0, 1, 2")]
)
def test_state_of_a_deeper_or_shallower_model_is_refused(layers, held):
    state = spoilt(lambda memory: None)
    before = contents(state)
    wanted = ", ".join(map(str, range(layers)))
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError,
            match=rf"MambaLMHeadModel: state must hold the layers \[{wanted}\], got \[{held}\]",
        ),
    ):
        model(n_layer=layers)(tokens(), state=state)
    assert same(contents(state), before)


def test_state_of_another_batch_is_refused_and_left_alone():
    m, state = model(), spoilt(lambda memory: None, batch=3)
    before = contents(state)
    for ids, kwargs in (
        (tokens(), {}),
        (tokens(3), {"cu_seqlens": torch.tensor([0, 6, 12])}),
        (tokens(1), {}),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=r"must hold \d rows, got 3"):
            m(ids, state=state, **kwargs)
    assert same(contents(state), before)


def test_what_is_no_state_is_refused():
    with pytest.raises(TypeError, match="MambaLMHeadModel: state must be a State, got dict"):
        model()(tokens(), state={})
    with pytest.raises(TypeError, match="Mamba1: state must be a State, got InferenceParams"):
        Mamba1(8)(torch.randn(2, 3, 8), state=InferenceParams(9, 2))


@kinds
def test_bad_tokens_leave_the_state_alone(kind):
    m, state = model(**kind), spoilt(lambda memory: None, **kind)
    before = contents(state)
    for ids, kwargs, error in (
        (tokens() + 99, {}, ValueError),
        (tokens(), {"attention_mask": torch.ones(2, 3)}, ValueError),
        (tokens(), {"cu_seqlens": torch.tensor([0, 7, 12])}, ValueError),
        (tokens(), {"past_key_values": 1}, TypeError),
        (tokens(), {"num_last_tokens": -1}, ValueError),
    ):
        with torch.no_grad(), pytest.raises(error):
            m(ids, state=state, **kwargs)
    assert same(contents(state), before)
    assert state.seqlen_offset == LENGTH


@kinds
@pytest.mark.parametrize("cut", range(1, LENGTH))
@pytest.mark.parametrize("foreign", [False, True])
def test_protocol_of_mamba_ssm(kind, cut, foreign):
    """A prefill at offset 0, single tokens from there, and a second text in the same object."""
    m = model(**kind)
    params = InferenceParams(99, 2) if foreign else State(max_batch_size=2, max_seqlen=99)
    with torch.no_grad():
        for ids in (tokens(), tokens()):
            params.seqlen_offset = 0
            parts = [m(ids[:, :cut], inference_params=params).logits]
            params.seqlen_offset += cut
            for t in range(cut, LENGTH):
                parts.append(m(ids[:, t : t + 1], inference_params=params).logits)
                params.seqlen_offset += 1
            close(torch.cat(parts, 1), m(ids).logits)
    assert sorted(params.key_value_memory_dict) == [0, 1, 2]


@kinds
def test_protocol_of_mamba_ssm_with_allocated_memory(kind):
    m, ids = model(**kind), tokens()
    params = InferenceParams(LENGTH, 2)
    params.key_value_memory_dict = m.allocate_inference_cache(2, LENGTH)
    held = [t.data_ptr() for layer in params.key_value_memory_dict.values() for t in layer]
    with torch.no_grad():
        got = [m(ids[:, :4], inference_params=params).logits]
        params.seqlen_offset = 4
        got.append(m(ids[:, 4:], inference_params=params).logits)
    close(torch.cat(got, 1), m(ids).logits)
    after = [t.data_ptr() for layer in params.key_value_memory_dict.values() for t in layer]
    assert after == held


@kinds
def test_protocol_of_mamba_ssm_with_gradients(kind):
    m, ids = model(**kind), tokens()
    want = torch.autograd.grad(m(ids).logits.square().sum(), m.parameters())
    params, loss = InferenceParams(LENGTH, 2), 0
    for part in ids.split(2, dim=1):
        loss = loss + m(part, inference_params=params).logits.square().sum()
        params.seqlen_offset += 2
    for a, b in zip(torch.autograd.grad(loss, m.parameters()), want, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("limit", "offset", "lengths", "message"),
    [
        (6, 3, None, "state must have room for 7 tokens per row, got 6"),
        (20, 5, torch.tensor([5, -1]), "lengths_per_sample must not be negative, got -1"),
    ],
)
def test_a_refused_call_of_the_protocol_forgets_nothing(limit, offset, lengths, message):
    """Not even the tokens behind a smaller offset, which an accepted call would forget."""
    m, params = model(**HYBRID), InferenceParams(limit, 2)
    with torch.no_grad():
        m(tokens(2, 5), inference_params=params)
        params.seqlen_offset, params.lengths_per_sample = offset, lengths
        before = contents(params)
        with pytest.raises(ValueError, match=message):
            m(tokens(2, 4), inference_params=params)
    assert same(contents(params), before)
