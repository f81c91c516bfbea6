"""The norms of ``mamba_ssm``: the fused one with a residual stream, and the gated one."""

import torch
from torch import nn

from ssm import ops
from ssm.modules.arguments import check_number
from ssm.modules.norm import RMSNormGated
from ssm.ops.python.check import FLOATS, check_tensor

__all__ = [
    "LayerNormGated",
    "RMSNorm",
    "RMSNormGated",
    "layer_norm_fn",
    "layernorm_fn",
    "rms_norm_fn",
    "rmsnorm_fn",
]


def layer_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    is_rms_norm=False,
    return_dropout_mask=False,
):
    """Add a residual stream and normalise the sum, with dropout and a second branch if asked for.

    Computes ``s = dropout(rowscale x) + dropout(x1) + residual`` and the norm of s, twice if there
    is a second weight. Without dropout, rowscale and x1 it is one operator; with them, torch
    prepares the sum in float32 or better. Dropout draws from torch's generator: its masks are not
    those of the upstream kernels.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16.
        weight: (D,).
        bias: (D,) or None.
        residual: as x in shape, or None.
        x1: as x in shape: a parallel branch, added to x. Excludes rowscale.
        weight1: (D,). Weight of a second norm of the same sum.
        bias1: (D,) or None.
        eps: added to the variance.
        dropout_p: probability with which elements of x and of x1 become 0.
        rowscale: (...): factor of each row of x.
        prenorm: also return the sum.
        residual_in_fp32: return the sum in float32 (float64 stays) if there is no residual; the
            residual's dtype wins otherwise.
        is_rms_norm: root-mean-square norm instead of layer norm.
        return_dropout_mask: also return the masks (..., D) of x and x1: True where kept, None where
            there was no dropout.

    Returns:
        out (..., D), dtype of x; then, where asked for, out1, the sum, mask and mask1.

    Raises:
        ValueError: rowscale beside x1, or what ``ssm.ops.fused_layer_norm`` refuses.

    Source:
        Interface of mamba_ssm 2.3; the operator is docs/ops/fused_layer_norm.md.
    """
    check_rows("layer_norm_fn", x, x1=x1)
    if x1 is not None and rowscale is not None:
        raise ValueError("layer_norm_fn: rowscale must be None beside x1, got a tensor")
    check_dropout("layer_norm_fn", dropout_p)
    summed, masks = x, (None, None)
    if rowscale is not None or x1 is not None or dropout_p > 0.0:
        summed, masks = _branches(x, x1, rowscale, dropout_p)

    def norm(weight, bias, prenorm):
        return ops.fused_layer_norm(
            summed, weight, bias, residual, is_rms_norm, eps, prenorm, residual_in_fp32
        )

    out = norm(weight, bias, prenorm)
    out, total = out if prenorm else (out, None)
    results = [out.to(x.dtype)]
    if weight1 is not None:
        results.append(norm(weight1, bias1, False).to(x.dtype))
    if prenorm:
        plain = total.dtype if residual_in_fp32 else x.dtype
        results.append(total.to(plain if residual is None else residual.dtype))
    if return_dropout_mask:
        results += masks
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    return_dropout_mask=False,
):
    """Do what :func:`layer_norm_fn` does, with the root-mean-square norm.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16.
        weight: (D,).
        bias: (D,) or None.
        residual: as x in shape, or None.
        x1: as x in shape, added to x. Excludes rowscale.
        weight1: (D,). Weight of a second norm of the same sum.
        bias1: (D,) or None.
        eps: added to the mean square.
        dropout_p: probability with which elements of x and of x1 become 0.
        rowscale: (...): factor of each row of x.
        prenorm: also return the sum.
        residual_in_fp32: return the sum in float32 if there is no residual.
        return_dropout_mask: also return the masks of x and x1.

    Returns:
        As :func:`layer_norm_fn`.

    Raises:
        ValueError: as :func:`layer_norm_fn`.

    Source:
        Interface of mamba_ssm 2.3; the operator is docs/ops/fused_layer_norm.md.
    """
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        True,
        return_dropout_mask,
    )


def layernorm_fn(
    x,
    weight,
    bias,
    z=None,
    eps=1e-6,
    group_size=None,
    norm_before_gate=True,
    is_rms_norm=False,
):
    """Normalise groups of the last axis and multiply by SiLU(z).

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16.
        weight: (D,).
        bias: (D,) or None.
        z: as x in shape, or None: no gate.
        eps: added to the variance.
        group_size: channels that share their statistics; None takes all.
        norm_before_gate: ``norm(x) * silu(z)``, else ``norm(x * silu(z))``.
        is_rms_norm: root-mean-square norm instead of layer norm.

    Returns:
        out (..., D), dtype of x.

    Raises:
        ValueError: what ``ssm.ops.gated_norm`` refuses.

    Source:
        Interface of mamba_ssm 2.3; the operator is docs/ops/gated_norm.md.
    """
    return ops.gated_norm(
        x,
        weight,
        bias,
        z,
        is_rms=is_rms_norm,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
    )


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """Do what :func:`layernorm_fn` does, with the root-mean-square norm.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16.
        weight: (D,).
        bias: (D,) or None.
        z: as x in shape, or None: no gate.
        eps: added to the mean square.
        group_size: channels that share their mean square; None takes all.
        norm_before_gate: ``norm(x) * silu(z)``, else ``norm(x * silu(z))``.

    Returns:
        out (..., D), dtype of x.

    Raises:
        ValueError: what ``ssm.ops.gated_norm`` refuses.

    Source:
        Interface of mamba_ssm 2.3; the operator is docs/ops/gated_norm.md.
    """
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class RMSNorm(nn.Module):
    """RMSNorm that adds a residual stream first: ``mamba_ssm.ops.triton.layer_norm.RMSNorm``.

    Args:
        hidden_size: D, width of the last axis.
        eps: added to the mean square.
        dropout_p: dropout of x in training, before the addition.
        device: where the weight lives.
        dtype: of the weight.

    Shape:
        x, residual (..., D) -> (..., D), dtype of x; with prenorm also the sum.
    """

    def __init__(self, hidden_size, eps=1e-5, dropout_p=0.0, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        """Add the residual, if any, to x (..., D) and normalise the sum."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


class LayerNormGated(nn.Module):
    """LayerNorm per group times a gate: ``mamba_ssm.ops.triton.layernorm_gated.LayerNorm``.

    Args:
        hidden_size: D, width of the last axis.
        eps: added to the variance.
        group_size: channels that share their statistics; None takes all.
        norm_before_gate: ``norm(x) * silu(z)``, else ``norm(x * silu(z))``.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        x, z (..., D) -> (..., D), dtype of x.
    """

    def __init__(
        self,
        hidden_size,
        eps=1e-5,
        group_size=None,
        norm_before_gate=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def forward(self, x, z=None):
        """Normalise x (..., D) and gate it by z (..., D), if given."""
        return layernorm_fn(
            x,
            self.weight,
            self.bias,
            z=z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )


def check_rows(op, x, dtypes=FLOATS, **others):
    """Refuse what is no x (..., D), or what has not its shape; None is permitted.

    Args:
        op: function, the first word of the sentence.
        x: main input.
        dtypes: permitted for the others.
        **others: argument -> value.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, dtype or device.
    """
    shape = {"...": tuple(x.shape) if isinstance(x, torch.Tensor) else ()}
    check_tensor(op, "x", x, shape)
    for name, tensor in others.items():
        check_tensor(op, name, tensor, shape, x.device, dtypes, optional=True)


def check_dropout(op, p):
    """Refuse what is no probability below 1."""
    check_number(op, "dropout_p", p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1), got {p}")


def _branches(x, x1, rowscale, dropout_p):
    """Return ``dropout(rowscale x) + dropout(x1)``, float32 or better, and the masks."""
    acc = torch.promote_types(x.dtype, torch.float32)
    total, masks = x.to(acc), [None, None]
    if rowscale is not None:
        total = total * rowscale.to(acc)[..., None]
    parts = [total] if x1 is None else [total, x1.to(acc)]
    if dropout_p > 0.0:
        for index, part in enumerate(parts):
            masks[index] = torch.rand_like(part) >= dropout_p
            # Selected, not multiplied: what is dropped may be infinite.
            parts[index] = torch.where(masks[index], part / (1.0 - dropout_p), 0.0)
    return (parts[0] if x1 is None else parts[0] + parts[1]), masks
