"""Registration of compiled operators with torch, so that compile, export and autograd see them."""

from collections.abc import Callable

import torch

# One library object per process: torch removes the operators when it is collected.
_LIBRARY = torch.library.Library("ssm", "FRAGMENT")

# Looked up once: is_eager is part of every call.
_is_compiling = torch.compiler.is_compiling
_dispatch_depth = torch._C._len_torch_dispatch_stack
_transform_level = torch._C._functorch.maybe_current_level
_is_grad_enabled = torch.is_grad_enabled
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def is_eager(*tensors: torch.Tensor | None) -> bool:
    """Return whether a call may go to the kernels directly, past torch's dispatcher.

    Args:
        tensors: all tensor arguments of an operator.

    Returns:
        False if a gradient is wanted, while torch traces, transforms or intercepts operators, if
        one is of a tensor subclass or a lazily negated view: then the call must
        go through the registered operator.

    Source:
        A step of decoding is shorter than the dispatcher's way through Python.
    """
    if (
        _is_compiling()
        or _dispatch_depth()
        or _transform_level() is not None
        or (_is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors))
    ):
        return False
    if not _PLAIN.issuperset(map(type, tensors)):
        # A subclass has rules of its own; what is no tensor at all, the kernels refuse by name.
        return not any(isinstance(t, torch.Tensor) and type(t) not in _PLAIN for t in tensors)
    return not any(t is not None and t.is_neg() for t in tensors)


def define(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Register the operator ``ssm::<schema>``.

    Args:
        schema: name, arguments and results in torch's schema language.
        kernel: called with CPU tensors of any strides; allocates and returns the results.
        fake: the same signature for tensors without data: shapes, dtypes and strides only.

    Returns:
        The operator, to be called with positional arguments.

    Source:
        torch.library: the registration interface for operators written outside torch.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
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
