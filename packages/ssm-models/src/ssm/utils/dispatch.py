"""Which implementation serves an operator, and why: table (operator, device type) -> function.

A compiled operator is ``ssm.ops.compiled.<op>.<op>``; where it cannot be loaded, for whatever
reason, the reference serves and the reason is kept for :func:`why`. Kernels of the CPU are loaded
with ``ssm.ops``, those of a GPU when they are first used. ``SSM_BACKEND`` (auto, python, cpu, cuda)
is read once, at first use.
"""

import contextlib
import contextvars
import functools
import importlib
import os
import types
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.autograd import forward_ad

BACKENDS = ("auto", "python", "cpu", "cuda")
# Operators that share a file in every layer -> the name of that file.
FILES = dict.fromkeys(
    (
        "ssd_chunk_cumsum",
        "ssd_chunk_state",
        "ssd_state_passing",
        "ssd_bmm_chunk",
        "ssd_chunk_output",
    ),
    "ssd_stages",
)
# Operators that have a compiled cell; all others are served by the reference on every device.
COMPILED = (
    "selective_scan",
    "selective_state_step",
    "dw_causal_conv",
    "dw_causal_conv_step",
    "fused_layer_norm",
    "ssd_chunk_scan",
    "gated_norm",
    "swiglu",
    *FILES,
)
OPERATORS = COMPILED
# The extension module that holds the kernels of a device type.
_KERNELS = {"cpu": "ssm_kernels", "cuda": "ssm_kernels._cuda"}

# Looked up once: they are part of every call.
_is_compiling = torch.compiler.is_compiling
_transform_level = torch._C._functorch.maybe_current_level
_GRAD = torch._C._functorch.TransformType.Grad

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("ssm_backend", default=None)
# The choices made: "op:device", and "op:device:backend" where use_backend forces one.
# Attributes, because dynamo looks at a dictionary only once per trace.
_choices = types.SimpleNamespace()
_table: dict[str, Callable] = vars(_choices)
_attempts: dict[tuple[str, str], Callable | str] = {}  # a loaded function, or why it is not there
_from_environment: list[str] = []  # SSM_BACKEND, once read


def _named(backend: object, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(
            f"dispatch: {source} must be one of {', '.join(BACKENDS)}, got {backend!r}"
        )
    return backend


def _environment() -> str:
    if not _from_environment:
        _from_environment.append(_named(os.environ.get("SSM_BACKEND") or "auto", "SSM_BACKEND"))
    return _from_environment[0]


def _is_too_wide(tensor: torch.Tensor) -> bool:
    """Return whether a tensor of a GPU is float64: its kernels compute in float32."""
    return tensor.is_cuda and tensor.dtype == torch.float64


def _is_derivative() -> bool:
    """Return whether a derivative is taken that kernels do not have.

    Theirs is the backward of autograd. Without a rule for it torch would give a zero for the
    forward mode, silently, and stop inside at a transform of ``torch.func``. ``torch.vmap`` alone
    calls the kernels row by row.
    """
    if forward_ad._current_level >= 0:  # also inside of torch.func.jvp
        return True
    if _transform_level() is None:
        return False
    return any(level.key() == _GRAD for level in torch._C._functorch.get_interpreter_stack())


def _reference(op: str) -> Callable:
    return getattr(importlib.import_module("ssm.ops.python.reference"), op)


def _load(op: str, device_type: str) -> Callable | str:
    """Return the compiled operator, or the reason why there is none; tried once."""
    key = (op, device_type)
    if key not in _attempts:
        try:
            kernels, file = importlib.import_module(_KERNELS[device_type]), FILES.get(op, op)
            if device_type == "cuda" and file not in kernels.operators:
                raise NotImplementedError("this version of ssm-kernels has none of this operator")
            if device_type == "cuda":
                _require_architecture(kernels)
            _attempts[key] = getattr(importlib.import_module(f"ssm.ops.compiled.{file}"), op)
        except Exception as error:  # any fault of a backend must leave the reference usable
            _attempts[key] = f"{type(error).__name__}: {error}"
    return _attempts[key]


def _require_architecture(kernels: types.ModuleType) -> None:
    """Raise if the kernels are built for none of the GPUs that there are.

    On one of several GPUs that they are not built for, a call says so.
    """
    faults = [kernels.architecture_fault(index) for index in range(len(kernels.devices()))]
    if faults and all(faults):
        raise RuntimeError(faults[0])


def _choose(op: str, device_type: str, backend: str) -> tuple[Callable, str]:
    """Return the implementation and a sentence saying why it was chosen."""
    reference = _reference(op)
    if op not in COMPILED:
        return reference, "the operator has no compiled kernels"
    if backend == "python":
        return reference, "backend python is forced"
    if device_type not in _KERNELS:
        return reference, f"there are no kernels for device type {device_type}"
    if backend != "auto" and backend != device_type:
        raise RuntimeError(
            f"{op}: tensors must be on {backend} when that is forced, got {device_type}"
        )
    loaded = _load(op, device_type)
    if callable(loaded):
        return loaded, f"the {device_type} kernels are loaded"
    if backend != "auto":
        raise RuntimeError(
            f"{op}: backend {backend} must be loadable when it is forced, got {loaded}"
        )
    return reference, f"the {device_type} kernels did not load: {loaded}"


def _resolve(op: str, device_type: str) -> str:
    """Choose, remember the choice in ``_table`` and return its key there."""
    backend = "python" if _is_derivative() else _forced.get()
    function, _ = _choose(op, device_type, backend or _environment())
    key = f"{op}:{device_type}" if backend is None else f"{op}:{device_type}:{backend}"
    _table[key] = function
    return key


# Dynamo runs _resolve while tracing and keeps the result, a string, as a constant: nothing inside
# is traceable, and a function could not be kept. This is the mark that
# torch.compiler.assume_constant_result sets; calling it would import dynamo, a second of start-up.
_resolve._dynamo_marked_constant = True


def implementation(op: str, tensor: torch.Tensor) -> Callable:
    """Return the function that serves an operator for a tensor.

    Args:
        op: name of the operator.
        tensor: its main input, any shape and dtype; only its device type is looked at. What is not
            a tensor goes to the reference, which refuses it.

    Returns:
        The function; it has the signature of ``ssm.ops.python.reference.<op>``.

    Raises:
        ValueError: SSM_BACKEND is not a backend.
        RuntimeError: a backend is forced that cannot serve the tensor.

    Source:
        This project's design: the best loadable backend serves, the reference always can.
    """
    if not isinstance(tensor, torch.Tensor):
        device_type = "none"
    else:  # a device alone costs as much as all the rest here
        device_type = "cpu" if tensor.is_cpu else tensor.device.type
    if device_type == "cuda" and _is_too_wide(tensor):
        return _reference(op)
    if _is_compiling():
        return getattr(_choices, _resolve(op, device_type))
    if _forced.get() is None and not _is_derivative():
        function = _table.get(f"{op}:{device_type}")
        if function is not None:
            return function
    return _table[_resolve(op, device_type)]


def load_cpu_kernels() -> None:
    """Load what serves tensors of the CPU, unless SSM_BACKEND asks for the reference.

    Raises nothing: what does not load is served by the reference, and :func:`why` says so.

    Source:
        This project's design: the first call is at steady speed.
    """
    if os.environ.get("SSM_BACKEND") != "python" and has_cpu_kernels():
        _call_steps()


def _call_steps() -> None:
    """Call the steps of decoding once, on one thread.

    They take microseconds, and what the first call in a process has to find, pages of the library,
    tables of torch and the way through here, takes ten times as long. The choices of later calls
    are still to be made: ``SSM_BACKEND`` may be set until then.
    """
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device="cpu")
    # Whoever calls next will hear of a fault.
    with contextlib.suppress(Exception), torch.no_grad(), _forcing("cpu"):
        lines, states = zeros(1, 64), zeros(64, 16)
        row, matrix = lines[0], states[:1]
        implementation("dw_causal_conv_step", lines)(lines, zeros(1, 64, 4), states[:, :4], row)
        implementation("selective_state_step", lines)(
            zeros(1, 64, 16), lines, lines, states, matrix, matrix, row, lines, row
        )


def has_cpu_kernels() -> bool:
    """Return whether compiled CPU kernels can be loaded.

    Returns:
        True if every operator of the compiled set loads for the CPU.

    Source:
        API document of this project, section Utils.
    """
    return has_kernels("cpu")


def has_cuda_kernels() -> bool:
    """Return whether compiled CUDA kernels can be loaded.

    Returns:
        True if some operator loads for CUDA; :func:`why` says which do not, and the reference
        serves those. Does not ask for a GPU.

    Source:
        API document of this project, section Utils.
    """
    return any(has_kernels("cuda", (op,)) for op in COMPILED)


def has_kernels(device_type: str, ops: Iterable[str] = COMPILED) -> bool:
    """Return whether compiled kernels of some operators can be loaded.

    Args:
        device_type: such as "cuda".
        ops: names of operators.

    Returns:
        True if all of them load. Does not ask for a device.

    Source:
        This project's design: any failure to load a backend leaves the reference usable.
    """
    return device_type in _KERNELS and all(callable(_load(op, device_type)) for op in ops)


def get_available_backend() -> str:
    """Return the best backend that this machine can use.

    Returns:
        "cuda" if the CUDA kernels load and there is a GPU, else "cpu" if the CPU kernels load, else
        "python". A forced backend is not looked at.

    Source:
        API document of this project, section Utils.
    """
    if has_cuda_kernels() and torch.cuda.is_available():
        return "cuda"
    return "cpu" if has_cpu_kernels() else "python"


def why(op: str, where: torch.Tensor | torch.device | str = "cpu") -> str:
    """Say which implementation serves an operator, and why not another.

    Args:
        op: name of the operator.
        where: a tensor, any shape and dtype, or a device.

    Returns:
        One line, such as ``selective_scan on cpu: python, the cpu kernels did not load: ...``.

    Raises:
        ValueError: the operator or the device is unknown, or SSM_BACKEND is not a backend.

    Source:
        This project's design: any failure to load a backend is recorded and shown.
    """
    device = where.device if isinstance(where, torch.Tensor) else torch.device(where)
    if op not in OPERATORS:
        raise ValueError(f"dispatch: op must name an operator, got {op!r}")
    if isinstance(where, torch.Tensor) and _is_too_wide(where):
        return f"{op} on {device.type}: python, kernels of a GPU compute in float32"
    forced = _forced.get()
    try:
        function, reason = _choose(op, device.type, forced or _environment())
    except RuntimeError as error:
        return f"{op} on {device.type}: none, {error}"
    name = "python" if function is _reference(op) else device.type
    return f"{op} on {device.type}: {name}, {reason}"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend in a ``with`` block, in this thread or task only; wins over SSM_BACKEND.

    A function compiled by ``torch.compile`` keeps the backend it was traced under.

    Args:
        name: "auto", "python", "cpu" or "cuda".

    Raises:
        ValueError: not a backend.

    Source:
        This project's design: tests compare implementations with one another.

    Example:
        >>> with use_backend("python"):
        ...     y = ssm.ops.selective_scan(u, delta, A, B, C)
    """
    with _forcing(_named(name, "backend")):
        yield


def backends_of_checkpoint() -> tuple[
    contextlib.AbstractContextManager, contextlib.AbstractContextManager
]:
    """Return the contexts of a forward pass and of its repetition: both have the same backend.

    For the ``context_fn`` of ``torch.utils.checkpoint``: a backward pass may run under another
    ``use_backend``, or in another thread, and other operators would save other tensors.

    Returns:
        Two context managers.

    Source:
        torch.utils.checkpoint.
    """
    return contextlib.nullcontext(), _forcing(_forced.get())


@contextlib.contextmanager
def _forcing(name: str | None) -> Iterator[None]:
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
