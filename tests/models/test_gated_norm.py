"""ssm.ops.gated_norm on compiled kernels.  Judge: the reference in float64."""

import itertools

import pytest
import torch

from ssm import ops
from ssm.modules.norm import RMSNormGated
from ssm.ops.compiled import gated_norm as compiled
from ssm.ops.python import reference
from ssm.utils import dispatch
from tests.cases import CASES, GatedNormCase
from tests.tensors import FLOATS, count_nodes, gradcheck, gradients, leaves, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "gated_norm"
BY_NAME = {case.name: case for case in CASES[OP]}
SMALL = [
    GatedNormCase(
        f"{'rms' if is_rms else 'layer'}_{given or 'bare'}_{size}_{'norm' if first else 'gate'}",
        *((2, 3, 4), is_rms, given, size, first),
    )
    for is_rms, given, size, first in itertools.product(
        (True, False), ("", "bias z"), (None, 2), (True, False)
    )
]
ODD = ("odd", "gate_first_layer_norm", "groups", "bare")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def exact(arguments: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def integer_gradients(function, arguments: dict) -> dict:
    """Weigh the output with numbers that bfloat16 holds: both sides differentiate the same."""
    arguments = leaves(arguments)
    y = function(**arguments)
    generator = torch.Generator().manual_seed(3)
    (y.double() * torch.randint(-4, 5, y.shape, generator=generator)).sum().backward()
    return {n: v.grad for n, v in arguments.items() if isinstance(v, torch.Tensor)}


def test_dispatch_serves_the_kernels():
    assert dispatch.why(OP) == f"{OP} on cpu: cpu, the cpu kernels are loaded"


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_reference(case, dtype):
    arguments = make_tensors(case, dtype=dtype)
    y = ops.gated_norm(**arguments)
    assert (y.dtype, y.shape) == (dtype, arguments["x"].shape)
    assert_close("y", y, reference.gated_norm(**exact(arguments)), TOLERANCES[OP, name_of(dtype)])


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", [c for c in CASES[OP] if 0 not in c.shape], ids=str)
def test_grad_matches_reference(case, dtype):
    arguments = make_tensors(case, dtype=dtype)
    want = integer_gradients(reference.gated_norm, exact(arguments))
    for name, gradient in integer_gradients(ops.gated_norm, arguments).items():
        assert gradient.dtype == dtype
        assert_close(name, gradient, want[name], TOLERANCES[f"{OP}_bwd", name_of(dtype)])


@pytest.mark.parametrize("case", [c for c in CASES[OP] if 0 in c.shape], ids=str)
def test_empty_shapes_have_gradients(case):
    for name, gradient in gradients(ops.gated_norm, make_tensors(case)).items():
        assert gradient is not None, name
        assert not gradient.any(), name


@pytest.mark.parametrize("low", ["x", "weight", "bias", "z"])
@pytest.mark.parametrize("name", ODD[:3])
def test_mixed_dtypes(name, low):
    arguments = make_tensors(BY_NAME[name], dtype=torch.float32)
    arguments[low] = arguments[low].bfloat16()
    y = ops.gated_norm(**arguments)
    assert y.dtype == arguments["x"].dtype
    want = reference.gated_norm(**exact(arguments))
    assert_close("y", y, want, TOLERANCES[OP, name_of(y.dtype)])
    want = integer_gradients(reference.gated_norm, exact(arguments))
    for which, gradient in integer_gradients(ops.gated_norm, arguments).items():
        assert gradient.dtype == arguments[which].dtype
        assert_close(which, gradient, want[which], TOLERANCES[f"{OP}_bwd", name_of(gradient.dtype)])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(compiled.gated_norm, make_tensors(case))


def test_eps():
    arguments = make_tensors(BY_NAME["groups_gate_first"])
    want = reference.gated_norm(**arguments, eps=0.5)
    assert_close("y", ops.gated_norm(**arguments, eps=0.5), want, TOLERANCES[OP, "float64"])


def test_second_derivative_is_refused():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(
        ops.gated_norm(x, torch.ones(4).double()).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match=f"{OP}: a second derivative must be taken with the ref"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ODD)
def test_noncontiguous(name):
    arguments = make_tensors(BY_NAME[name], dtype=torch.float32)
    assert torch.equal(ops.gated_norm(**strided(arguments)), ops.gated_norm(**arguments))
    want = gradients(ops.gated_norm, arguments)
    for which, got in gradients(ops.gated_norm, strided(arguments)).items():
        assert torch.equal(got, want[which]), which


def test_more_axes_than_the_kernels_take():
    arguments = make_tensors(BY_NAME["groups"], dtype=torch.float32)
    deep = {**arguments, **{n: arguments[n].reshape(2, 1, 1, 1, 1, 3, 36) for n in ("x", "z")}}
    y = ops.gated_norm(**deep)
    assert y.shape == (2, 1, 1, 1, 1, 3, 36)
    assert torch.equal(y.view(2, 3, 36), ops.gated_norm(**arguments))
    want = integer_gradients(ops.gated_norm, arguments)
    for name, got in integer_gradients(ops.gated_norm, deep).items():
        assert torch.equal(got.view(want[name].shape), want[name]), name


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_threads_agree(norm_before_gate):
    case = GatedNormCase("many", (5, 67, 257), False, norm_before_gate=norm_before_gate)
    arguments = make_tensors(case, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            y = ops.gated_norm(**arguments)
            results.append((y, *gradients(ops.gated_norm, arguments).values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", [*SMALL, BY_NAME["no_batch"]], ids=str)
def test_opcheck(case, requires_grad):
    arguments = make_tensors(case, dtype=torch.float32)
    inputs = [arguments.get(n) for n in ("x", "weight", "bias", "z")]
    if requires_grad:
        inputs = [None if t is None else t.requires_grad_() for t in inputs]
    values = (*inputs, case.is_rms, 1e-5, case.group_size, case.norm_before_gate, True)
    torch.library.opcheck(torch.ops.ssm.gated_norm_fwd.default, values)


@pytest.mark.parametrize("name", ODD)
def test_compile(name):
    arguments = make_tensors(BY_NAME[name], dtype=torch.float32)
    function = torch.compile(ops.gated_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(**arguments), ops.gated_norm(**arguments))
    want = gradients(ops.gated_norm, arguments)
    for which, got in gradients(function, arguments).items():
        assert torch.equal(got, want[which]), which


def test_the_module_is_one_call():
    norm = RMSNormGated(12, eps=1e-3, group_size=4, norm_before_gate=False)
    x, z = torch.randn(2, 12, 3, 12).unbind(0)
    nodes = count_nodes(lambda x, z: norm(x, z), {"x": x, "z": z})
    assert sum(n for name, n in nodes.items() if "AccumulateGrad" not in name) == 1, nodes
    want = reference.gated_norm(
        *(x, norm.weight, None, z), eps=1e-3, group_size=4, norm_before_gate=False
    )
    torch.testing.assert_close(norm(x, z), want)


def test_rejects_with_the_sentences_of_the_reference():
    arguments = make_tensors(BY_NAME["groups_gate_first"], dtype=torch.float32)
    wrong = [{"eps": 0.0}, {"eps": -1e-5}, {"eps": float("nan")}, {"x": torch.zeros(())}]
    wrong += [{"group_size": 0}, {"group_size": -17}, {"group_size": 3}]
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            wrong += [{key: value.to(torch.int32)}, {key: value[..., None]}]
            if key != "x":
                wrong.append({key: value[..., :-1]})
    # More axes than kernels take are merged: as many rows of another shape are wrong still.
    deep = {n: arguments[n].expand(1, 1, 1, 1, 2, *arguments[n].shape) for n in ("x", "z")}
    wrong.append({**deep, "z": deep["z"].movedim(3, 4)})
    for change in wrong:
        sentences = []
        for function in (reference.gated_norm, compiled.gated_norm):
            with pytest.raises(ValueError) as caught:
                function(**{**arguments, **change})
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1], change


def test_rejects_what_is_not_a_tensor():
    with pytest.raises(TypeError, match=f"{OP}: weight must be a torch.Tensor, got list"):
        ops.gated_norm(torch.ones(2, 3), [1.0])
    with pytest.raises(TypeError, match=f"{OP}: x must be a torch.Tensor, got list"):
        ops.gated_norm([1.0], torch.ones(3))
