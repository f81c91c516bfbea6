"""The fused norm between torch and ``ssm_kernels``: allocation, gradients, shapes.

The backward needs the sum s unrounded. It is what was returned where that has the accumulate dtype,
x itself without a residual, and otherwise x and the residual, which the kernel adds again.
"""

import math

import torch
from ssm_kernels import fused_layer_norm_bwd, fused_layer_norm_bwd_workspace, fused_layer_norm_fwd

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


def _allocate(x, is_rms, sum_dtype, save):
    """Return empty y, s, mean and rstd; what is not asked for has no element."""
    rows, acc = math.prod(x.shape[:-1]), acc_dtype(x)
    return (
        torch.empty_like(x),
        x.new_empty(0) if sum_dtype is None else torch.empty_like(x, dtype=sum_dtype),
        x.new_empty(rows if save and not is_rms else 0, dtype=acc),
        x.new_empty(rows if save else 0, dtype=acc),
    )


def _launch(x, weight, bias, residual, is_rms, eps, y, s, mean=None, rstd=None):
    fused_layer_norm_fwd(
        x,
        weight,
        bias,
        residual,
        y=y,
        residual_out=s,
        mean=mean,
        rstd=rstd,
        is_rms=is_rms,
        eps=eps,
        num_threads=num_threads(),
        stream=stream(x),
    )


def _forward(x, weight, bias, residual, is_rms, eps, sum_dtype, save):
    y, s, mean, rstd = _allocate(x, is_rms, sum_dtype, save)
    _launch(
        *(x, weight, bias, residual, is_rms, eps, y),
        s=None if sum_dtype is None else s,
        mean=mean if save and not is_rms else None,
        rstd=rstd if save else None,
    )
    return y, s, mean, rstd


def _direct(x, weight, bias, residual, is_rms, eps, sum_dtype):
    """Return y and s, or None, without the statistics and past the dispatcher."""
    y = torch.empty_like(x)
    s = None if sum_dtype is None else torch.empty_like(x, dtype=sum_dtype)
    _launch(x, weight, bias, residual, is_rms, eps, y, s)
    return y, s


def _forward_fake(x, weight, bias, residual, is_rms, eps, sum_dtype, save):
    return _allocate(x, is_rms, sum_dtype, save)


def _allocate_gradients(s, weight, bias_dtype, residual, x_dtype, *_):
    """Return empty dx, dresidual, dweight and dbias; what is not asked for has no element."""
    return (
        torch.empty_like(s, dtype=x_dtype),
        s.new_empty(0) if residual is None else torch.empty_like(s, dtype=residual),
        torch.empty_like(weight),
        weight.new_empty(0) if bias_dtype is None else torch.empty_like(weight, dtype=bias_dtype),
    )


def _backward_kernel(
    s, weight, bias_dtype, dresidual_dtype, x_dtype, residual, mean, rstd, dy, ds, is_rms
):
    gradients = _allocate_gradients(s, weight, bias_dtype, dresidual_dtype, x_dtype)
    dx, dresidual, dweight, dbias = gradients
    fused_layer_norm_bwd(
        s,
        weight,
        residual,
        mean=None if is_rms else mean,
        rstd=rstd,
        dy=dy,
        dresidual_out=ds,
        dx=dx,
        dresidual=None if dresidual_dtype is None else dresidual,
        dweight=dweight,
        dbias=None if bias_dtype is None else dbias,
        is_rms=is_rms,
        num_threads=num_threads(),
        stream=stream(s),
        workspace=workspace(s, fused_layer_norm_bwd_workspace, s),
    )
    return gradients


def _backward_fake(*args):
    return _allocate_gradients(*args)


_fwd = define(
    "fused_layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool is_rms, "
    "float eps, ScalarType? sum_dtype, bool save) -> "
    "(Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
_bwd = define(
    "fused_layer_norm_bwd(Tensor s, Tensor weight, ScalarType? bias_dtype, "
    "ScalarType? dresidual_dtype, ScalarType x_dtype, Tensor? residual, Tensor mean, Tensor rstd, "
    "Tensor dy, Tensor? ds, bool is_rms) -> "
    "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, ctx.is_rms, _, sum_dtype, _ = inputs
    _, s, mean, rstd = output
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    if residual is not None and sum_dtype == acc_dtype(x):
        ctx.save_for_backward(s, None, weight, mean, rstd)
    else:
        ctx.save_for_backward(x, residual, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, ds, *_):
    s, residual, weight, mean, rstd = ctx.saved_tensors
    if dy is None and ds is None:
        return (None,) * 8
    if dy is None:
        dy = torch.zeros_like(s, dtype=ctx.x_dtype)
    # One gradient serves x and a residual of the same dtype.
    is_shared = ctx.residual_dtype in (None, ctx.x_dtype)
    dx, dresidual, dweight, dbias = _bwd(
        s,
        weight,
        ctx.bias_dtype,
        None if is_shared else ctx.residual_dtype,
        ctx.x_dtype,
        residual,
        mean,
        rstd,
        dy,
        ds,
        ctx.is_rms,
    )
    return (
        dx,
        dweight,
        None if ctx.bias_dtype is None else dbias,
        None if ctx.residual_dtype is None else dx if is_shared else dresidual,
        *(None,) * 4,
    )


differentiate("fused_layer_norm_fwd", _setup_context, _backward)
refuse_second_gradient("fused_layer_norm_bwd")


@refuse_as(check.fused_layer_norm)
def fused_layer_norm(
    x,
    weight,
    bias,
    residual=None,
    is_rms=False,
    eps=1e-5,
    prenorm=True,
    residual_in_fp32=True,
):
    """Run the fused norm on compiled kernels; contract: ``ssm.ops.python.reference``."""
    if isinstance(x, torch.Tensor) and x.ndim > _MOST_AXES:
        given = residual is not None and residual.shape == x.shape
        found = fused_layer_norm(
            x.flatten(0, -2),
            weight,
            bias,
            residual.flatten(0, -2) if given else residual,
            is_rms,
            eps,
            prenorm,
            residual_in_fp32,
        )
        return tuple(t.view(x.shape) for t in found) if prenorm else found.view(x.shape)
    sum_dtype = None
    if prenorm:
        given = x if residual is None else residual
        sum_dtype = acc_dtype(x) if residual_in_fp32 else given.dtype
    check.check_positive("fused_layer_norm", "eps", eps)
    is_rms = bool(is_rms)
    inputs = (x, weight, bias, residual)
    save = wants_gradient(*inputs)
    # Without a residual x is the sum already. With gradients it still goes through the operator,
    # which adds the two gradients before it rounds them.
    is_sum = prenorm and residual is None and sum_dtype == x.dtype and not save
    asked = None if is_sum else sum_dtype
    if is_eager(*inputs):
        y, s = _direct(*inputs, is_rms, eps, asked)
    else:
        y, s, _, _ = _fwd(*inputs, is_rms, eps, asked, save)
    if not prenorm:
        return y
    return y, x if is_sum else s
