"""LayerNorm and RMSNorm of a residual sum, specified in PyTorch."""

import torch

from ssm.ops.python import arithmetic, check


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
    """Add a residual stream and normalise the sum over the last axis.

    Computes ``s = x + residual`` and ``y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias``,
    or, with ``is_rms``, ``y = s / sqrt(mean(s^2) + eps) * weight + bias``.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16. Input.
        weight: (D,), any of these dtypes, like every tensor below.
        bias: (D,) or None.
        residual: as x in shape, or None.
        is_rms: normalise by the root mean square, without subtracting the mean.
        eps: added to the variance; positive.
        prenorm: also return the sum.
        residual_in_fp32: return the sum in acc: float64 if x is, else float32.

    Returns:
        y: (..., D), dtype of x. Normalised sum.
        s: (..., D). Only if ``prenorm``. The sum, in acc if ``residual_in_fp32``, else in the dtype
            of the residual, or of x if there is none. y is computed from the unrounded sum.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Ba et al. 2016 (arXiv:1607.06450), eq. 4; Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.

    Example:
        >>> y, residual = fused_layer_norm(x, weight, None, residual, is_rms=True)
    """
    check.fused_layer_norm(x, weight, bias, residual, eps)
    acc = arithmetic.acc_dtype(x)
    s = x.to(acc) if residual is None else x.to(acc) + residual.to(acc)
    centred = s if is_rms else s - s.mean(-1, keepdim=True)
    y = (
        centred
        * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + float(eps))
        * weight.to(acc)
    )
    if bias is not None:
        y = y + bias.to(acc)
    y = y.to(x.dtype)
    if not prenorm:
        return y
    return y, s.to(acc if residual_in_fp32 else x.dtype if residual is None else residual.dtype)
