"""The gated norm of a group of channels that several ranks share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm.distributed.collectives import through_all


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    *,
    eps: float,
    norm_before_gate: bool,
    width: int,
    slot: int,
    slots: int,
    group,
) -> Tensor:
    """Normalise by the mean square over channels of which other ranks hold a part.

    Args:
        x: (..., D), channels of this rank, all of one norm group.
        weight: (D,).
        z: (..., D), gate, or None.
        eps: added to the mean square.
        norm_before_gate: ``norm(x) * silu(z)``, else ``norm(x * silu(z))``.
        width: channels of the norm group over all ranks.
        slot: number of the norm group that this rank is part of.
        slots: number of norm groups over all ranks.
        group: ranks.

    Returns:
        (..., D), dtype of x.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    gate = None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    squares = y.square().sum(-1, keepdim=True)
    if slots > 1:
        # A slot per norm group: one sum over all ranks serves them all.
        squares = F.pad(squares, (slot, slots - 1 - slot))
    squares = through_all(squares, group)[..., slot if slots > 1 else 0, None]
    y = y * torch.rsqrt(squares / width + eps) * weight.to(wide)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)
