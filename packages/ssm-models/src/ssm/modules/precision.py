"""Which parameters stay in float32, and in which dtype a projection gets its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm.ops import projection


class DeltaProjection(nn.Linear):
    """Linear map from rank R to the step sizes (D,), whose bias is kept and added in float32.

    The bias (dt_bias of the paper) is about -4.6 while the low-rank part is small: a sum rounded to
    bfloat16 would change the step size by up to 2 %. The bias is inside this module, not handed to
    the scan, so that a replacement (LoRA, quantised linear) and a forward hook see the whole map.

    Args:
        dt_rank: R.
        dim: D.
        device: where the parameters live.
        dtype: of the weight.

    Shape:
        (..., R) -> (..., D), float32 (float64 stays float64).
    """

    def __init__(self, dt_rank: int, dim: int, device=None, dtype=None) -> None:
        # With a bias, which draws what it draws in mamba_ssm: one seed, the same weights.
        super().__init__(dt_rank, dim, bias=True, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=at_least_fp32(dtype)))

    def forward(self, dt: Tensor) -> Tensor:
        """Map dt (..., R) to step sizes before softplus (..., D)."""
        same = self.bias.dtype == self.weight.dtype == dt.dtype == at_least_fp32(dt.dtype)
        if same and not is_autocast(dt):
            return F.linear(dt, self.weight, self.bias)
        delta = F.linear(dt, self.weight)
        return delta + self.bias.to(at_least_fp32(delta.dtype))


def at_least_fp32(dtype: torch.dtype | None) -> torch.dtype:
    """Return the accumulate type that goes with a dtype.

    Args:
        dtype: any; None stands for the default dtype.

    Returns:
        float64 for float64, else float32.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_autocast(x: Tensor) -> bool:
    """Say whether autocast decides the dtype of products with a tensor.

    Args:
        x: any tensor. The device type "meta" has no autocast, and torch refuses to be asked.

    Returns:
        True under autocast.
    """
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """Call a projection on x cast to its parameter dtype.

    Unless it is a plain nn.Linear, the module is called, so that hooks fire and a LoRA or quantised
    replacement is used. Where the weight is no floating point tensor, and under autocast, the
    module decides itself.

    Args:
        linear: nn.Linear or what replaced it.
        x: (..., D_in), floating point.

    Returns:
        (..., D_out).
    """
    weight = getattr(linear, "weight", None)
    is_float = isinstance(weight, Tensor) and weight.is_floating_point()
    if is_float and not is_autocast(x):
        x = x.to(weight.dtype)
    return projection.project(linear, x)
