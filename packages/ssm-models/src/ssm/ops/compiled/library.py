"""Registration of compiled operators with torch, so that compile, export and autograd see them."""

import functools
import inspect
import math
import sys
from collections.abc import Callable

import torch
from torch.autograd import forward_ad as _forward_ad

from ssm.ops.python import reference

# One library object per process: torch removes the operators when it is collected.
_LIBRARY = torch.library.Library("ssm", "FRAGMENT")

# Looked up once: is_eager is part of every call.
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing  # by torch.jit.trace
_dispatch_depth = torch._C._len_torch_dispatch_stack
_transform_level = torch._C._functorch.maybe_current_level
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped = torch._C._functorch.get_unwrapped
_is_grad_enabled = torch.is_grad_enabled
num_threads = torch.get_num_threads
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def is_eager(*tensors: torch.Tensor | None) -> bool:
    """Return whether a call may go to the kernels directly, past torch's dispatcher.

    Args:
        tensors: all tensor arguments of an operator.

    Returns:
        False if a gradient is wanted, while torch traces, transforms or intercepts operators, or if
        one is of a tensor subclass: then the call must go through the registered operator.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: tensors are on several devices. :func:`refuse_as` says which, in both cases.

    Source:
        A step of decoding is shorter than the dispatcher's way through Python.
    """
    if _is_compiling() or _is_tracing() or _dispatch_depth() or _transform_level() is not None:
        return False
    if _forward_ad._current_level >= 0:  # a tensor may carry a tangent
        return False
    if _is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors):
        # With one on the meta device, torch would call the fake kernel and return no data.
        if len({getattr(t, "device", None) for t in tensors if t is not None}) > 1:
            raise ValueError("tensors must be on one device, got several")
        return False
    if _PLAIN.issuperset(map(type, tensors)):  # a loop here costs as much as a small kernel
        return True
    if all(t is None or isinstance(t, torch.Tensor) for t in tensors):
        return False  # a subclass has rules of its own
    raise TypeError("tensors must be torch.Tensor, got something else")  # kernels would take them


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Return whether a backward will follow, for which a forward has to save what it needs.

    Args:
        tensors: all differentiable arguments of an operator.

    Source:
        Inside torch.vmap a tensor does not tell; the one that it stands for does.
    """
    if not _is_grad_enabled():
        return False
    if not _is_compiling() and _transform_level() is not None:
        tensors = tuple(map(_innermost, tensors))
    return any(getattr(t, "requires_grad", False) for t in tensors)


def _innermost(tensor: torch.Tensor | None) -> torch.Tensor | None:
    while isinstance(tensor, torch.Tensor) and _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    return tensor


def may_update(state: torch.Tensor, *inputs: torch.Tensor | None) -> bool:
    """Return whether a kernel may update a state in place.

    Args:
        state: what it is to write.
        inputs: the other differentiable arguments of the operator.

    Returns:
        False if a backward will follow, which a step has not; inside torch.vmap, which takes no
        operator that writes; if the state is a lazily negated view, which a kernel cannot write.

    Source:
        torch.Tensor.is_neg and the levels of torch.func; traced code has neither.
    """
    if wants_gradient(state, *inputs):
        return False
    if _is_compiling():
        return True
    return _transform_level() is None and not (isinstance(state, torch.Tensor) and state.is_neg())


def refuse_as(check: Callable) -> Callable:
    """Make an operator refuse what is wrong with the sentences of its reference.

    Nothing is checked beforehand: kernels, allocations and torch's dispatcher refuse in words of
    their own, and only then ``check`` is asked for the sentence. Views that torch negates when they
    are read are right, but kernels refuse them; the reference serves.

    Args:
        check: of ``ssm.ops.python.check``. Its parameters are named as those of the operator.

    Returns:
        A decorator. What ``check`` finds nothing wrong with, is raised as it was.

    Source:
        This project's design: an operator says the same on every backend.
    """
    names = tuple(inspect.signature(check).parameters)

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def served(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception:
                if _is_compiling():
                    raise
                given = signature.bind(*args, **kwargs)
                given.apply_defaults()
                try:
                    check(*(given.arguments[name] for name in names))
                except (TypeError, ValueError) as error:
                    raise error from None
                tensors = (t for t in given.arguments.values() if isinstance(t, torch.Tensor))
                if any(t.is_neg() for t in tensors):
                    return getattr(reference, function.__name__)(*given.args, **given.kwargs)
                raise

        return served

    return decorate


def stream(tensor: torch.Tensor) -> int:
    """Return the handle of torch's current stream where a tensor is; 0 on the CPU.

    Source:
        This project's design: kernels are given their stream.
    """
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def workspace(tensor: torch.Tensor, size: Callable, *inputs) -> torch.Tensor | None:
    """Return the working memory of a kernel; None where it needs none, as on the CPU.

    Args:
        tensor: the main input.
        size: says how many bytes the kernel needs on a GPU, from ``inputs``.
        inputs: what ``size`` takes.

    Source:
        This project's design: kernels allocate nothing.
    """
    if tensor.is_cuda and (count := size(*inputs)):
        return tensor.new_empty(count, dtype=torch.uint8)
    return None


def flat_size(shape: tuple[int, ...]) -> int:
    """Return the length of a tensor of one axis that has room for what a forward keeps.

    Args:
        shape: (B, parts of the sequence, ...); the first two sizes may be symbolic.

    Source:
        torch.export asks of every size whether it is 1, and of the number of parts it learns so
        how long the sequence is at most. Of a multiple of the other sizes it knows that it is more,
        or where these are 1, of two more than the parts.
    """
    width = math.prod(shape[2:])
    return shape[0] * shape[1] * width if width != 1 else shape[0] * shape[1] + 2


def unflatten(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the view of this shape of a tensor whose length is :func:`flat_size` of it."""
    return tensor[: math.prod(shape)].view(shape)


def finite(bound: float) -> float:
    """Return a bound, or for an infinite one the largest float of its sign.

    Source:
        torch's ahead-of-time compiler writes an infinite constant as what it cannot read again.
    """
    return min(max(bound, -sys.float_info.max), sys.float_info.max)


def unbounded(bound: float) -> float:
    """Return what :func:`finite` was given."""
    return math.copysign(math.inf, bound) if abs(bound) == sys.float_info.max else bound


def define(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Register the operator ``ssm::<schema>``.

    Args:
        schema: name, arguments and results in torch's schema language.
        kernel: called with CPU or CUDA tensors of any strides; allocates and returns the results.
        fake: the same signature for tensors without data: shapes, dtypes and strides only.

    Returns:
        The operator, to be called with positional arguments.

    Source:
        torch.library: the registration interface for operators written outside torch.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"ssm::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ssm, name).default


def differentiate(name: str, setup_context: Callable, backward: Callable) -> None:
    """Register the gradient of ``ssm::<name>``.

    Args:
        name: a defined operator.
        setup_context: keeps what the backward needs.
        backward: one gradient per argument, None where there is none.

    Source:
        torch.library.register_autograd.
    """
    torch.library.register_autograd(
        f"ssm::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def refuse_second_gradient(name: str) -> None:
    """Make a gradient through ``ssm::<name>``, itself a backward operator, an error.

    Args:
        name: a defined backward operator. Without this, torch would return wrong zeros silently.

    Source:
        torch.library.register_autograd.
    """

    def backward(ctx, *gradients):
        raise RuntimeError(
            f"{name.removesuffix('_bwd')}: a second derivative must be taken with the reference "
            "(ssm.utils.dispatch.use_backend('python')), got a compiled backward"
        )

    torch.library.register_autograd(f"ssm::{name}", backward, lib=_LIBRARY)
