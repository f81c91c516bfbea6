"""Attention over a sequence of which each rank holds a part: every rank reads all keys so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssm.distributed.collectives import gathered, parts_summed, rank_of
from ssm.distributed.context import tied
from ssm.modules.attend import attend
from ssm.modules.kv_cache import Layout, layout_of
from ssm.seq_meta import SeqMeta


class Parts(NamedTuple):
    """Where the steps of a rank lie in the sequence of all ranks.

    Args:
        counts: steps of each rank.
        start: steps of the ranks before this one.
        layout: packing and padding over all ranks, or None.
    """

    counts: list[int]
    start: int
    layout: Layout | None


def parts_of(batch: int, seqlen: int, device, seq_meta: SeqMeta | None, group) -> Parts:
    """Ask all ranks how many steps they hold, and of which sequences.

    Args:
        batch: B.
        seqlen: L of this rank.
        device: where the activations lie.
        seq_meta: packing and padding of this rank's steps.
        group: ranks.

    Returns:
        The parts.

    Raises:
        ValueError: seq_meta has cu_seqlens.
    """
    if seq_meta is not None and seq_meta.state_per_sequence:
        raise ValueError(
            "MHA: seq_meta must hold seq_idx or mask of this rank's steps with context_group, "
            "got cu_seqlens"
        )
    counts = gathered(torch.tensor([seqlen], device=device), group).flatten().tolist()
    layout = None
    if seq_meta is not None:
        ids = _joined(seq_meta.positions(batch, seqlen, device), counts, group)
        layout = layout_of(SeqMeta(seq_idx=ids), batch, sum(counts), device)
    return Parts(counts, sum(counts[: rank_of(group)]), layout)


def positions_in(x: Tensor, parts: Parts) -> Tensor:
    """Count the tokens of its sequence before each step of this rank.

    Args:
        x: (B, L, ...), of which the shape and the device are read.
        parts: from ``parts_of``.

    Returns:
        (B or 1, L) int64.
    """
    stop = parts.start + x.shape[1]
    if parts.layout is None:
        return torch.arange(parts.start, stop, device=x.device)[None]
    return parts.layout.rank[:, parts.start : stop]


def attend_across(
    q: Tensor, kv: Tensor, parts: Parts, causal: bool, scale: float | None, group
) -> Tensor:
    """Attend from this rank's steps to those of all ranks.

    Args:
        q: (B, L, H, P), queries of this rank.
        kv: (B, L, 2, Hkv, P), its keys and values.
        parts: from ``parts_of``.
        causal: whether a step sees itself and the past only.
        scale: of the scores; None is P^-0.5.
        group: ranks.

    Returns:
        (B, L, H, P); finite and without meaning where skipped.
    """
    start, stop = parts.start, parts.start + q.shape[1]
    everything = _Join.apply(kv, parts.counts, group)
    end = stop if causal else sum(parts.counts)
    k, v = everything[:, :end].unbind(2)
    mask = None
    if parts.layout is not None:
        number = parts.layout.sequence
        mask = number[:, start:stop, None] == number[:, None, :end]
        mask = mask.tril(start) if causal else mask
    elif causal:
        mask = torch.ones((1, stop - start, end), dtype=torch.bool, device=q.device).tril(start)
    return tied(attend(q, k, v, mask, False, scale), everything, stop - start)


def _joined(x: Tensor, counts: list[int], group) -> Tensor:
    """Return (B, sum of counts, ...) from the parts (B, count, ...) of all ranks."""
    parts = gathered(_padded(x, max(counts)), group)
    return torch.cat([p[:, :n] for p, n in zip(parts, counts, strict=True)], dim=1)


def _padded(x: Tensor, width: int) -> Tensor:
    """Return x (B, L, ...) with zeros up to L = width."""
    return torch.cat([x, x.new_zeros((len(x), width - x.shape[1], *x.shape[2:]))], dim=1)


class _Join(torch.autograd.Function):
    """``_joined``, whose gradient is summed over the ranks and cut again."""

    @staticmethod
    def forward(ctx, x, counts, group):
        ctx.counts, ctx.group = counts, group
        return _joined(x, counts, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        width = max(ctx.counts)
        parts = [_padded(part, width) for part in gradient.split(ctx.counts, dim=1)]
        own = parts_summed(torch.cat(parts), ctx.group)
        return own[:, : ctx.counts[rank_of(ctx.group)]], None, None
