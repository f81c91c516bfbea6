"""Mamba2: one recurrence however the sequence is cut, packed or padded.

Judge: the formulas of the paper spelled out, one step at a time, and the same module over the whole
sequence at once.
"""

import pytest
import torch
import torch.nn.functional as F

from ssm.modules.mamba2 import Mamba2
from ssm.seq_meta import SeqMeta
from ssm.state import State

D_MODEL, LENGTH = 8, 7

# Every option of the constructor that changes what is computed.
OPTIONS = {
    "plain": {},
    "groups": {"ngroups": 2},
    "skip_per_channel": {"D_has_hdim": True},
    "gate_only": {"rmsnorm": False},
    "norm_first": {"norm_before_gate": True, "ngroups": 4},
    "beside_mlp": {"d_ssm": 8, "bias": True},
    "limited_steps": {"dt_limit": (0.02, 0.06)},
    "no_conv_bias": {"conv_bias": False, "d_conv": 1},
    "wide_conv": {"d_conv": 9, "chunk_size": 100},
    "one_head": {"headdim": 16, "d_state": 1},
    "thin_heads": {"headdim": 1, "chunk_size": 1, "expand": 1},
    "reference": {"use_mem_eff_path": False},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def mixer(dtype=torch.float64, **kwargs) -> Mamba2:
    settings = {"d_state": 5, "headdim": 4, "chunk_size": 3, **kwargs}
    m = Mamba2(D_MODEL, dtype=dtype, **settings)
    with torch.no_grad():
        # Initial ones would hide a wrong index.
        m.D.normal_()
        if m.rmsnorm:
            m.norm.weight.normal_()
    return m


def inputs(batch=2, length=LENGTH, dtype=torch.float64):
    return torch.randn(batch, length, D_MODEL, dtype=dtype)


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def by_hand(m, x):
    """The block of the paper for one row (L, d_model), a loop over time, heads and groups."""
    width = m.ngroups * m.d_state
    d_mlp = m.d_inner - m.d_ssm
    widths = [d_mlp, d_mlp, m.d_ssm, m.d_ssm, width, width, m.nheads]
    z0, x0, z, u, B, C, dt = m.in_proj(x).split(widths, -1)
    convolved = torch.cat([u, B, C], -1)
    padded = torch.cat([convolved.new_zeros(m.d_conv - 1, convolved.shape[1]), convolved])
    taps = m.conv1d.weight[:, 0].T
    bias = 0 if m.conv1d.bias is None else m.conv1d.bias
    h = x.new_zeros(m.nheads, m.headdim, m.d_state)
    ys = []
    for t in range(len(x)):
        now = F.silu((padded[t : t + m.d_conv] * taps).sum(0) + bias)
        u, B, C = now.split([m.d_ssm, width, width])
        step = torch.log1p(torch.exp(dt[t] + m.dt_bias)).clamp(*m.dt_limit)
        heads, states = [], []
        for head in range(m.nheads):
            group = slice(head // (m.nheads // m.ngroups) * m.d_state, None)
            b, c = B[group][: m.d_state], C[group][: m.d_state]
            channels = slice(head * m.headdim, (head + 1) * m.headdim)
            decay = torch.exp(-step[head] * torch.exp(m.A_log[head]))
            states.append(decay * h[head] + step[head] * torch.outer(u[channels], b))
            skip = m.D[channels] if m.D_has_hdim else m.D[head]
            heads.append(states[-1] @ c + skip * u[channels])
        h, y, gate = torch.stack(states), torch.cat(heads), F.silu(z[t])
        if not m.rmsnorm:
            y = y * gate
        else:
            y = y if m.norm_before_gate else y * gate
            groups = y.view(m.ngroups, -1)
            y = (groups / (groups.square().mean(1, keepdim=True) + 1e-5).sqrt()).flatten()
            y = y * m.norm.weight * (gate if m.norm_before_gate else 1)
        ys.append(torch.cat([F.silu(z0[t]) * x0[t], y]))
    return m.out_proj(torch.stack(ys)), h


@EVERY_OPTION
def test_matches_the_paper(options):
    m, x = mixer(**options), inputs()
    state = m.allocate_state(2)
    y = m(x, state=state)
    for row in range(2):
        want, last = by_hand(m, x[row])
        close(y[row], want)
        close(state.key_value_memory_dict[0][1][row], last)
    close(m(x), y)


@EVERY_OPTION
@pytest.mark.parametrize("with_grad", [False, True])
def test_chunked_equals_whole(options, with_grad):
    m, x = mixer(**options), inputs()
    whole = m.allocate_state(2)
    with torch.set_grad_enabled(with_grad):
        want = m(x, state=whole)
        for cut in range(LENGTH + 1):
            state = m.allocate_state(2)
            parts = [m(part, state=state) for part in x.split([cut, LENGTH - cut], dim=1)]
            close(torch.cat(parts, 1), want)
            for got, expected in zip(
                state.key_value_memory_dict[0], whole.key_value_memory_dict[0], strict=True
            ):
                close(got, expected)


@EVERY_OPTION
def test_step_equals_scan(options):
    m, x = mixer(**options), inputs()
    conv_state, ssm_state = m.allocate_inference_cache(2, 0)
    state = m.allocate_state(2)
    with torch.no_grad():
        want = m(x, state=state)
        got = [m.step(x[:, t : t + 1], conv_state, ssm_state)[0] for t in range(LENGTH)]
    close(torch.cat(got, 1), want)
    close(conv_state, state.key_value_memory_dict[0][0])
    close(ssm_state, state.key_value_memory_dict[0][1])


def test_time_and_batch_in_one_axis():
    m, x = mixer(bias=True), inputs()
    want = m(x)
    close(m(x.flatten(0, 1), seqlen=LENGTH), want.flatten(0, 1))
    keep = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    got = m(x.flatten(0, 1), seqlen=LENGTH, attention_mask=keep)
    close(got, m(x, attention_mask=keep).flatten(0, 1))
    state = m.allocate_state(2)
    with torch.no_grad():
        parts = [m(x[:, t], state=state, seqlen=1) for t in range(LENGTH)]
    close(torch.stack(parts, 1), want)


def test_the_step_size_limit_holds_in_single_steps():
    free, limited = mixer(), mixer(dt_limit=(0.02, 0.06))
    limited.load_state_dict(free.state_dict())
    x = inputs(length=1)
    with torch.no_grad():
        for m in (free, limited):
            m.dt_bias.fill_(3)
        states = [m.allocate_state(2) for m in (free, limited)]
        outputs = [m(x, state=state) for m, state in zip((free, limited), states, strict=True)]
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("limit", [(0.5, float("inf")), (0.0, 0.01)])
def test_a_limit_on_one_side_holds_in_steps_as_in_the_scan(limit):
    m, x = mixer(dt_limit=limit), inputs()
    state = m.allocate_state(2)
    with torch.no_grad():
        close(torch.cat([m(step, state=state) for step in x.split(1, dim=1)], 1), m(x))


def test_the_compiled_operators_are_used_unless_forbidden(monkeypatch):
    from ssm.utils import dispatch

    seen = []
    choose = dispatch.implementation

    def spy(op, tensor):
        function = choose(op, tensor)
        seen.append(function.__module__)
        return function

    monkeypatch.setattr("ssm.ops.implementation", spy)
    m, x = mixer(use_mem_eff_path=False, d_ssm=8), inputs()
    y = m(x)
    assert seen
    assert all(module.startswith("ssm.ops.python.") for module in seen)
    seen.clear()
    m.use_mem_eff_path = True
    close(m(x), y)
    assert any(module.startswith("ssm.ops.compiled.") for module in seen)


@EVERY_OPTION
def test_gradients(options):
    """Judge: finite differences, for the input, the initial states and every parameter."""
    m = mixer(d_state=2, **{k: v for k, v in options.items() if k != "d_state"})
    names = [name for name, _ in m.named_parameters()]
    x = inputs(1, 4).requires_grad_()
    states = [torch.randn_like(t).requires_grad_() for t in m.allocate_inference_cache(1, 0)]

    def run(x, conv_state, ssm_state, *parameters):
        state = State({0: (conv_state, ssm_state)}, 1)
        arguments = dict(zip(names, parameters, strict=True))
        y = torch.func.functional_call(m, arguments, (x,), {"state": state})
        return y, *state.key_value_memory_dict[0]

    parameters = [p.detach().requires_grad_() for p in m.parameters()]
    torch.autograd.gradcheck(run, (x, *states, *parameters), fast_mode=True)


@EVERY_OPTION
def test_gradients_flow_through_the_state(options):
    m, x = mixer(**options), inputs()
    names = [name for name, _ in m.named_parameters()]
    want = torch.autograd.grad(m(x).square().sum(), m.parameters())
    state, loss = m.allocate_state(2), 0
    for part in x.split([3, 1, 3], dim=1):
        loss = loss + m(part, state=state).square().sum()
    got = torch.autograd.grad(loss, m.parameters())
    for name, a, b in zip(names, got, want, strict=True):
        assert b.abs().sum() > 0, name
        close(a, b)
    assert state.key_value_memory_dict[0][1].requires_grad
    assert not state.detach().key_value_memory_dict[0][1].requires_grad


def test_states_of_a_graph_survive_what_follows():
    m, x = mixer(), inputs()
    state = m.allocate_state(2)
    loss = m(x, state=state).square().sum() + m(x, state=state).square().sum()
    with torch.no_grad():
        m(x[:, :1], state=state)
        m(x, state=state)
    assert not state.key_value_memory_dict[0][1].requires_grad
    loss = loss + m(x, state=state).square().sum()
    state.reset()
    loss.backward()
    assert m.A_log.grad.abs().sum() > 0


def test_step_writes_in_place_with_gradients_enabled():
    m, x = mixer(), inputs(length=1)
    conv_state, ssm_state = m.allocate_inference_cache(2, 0)
    y, conv_same, ssm_same = m.step(x, conv_state, ssm_state)
    assert conv_same is conv_state
    assert ssm_same is ssm_state
    assert ssm_state.abs().sum() > 0
    assert not ssm_state.requires_grad
    y.sum().backward()
    assert m.A_log.grad is not None


def test_states_keep_their_storage_without_gradients():
    m = mixer()
    state = m.allocate_state(2)
    before = [t.data_ptr() for t in state.key_value_memory_dict[0]]
    with torch.no_grad():
        m(inputs(), state=state)
        m(inputs(length=1), state=state)
    assert [t.data_ptr() for t in state.key_value_memory_dict[0]] == before


def test_inference_params_of_mamba_ssm():
    class InferenceParams:
        def __init__(self):
            self.key_value_memory_dict, self.seqlen_offset = {}, 0

    m, x = mixer(layer_idx=3), inputs()
    want = m(x)
    params = InferenceParams()
    with torch.no_grad():
        for _ in range(2):  # offset 0 starts from nothing, whatever the memory holds
            params.seqlen_offset = 0
            parts = [m(x[:, :3], inference_params=params)]
            for t in range(3, LENGTH):
                params.seqlen_offset = t
                parts.append(m(x[:, t : t + 1], params))
            close(torch.cat(parts, 1), want)
    assert list(params.key_value_memory_dict) == [3]


@EVERY_OPTION
def test_packed_equals_separate(options):
    m, lengths = mixer(**options), [1, 4, 2]
    x = inputs(1, 8)
    separate = torch.cat([m(part) for part in x[:, :7].split(lengths, dim=1)], 1)
    x[:, 7] = torch.nan
    skipped = 0 if m.out_proj.bias is None else m.out_proj.bias
    seq_idx = torch.tensor([[0, 1, 1, 1, 1, 2, 2, -1]])
    for kwargs in (
        {"cu_seqlens": torch.tensor([0, 1, 5, 7])},
        {"seq_idx": seq_idx},
        {"seq_meta": SeqMeta(seq_idx=seq_idx)},
    ):
        y = m(x, **kwargs)
        close(y[:, :7], separate)
        assert (y[:, 7] == skipped).all()


def test_packing_takes_the_places_of_the_api():
    m, x = mixer(), inputs(1, 5)
    ids, ends = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([0, 2, 5])
    want = m(x, seq_idx=ids)
    close(m(x, None, ids), want)
    close(m(x, None, None, ends), want)
    close(m(x, None, ids, ends), want)


def test_packed_batch_has_a_state_per_sequence():
    """Two rows of packed sequences, one of them empty, in three pieces; gradients included."""
    m, x = mixer(ngroups=2), inputs(2, 6)
    ends = torch.tensor([0, 2, 6, 6, 9])  # in row 0: 2 and 4 steps, none; in row 1: 3, 3 skipped
    state = m.allocate_state(4)
    pieces = [m(x, state=state, cu_seqlens=ends) for _ in range(3)]
    loss = sum(y.square().sum() for y in pieces)
    alone = 0
    for row, part in enumerate((x[:1, :2], x[:1, 2:], x[:1, :0], x[1:, :3])):
        single = m.allocate_state(1)
        for y in pieces:
            got = y.flatten(0, 1)[ends[row] : ends[row + 1]]
            want = m(part, state=single)
            close(got, want[0])
            alone = alone + want.square().sum()
        conv, ssm = (t[row] for t in state.key_value_memory_dict[0])
        conv_alone, ssm_alone = (t[0] for t in single.key_value_memory_dict[0])
        close(ssm, ssm_alone)
        close(conv[:, 1:], conv_alone[:, 1:])
    for got, want in zip(
        torch.autograd.grad(loss, m.parameters()),
        torch.autograd.grad(alone, m.parameters()),
        strict=True,
    ):
        close(got, want)


def test_a_sequence_does_not_see_its_neighbours():
    m, x = mixer(), inputs(1, 6)
    ends = torch.tensor([0, 3, 6])
    before = m(x, cu_seqlens=ends)
    x[:, :3] = 1e3
    assert torch.equal(m(x, cu_seqlens=ends)[:, 3:], before[:, 3:])


@EVERY_OPTION
@pytest.mark.parametrize("mask", ["0011111", "1111100", "1011011", "0000000"])
def test_padding_is_skipped(options, mask):
    keep = torch.tensor([[c == "1" for c in mask], [True] * LENGTH])
    m, x = mixer(**options), inputs()
    x[~keep] = torch.nan
    state = m.allocate_state(2)
    y = m(x, state=state, attention_mask=keep.long())
    assert (y[~keep] == (0 if m.out_proj.bias is None else m.out_proj.bias)).all()
    for row in range(2):
        alone = m.allocate_state(1)
        close(y[row, keep[row]], m(x[row, keep[row]][None], state=alone)[0])
        conv, ssm = (t[row] for t in state.key_value_memory_dict[0])
        conv_alone, ssm_alone = (t[0] for t in alone.key_value_memory_dict[0])
        close(ssm, ssm_alone)
        close(conv[:, 1:], conv_alone[:, 1:])
    y.sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_gradient_of_padding_is_zero():
    m, x = mixer(d_ssm=8, bias=True), inputs().requires_grad_()
    keep = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [1] * 7])
    m(x, attention_mask=keep).square().sum().backward()
    assert (x.grad[keep == 0] == 0).all()
    assert (x.grad[keep == 1].abs().sum(-1) > 0).all()


def test_masked_step_leaves_the_state_alone():
    m = mixer()
    state = m.allocate_state(2)
    with torch.no_grad():
        m(inputs(), state=state)
        before = state.clone()
        x = inputs(length=1)
        x[1] = torch.nan
        y = m(x, state=state, attention_mask=torch.tensor([[1], [0]]))
    assert (y[1] == 0).all()
    for after, old in zip(
        state.key_value_memory_dict[0], before.key_value_memory_dict[0], strict=True
    ):
        assert torch.equal(after[1], old[1])
        assert not torch.equal(after[0], old[0])


def test_growing_attention_mask_names_the_last_columns():
    m, x = mixer(), inputs()
    mask = torch.ones(2, LENGTH)
    mask[0, :2] = 0
    state = m.allocate_state(2)
    with torch.no_grad():
        want = m(x, attention_mask=mask)
        parts = [
            m(x[:, :4], state=state, attention_mask=mask[:, :4]),
            m(x[:, 4:], state=state, attention_mask=mask),
        ]
    close(torch.cat(parts, 1), want)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0)])
def test_empty(batch, length):
    m = mixer(d_ssm=8)
    x = inputs(batch, length).requires_grad_()
    state = m.allocate_state(batch)
    y = m(x, state=state)
    assert y.shape == x.shape
    assert all((t == 0).all() for t in state.key_value_memory_dict[0])
    y.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in m.parameters())


def test_chunk_size_does_not_matter():
    m, x = mixer(), inputs(length=20)
    want = m(x)
    for chunk_size in (1, 4, 16, 1000):
        m.chunk_size = chunk_size
        close(m(x), want)
