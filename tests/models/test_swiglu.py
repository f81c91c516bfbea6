"""ssm.ops.swiglu on compiled kernels.  Judge: the reference in float64."""

import pytest
import torch

from ssm import ops
from ssm.ops.compiled import swiglu as compiled
from ssm.ops.python import reference
from ssm.utils import dispatch
from tests.cases import CASES, SwigluCase
from tests.tensors import FLOATS, gradcheck, gradients, leaves, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "swiglu"
BY_NAME = {case.name: case for case in CASES[OP]}
SMALL = [SwigluCase("separate", (2, 3, 4)), SwigluCase("packed", (2, 3, 4), "")]
ODD = ("odd", "packed_odd", "no_batch")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exact(arguments: dict) -> dict:
    return {k: None if v is None else v.double() for k, v in arguments.items()}


def integer_gradients(function, arguments: dict) -> dict:
    """Weigh the output with numbers that bfloat16 holds: both sides differentiate the same."""
    arguments = leaves(arguments)
    y = function(**arguments)
    generator = torch.Generator().manual_seed(3)
    (y.double() * torch.randint(-4, 5, y.shape, generator=generator)).sum().backward()
    return {n: v.grad for n, v in arguments.items() if v is not None}


def test_dispatch_serves_the_kernels():
    assert dispatch.why(OP) == f"{OP} on cpu: cpu, the cpu kernels are loaded"


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_reference(case, dtype):
    arguments = make_tensors(case, dtype=dtype)
    y, want = ops.swiglu(**arguments), reference.swiglu(**exact(arguments))
    assert (y.dtype, y.shape) == (dtype, want.shape)
    assert_close("y", y, want, TOLERANCES[OP, name_of(dtype)])


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_grad_matches_reference(case, dtype):
    arguments = make_tensors(case, dtype=dtype)
    want = integer_gradients(reference.swiglu, exact(arguments))
    for name, gradient in integer_gradients(ops.swiglu, arguments).items():
        assert (gradient.dtype, gradient.shape) == (dtype, arguments[name].shape)
        assert_close(name, gradient, want[name], TOLERANCES[f"{OP}_bwd", name_of(dtype)])


@pytest.mark.parametrize("low", ["gate", "up"])
def test_mixed_dtypes(low):
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.float32)
    arguments[low] = arguments[low].bfloat16()
    y = ops.swiglu(**arguments)
    assert y.dtype == arguments["gate"].dtype
    assert_close("y", y, reference.swiglu(**exact(arguments)), TOLERANCES[OP, name_of(y.dtype)])
    want = integer_gradients(reference.swiglu, exact(arguments))
    for name, gradient in integer_gradients(ops.swiglu, arguments).items():
        assert gradient.dtype == arguments[name].dtype
        assert_close(name, gradient, want[name], TOLERANCES[f"{OP}_bwd", name_of(gradient.dtype)])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(compiled.swiglu, make_tensors(case))


def test_second_derivative_is_refused():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.swiglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{OP}: a second derivative must be taken with the ref"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ODD)
def test_noncontiguous(name):
    arguments = make_tensors(BY_NAME[name], dtype=torch.float32)
    assert torch.equal(ops.swiglu(**strided(arguments)), ops.swiglu(**arguments))
    want = gradients(ops.swiglu, arguments)
    for which, got in gradients(ops.swiglu, strided(arguments)).items():
        assert (got is None) == (want[which] is None)
        assert got is None or torch.equal(got, want[which]), which


@pytest.mark.parametrize("swapped", [False, True])
def test_views_of_one_tensor(swapped):
    """The halves of a projection, in either order, without a copy: as packed, gradients as well."""
    fc1 = torch.randn(3, 5, 26, requires_grad=True)
    gate, up = fc1.chunk(2, -1)[:: -1 if swapped else 1]
    assert not gate.is_contiguous()
    assert not up.is_contiguous()
    y = ops.swiglu(gate, up)
    y.sum().backward()
    packed = torch.cat([gate, up], -1).detach().requires_grad_()
    want = ops.swiglu(packed)
    want.sum().backward()
    assert torch.equal(y, want)
    halves = packed.grad.chunk(2, -1)[:: -1 if swapped else 1]
    assert torch.equal(fc1.grad, torch.cat(halves, -1))


@pytest.mark.parametrize("given", ["up", ""])
def test_more_axes_than_the_kernels_take(given):
    arguments = make_tensors(SwigluCase("deep", (2, 1, 1, 1, 1, 3, 10), given))
    flat = {n: None if v is None else v.view(2, 3, 10) for n, v in arguments.items()}
    y, want = ops.swiglu(**arguments), ops.swiglu(**flat)
    assert torch.equal(y, want.view(2, 1, 1, 1, 1, 3, -1))
    want = integer_gradients(ops.swiglu, flat)
    for name, got in integer_gradients(ops.swiglu, arguments).items():
        assert torch.equal(got.view(2, 3, 10), want[name]), name


def test_threads_agree():
    arguments = make_tensors(SwigluCase("many", (5, 67, 257)), dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append((ops.swiglu(**arguments), *gradients(ops.swiglu, arguments).values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", [*SMALL, BY_NAME["no_batch"]], ids=str)
def test_opcheck(case, requires_grad):
    inputs = list(make_tensors(case, dtype=torch.float32).values())
    if requires_grad:
        inputs = [None if t is None else t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.ssm.swiglu_fwd.default, tuple(inputs))


@pytest.mark.parametrize("name", ODD)
def test_compile(name):
    arguments = make_tensors(BY_NAME[name], dtype=torch.float32)
    function = torch.compile(ops.swiglu, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(**arguments), ops.swiglu(**arguments))
    want = integer_gradients(ops.swiglu, arguments)
    for which, got in integer_gradients(function, arguments).items():
        assert torch.equal(got, want[which]), which


def test_rejects_with_the_sentences_of_the_reference():
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.float32)
    packed = make_tensors(BY_NAME["packed_odd"], dtype=torch.float32)
    wrong = [
        {**arguments, "gate": torch.zeros(())},
        {**arguments, "gate": torch.zeros(()), "up": None},
        {**packed, "gate": packed["gate"][..., :-1]},
        {**packed, "gate": packed["gate"].int()},
    ]
    for key, value in arguments.items():
        wrong += [{**arguments, key: value.int()}, {**arguments, key: value[..., None]}]
        wrong += [{**arguments, key: value[..., :-1]}]
        # More axes than kernels take are merged: as many rows of another shape are wrong still.
        many = {n: t.expand(1, 1, 1, 1, 2, *t.shape) for n, t in arguments.items()}
        wrong += [{**many, key: many[key].movedim(3, 4)}]
    for values in wrong:
        sentences = []
        for function in (reference.swiglu, compiled.swiglu):
            with pytest.raises(ValueError) as caught:
                function(**values)
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1]


def test_rejects_what_is_not_a_tensor():
    with pytest.raises(TypeError, match=f"{OP}: up must be a torch.Tensor, got list"):
        ops.swiglu(torch.ones(2, 3), [1.0])
    with pytest.raises(TypeError, match=f"{OP}: gate must be a torch.Tensor, got list"):
        ops.swiglu([1.0])
