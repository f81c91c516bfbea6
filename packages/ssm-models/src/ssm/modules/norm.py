"""Normalisation over the last axis, by the fused operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm import ops
from ssm.modules.arguments import check_dtype, check_int


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        hidden_size: D, width of the last axis.
        eps: added to the mean square.
        device: where the weight lives.
        dtype: of the weight; statistics are float32 or better in any case.

    Shape:
        (..., D) -> (..., D), same dtype.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        check_dtype("RMSNorm", dtype)
        check_int("RMSNorm", "hidden_size", hidden_size, 0)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D) and return it in its own dtype."""
        return ops.fused_layer_norm(
            x, self.weight, None, is_rms=True, eps=self.eps, prenorm=False, residual_in_fp32=True
        )

    def extra_repr(self) -> str:
        """Show the width and eps in ``print(model)``."""
        return f"{self.weight.numel()}, eps={self.eps}"


class WeightlessRMSNorm(nn.Module):
    """Root mean square normalisation without a weight.

    Args:
        eps: added to the mean square.

    Shape:
        (..., D) -> (..., D), same dtype.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D) and return it in its own dtype."""
        return ops.fused_layer_norm(
            x,
            x.new_ones(x.shape[-1]),
            None,
            is_rms=True,
            eps=self.eps,
            prenorm=False,
            residual_in_fp32=True,
        )

    def extra_repr(self) -> str:
        """Show eps in ``print(model)``."""
        return f"eps={self.eps}"


class RMSNormGated(nn.Module):
    """RMSNorm per group of channels, multiplied by a gate (Dao & Gu 2024, section 7).

    Args:
        hidden_size: D, width of the last axis.
        eps: added to the mean square.
        group_size: channels that share a mean square, a divisor of D; None takes all.
        norm_before_gate: ``norm(x) * silu(z)``, else ``norm(x * silu(z))``.
        device: where the weight lives.
        dtype: of the weight; statistics are float32 or better in any case.

    Shape:
        x, z (..., D) -> (..., D), dtype of x.

    Raises:
        ValueError: group_size does not divide D (from the operator, at the first call).
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_dtype("RMSNormGated", dtype)
        check_int("RMSNormGated", "hidden_size", hidden_size, 0)
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise x (..., D) and gate it by z (..., D), if given."""
        return ops.gated_norm(
            x,
            self.weight,
            None,
            z,
            is_rms=True,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )

    def extra_repr(self) -> str:
        """Show the sizes and the order in ``print(model)``."""
        order = f"norm_before_gate={self.norm_before_gate}"
        return f"{self.weight.numel()}, eps={self.eps}, group_size={self.group_size}, {order}"


def is_fusable(norm: nn.Module) -> bool:
    """Say whether ``fused_layer_norm`` computes this norm.

    Args:
        norm: any norm.

    Returns:
        True for an RMSNorm, and for a LayerNorm with a weight over the last axis alone.
    """
    if isinstance(norm, RMSNorm):
        return True
    return (
        isinstance(norm, nn.LayerNorm)
        and norm.weight is not None
        and len(norm.normalized_shape) == 1
    )


def add_norm(
    norm: nn.Module,
    hidden_states: Tensor,
    residual: Tensor | None,
    *,
    fused: bool,
    residual_in_fp32: bool,
    prenorm: bool = True,
):
    """Add the residual stream and normalise the sum.

    Args:
        norm: a module for which ``is_fusable`` holds if ``fused``, else any norm.
        hidden_states: (B, L, D), output of the layer before.
        residual: (B, L, D) or None at the first layer.
        fused: one operator, or PyTorch step by step.
        residual_in_fp32: hand the sum on in float32 (float64 stays float64).
        prenorm: also return the sum.

    Returns:
        (normed, residual) if prenorm, else normed; all (B, L, D), normed in the dtype of
        hidden_states.
    """
    if fused:
        return ops.fused_layer_norm(
            hidden_states,
            norm.weight,
            getattr(norm, "bias", None),
            residual=residual,
            is_rms=isinstance(norm, RMSNorm),
            eps=norm.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )
    if residual_in_fp32 and hidden_states.dtype != torch.float64:
        total = hidden_states.float()
    else:
        total = hidden_states
    if residual is not None:
        total = total + residual.to(total.dtype) if residual_in_fp32 else hidden_states + residual
    weight = getattr(norm, "weight", None)
    normed = norm(total if weight is None else total.to(weight.dtype)).to(hidden_states.dtype)
    return (normed, total) if prenorm else normed
