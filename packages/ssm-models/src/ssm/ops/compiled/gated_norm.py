"""The gated norm between torch and ``ssm_kernels``: allocation, gradients, shapes.

Kept for the backward: the inputs, and per group the mean and the reciprocal deviation.
"""

import math

import torch
from ssm_kernels import gated_norm_bwd, gated_norm_bwd_workspace, gated_norm_fwd

from ssm.ops.compiled.library import (
    define,
    differentiate,
    is_eager,
    num_threads,
    refuse_as,
    refuse_second_gradient,
    stream,
    wants_gradient,
    workspace,
)
from ssm.ops.python import check
from ssm.ops.python.arithmetic import acc_dtype

_MOST_AXES = 6  # that the kernels take


def _allocate(x, is_rms, group_size, save):
    """Return empty y, mean and rstd; what is not asked for has no element."""
    groups = 0
    if save:
        groups = math.prod(x.shape[:-1])
        if group_size is not None:
            groups = groups * (x.shape[-1] // group_size)
    acc = acc_dtype(x)
    mean = x.new_empty(0 if is_rms else groups, dtype=acc)
    return torch.empty_like(x), mean, x.new_empty(groups, dtype=acc)


def _launch(x, weight, bias, z, is_rms, eps, group_size, norm_before_gate, y, mean=None, rstd=None):
    gated_norm_fwd(
        x,
        weight,
        bias,
        z,
        y=y,
        mean=mean,
        rstd=rstd,
        is_rms=is_rms,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        num_threads=num_threads(),
        stream=stream(x),
    )


def _forward(x, weight, bias, z, is_rms, eps, group_size, norm_before_gate, save):
    y, mean, rstd = _allocate(x, is_rms, group_size, save)
    _launch(
        *(x, weight, bias, z, is_rms, eps, group_size, norm_before_gate, y),
        mean=mean if save and not is_rms else None,
        rstd=rstd if save else None,
    )
    return y, mean, rstd


def _direct(x, *rest):
    """Return y without the statistics and past the dispatcher."""
    y = torch.empty_like(x)
    _launch(x, *rest, y)
    return y


def _forward_fake(x, weight, bias, z, is_rms, eps, group_size, norm_before_gate, save):
    return _allocate(x, is_rms, group_size, save)


def _allocate_gradients(x, weight, bias, z, *_):
    """Return empty dx, dweight, dbias and dz; what is not asked for has no element."""
    none = x.new_empty
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        none(0) if bias is None else torch.empty_like(bias),
        none(0) if z is None else torch.empty_like(z),
    )


def _backward_kernel(x, weight, bias, z, mean, rstd, dy, is_rms, group_size, norm_before_gate):
    gradients = _allocate_gradients(x, weight, bias, z)
    dx, dweight, dbias, dz = gradients
    gated_norm_bwd(
        x,
        weight,
        bias,
        z,
        mean=None if is_rms else mean,
        rstd=rstd,
        dy=dy,
        dx=dx,
        dz=None if z is None else dz,
        dweight=dweight,
        dbias=None if bias is None else dbias,
        is_rms=is_rms,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        num_threads=num_threads(),
        stream=stream(x),
        workspace=workspace(x, gated_norm_bwd_workspace, x, group_size),
    )
    return gradients


_fwd = define(
    "gated_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? z, bool is_rms, float eps, "
    "SymInt? group_size, bool norm_before_gate, bool save) -> (Tensor y, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
_bwd = define(
    "gated_norm_bwd(Tensor x, Tensor weight, Tensor? bias, Tensor? z, Tensor mean, Tensor rstd, "
    "Tensor dy, bool is_rms, SymInt? group_size, bool norm_before_gate) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dz)",
    _backward_kernel,
    _allocate_gradients,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, z, ctx.is_rms, _, ctx.group_size, ctx.norm_before_gate, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, z, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    x, weight, bias, z, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, dz = _bwd(
        *(x, weight, bias, z, mean, rstd, dy),
        ctx.is_rms,
        ctx.group_size,
        ctx.norm_before_gate,
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if z is None else dz,
        *(None,) * 5,
    )


differentiate("gated_norm_fwd", _setup_context, _backward)
refuse_second_gradient("gated_norm_bwd")


@refuse_as(check.gated_norm)
def gated_norm(
    x,
    weight,
    bias=None,
    z=None,
    *,
    is_rms=True,
    eps=1e-5,
    group_size=None,
    norm_before_gate=True,
):
    """Run the gated norm on compiled kernels; contract: ``ssm.ops.python.reference``."""
    if group_size is not None:
        check.check_int("gated_norm", "group_size", group_size, 1)
    if isinstance(x, torch.Tensor) and x.ndim > _MOST_AXES:
        if z is not None and z.shape == x.shape:
            z = z.flatten(0, -2)
        y = gated_norm(
            x.flatten(0, -2),
            weight,
            bias,
            z,
            is_rms=is_rms,
            eps=eps,
            group_size=group_size,
            norm_before_gate=norm_before_gate,
        )
        return y.view(x.shape)
    inputs = (x, weight, bias, z)
    check.check_positive("gated_norm", "eps", eps)
    options = (bool(is_rms), eps, group_size, bool(norm_before_gate))
    if is_eager(*inputs):
        return _direct(*inputs, *options)
    save = wants_gradient(*inputs)
    return _fwd(*inputs, *options, save)[0]
