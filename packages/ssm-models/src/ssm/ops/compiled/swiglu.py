"""SwiGLU between torch and ``ssm_kernels``: allocation, gradients, shapes.

The backward reads the inputs again: nothing else is kept.
"""

import torch
from ssm_kernels import swiglu_bwd, swiglu_fwd

from ssm.ops.compiled.library import (
    define,
    differentiate,
    is_eager,
    num_threads,
    refuse_as,
    refuse_second_gradient,
    stream,
)
from ssm.ops.python import check

_MOST_AXES = 6  # that the kernels take


def _allocate(gate, up=None):
    """Return an empty y. What the kernel will refuse, it refuses by name."""
    if up is not None or gate.ndim == 0:
        return torch.empty_like(gate)
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))


def _forward(gate, up):
    y = _allocate(gate, up)
    swiglu_fwd(gate, up, y=y, num_threads=num_threads(), stream=stream(gate))
    return y


def _allocate_gradients(gate, up, dy):
    """Return empty dgate and dup; without up, dup has no element."""
    return torch.empty_like(gate), gate.new_empty(0) if up is None else torch.empty_like(up)


def _backward_kernel(gate, up, dy):
    dgate, dup = _allocate_gradients(gate, up, dy)
    swiglu_bwd(
        gate,
        up,
        dy=dy,
        dgate=dgate,
        dup=None if up is None else dup,
        num_threads=num_threads(),
        stream=stream(gate),
    )
    return dgate, dup


_fwd = define("swiglu_fwd(Tensor gate, Tensor? up) -> Tensor", _forward, _allocate)
_bwd = define(
    "swiglu_bwd(Tensor gate, Tensor? up, Tensor dy) -> (Tensor dgate, Tensor dup)",
    _backward_kernel,
    _allocate_gradients,
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    gate, up = ctx.saved_tensors
    dgate, dup = _bwd(gate, up, dy)
    return dgate, None if up is None else dup


differentiate("swiglu_fwd", _setup_context, _backward)
refuse_second_gradient("swiglu_bwd")


@refuse_as(check.swiglu)
def swiglu(gate, up=None):
    """Run SwiGLU on compiled kernels; contract: ``ssm.ops.python.reference``."""
    if isinstance(gate, torch.Tensor) and gate.ndim > _MOST_AXES:
        shape = gate.shape[:-1]
        if up is not None and up.shape == gate.shape:
            up = up.flatten(0, -2)
        return swiglu(gate.flatten(0, -2), up).unflatten(0, shape)
    return (_forward if is_eager(gate, up) else _fwd)(gate, up)
