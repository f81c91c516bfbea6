"""The reference of selective_state_step.  Judge: a float64 NumPy loop, and finite differences."""

import pytest
import torch

from ssm.ops.python.reference import selective_state_step, ssd_chunk_scan
from tests import judge
from tests.cases import CASES, StepCase, make
from tests.tensors import FLOATS, arrays, gradcheck, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "selective_state_step"
EXACT = TOLERANCES[OP, "float64"]
SMALL = (
    StepCase("bare", 2, 2, 0, 2, given="", softplus=False),
    StepCase("tokens", 2, 2, 0, 2, ntokens=2),
    StepCase("groups", 1, 4, 0, 2, ngroups=2),
    StepCase("heads", 2, 2, 2, 2, ngroups=2),
    StepCase("heads_untied", 1, 2, 2, 1, ntokens=2, tied=False),
    StepCase("indices", 3, 2, 0, 2, nrows=4),
    StepCase("heads_indices", 2, 2, 2, 1, ngroups=1, nrows=3),
)


def step(state, **arguments):
    """Return y and the state after the step, and leave the given state alone."""
    state = state.clone()
    y = selective_state_step(state, **arguments)
    return y, state


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case):
    y, state = step(**make_tensors(case, 1))
    want_y, want_state = judge.selective_state_step(**make(case, 1))
    assert_close("y", y, want_y, EXACT)
    assert_close("state", state, want_state, EXACT)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_low_precision_matches_judge(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    arguments["state"] = arguments["state"].float()
    y, state = step(**arguments)
    want_y, want_state = judge.selective_state_step(**arrays(arguments))
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert_close("y", y, want_y, TOLERANCES[OP, str(dtype).removeprefix("torch.")])
    assert_close("state", state, want_state, TOLERANCES[OP, "float32"])


def test_low_precision_state_is_rounded_once_per_call():
    case = StepCase("tokens", 2, 3, 0, 4, ntokens=6)
    arguments = make_tensors(case, 3, torch.float32)
    arguments["state"] = arguments["state"].bfloat16()
    _, state = step(**arguments)
    _, want = step(**{**arguments, "state": arguments["state"].float()})
    assert torch.equal(state, want.bfloat16())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(step, make_tensors(case))


@pytest.mark.parametrize("case", [c for c in CASES[OP] if c.ntokens > 0], ids=str)
def test_tokens_equal_single_steps(case):
    arguments = make_tensors(case, 4)
    y, state = step(**arguments)
    alone, found = arguments["state"].clone(), []
    for t in range(case.ntokens):
        token = {n: arguments[n][:, t] for n in ("x", "dt", "B", "C", "z")}
        found.append(selective_state_step(**{**arguments, **token, "state": alone}))
    assert_close("y", torch.stack(found, 1), y, EXACT)
    assert_close("state", alone, state, EXACT)


def test_heads_equal_ssd_chunk_scan():
    arguments = make_tensors(StepCase("heads", 2, 4, 3, 5, ntokens=7, ngroups=2), 5)
    y, state = step(**arguments)
    del arguments["state_indices"]
    initial, x = arguments.pop("state"), arguments.pop("x")
    want = ssd_chunk_scan(
        x, chunk_size=3, initial_states=initial, return_final_states=True, **arguments
    )
    assert_close("y", y, want[0], EXACT)
    assert_close("state", state, want[1], EXACT)


def test_heads_equal_channels():
    """Mamba-2 with everything given per channel is Mamba-1 with H P channels."""
    arguments = make_tensors(StepCase("heads", 2, 3, 4, 5, tied=False), 6)
    y, state = step(**arguments)
    flat = {n: arguments[n].flatten(1, 2) for n in ("state", "x", "dt", "z")}
    flat |= {n: arguments[n].flatten(0, 1) for n in ("A", "D", "dt_bias")}
    want_y, want_state = step(**{**arguments, **flat})
    assert_close("y", y.flatten(1), want_y, EXACT)
    assert_close("state", state.flatten(1, 2), want_state, EXACT)


def test_skipped_rows_touch_nothing():
    arguments = make_tensors(StepCase("skip", 4, 3, 0, 2, nrows=5), 7)
    arguments["state_indices"] = torch.tensor([3, -1, 0, -1], dtype=torch.int32)
    for name in ("x", "dt", "B", "C", "z"):
        arguments[name][1::2] = float("nan")
    arguments["state"][1] = float("nan")  # a row that nobody uses
    y, state = step(**arguments)
    assert not y[1::2].any()
    assert torch.equal(state[[2, 4]], arguments["state"][[2, 4]])
    assert state[1].isnan().all()
    assert not torch.equal(state[[0, 3]], arguments["state"][[0, 3]])
    assert not state[[0, 3]].isnan().any()
    values = {n: t.requires_grad_() for n, t in arguments.items() if n in ("x", "dt", "B", "C")}
    step(**arguments)[0].sum().backward()
    for name, value in values.items():
        assert not value.grad[1::2].any(), name
        assert not value.grad.isnan().any(), name


def test_rows_that_stay_are_not_rounded():
    """A state may be wider than what is computed in."""
    arguments = make_tensors(StepCase("wide", 1, 3, 0, 2, nrows=3), 7, torch.float32)
    arguments["state"] = torch.randn(3, 3, 2, dtype=torch.float64)
    arguments["state_indices"] = torch.tensor([1], dtype=torch.int32)
    _, state = step(**arguments)
    assert state.dtype == torch.float64
    assert torch.equal(state[[0, 2]], arguments["state"][[0, 2]])
    assert not torch.equal(state[1], arguments["state"][1])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 8)
    want_y, want_state = step(**arguments)
    views = strided(arguments)
    y = selective_state_step(**views)
    assert torch.equal(y, want_y)
    assert torch.equal(views["state"], want_state)


def test_broadcast_strides():
    """Upstream passes per-head values of Mamba-2 expanded with stride 0."""
    tied = make_tensors(StepCase("heads", 2, 3, 4, 5, ngroups=1), 9)
    untied = dict(tied)
    untied["dt"] = tied["dt"][..., None].expand(2, 3, 4)
    untied["A"] = tied["A"][:, None, None].expand(3, 4, 5)
    untied["D"] = tied["D"][:, None].expand(3, 4)
    untied["dt_bias"] = tied["dt_bias"][:, None].expand(3, 4)
    for got, want in zip(step(**untied), step(**tied), strict=True):
        assert torch.equal(got, want)


REJECTED = {
    "state": (lambda t: t[0], "state must have shape (R, H, P, N), got (4, 3)"),
    "x": (lambda t: t[:, None, None], "x must have shape (B, T, D) = (B, T, 4), got (2, 1, 1, 4)"),
    "dt": (lambda t: t[:, :3], "dt must have shape (B, D) = (2, 4), got (2, 3)"),
    "A": (lambda t: t[:, 0], "A must have shape (D, N) = (4, 3), got (4,)"),
    "B": (lambda t: t[0], "B must have shape (B, G, N) = (2, 1, 3), got (3,)"),
    "C": (lambda t: t[:, :2], "C must have shape (B, N) = (2, 3), got (2, 2)"),
    "D": (lambda t: t[None], "D must have shape (D,) = (4,), got (1, 4)"),
    "z": (lambda t: t[:1], "z must have shape (B, D) = (2, 4), got (1, 4)"),
    "dt_bias": (lambda t: t[1:], "dt_bias must have shape (D,) = (4,), got (3,)"),
    "state_indices": (lambda t: t[1:], "state_indices must have shape (B,) = (2,), got (1,)"),
}
REJECTED_HEADS = {
    "x": (lambda t: t[:, 0], "x must have shape (B, T, H, P) = (B, T, 4, 5), got (2, 5)"),
    "dt": (lambda t: t[:, :3], "dt must have shape (B, H) = (2, 4), got (2, 3)"),
    "A": (lambda t: t[:, None], "A must have shape (H, P, N) = (4, 5, 3), got (4, 1)"),
    "B": (lambda t: t[:, :, :2], "B must have shape (B, G, N) = (2, 2, 3), got (2, 2, 2)"),
    "D": (lambda t: t[:3], "D must have shape (H,) = (4,), got (3,)"),
}


def _case(heads: bool) -> StepCase:
    return (
        StepCase("reject", 2, 4, 5, 3, ngroups=2) if heads else StepCase("r", 2, 4, 0, 3, nrows=3)
    )


@pytest.mark.parametrize(
    ("heads", "name"), [(False, n) for n in REJECTED] + [(True, n) for n in REJECTED_HEADS]
)
def test_rejects_shape(heads, name):
    arguments = make_tensors(_case(heads))
    change, message = (REJECTED_HEADS if heads else REJECTED)[name]
    arguments[name] = change(arguments[name])
    before = arguments["state"].clone()
    with pytest.raises(ValueError) as error:
        selective_state_step(**arguments)
    assert str(error.value) == f"{OP}: {message}"
    assert torch.equal(arguments["state"], before)


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_dtype_device_and_type(name):
    arguments = make_tensors(_case(False))
    wanted = "int32" if name == "state_indices" else "float64, float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=f"^{OP}: {name} must have dtype {wanted}, got int64$"):
        selective_state_step(**{**arguments, name: arguments[name].long()})
    if name != "state":
        with pytest.raises(ValueError, match=f"^{OP}: {name} must be on cpu, got meta$"):
            selective_state_step(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(TypeError, match=f"^{OP}: {name} must be a torch.Tensor, got list$"):
        selective_state_step(**{**arguments, name: [1.0]})


@pytest.mark.parametrize(("heads", "letter"), [(False, "D"), (True, "H")])
def test_rejects_groups(heads, letter):
    arguments = {**make_tensors(_case(heads)), "C": torch.zeros(2, 3, 3)}
    message = f"C must have a group count that divides {letter} = 4, got 3"
    with pytest.raises(ValueError, match=f"^{OP}: {message}$"):
        selective_state_step(**arguments)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 3], "state_indices must lie in -1..2, got 3"),
        ([-2, 0], "state_indices must lie in -1..2, got -2"),
        ([2, 2], "state_indices must not name a row twice, got 2"),
        (None, "state must have B = 2 rows without state_indices, got 3"),
    ],
)
def test_rejects_state_indices(indices, message):
    arguments = make_tensors(_case(False))
    arguments["state_indices"] = indices and torch.tensor(indices, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{OP}: {message}$"):
        selective_state_step(**arguments)


def test_skips_may_repeat():
    arguments = make_tensors(_case(False))
    arguments["state_indices"] = torch.tensor([-1, -1], dtype=torch.int32)
    y, state = step(**arguments)
    assert not y.any()
    assert torch.equal(state, arguments["state"])
