"""Mamba1: one recurrence however the sequence is cut, packed or padded.

Judge: the same module over the whole sequence at once, and the formulas of the paper spelled out.
"""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssm.modules.mamba1 import Mamba1
from ssm.modules.precision import DeltaProjection
from ssm.seq_meta import SeqMeta
from ssm.state import State

D_MODEL, LENGTH = 8, 7


def mixer(dtype=torch.float64, **kwargs) -> Mamba1:
    return Mamba1(D_MODEL, d_state=3, dtype=dtype, **kwargs)


def inputs(batch=2, length=LENGTH, dtype=torch.float64):
    return torch.randn(batch, length, D_MODEL, dtype=dtype)


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def by_hand(m, x):
    """The block of the paper for one row (L, d_model), a loop over time."""
    u, z = m.in_proj(x).chunk(2, -1)
    padded = torch.cat([u.new_zeros(m.d_conv - 1, m.d_inner), u])
    weight = m.conv1d.weight[:, 0]
    window = [padded[t : t + m.d_conv].T for t in range(len(u))]
    u = torch.stack([F.silu((w * weight).sum(-1) + m.conv1d.bias) for w in window])
    dt, B, C = m.x_proj(u).split([m.dt_rank, m.d_state, m.d_state], -1)
    dt = F.softplus(dt @ m.dt_proj.weight.T + m.dt_proj.bias)
    h, y = u.new_zeros(m.d_inner, m.d_state), []
    for t in range(len(u)):
        h = torch.exp(dt[t, :, None] * -m.A_log.exp()) * h + (dt[t] * u[t])[:, None] * B[t]
        y.append((h @ C[t] + m.D * u[t]) * F.silu(z[t]))
    return m.out_proj(torch.stack(y))


def test_matches_the_paper():
    m, x = mixer(bias=True), inputs()
    close(m(x), torch.stack([by_hand(m, row) for row in x]))


@pytest.mark.parametrize("cut", range(LENGTH + 1))
@pytest.mark.parametrize("with_grad", [False, True])
def test_chunked_equals_whole(cut, with_grad):
    m, x = mixer(), inputs()
    state, whole = m.allocate_state(2), m.allocate_state(2)
    with torch.set_grad_enabled(with_grad):
        want = m(x, state=whole)
        parts = [m(part, state=state) for part in x.split([cut, LENGTH - cut], dim=1)]
    close(torch.cat(parts, 1), want)
    close(want, m(x))
    for got, expected in zip(
        state.key_value_memory_dict[0], whole.key_value_memory_dict[0], strict=True
    ):
        close(got, expected)


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_step_equals_scan(d_conv):
    m, x = mixer(d_conv=d_conv), inputs()
    conv_state, ssm_state = m.allocate_inference_cache(2, 0)
    state = m.allocate_state(2)
    with torch.no_grad():
        want = m(x, state=state)
        got = [m.step(x[:, t : t + 1], conv_state, ssm_state)[0] for t in range(LENGTH)]
    close(torch.cat(got, 1), want)
    close(conv_state, state.key_value_memory_dict[0][0])
    close(ssm_state, state.key_value_memory_dict[0][1])


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
    # In place where no graph holds the states, else beside them.
    params.seqlen_offset, held = 0, params.key_value_memory_dict[3]
    with torch.no_grad():
        m(x, params)
    assert all(a is b for a, b in zip(params.key_value_memory_dict[3], held, strict=True))
    loss = m(x, params).sum()
    loss = loss + sum(state.square().sum() for state in params.key_value_memory_dict[3])
    (m(x, params).sum() + loss).backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_states_are_of_the_dtype_asked_for():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        held = mixer(torch.float32).allocate_state(2, dtype).key_value_memory_dict[0]
        assert [t.dtype for t in held] == [dtype, wide]


def test_gradients_flow_through_the_state():
    m, x = mixer(), inputs()
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


def test_packed_equals_separate():
    m, lengths = mixer(), [1, 4, 2]
    x = inputs(1, 8)
    ends = [0, 1, 5, 7]
    separate = [m(part) for part in x[:, :7].split(lengths, dim=1)]
    seq_idx = torch.tensor([[0, 1, 1, 1, 1, 2, 2, -1]])
    for kwargs in (
        {"cu_seqlens": torch.tensor(ends)},
        {"seq_idx": seq_idx},
        {"seq_meta": SeqMeta(seq_idx=seq_idx)},
    ):
        y = m(x, **kwargs)
        close(y[:, :7], torch.cat(separate, 1))
        assert (y[:, 7] == 0).all()


def test_cu_seqlens_have_a_state_each():
    m, x = mixer(), inputs(1, 5)
    state = m.allocate_state(2)
    with torch.no_grad():
        for _ in range(2):
            m(x, state=state, cu_seqlens=torch.tensor([0, 2, 5]))
        for row, part in enumerate((x[:, :2], x[:, 2:])):
            alone = m.allocate_state(1)
            m(part, state=alone)
            m(part, state=alone)
            close(state.key_value_memory_dict[0][1][row], alone.key_value_memory_dict[0][1][0])


@pytest.mark.parametrize("mask", ["0011111", "1111100", "1011011", "0000000"])
def test_padding_is_skipped(mask):
    keep = torch.tensor([[c == "1" for c in mask], [True] * LENGTH])
    m, x = mixer(), inputs()
    x[~keep] = torch.nan
    state = m.allocate_state(2)
    y = m(x, state=state, attention_mask=keep.long())
    assert (y[~keep] == 0).all()
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
    m = mixer()
    x = inputs(batch, length).requires_grad_()
    y = m(x, state=m.allocate_state(batch))
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in m.parameters())


def test_one_seed_gives_the_weights_of_mamba_ssm():
    """The released code makes its layers, and draws the step sizes, in this order."""
    torch.manual_seed(5)
    made = Mamba1(32, d_state=3)
    behind = torch.rand(())
    torch.manual_seed(5)
    want = {"in_proj": nn.Linear(32, 128, bias=False)}
    want["conv1d"] = nn.Conv1d(64, 64, 4, groups=64, padding=3)
    want["x_proj"] = nn.Linear(64, 2 + 2 * 3, bias=False)
    want["dt_proj"] = nn.Linear(2, 64)
    nn.init.uniform_(want["dt_proj"].weight, -(2**-0.5), 2**-0.5)
    low, high = math.log(1e-3), math.log(1e-1)
    dt = torch.exp(torch.rand(64) * (high - low) + low).clamp(min=1e-4)
    want["out_proj"] = nn.Linear(64, 32, bias=False)
    assert torch.equal(behind, torch.rand(()))
    with torch.no_grad():
        want["dt_proj"].bias.copy_(dt + torch.log(-torch.expm1(-dt)))
    for name, layer in want.items():
        for key, value in layer.state_dict().items():
            assert torch.equal(made.state_dict()[f"{name}.{key}"], value), f"{name}.{key}"


def test_initial_values_are_those_of_the_paper():
    m = Mamba1(40, d_state=5, dt_min=0.01, dt_max=0.02)
    assert torch.equal(m.A_log, torch.arange(1.0, 6).log().expand(80, -1))
    assert torch.equal(m.D, torch.ones(80))
    dt = F.softplus(m.dt_proj.bias)
    assert 0.0099 < dt.min() < dt.max() < 0.0201
    assert m.dt_rank == 3
    assert m.dt_proj.weight.abs().max() <= 3**-0.5
    assert (Mamba1(8, dt_init="constant", dt_scale=2.0).dt_proj.weight == 2).all()
    floor = F.softplus(Mamba1(8, dt_min=1e-9, dt_max=1e-8, dt_init_floor=1e-3).dt_proj.bias)
    torch.testing.assert_close(floor, torch.full((16,), 1e-3))
    marked = {n for n, p in m.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert {"A_log", "D"} <= marked
    assert m.dt_proj.bias._no_reinit


def test_keys_and_shapes_are_those_of_state_spaces():
    m = Mamba1(16, d_state=5, d_conv=3, dt_rank=2, bias=True)
    assert {name: tuple(p.shape) for name, p in m.state_dict().items()} == {
        "A_log": (32, 5),
        "D": (32,),
        "in_proj.weight": (64, 16),
        "in_proj.bias": (64,),
        "conv1d.weight": (32, 1, 3),
        "conv1d.bias": (32,),
        "x_proj.weight": (12, 32),
        "dt_proj.weight": (32, 2),
        "dt_proj.bias": (32,),
        "out_proj.weight": (16, 32),
        "out_proj.bias": (16,),
    }


def test_positional_order_is_that_of_the_api():
    names = list(inspect.signature(Mamba1).parameters)
    numbers = ["d_model", "d_state", "d_conv", "expand", "dt_min", "dt_max", "dt_init_floor"]
    rest = ["bias", "conv_bias", "use_fast_path", "layer_idx", "device", "dtype"]
    assert names[:13] == numbers + rest


def test_bfloat16_keeps_the_recurrence_in_float32():
    m = mixer(torch.bfloat16)
    assert m.in_proj.weight.dtype == torch.bfloat16
    assert m.A_log.dtype == m.D.dtype == m.dt_proj.bias.dtype == torch.float32
    conv_state, ssm_state = m.allocate_inference_cache(1, 0)
    assert (conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.float32)
    assert m.dt_proj(torch.randn(2, m.dt_rank, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("cast", ["to", "half", "autocast", "created"])
def test_low_precision_is_near_float32(cast):
    m, x = mixer(torch.float32), inputs(dtype=torch.float32)
    want = m(x)
    low = torch.float16 if cast == "half" else torch.bfloat16
    if cast == "created":
        other = mixer(low)
        other.load_state_dict(m.state_dict())
        m = other
    elif cast != "autocast":
        m = m.to(low)
    if cast == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        assert y.dtype == torch.float32
    else:
        y = m(x.to(low))
        assert y.dtype == low
    # bfloat16 has 8 bits; five roundings on the way.
    assert (y.float() - want).abs().max() < 5 * 2**-8 * want.abs().max()
    y.float().sum().backward()


def test_step_size_bias_is_not_rounded():
    plain = nn.Linear(1, 64).bfloat16()
    exact = DeltaProjection(1, 64, dtype=torch.bfloat16)
    bias = torch.linspace(-7, -2, 64)
    with torch.no_grad():
        for linear in (plain, exact):
            linear.bias.copy_(bias)
            linear.weight.fill_(0.5)
    dt = torch.full((1, 1), 0.25, dtype=torch.bfloat16)
    want = bias + 0.125
    assert (exact(dt)[0] - want).abs().max() < 1e-6
    assert (plain(dt)[0].float() - want).abs().max() > 1e-3


def test_module_dtype_differs_from_input_dtype():
    y = mixer(torch.bfloat16)(inputs(dtype=torch.float32))
    assert y.dtype == torch.float32


def test_forward_hooks_fire_on_every_linear():
    m, fired = mixer(), []
    for name, module in m.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: fired.append(name))
    projections = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    m(inputs())
    assert fired == projections
    fired.clear()
    with torch.no_grad():
        m(inputs(length=1), state=m.allocate_state(2))
    assert fired == projections


class LowRank(nn.Module):
    """A linear with a low-rank correction, as LoRA puts it in the place of a linear."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_replaced_projection_is_used(name):
    m, x = mixer(), inputs()
    merged = copy.deepcopy(m)
    adapted = LowRank(getattr(m, name))
    setattr(m, name, adapted)
    with torch.no_grad():
        getattr(merged, name).weight += adapted.up @ adapted.down
    y = m(x)
    close(y, merged(x))
    y.square().sum().backward()
    assert adapted.down.grad.abs().sum() > 0
    assert adapted.up.grad.abs().sum() > 0


def test_plain_linear_serves_as_dt_proj():
    m, x = mixer(), inputs()
    want = m(x)
    plain = nn.Linear(m.dt_rank, m.d_inner, dtype=torch.float64)
    plain.load_state_dict(m.dt_proj.state_dict())
    m.dt_proj = plain
    close(m(x), want)


def test_use_fast_path_false_is_the_reference(monkeypatch):
    from ssm.utils import dispatch

    seen = []
    choose = dispatch.implementation

    def spy(op, tensor):
        function = choose(op, tensor)
        seen.append(function.__module__)
        return function

    monkeypatch.setattr("ssm.ops.implementation", spy)
    m, x = mixer(use_fast_path=False), inputs()
    y = m(x)
    assert seen
    assert all(module.startswith("ssm.ops.python.") for module in seen)
    m.use_fast_path = True
    close(m(x), y)


def test_deepcopy_and_pickle():
    m, x = mixer(), inputs()
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(copied(x), m(x))
        with torch.no_grad():
            copied.D += 1
        assert not torch.equal(copied(x), m(x))


def test_state_clone_is_independent():
    m = mixer()
    state = m.allocate_state(2)
    with torch.no_grad():
        m(inputs(), state=state)
        fork = state.clone()
        x = inputs(length=2)
        want = m(x, state=state)
        close(m(x, state=fork), want)
    assert (state.reset().key_value_memory_dict[0][1] == 0).all()
    assert fork.key_value_memory_dict[0][1].abs().sum() > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "Mamba1: d_state must be positive, got 0"),
        ({"dt_min": 0.2}, r"Mamba1: dt_max must be at least dt_min = 0.2, got 0.1"),
        ({"dt_init": "zeros"}, "Mamba1: dt_init must be 'random' or 'constant', got 'zeros'"),
        ({"expand": 0}, "Mamba1: expand must be positive, got 0"),
        ({"dt_scale": -1.0}, r"Mamba1: dt_scale must be positive, got -1\.0"),
    ],
)
def test_rejects_a_bad_argument(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Mamba1(8, **kwargs)


@pytest.mark.parametrize(("name", "value"), [("dt_rank", "most"), ("d_state", 2.5)])
def test_rejects_a_size_that_is_no_int(name, value):
    with pytest.raises(TypeError, match=f"Mamba1: {name} must be an int, got {value!r}"):
        Mamba1(8, **{name: value})


def test_rejects_bad_inputs():
    m, x = mixer(layer_idx=0), inputs()
    with pytest.raises(TypeError, match="unexpected keyword argument 'stat'"):
        m(x, stat=None)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(B, L, 8\), got \(2, 7"):
        m(x[..., :5])
    with pytest.raises(ValueError, match="state must not be given beside inference_params"):
        m(x, inference_params=State(), state=State())
    with pytest.raises(ValueError, match="state must hold 2 rows, got 3"):
        m(x, state=m.allocate_state(3))
    with pytest.raises(ValueError, match="layer_idx must be set"):
        mixer()(x, inference_params=State())
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        m(x, attention_mask=torch.ones(2, 3))
    meta = SeqMeta(mask=torch.ones(2, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="seq_meta must be the only"):
        m(x, seq_meta=meta, attention_mask=torch.ones(2, LENGTH))
    with pytest.raises(ValueError, match=r"hidden_states must have shape \(B, 1, 8\) in step"):
        m.step(x, *m.allocate_inference_cache(2, 0))


def test_rejects_the_state_of_another_layer_untouched():
    m = mixer(layer_idx=0)
    other = Mamba1(D_MODEL, d_state=4, layer_idx=0, dtype=torch.float64).allocate_state(2)
    for tensor in other.key_value_memory_dict[0]:
        tensor.fill_(1)
    wanted, got = r"\(2, 16, 4\), \(2, 16, 3\)", r"\(2, 16, 4\), \(2, 16, 4\)"
    message = f"Mamba1: state must have shapes {wanted}, got {got}"
    with torch.no_grad():
        for arguments in ({"state": other}, {"inference_params": other}):
            with pytest.raises(ValueError, match=message):
                m(inputs(length=1), **arguments)
        with pytest.raises(ValueError, match=message):
            m.step(inputs(length=1), *other.key_value_memory_dict[0])
    assert all((tensor == 1).all() for tensor in other.key_value_memory_dict[0])
