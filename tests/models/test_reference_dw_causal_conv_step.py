"""The reference of dw_causal_conv_step.  Judge: a float64 NumPy loop, and finite differences."""

import pytest
import torch

from ssm.ops.python.reference import dw_causal_conv_step
from tests import judge
from tests.cases import CASES, ConvStepCase, make
from tests.tensors import FLOATS, arrays, gradcheck, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "dw_causal_conv_step"
EXACT = TOLERANCES[OP, "float64"]
SMALL = (
    ConvStepCase("bare", 2, 2, 3, activation=None, given=""),
    ConvStepCase("tokens", 2, 2, 4, ntokens=2),
    ConvStepCase("indices", 3, 2, 3, nrows=4),
    ConvStepCase("circular", 2, 2, 3, ntokens=2, circular=True),
    ConvStepCase("circular_indices", 3, 1, 4, circular=True, nrows=4),
)


def step(conv_state, **arguments):
    """Return y and the window after the step, and leave the given window alone."""
    conv_state = conv_state.clone()
    y = dw_causal_conv_step(conv_state=conv_state, **arguments)
    return y, conv_state


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case):
    y, state = step(**make_tensors(case, 1))
    want_y, want_state = judge.dw_causal_conv_step(**make(case, 1))
    assert_close("y", y, want_y, EXACT)
    assert_close("conv_state", state, want_state, EXACT)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_low_precision_matches_judge(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    y, state = step(**arguments)
    want_y, want_state = judge.dw_causal_conv_step(**arrays(arguments))
    assert (y.dtype, state.dtype) == (dtype, dtype)
    assert_close("y", y, want_y, TOLERANCES[OP, str(dtype).removeprefix("torch.")])
    assert torch.equal(state, torch.from_numpy(want_state).to(dtype))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(step, make_tensors(case))


@pytest.mark.parametrize("case", [c for c in CASES[OP] if c.ntokens > 0], ids=str)
def test_tokens_equal_single_steps(case):
    arguments = make_tensors(case, 3)
    y, state = step(**arguments)
    alone, found, seen = arguments["conv_state"].clone(), [], arguments["cache_seqlens"]
    for t in range(case.ntokens):
        token = {"x": arguments["x"][..., t], "conv_state": alone}
        token["cache_seqlens"] = None if seen is None else seen + t
        found.append(dw_causal_conv_step(**{**arguments, **token}))
    assert_close("y", torch.stack(found, 2), y, EXACT)
    assert_close("conv_state", alone, state, EXACT)


def test_circular_equals_shifted():
    arguments = make_tensors(ConvStepCase("circular", 3, 4, 5, ntokens=8, circular=True), 4)
    circular, seen = arguments["conv_state"], arguments.pop("cache_seqlens")

    def oldest_first(state, seen):
        return torch.stack(
            [torch.roll(s, -int(n) % 5 - 5, 1) for s, n in zip(state, seen, strict=True)]
        )

    shifted = oldest_first(circular, seen)
    want = dw_causal_conv_step(**{**arguments, "conv_state": shifted})
    assert_close("y", dw_causal_conv_step(**arguments, cache_seqlens=seen), want, EXACT)
    assert_close("conv_state", oldest_first(circular, seen + 8), shifted, EXACT)


def test_skipped_rows_touch_nothing():
    arguments = make_tensors(ConvStepCase("skip", 4, 3, 3, nrows=5), 5)
    arguments["state_indices"] = torch.tensor([3, -1, 0, -1], dtype=torch.int32)
    arguments["x"][1::2] = float("nan")
    arguments["conv_state"][1] = float("nan")  # a row that nobody uses
    y, state = step(**arguments)
    assert not y[1::2].any()
    assert not y.isnan().any()
    assert torch.equal(state[[2, 4]], arguments["conv_state"][[2, 4]])
    assert state[1].isnan().all()
    assert torch.equal(state[3, :, -1], arguments["x"][0])
    arguments["x"].requires_grad_()
    arguments["weight"].requires_grad_()
    step(**arguments)[0].sum().backward()
    assert not arguments["x"].grad[1::2].any()
    assert not arguments["weight"].grad.isnan().any()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 6)
    want_y, want_state = step(**arguments)
    views = strided(arguments)
    assert torch.equal(dw_causal_conv_step(**views), want_y)
    assert torch.equal(views["conv_state"], want_state)


CASE = ConvStepCase("reject", 2, 4, 3, circular=True, nrows=3)
REJECTED = {
    "x": (lambda t: t[0], "x must have shape (B, D, T), got (4,)"),
    "conv_state": (
        lambda t: t[:, :2],
        "conv_state must have shape (R, D, K) = (3, 4, 3), got (3, 2, 3)",
    ),
    "weight": (lambda t: t[0], "weight must have shape (D, 1, W) = (4, 1, W), got (4,)"),
    "bias": (lambda t: t[:3], "bias must have shape (D,) = (4,), got (3,)"),
    "cache_seqlens": (lambda t: t[:1], "cache_seqlens must have shape (B,) = (2,), got (1,)"),
    "state_indices": (lambda t: t[:1], "state_indices must have shape (B,) = (2,), got (1,)"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_shape(name):
    arguments = make_tensors(CASE)
    change, message = REJECTED[name]
    arguments[name] = change(arguments[name])
    before = arguments["conv_state"].clone()
    with pytest.raises(ValueError) as error:
        dw_causal_conv_step(**arguments)
    assert str(error.value) == f"{OP}: {message}"
    assert torch.equal(arguments["conv_state"], before)


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_dtype_device_and_type(name):
    arguments = make_tensors(CASE)
    is_index = not arguments[name].is_floating_point()
    wanted = "int32" if is_index else "float64, float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=f"^{OP}: {name} must have dtype {wanted}, got int64$"):
        dw_causal_conv_step(**{**arguments, name: arguments[name].long()})
    if name != "x":
        with pytest.raises(ValueError, match=f"^{OP}: {name} must be on cpu, got meta$"):
            dw_causal_conv_step(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(TypeError, match=f"^{OP}: {name} must be a torch.Tensor, got list$"):
        dw_causal_conv_step(**{**arguments, name: [1.0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conv_state": torch.zeros(3, 4, 2)},
            "conv_state must hold at least W - 1 = 3 inputs, got 2",
        ),
        ({"weight": torch.zeros(4, 0)}, "weight must have a width of at least 1, got 0"),
        (
            {"activation": "gelu"},
            "activation must be 'silu', 'swish', 'identity' or None, got 'gelu'",
        ),
        (
            {"cache_seqlens": torch.tensor([4, -1], dtype=torch.int32)},
            "cache_seqlens must not be negative, got -1",
        ),
        (
            {"state_indices": torch.tensor([0, 3], dtype=torch.int32)},
            "state_indices must lie in -1..2, got 3",
        ),
        (
            {"state_indices": torch.tensor([1, 1], dtype=torch.int32)},
            "state_indices must not name a row twice, got 1",
        ),
        ({"state_indices": None}, "conv_state must have B = 2 rows without state_indices, got 3"),
    ],
)
def test_rejects_value(change, message):
    with pytest.raises(ValueError, match=f"^{OP}: {message}$"):
        dw_causal_conv_step(**{**make_tensors(CASE), **change})
