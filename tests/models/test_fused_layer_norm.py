"""ssm.ops.fused_layer_norm on compiled kernels.  Judge: the reference in float64."""

import pytest
import torch

from ssm import ops
from ssm.ops.compiled import fused_layer_norm as compiled
from ssm.ops.python import reference
from ssm.utils import dispatch
from tests.cases import CASES, NormCase
from tests.tensors import FLOATS, gradcheck, gradients, leaves, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "fused_layer_norm"
BY_NAME = {case.name: case for case in CASES[OP]}
POLICIES = [(True, True), (True, False), (False, True)]  # prenorm, residual_in_fp32
SMALL = [
    NormCase(f"{'rms' if is_rms else 'layer'}_{given or 'bare'}", (2, 3, 4), is_rms, given)
    for is_rms in (True, False)
    for given in ("", "bias residual")
]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exact(arguments: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def tuple_of(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_dispatch_serves_the_kernels():
    assert dispatch.why(OP) == f"{OP} on cpu: cpu, the cpu kernels are loaded"


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_reference(case, dtype, policy):
    arguments = {"bias": None, **make_tensors(case, dtype=dtype)}
    arguments |= dict(zip(("prenorm", "residual_in_fp32"), policy, strict=True))
    got = tuple_of(ops.fused_layer_norm(**arguments))
    same = tuple_of(reference.fused_layer_norm(**arguments))
    want = tuple_of(reference.fused_layer_norm(**exact(arguments)))
    for name, g, s, w in zip(("y", "s"), got, same, want, strict=False):
        assert (g.dtype, g.shape) == (s.dtype, s.shape)
        assert_close(name, g, w, TOLERANCES[OP, name_of(g.dtype)])


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", [c for c in CASES[OP] if 0 not in c.shape], ids=str)
def test_grad_matches_reference(case, dtype, policy):
    arguments = {"bias": None, **make_tensors(case, dtype=dtype)}
    arguments |= dict(zip(("prenorm", "residual_in_fp32"), policy, strict=True))

    def integer_gradients(function, values):
        """Weigh the outputs with numbers that bfloat16 holds: both sides differentiate the same."""
        values = leaves(values)
        outputs = tuple_of(function(**values))
        generator = torch.Generator().manual_seed(3)
        weights = torch.randint(-4, 5, (2, *values["x"].shape), generator=generator).double()
        sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=False)).backward()
        return {n: v.grad for n, v in values.items() if isinstance(v, torch.Tensor)}

    got = integer_gradients(ops.fused_layer_norm, arguments)
    want = integer_gradients(reference.fused_layer_norm, exact(arguments))
    for name, gradient in got.items():
        assert gradient.dtype == dtype
        assert_close(name, gradient, want[name], TOLERANCES[f"{OP}_bwd", name_of(dtype)])


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_a_residual_of_another_dtype(residual_in_fp32):
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.bfloat16)
    arguments["residual"] = arguments["residual"].float()
    arguments["weight"] = arguments["weight"].float()
    arguments["residual_in_fp32"] = residual_in_fp32
    y, s = ops.fused_layer_norm(**arguments)
    want_y, want_s = reference.fused_layer_norm(**exact(arguments))
    assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    assert_close("y", y, want_y, TOLERANCES[OP, "bfloat16"])
    assert_close("s", s, want_s, TOLERANCES[OP, "float32"])
    got = gradients(ops.fused_layer_norm, arguments)
    want = gradients(reference.fused_layer_norm, arguments)
    for name, gradient in got.items():
        assert gradient.dtype == arguments[name].dtype
        # The reference rounds to bfloat16 as well, at other places.
        torch.testing.assert_close(gradient, want[name], rtol=2e-2, atol=2e-2)


def test_gradient_of_a_wider_residual_is_not_rounded_to_the_dtype_of_x():
    x, residual = torch.randn(5, 16).bfloat16(), torch.randn(5, 16, requires_grad=True)
    weight, gradients = torch.randn(16), (torch.randn(5, 16).bfloat16(), torch.randn(5, 16))
    got, want = (
        torch.autograd.grad(function(x, weight, None, residual), residual, gradients)[0]
        for function in (ops.fused_layer_norm, reference.fused_layer_norm)
    )
    assert_close("residual", got, want, TOLERANCES[f"{OP}_bwd", "float32"])


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case, prenorm):
    arguments = {"bias": None, **make_tensors(case), "prenorm": prenorm}
    gradcheck(compiled.fused_layer_norm, arguments)


def test_gradient_of_one_output_only():
    arguments = make_tensors(BY_NAME["odd"])
    for index in (0, 1):
        got, want = (
            gradients(lambda f=f, i=index, **a: f(**a)[i], arguments)
            for f in (ops.fused_layer_norm, reference.fused_layer_norm)
        )
        for name in got:
            if want[name] is None:
                assert got[name] is None or not got[name].any()
            else:
                assert_close(name, got[name], want[name], TOLERANCES[f"{OP}_bwd", "float64"])


def test_second_derivative_is_refused():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    y = ops.fused_layer_norm(x, torch.ones(4).double(), None, prenorm=False)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{OP}: a second derivative must be taken with the ref"):
        dx.sum().backward()


def test_noncontiguous():
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.float32)
    want = ops.fused_layer_norm(**arguments)
    for g, w in zip(ops.fused_layer_norm(**strided(arguments)), want, strict=True):
        assert torch.equal(g, w)
    want = gradients(ops.fused_layer_norm, arguments)
    for name, got in gradients(ops.fused_layer_norm, strided(arguments)).items():
        assert torch.equal(got, want[name]), name


def test_threads_agree():
    arguments = make_tensors(NormCase("many", (5, 67, 257), False), dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outputs = ops.fused_layer_norm(**arguments)
            results.append((*outputs, *gradients(ops.fused_layer_norm, arguments).values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", [*SMALL, BY_NAME["no_batch"]], ids=str)
def test_opcheck(case, requires_grad):
    arguments = make_tensors(case, dtype=torch.float32)
    inputs = [arguments.get(n) for n in ("x", "weight", "bias", "residual")]
    if requires_grad:
        inputs = [None if t is None else t.requires_grad_() for t in inputs]
    values = (*inputs, case.is_rms, 1e-5, torch.float32, True)
    torch.library.opcheck(torch.ops.ssm.fused_layer_norm_fwd.default, values)


def test_compile():
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.float32)
    want = ops.fused_layer_norm(**arguments)
    function = torch.compile(ops.fused_layer_norm, fullgraph=True, backend="aot_eager")
    for g, w in zip(function(**arguments), want, strict=True):
        assert torch.equal(g, w)
    want = gradients(ops.fused_layer_norm, arguments)
    for name, got in gradients(function, arguments).items():
        assert torch.equal(got, want[name]), name


def test_rejects_with_the_sentences_of_the_reference():
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.float32)
    wrong = [{"eps": 0.0}, {"eps": -1e-5}, {"eps": float("nan")}, {"x": torch.zeros(())}]
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            wrong += [{key: value.to(torch.int32)}, {key: value[..., None]}]
            if key != "x":
                wrong.append({key: value[..., :-1]})
    # More axes than kernels take are merged: as many rows of another shape are wrong still.
    deep = {n: arguments[n].expand(1, 1, 1, 1, 2, *arguments[n].shape) for n in ("x", "residual")}
    wrong.append({**deep, "residual": deep["residual"].movedim(3, 4)})
    for change in wrong:
        sentences = []
        for function in (reference.fused_layer_norm, compiled.fused_layer_norm):
            with pytest.raises(ValueError) as caught:
                function(**{**arguments, **change})
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1]


def test_rejects_what_is_not_a_tensor():
    with pytest.raises(TypeError, match=f"{OP}: weight must be a torch.Tensor, got list"):
        ops.fused_layer_norm(torch.ones(2, 3), [1.0], None)
    with pytest.raises(TypeError, match=f"{OP}: x must be a torch.Tensor, got list"):
        ops.fused_layer_norm([1.0], torch.ones(3), None)
