"""Registration of compiled operators with torch, so that compile, export and autograd see them."""

from collections.abc import Callable

import torch

# One library object per process: torch removes the operators when it is collected.
_LIBRARY = torch.library.Library("ssm", "FRAGMENT")

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def is_eager(*tensors: torch.Tensor | None) -> bool:
    """Return whether a call may go to the kernels directly, past torch's dispatcher.

    Args:
        tensors: all tensor arguments of an operator.

    Returns:
        False if a gradient is wanted, while torch traces, transforms or intercepts operators, or
        if the first is no plain tensor or one is a lazily negated view: then the call must go
        through the registered operator.

    Source:
        A step of decoding is shorter than the dispatcher's way through Python.
    """
    if (
        type(tensors[0]) is not torch.Tensor
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return False
    wanted = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) in _PLAIN:
            if tensor is not None and ((wanted and tensor.requires_grad) or tensor.is_neg()):
                return False
        elif isinstance(tensor, torch.Tensor):
            return False  # a subclass; what is no tensor at all, the kernels refuse by name
    return True


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
