"""The reference of swiglu.  Judge: a float64 NumPy loop, and finite differences."""

import pytest
import torch

from ssm.ops.python.reference import swiglu
from tests import judge
from tests.cases import CASES, SwigluCase, make
from tests.tensors import FLOATS, arrays, gradcheck, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "swiglu"
EXACT = TOLERANCES[OP, "float64"]
SMALL = (SwigluCase("separate", (2, 3, 4)), SwigluCase("packed", (2, 3, 4), ""))


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case):
    assert_close("y", swiglu(**make_tensors(case, 1)), judge.swiglu(**make(case, 1)), EXACT)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_low_precision_matches_judge(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    y = swiglu(**arguments)
    assert y.dtype == dtype
    tolerance = TOLERANCES[OP, str(dtype).removeprefix("torch.")]
    assert_close("y", y, judge.swiglu(**arrays(arguments)), tolerance)


def test_matches_torch():
    x = make_tensors(SwigluCase("plain", (3, 14), ""), 3)["gate"]
    want = torch.nn.functional.silu(x[:, :7]) * x[:, 7:]
    assert_close("packed", swiglu(x), want, EXACT)
    assert_close("separate", swiglu(*x.chunk(2, 1)), want, EXACT)


def test_dtype_is_that_of_the_gate():
    arguments = make_tensors(SMALL[0])
    gate, up = arguments["gate"], arguments["up"]
    assert swiglu(gate.bfloat16(), up).dtype == torch.bfloat16
    assert swiglu(gate, up.bfloat16()).dtype == torch.float64


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_large_gates_do_not_overflow(value):
    y = swiglu(torch.full((2,), value), torch.ones(2))
    assert torch.equal(y, torch.full((2,), max(value, 0.0)))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(swiglu, make_tensors(case), second=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 7)
    assert_close("y", swiglu(**strided(arguments)), swiglu(**arguments), EXACT)
    arguments["gate"] = arguments["gate"][:1, :, :1].expand(2, 3, 4)
    copied = {**arguments, "gate": arguments["gate"].contiguous()}
    assert_close("y", swiglu(**arguments), swiglu(**copied), EXACT)


def test_rejects_shape():
    x = torch.ones(2, 3, 4)
    for wrong, sentence in (
        ((x[0, 0, 0],), "gate must have shape (..., D), got ()"),
        ((x, x[0]), "up must have shape (..., D) = (2, 3, 4), got (3, 4)"),
        ((x, x[..., :2]), "up must have shape (..., D) = (2, 3, 4), got (2, 3, 2)"),
        ((x[..., :3],), "gate must have an even last axis without up, got 3"),
    ):
        with pytest.raises(ValueError) as error:
            swiglu(*wrong)
        assert str(error.value) == f"{OP}: {sentence}"


@pytest.mark.parametrize("name", ["gate", "up"])
def test_rejects_dtype_device_and_type(name):
    arguments = make_tensors(SMALL[0])
    floats = "float64, float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=f"^{OP}: {name} must have dtype {floats}, got int64$"):
        swiglu(**{**arguments, name: arguments[name].long()})
    if name != "gate":
        with pytest.raises(ValueError, match=f"^{OP}: {name} must be on cpu, got meta$"):
            swiglu(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(TypeError, match=f"^{OP}: {name} must be a torch.Tensor, got list$"):
        swiglu(**{**arguments, name: [1.0]})
