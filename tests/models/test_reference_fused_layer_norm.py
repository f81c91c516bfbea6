"""The reference of fused_layer_norm.  Judge: a float64 NumPy loop, and finite differences."""

import pytest
import torch

from ssm.ops.python.reference import fused_layer_norm
from tests import judge
from tests.cases import CASES, NormCase, make
from tests.tensors import FLOATS, arrays, gradcheck, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "fused_layer_norm"
EXACT = TOLERANCES[OP, "float64"]
SMALL = tuple(
    NormCase(
        f"{'rms' if is_rms else 'layer'}_{'options' if given else 'bare'}", (2, 3, 4), is_rms, given
    )
    for is_rms in (True, False)
    for given in ("", "bias residual")
)


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case):
    y, total = fused_layer_norm(**make_tensors(case, 1))
    want_y, want_total = judge.fused_layer_norm(**make(case, 1))
    assert_close("y", y, want_y, EXACT)
    assert_close("sum", total, want_total, EXACT)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_low_precision_matches_judge(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    y, total = fused_layer_norm(**arguments)
    want_y, want_total = judge.fused_layer_norm(**arrays(arguments))
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    assert_close("y", y, want_y, TOLERANCES[OP, str(dtype).removeprefix("torch.")])
    assert_close("sum", total, want_total, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize("is_rms", [False, True])
def test_matches_torch(is_rms):
    arguments = make_tensors(NormCase("plain", (3, 7), is_rms, "" if is_rms else "bias"), 3)
    x, weight, bias = (arguments[n] for n in ("x", "weight", "bias"))
    y = fused_layer_norm(**arguments, eps=1e-3, prenorm=False)
    if is_rms:
        want = torch.nn.functional.rms_norm(x, (7,), weight, 1e-3)
    else:
        want = torch.nn.functional.layer_norm(x, (7,), weight, bias, 1e-3)
    assert_close("y", y, want, EXACT)


@pytest.mark.parametrize("eps", [1e-5, 1e-1, 10.0])
def test_eps(eps):
    for case in SMALL:
        y = fused_layer_norm(**make_tensors(case, 4), eps=eps, prenorm=False)
        assert_close("y", y, judge.fused_layer_norm(**make(case, 4), eps=eps)[0], EXACT)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("prenorm", [False, True])
def test_gradcheck(case, prenorm):
    gradcheck(lambda **given: fused_layer_norm(**given, prenorm=prenorm), make_tensors(case))


def test_gradgradcheck():
    gradcheck(fused_layer_norm, make_tensors(SMALL[3]), second=True)


@pytest.mark.parametrize(
    ("x", "residual", "in_fp32", "want"),
    [
        (torch.bfloat16, None, True, torch.float32),
        (torch.bfloat16, None, False, torch.bfloat16),
        (torch.bfloat16, torch.float32, True, torch.float32),
        (torch.bfloat16, torch.float32, False, torch.float32),
        (torch.bfloat16, torch.bfloat16, True, torch.float32),
        (torch.bfloat16, torch.bfloat16, False, torch.bfloat16),
        (torch.float32, torch.bfloat16, False, torch.bfloat16),
        (torch.float32, None, False, torch.float32),
        (torch.float64, None, True, torch.float64),
        (torch.float64, torch.float32, True, torch.float64),
        (torch.float64, torch.float32, False, torch.float32),
    ],
)
def test_dtype_of_the_sum(x, residual, in_fp32, want):
    arguments = make_tensors(SMALL[1], 5, x)
    given = arguments["residual"]
    arguments["residual"] = None if residual is None else given.to(residual)
    y, total = fused_layer_norm(**arguments, residual_in_fp32=in_fp32)
    assert (y.dtype, total.dtype) == (x, want)


def test_norm_of_the_unrounded_sum():
    arguments = make_tensors(NormCase("sum", (4, 64)), 6, torch.bfloat16)
    exact = fused_layer_norm(**arguments, residual_in_fp32=True)[0]
    rounded = fused_layer_norm(**arguments, residual_in_fp32=False)[0]
    assert torch.equal(exact, rounded)


def test_large_mean_does_not_cancel():
    """The variance is of the centred values, not a difference of moments."""
    x = torch.tensor([[1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3]])
    y = fused_layer_norm(x, torch.ones(4), None, prenorm=False)
    want, _ = judge.fused_layer_norm(x.numpy(), torch.ones(4).numpy(), None)
    assert_close("y", y, want, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 7)
    wanted = fused_layer_norm(**arguments)
    for got, want in zip(fused_layer_norm(**strided(arguments)), wanted, strict=True):
        assert_close("output", got, want, EXACT)
    arguments["x"] = arguments["x"][:1, :, :1].expand(2, 3, 4)
    copied = {**arguments, "x": arguments["x"].contiguous()}
    for got, want in zip(fused_layer_norm(**arguments), fused_layer_norm(**copied), strict=True):
        assert_close("output", got, want, EXACT)


REJECTED = {
    "x": (lambda t: t[0, 0, 0], "x must have shape (..., D), got ()"),
    "weight": (lambda t: t[:3], "weight must have shape (D,) = (4,), got (3,)"),
    "bias": (lambda t: t[None], "bias must have shape (D,) = (4,), got (1, 4)"),
    "residual": (lambda t: t[0], "residual must have shape (..., D) = (2, 3, 4), got (3, 4)"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_shape(name):
    arguments = make_tensors(SMALL[3])
    change, message = REJECTED[name]
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError) as error:
        fused_layer_norm(**arguments)
    assert str(error.value) == f"{OP}: {message}"


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_dtype_device_and_type(name):
    arguments = make_tensors(SMALL[3])
    floats = "float64, float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=f"^{OP}: {name} must have dtype {floats}, got int64$"):
        fused_layer_norm(**{**arguments, name: arguments[name].long()})
    if name != "x":
        with pytest.raises(ValueError, match=f"^{OP}: {name} must be on cpu, got meta$"):
            fused_layer_norm(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(TypeError, match=f"^{OP}: {name} must be a torch.Tensor, got list$"):
        fused_layer_norm(**{**arguments, name: [1.0]})


@pytest.mark.parametrize("eps", [0, -1e-5, float("nan")])
def test_rejects_eps(eps):
    with pytest.raises(ValueError, match=f"^{OP}: eps must be positive, got {eps}$"):
        fused_layer_norm(**make_tensors(SMALL[3]), eps=eps)
