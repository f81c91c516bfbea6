"""The dispatch chooses, falls back and explains.  Judge: backends made for the test."""

import inspect
import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ssm.ops
from ssm.ops.python import reference
from ssm.utils import dispatch
from ssm.utils.dispatch import use_backend, why
from tests.cases import CASES
from tests.tensors import make_tensors

OP = "fused_layer_norm"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Give each test a dispatch that has chosen nothing yet."""
    choices = types.SimpleNamespace()
    monkeypatch.setattr(dispatch, "_choices", choices)
    monkeypatch.setattr(dispatch, "_table", vars(choices))
    monkeypatch.setattr(dispatch, "_attempts", {})
    monkeypatch.setattr(dispatch, "_from_environment", [])
    monkeypatch.delenv("SSM_BACKEND", raising=False)


def install(monkeypatch, ops=dispatch.COMPILED, kernels=("ssm_kernels",)):
    """Make backends that answer with their own name."""
    modules = {}
    for name in kernels:
        module = types.ModuleType(name)
        module.operators = [dispatch.FILES.get(op, op) for op in dispatch.COMPILED]
        module.devices = list
        monkeypatch.setitem(sys.modules, name, module)
    for op in ops:
        name = f"ssm.ops.compiled.{dispatch.FILES.get(op, op)}"
        module = modules.setdefault(name, types.ModuleType(name))
        setattr(module, op, lambda *args, op=op, **kwargs: f"compiled {op}")
        monkeypatch.setitem(sys.modules, name, module)


def uninstall(monkeypatch):
    """Make every import of kernels fail, as where they are not installed."""
    for name in ("ssm_kernels", "ssm_kernels._cuda"):
        monkeypatch.setitem(sys.modules, name, None)


def call():
    x = torch.zeros(2, 3)
    return ssm.ops.fused_layer_norm(x, x[0], None, prenorm=False)


@pytest.mark.parametrize("op", ssm.ops.__all__)
def test_signature_is_that_of_the_reference(op):
    assert inspect.signature(getattr(ssm.ops, op)) == inspect.signature(getattr(reference, op))


@pytest.mark.parametrize("op", ssm.ops.__all__)
def test_passes_every_argument(op, monkeypatch):
    """Each argument arrives under its own name: a marker per parameter is found again."""
    parameters = inspect.signature(getattr(reference, op)).parameters
    seen = {}

    def record(*args, **kwargs):
        bound = inspect.signature(getattr(reference, op)).bind(*args, **kwargs)
        seen.update(bound.arguments)

    monkeypatch.setattr(ssm.ops, "implementation", lambda name, tensor: record)
    marks = {name: object() for name in parameters}
    getattr(ssm.ops, op)(**marks)
    assert seen == marks


@pytest.mark.parametrize("op", ssm.ops.__all__)
def test_python_backend_is_the_reference(op):
    case = CASES[op][1]
    with use_backend("python"):
        got = getattr(ssm.ops, op)(**make_tensors(case))
    want = getattr(reference, op)(**make_tensors(case))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_compiled_serves_where_it_loads(monkeypatch):
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "ssm_kernels._cuda", None)
    assert call() == f"compiled {OP}"
    assert call() == f"compiled {OP}"
    assert why(OP) == f"{OP} on cpu: cpu, the cpu kernels are loaded"
    assert dispatch.has_cpu_kernels()
    assert not dispatch.has_cuda_kernels()
    assert dispatch.get_available_backend() == "cpu"


@pytest.mark.parametrize("op", dispatch.FILES)
def test_operators_that_share_a_file_are_served_from_it(monkeypatch, op):
    install(monkeypatch)
    function = dispatch.implementation(op, torch.zeros(1))
    assert function() == f"compiled {op}"
    assert function is getattr(sys.modules["ssm.ops.compiled.ssd_stages"], op)


def test_operator_without_kernels_is_always_the_reference(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(dispatch, "COMPILED", (OP,))
    case = CASES["ssd_chunk_scan"][0]
    for backend in dispatch.BACKENDS:
        with use_backend(backend):
            assert torch.is_tensor(ssm.ops.ssd_chunk_scan(**make_tensors(case)))
            assert why("ssd_chunk_scan").endswith("python, the operator has no compiled kernels")


def test_falls_back_without_kernels(monkeypatch):
    uninstall(monkeypatch)
    assert torch.is_tensor(call())
    assert not dispatch.has_cpu_kernels()
    assert dispatch.get_available_backend() == "python"
    assert why(OP).startswith(f"{OP} on cpu: python, the cpu kernels did not load: ModuleNotFound")


@pytest.mark.parametrize("fault", [OSError("no such library"), RuntimeError("bad"), KeyError("x")])
def test_falls_back_on_any_fault(monkeypatch, fault):
    def broken(name, package=None):
        if name.startswith("ssm_kernels"):
            raise fault
        return importlib_import(name, package)

    importlib_import = dispatch.importlib.import_module
    monkeypatch.setattr(dispatch.importlib, "import_module", broken)
    assert torch.is_tensor(call())
    assert f"did not load: {type(fault).__name__}: {fault}" in why(OP)


def test_a_fault_is_found_once(monkeypatch):
    uninstall(monkeypatch)
    call()
    install(monkeypatch)
    assert torch.is_tensor(call())


def test_one_broken_operator_leaves_the_others(monkeypatch):
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "ssm.ops.compiled.dw_causal_conv", None)
    assert call() == f"compiled {OP}"
    assert why("dw_causal_conv").startswith(
        "dw_causal_conv on cpu: python, the cpu kernels did not"
    )
    assert not dispatch.has_cpu_kernels()


# Other or older kernels: what the package holds, and which operators the reference serves then.
INCOMPLETE = {
    "": (dispatch.COMPILED, ""),
    "{n: f for n, f in vars(whole).items() if n != 'swiglu_bwd'}": (("swiglu",), "swiglu_bwd"),
    "{n: f for n, f in vars(whole).items() if n != 'gated_norm_bwd_workspace'}": (
        ("gated_norm",),
        "gated_norm_bwd_workspace",
    ),
}


@pytest.mark.parametrize("held", INCOMPLETE, ids=["empty", "no_function", "no_workspace"])
def test_kernels_that_lack_a_function_leave_the_reference(held):
    lost, function = INCOMPLETE[held]
    code = f"""
import sys, types
import ssm_kernels as whole
sys.modules["ssm_kernels"] = types.ModuleType("ssm_kernels")
vars(sys.modules["ssm_kernels"]).update({held})
import torch, ssm.ops
from ssm.utils import dispatch
assert ssm.ops.swiglu(torch.ones(2, 4, requires_grad=True)).shape == (2, 2)
assert not dispatch.has_cpu_kernels()
print(*map(dispatch.why, dispatch.COMPILED), sep="\\n")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for op, line in zip(dispatch.COMPILED, result.stdout.splitlines(), strict=True):
        if op in lost:
            reason = f"ImportError: cannot import name '{function}"
            assert line.startswith(f"{op} on cpu: python, the cpu kernels did not load: {reason}")
        else:
            assert line == f"{op} on cpu: cpu, the cpu kernels are loaded"


def test_use_backend_forces_and_nests(monkeypatch):
    install(monkeypatch)
    with use_backend("python"):
        assert torch.is_tensor(call())
        assert why(OP) == f"{OP} on cpu: python, backend python is forced"
        with use_backend("auto"):
            assert call() == f"compiled {OP}"
        assert torch.is_tensor(call())
    assert call() == f"compiled {OP}"
    with pytest.raises(ZeroDivisionError), use_backend("python"):
        raise ZeroDivisionError
    assert call() == f"compiled {OP}"


def test_use_backend_is_per_thread(monkeypatch):
    install(monkeypatch)
    found = []
    with use_backend("python"):
        thread = threading.Thread(target=lambda: found.append(call()))
        thread.start()
        thread.join()
    assert found == [f"compiled {OP}"]


def test_an_empty_environment_forces_nothing(monkeypatch):
    install(monkeypatch)
    monkeypatch.setenv("SSM_BACKEND", "")
    assert call() == f"compiled {OP}"


def test_environment_forces(monkeypatch):
    install(monkeypatch)
    monkeypatch.setenv("SSM_BACKEND", "python")
    assert torch.is_tensor(call())
    # Read once; only use_backend wins over it.
    monkeypatch.setenv("SSM_BACKEND", "cpu")
    assert torch.is_tensor(call())
    with use_backend("cpu"):
        assert call() == f"compiled {OP}"
    assert torch.is_tensor(call())


def test_cuda_kernels_serve_cuda_tensors(monkeypatch):
    install(monkeypatch, kernels=("ssm_kernels", "ssm_kernels._cuda"))
    assert dispatch.has_cuda_kernels()
    assert why(OP, torch.device("cuda")) == f"{OP} on cuda: cuda, the cuda kernels are loaded"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.get_available_backend() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.get_available_backend() == "cpu"


@pytest.mark.parametrize("faults", [["", ""], ["", "GPU 1 is old"], ["GPU 0 is old"]])
def test_kernels_for_other_gpus_leave_the_reference(monkeypatch, faults):
    install(monkeypatch, kernels=("ssm_kernels", "ssm_kernels._cuda"))
    kernels = sys.modules["ssm_kernels._cuda"]
    kernels.devices = lambda: ["some GPU"] * len(faults)
    kernels.architecture_fault = faults.__getitem__
    serves = not all(faults)
    assert dispatch.has_cuda_kernels() == serves
    said = why(OP, torch.device("cuda"))
    assert said.startswith(f"{OP} on cuda: {'cuda' if serves else 'python'}, ")
    assert serves or said.endswith("did not load: RuntimeError: GPU 0 is old")


def test_operator_without_cuda_kernels_goes_to_the_reference(monkeypatch):
    install(monkeypatch, kernels=("ssm_kernels", "ssm_kernels._cuda"))
    sys.modules["ssm_kernels._cuda"].operators.remove(OP)
    assert dispatch.has_cuda_kernels()
    assert dispatch.has_kernels("cuda", ("swiglu",))
    assert not dispatch.has_kernels("cuda", ("swiglu", OP))
    assert not dispatch.has_kernels("meta", ("swiglu",))
    assert why(OP, torch.device("cuda")).startswith(f"{OP} on cuda: python, the cuda kernels did")


def test_float64_of_a_gpu_goes_to_the_reference(monkeypatch):
    install(monkeypatch, kernels=("ssm_kernels", "ssm_kernels._cuda"))
    with FakeTensorMode():
        wide, narrow = (torch.empty(2, device="cuda", dtype=t) for t in (torch.double, torch.half))
    assert dispatch.implementation(OP, wide) is getattr(reference, OP)
    assert dispatch.implementation(OP, narrow) is not getattr(reference, OP)
    assert why(OP, wide) == f"{OP} on cuda: python, kernels of a GPU compute in float32"
    assert why(OP, narrow) == f"{OP} on cuda: cuda, the cuda kernels are loaded"


def test_other_devices_go_to_the_reference(monkeypatch):
    install(monkeypatch)
    x = torch.zeros(2, 3, device="meta")
    assert ssm.ops.fused_layer_norm(x, x[0], None, prenorm=False).is_meta
    assert why(OP, x) == f"{OP} on meta: python, there are no kernels for device type meta"


def test_what_is_not_a_tensor_is_refused_by_the_reference(monkeypatch):
    install(monkeypatch)
    with pytest.raises(TypeError, match=f"^{OP}: x must be a torch.Tensor, got list$"):
        ssm.ops.fused_layer_norm([1.0], None, None)


UNKNOWN = "must be one of auto, python, cpu, cuda, got 'gpu'"


def test_rejects_unknown_environment(monkeypatch):
    monkeypatch.setenv("SSM_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"^dispatch: SSM_BACKEND {UNKNOWN}$"):
        call()


def test_rejects_unknown_backend():
    with pytest.raises(ValueError, match=f"^dispatch: backend {UNKNOWN}$"), use_backend("gpu"):
        pass


def test_rejects_forced_backend_that_does_not_load(monkeypatch):
    uninstall(monkeypatch)
    with use_backend("cpu"):
        message = f"^{OP}: backend cpu must be loadable when it is forced, got ModuleNotFoundError"
        with pytest.raises(RuntimeError, match=message):
            call()
        assert why(OP).startswith(f"{OP} on cpu: none, {OP}: backend cpu must be loadable")


def test_rejects_tensors_on_another_device_than_forced(monkeypatch):
    install(monkeypatch, kernels=("ssm_kernels", "ssm_kernels._cuda"))
    message = f"^{OP}: tensors must be on cuda when that is forced, got cpu$"
    with use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("op", ["selective_scna", "torch", "_silu", "last_kept"])
def test_why_rejects_unknown_operator(op):
    with pytest.raises(ValueError, match=f"^dispatch: op must name an operator, got '{op}'$"):
        why(op)


@pytest.mark.parametrize("op", ssm.ops.__all__)
def test_compiles_in_one_graph(op):
    torch._dynamo.reset()
    case = next(c for c in reversed(CASES[op]) if str(c) in ("tiny", "packed", "indices"))
    function = getattr(ssm.ops, op)
    want = function(**make_tensors(case))
    got = torch.compile(function, fullgraph=True, backend="eager")(**make_tensors(case))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_compiles_with_several_operators_and_seq_meta():
    torch._dynamo.reset()
    case = next(c for c in CASES["selective_scan"] if str(c) == "packed_holes")
    arguments = make_tensors(case)
    weight = torch.ones(case.dim, 3, dtype=torch.float64)

    def block(u, seq_meta, **rest):
        u = ssm.ops.dw_causal_conv(u, weight, seq_meta=seq_meta)
        y, state = ssm.ops.selective_scan(u, **rest, seq_meta=seq_meta, return_last_state=True)
        return ssm.ops.fused_layer_norm(y.transpose(1, 2), weight[:, 0], None, prenorm=False), state

    want = block(**arguments)
    for got, value in zip(
        torch.compile(block, fullgraph=True, backend="eager")(**arguments), want, strict=True
    ):
        torch.testing.assert_close(got, value)


def test_compiles_under_a_forced_backend(monkeypatch):
    install(monkeypatch)
    torch._dynamo.reset()
    x = torch.randn(2, 3)
    with use_backend("python"):
        compiled = torch.compile(ssm.ops.fused_layer_norm, fullgraph=True, backend="eager")
        assert torch.is_tensor(compiled(x, x[0], None, prenorm=False))


LOADED = "{m for m in sys.modules if m.startswith(('ssm_kernels', 'ssm.ops.compiled'))}"

# Notes the calls of the steps' kernels, which raise `fault` if there is one.
RECORD = """
import ssm_kernels
STEPS = ("dw_causal_conv_step_fwd", "selective_state_step_fwd")
called, fault = [], None

def record(name, kernel):
    def recorded(*args, **kwargs):
        called.append(name)
        if fault:
            raise fault
        return kernel(*args, **kwargs)
    setattr(ssm_kernels, name, recorded)

for name in STEPS:
    record(name, getattr(ssm_kernels, name))
pass"""


@pytest.mark.parametrize(
    ("code", "backend"),
    [
        (f"import ssm, ssm.utils.dispatch; assert not {LOADED}", ""),
        (f"import ssm.ops; assert not {LOADED}", "python"),
        # No call has to load anything.
        (
            f"import ssm.ops, ssm.utils.dispatch as d; a = {LOADED}; assert len(a) > 12, a; "
            f"assert d.has_cpu_kernels(); assert a == {LOADED}",
            "",
        ),
        # The steps are called once, on the CPU whatever the default is, and choose no backend.
        (f"{RECORD}; import ssm.ops; assert called == [*STEPS]", ""),
        (
            f"{RECORD}; import torch; torch.set_default_device('meta'); import ssm.ops, os; "
            "assert called == [*STEPS]; os.environ['SSM_BACKEND'] = 'python'; "
            "assert 'python is forced' in ssm.utils.dispatch.why('selective_state_step')",
            "",
        ),
        (f"{RECORD}; import ssm.ops; assert called == []", "python"),
        # A fault waits for the first use.
        (f"{RECORD}; fault = OSError; import ssm.ops; assert called == [STEPS[0]]", ""),
        ("sys.modules['ssm_kernels'] = None; import ssm.ops", ""),
        ("import ssm.ops", "nonsense"),
    ],
)
def test_what_importing_loads(code, backend):
    env = {**os.environ, "SSM_BACKEND": backend}
    code = f"import sys\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""
