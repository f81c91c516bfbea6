"""LayerNorm and RMSNorm in groups, times a gate, specified in PyTorch."""

import torch

from ssm.ops.python import arithmetic, check


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
    """Normalise groups of the last axis and multiply by a gate.

    Computes ``y = (norm(x) * weight + bias) * silu(z)``, or, without ``norm_before_gate``,
    ``y = norm(x * silu(z)) * weight + bias``; ``norm(s) = s / sqrt(mean(s^2) + eps)``, or, without
    ``is_rms``, ``(s - mean(s)) / sqrt(var(s) + eps)``, where the means are over one group.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16. Input.
        weight: (D,), any of these dtypes, like every tensor below.
        bias: (D,) or None.
        z: as x in shape, or None: no gate.
        is_rms: normalise by the root mean square, without subtracting the mean.
        eps: added to the variance; positive.
        group_size: channels that share their statistics; divides D. None takes all.
        norm_before_gate: gate what was normalised instead of normalising what was gated.

    Returns:
        y: (..., D), dtype of x.

    Raises:
        TypeError: an argument is not a tensor, or group_size not an int.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), section 7.1; Ba et al. 2016 (arXiv:1607.06450), eq. 4;
        Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.

    Example:
        >>> y = gated_norm(x, weight, z=z, norm_before_gate=False)
    """
    check.gated_norm(x, weight, bias, z, eps, group_size)
    acc, dim = arithmetic.acc_dtype(x), x.shape[-1]
    groups = (1, dim) if group_size is None else (dim // group_size, group_size)
    s = x.to(acc)
    gate = None if z is None else arithmetic.silu(z.to(acc))
    if gate is not None and not norm_before_gate:
        s = s * gate
    s = s.unflatten(-1, groups)
    if not is_rms:
        s = s - s.mean(-1, keepdim=True)
    y = (s * torch.rsqrt((s * s).mean(-1, keepdim=True) + float(eps))).flatten(-2) * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)
