"""Rotary position embedding: pairs of features turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm.modules.precision import at_least_fp32


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, section 3.2.2).

    Pair i of the first ``dim`` features of every head is turned by position * base^(-2 i / dim);
    features beyond ``dim`` stay. There is nothing to store: angles are computed for the positions
    asked for, in float32 or better, so that no position is too large and no cast rounds them.

    Args:
        dim: features per head that turn, even and positive.
        base: ratio of the shortest to the longest wave length, about.
        interleaved: pairs are (0, 1), (2, 3), ...; else (0, dim / 2), (1, dim / 2 + 1), ...

    Shape:
        (B, L, H, P) and positions (B, L) -> (B, L, H, P), same dtype.

    Raises:
        ValueError: dim is odd or not positive, or base is not positive.
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim < 1 or dim % 2:
            raise ValueError(f"Rotary: dim must be even and positive, got {dim}")
        if not base > 0:
            raise ValueError(f"Rotary: base must be positive, got {base}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x (B, L, H, P), P >= dim, by positions (B, L) or (1, L), any number type."""
        wide = at_least_fp32(x.dtype)
        exponent = torch.arange(0, self.dim, 2, device=x.device, dtype=wide) / -self.dim
        angle = positions[..., None, None].to(wide) * self.base**exponent  # (B, L, 1, dim / 2)
        cos, sin = angle.cos(), angle.sin()
        turning, rest = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            a, b = turning[..., 0::2], turning[..., 1::2]
        else:
            a, b = turning.chunk(2, dim=-1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}"
