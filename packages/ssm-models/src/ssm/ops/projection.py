"""Calls a projection in the way that is fastest for its number of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ssm.ops.compiled.library import is_eager

# A weight of fewer elements stays in the caches, where torch's own way is as good as any.
_LARGE = 1 << 18
# Up to here a product is bound by reading the weight.
_FEW_ROWS = 4
# Parts of a weight, for the threads; more than two gain nothing where there are two.
_PARTS = (8, 4, 2)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """Call a projection.

    Args:
        linear: nn.Linear or what replaced it. It is called, unless it is an nn.Linear without
            hooks: then nothing but the product can tell the difference.
        x: (..., D_in), floating point.

    Returns:
        (..., D_out).

    Source:
        Measured, two threads: torch reads a float32 weight with 13 GB/s for one row, and with 35 if
        it is asked for parts of it; for many rows oneDNN is a tenth to a fifth faster.
    """
    return multiply(x, linear.weight, linear.bias) if _is_plain(linear) else linear(x)


@contextlib.contextmanager
def projected(linear: nn.Module) -> Iterator[None]:
    """Let others who call a projection in this block call :func:`project` instead.

    Args:
        linear: as of :func:`project`.

    Yields:
        None.
    """
    if not _is_plain(linear):
        yield
        return
    vars(linear)["forward"] = lambda x: multiply(x, linear.weight, linear.bias)
    try:
        yield
    finally:
        # Another thread in such a block may have been first; the product is the same without.
        vars(linear).pop("forward", None)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x @ weight.T + bias``.

    Args:
        x: (..., D_in), floating point.
        weight: (D_out, D_in).
        bias: (D_out,) or None.

    Returns:
        (..., D_out).
    """
    if not _is_ours(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return _Product.apply(x, weight, bias)
    return _multiply(x, weight, bias)


class _Product(torch.autograd.Function):
    """The product with its gradients, which are torch's own products."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        return (
            dy @ weight if wants_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    width, inner = weight.shape
    rows = x.numel() // inner
    if rows > _FEW_ROWS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    parts = next((n for n in _PARTS if width % n == 0), 1)
    columns = x.reshape(rows, inner).t().expand(parts, inner, rows)
    y = torch.bmm(weight.view(parts, width // parts, inner), columns)
    y = y.view(width, rows).t().contiguous().view(*x.shape[:-1], width)
    return y if bias is None else y + bias


def _is_plain(linear: nn.Module) -> bool:
    """Return whether to call a projection is to multiply, and nothing else."""
    if type(linear) is not nn.Linear or torch.compiler.is_compiling():
        return False
    held = vars(linear)
    if "forward" in held:
        return False
    hooked = any(held[name] for name in _HOOKS)
    return not hooked and not any(getattr(torch_modules, name) for name in _GLOBAL_HOOKS)


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the product may be taken in another way than torch's own."""
    return (
        weight.numel() >= _LARGE
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and _is_eager(x, weight, bias)
    )


def _is_eager(*tensors: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return is_eager(*tensors)
    with torch.no_grad():  # a gradient does not matter here
        return is_eager(*tensors)
