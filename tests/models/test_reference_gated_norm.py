"""The reference of gated_norm.  Judge: a float64 NumPy loop, and finite differences."""

import itertools

import pytest
import torch

from ssm.ops.python.reference import gated_norm
from tests import judge
from tests.cases import CASES, GatedNormCase, make
from tests.tensors import FLOATS, arrays, gradcheck, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "gated_norm"
EXACT = TOLERANCES[OP, "float64"]
SMALL = tuple(
    GatedNormCase(
        f"{'rms' if is_rms else 'layer'}_{given or 'bare'}_{size}_{'gate' if first else 'norm'}",
        (2, 3, 4),
        is_rms,
        given,
        size,
        not first,
    )
    for is_rms, given, size, first in itertools.product(
        (True, False), ("", "z", "bias z"), (None, 2), (True, False)
    )
)


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case):
    assert_close("y", gated_norm(**make_tensors(case, 1)), judge.gated_norm(**make(case, 1)), EXACT)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_low_precision_matches_judge(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    y = gated_norm(**arguments)
    assert y.dtype == dtype
    tolerance = TOLERANCES[OP, str(dtype).removeprefix("torch.")]
    assert_close("y", y, judge.gated_norm(**arrays(arguments)), tolerance)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("is_rms", [False, True])
def test_matches_torch(is_rms, norm_before_gate):
    """Each group is a call of torch's own norm."""
    case = GatedNormCase("plain", (3, 14), is_rms, "z" if is_rms else "bias z", 7, norm_before_gate)
    arguments = make_tensors(case, 3)
    x, weight, bias, z = (arguments[n] for n in ("x", "weight", "bias", "z"))
    gate = torch.nn.functional.silu(z)
    halves = []
    for here in (slice(0, 7), slice(7, 14)):
        s = x[:, here] if norm_before_gate else (x * gate)[:, here]
        if is_rms:
            half = torch.nn.functional.rms_norm(s, (7,), weight[here], 1e-3)
        else:
            half = torch.nn.functional.layer_norm(s, (7,), weight[here], bias[here], 1e-3)
        halves.append(half * gate[:, here] if norm_before_gate else half)
    assert_close("y", gated_norm(**arguments, eps=1e-3), torch.cat(halves, 1), EXACT)


@pytest.mark.parametrize("eps", [1e-5, 1e-1, 10.0])
def test_eps(eps):
    for case in SMALL:
        want = judge.gated_norm(**make(case, 4), eps=eps)
        assert_close("y", gated_norm(**make_tensors(case, 4), eps=eps), want, EXACT)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(gated_norm, make_tensors(case))


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gradgradcheck(norm_before_gate):
    case = GatedNormCase("second", (2, 4), False, "bias z", 2, norm_before_gate)
    gradcheck(gated_norm, make_tensors(case), second=True)


def test_a_group_is_a_norm_of_its_own():
    arguments = make_tensors(GatedNormCase("groups", (5, 12), group_size=4), 5)
    y = gated_norm(**arguments)
    for start in (0, 4, 8):
        part = {
            n: v[..., start : start + 4] if isinstance(v, torch.Tensor) else v
            for n, v in arguments.items()
        }
        got = gated_norm(**{**part, "group_size": None})
        assert_close("y", got, y[..., start : start + 4], EXACT)


def test_without_a_gate_the_order_does_not_matter():
    arguments = make_tensors(GatedNormCase("bare", (5, 12), given="bias"), 6)
    del arguments["norm_before_gate"]
    first, second = (gated_norm(**arguments, norm_before_gate=b) for b in (True, False))
    assert torch.equal(first, second)


def test_large_mean_does_not_cancel():
    """The variance is of the centred values, not a difference of moments."""
    x = torch.tensor([[1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3]])
    y = gated_norm(x, torch.ones(4), is_rms=False)
    want = judge.gated_norm(x.numpy(), torch.ones(4).numpy(), is_rms=False)
    assert_close("y", y, want, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 7)
    assert_close("y", gated_norm(**strided(arguments)), gated_norm(**arguments), EXACT)
    arguments["x"] = arguments["x"][:1, :, :1].expand(2, 3, 4)
    copied = {**arguments, "x": arguments["x"].contiguous()}
    assert_close("y", gated_norm(**arguments), gated_norm(**copied), EXACT)


FULL = GatedNormCase("full", (2, 3, 4), False, "bias z")
REJECTED = {
    "x": (lambda t: t[0, 0, 0], "x must have shape (..., D), got ()"),
    "weight": (lambda t: t[:3], "weight must have shape (D,) = (4,), got (3,)"),
    "bias": (lambda t: t[None], "bias must have shape (D,) = (4,), got (1, 4)"),
    "z": (lambda t: t[0], "z must have shape (..., D) = (2, 3, 4), got (3, 4)"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_shape(name):
    arguments = make_tensors(FULL)
    change, message = REJECTED[name]
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError) as error:
        gated_norm(**arguments)
    assert str(error.value) == f"{OP}: {message}"


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_dtype_device_and_type(name):
    arguments = make_tensors(FULL)
    floats = "float64, float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=f"^{OP}: {name} must have dtype {floats}, got int64$"):
        gated_norm(**{**arguments, name: arguments[name].long()})
    if name != "x":
        with pytest.raises(ValueError, match=f"^{OP}: {name} must be on cpu, got meta$"):
            gated_norm(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(TypeError, match=f"^{OP}: {name} must be a torch.Tensor, got list$"):
        gated_norm(**{**arguments, name: [1.0]})


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan")])
def test_rejects_eps(eps):
    with pytest.raises(ValueError, match=f"^{OP}: eps must be positive, got {eps}$"):
        gated_norm(**make_tensors(FULL), eps=eps)


@pytest.mark.parametrize(
    ("size", "error", "sentence"),
    [
        (3, ValueError, "divide D = 4, got 3"),
        (8, ValueError, "divide D = 4, got 8"),
        (0, ValueError, "be at least 1, got 0"),
        (-2, ValueError, "be at least 1, got -2"),
        (2.0, TypeError, "be an int, got float"),
        (True, TypeError, "be an int, got bool"),
    ],
)
def test_rejects_group_size(size, error, sentence):
    with pytest.raises(error, match=f"^{OP}: group_size must {sentence}$"):
        gated_norm(**{**make_tensors(FULL), "group_size": size})
