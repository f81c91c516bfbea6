"""Keys and values of the tokens seen, row by row without gaps: where a call reads and writes them.

A cache is (R, T, 2, Hkv, P): R rows, T slots, keys and values. Row r holds its first ``lengths[r]``
tokens; what lies behind them has weight 0. The functions here know nothing of projections.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm.seq_meta import SeqMeta


class Layout(NamedTuple):
    """Where each step of a call lies in its sequence.

    Args:
        sequence: (B, L) int64, number of the sequence within its row, from 1; 0 = skipped.
        rank: (B, L) int64, steps of the same sequence and call before this one.
        ids: (B, L) int64, sequence id as given, -1 = skipped.
    """

    sequence: Tensor
    rank: Tensor
    ids: Tensor


class Plan(NamedTuple):
    """What a call does to a cache.

    Args:
        lengths: (R,) int64, tokens held before the call.
        start: (R,) int64, slot that takes the first token of this call.
        count: (R,) int64, tokens of this call that stay in the row.
        order: (B L,) int64, steps sorted by the row that keeps them; None if that changes nothing.
        uniform: the length that all rows have, if it is known and no step is skipped or packed.
        held: slots that may hold tokens before the call; those behind need not be read.
        used: slots that may hold tokens after the call.
        width: largest count, or more.
        slots: T that the call needs.
    """

    lengths: Tensor
    start: Tensor
    count: Tensor
    order: Tensor | None
    uniform: int | None
    held: int
    used: int
    width: int
    slots: int


def layout_of(seq_meta: SeqMeta, batch: int, seqlen: int, device) -> Layout:
    """Number sequences and steps within each row.

    Args:
        seq_meta: packing and padding.
        batch: B.
        seqlen: L.
        device: where the result lies.

    Returns:
        The layout.
    """
    ids = seq_meta.positions(batch, seqlen, device).long()
    keep = ids >= 0
    seen = keep.long().cumsum(1)  # steps not skipped up to and with this one
    step = torch.arange(seqlen, device=ids.device).expand(batch, -1)
    last_kept = torch.where(keep, step, -1).cummax(1).values if seqlen else step
    before = F.pad(last_kept, (1, 0), value=-1)[:, :seqlen]
    id_before = torch.where(before >= 0, ids.gather(1, before.clamp(min=0)), -1)
    begins = keep & (ids != id_before)
    sequence = torch.where(keep, begins.long().cumsum(1), 0)
    first = torch.where(begins, seen - 1, 0)
    first = first.cummax(1).values if seqlen else first
    return Layout(sequence, (seen - 1 - first).clamp(min=0), ids)


_is_reading = ContextVar("_is_reading", default=True)


@contextlib.contextmanager
def without_reading() -> Iterator[None]:
    """Plan by sizes alone: what runs inside serves other lengths later, as in a captured graph.

    Calls then take their limit for the slots that may hold tokens, and whoever runs them again must
    see to it that the tokens fit.
    """
    token = _is_reading.set(False)
    try:
        yield
    finally:
        _is_reading.reset(token)


def plan_write(
    owner: str,
    slots: int,
    lengths: Tensor,
    layout: Layout | None,
    seq_meta: SeqMeta | None,
    batch: int,
    seqlen: int,
    limit: int | None,
) -> Plan:
    """Decide where the tokens of a call go; nothing is written.

    Args:
        owner: class name for messages.
        slots: T.
        lengths: (R,) int64, tokens in each row of the cache.
        layout: that of seq_meta; None for neither packing nor padding.
        seq_meta: says whether rows of the cache are sequences or rows of the batch.
        batch: B.
        seqlen: L.
        limit: largest T; None for no limit.

    Returns:
        The plan.

    Raises:
        ValueError: the tokens do not fit below the limit, or a length is negative.
    """
    rows = lengths.shape[0]
    start, order = lengths, None
    if layout is None:
        count = torch.full_like(lengths, seqlen)
    else:
        # A row of the batch keeps its last sequence, which continues the state if it is the first.
        keep = layout.sequence > 0
        per_sequence = seq_meta.state_per_sequence
        if per_sequence:
            row = layout.ids
        else:
            row = torch.arange(batch, device=lengths.device)[:, None].expand(-1, seqlen)
            last = layout.sequence.amax(1) if seqlen else torch.zeros_like(lengths)
            keep = keep & (layout.sequence == last[:, None])
            start = torch.where(last <= 1, lengths, 0)
        order, count = _sorted_by_row(torch.where(keep, row, rows), rows)
        if seqlen == 1 and not per_sequence:
            order = None
    if torch.compiler.is_compiling() or not _is_reading.get():
        # Lengths are data here: take what is enough whatever they are.
        needed = slots + seqlen if limit is None else limit
        uniform = 0 if slots == 0 and layout is None else None
        used = seqlen if uniform == 0 else needed
        return Plan(lengths, start, count, order, uniform, slots, used, seqlen, needed)
    low = held = used = width = 0
    if rows and layout is None:
        low, held = torch.stack(lengths.aminmax()).tolist()
        used, width = held + seqlen, seqlen
    elif rows:
        # One transfer for all, as reading a value waits for the device.
        bounds = torch.stack([*lengths.aminmax(), (start + count).amax(), count.amax()])
        low, held, used, width = bounds.tolist()
    if low < 0:
        raise ValueError(f"{owner}: lengths_per_sample must not be negative, got {low}")
    uniform = low if low == held and layout is None else None
    if limit is not None and used > limit:
        raise ValueError(f"{owner}: state must have room for {used} tokens per row, got {limit}")
    needed = max(used, held)
    if needed > slots:
        # Doubling, so that a token costs the same on average however many follow.
        slots = max(needed, 2 * slots)
        slots = slots if limit is None else min(slots, limit)
    return Plan(lengths, start, count, order, uniform, held, used, width, slots)


def plan_alone(layout: Layout) -> tuple[Plan, Tensor]:
    """Give every sequence of a call a row of its own, as if a cache took them; without tracing.

    Args:
        layout: packing and padding.

    Returns:
        The plan, and the row (B, L) int64 of each step, arbitrary where skipped.
    """
    sequences = layout.sequence.amax(1)
    before = sequences.cumsum(0) - sequences
    rows = int(sequences.sum())
    row = before[:, None] + layout.sequence - 1
    order, count = _sorted_by_row(torch.where(layout.sequence > 0, row, rows), rows)
    width = int(count.max()) if rows else 0
    start = torch.zeros_like(count)
    plan = Plan(start, start, count, order, None, 0, width, width, width)
    return plan, row.clamp(0, max(rows - 1, 0))


def write(cache: Tensor, kv: Tensor, plan: Plan, in_place: bool) -> Tensor:
    """Put the keys and values of a call into a cache.

    Args:
        cache: (R, T, 2, Hkv, P).
        kv: (B, L, 2, Hkv, P).
        plan: from ``plan_write`` for this cache.
        in_place: overwrite the slots, else leave the cache alone and return another.

    Returns:
        (R, max(T, plan.slots), 2, Hkv, P): the cache given, if in_place and it was large enough.
    """
    rows, slots = cache.shape[:2]
    if slots < plan.slots:
        cache = torch.cat([cache, cache.new_zeros(rows, plan.slots - slots, *cache.shape[2:])], 1)
    seqlen = kv.shape[1]
    if kv.numel() == 0 or cache.numel() == 0:
        return cache
    kv = kv.to(cache.dtype)
    if plan.uniform is not None:
        end = plan.uniform + seqlen
        if not in_place:
            return torch.cat([cache[:, : plan.uniform], kv, cache[:, end:]], dim=1)
        cache[:, plan.uniform : end] = kv
        return cache
    if in_place and plan.order is None and seqlen == 1:
        at = torch.arange(rows, device=cache.device), plan.start.clamp(max=cache.shape[1] - 1)
        cache[at] = torch.where(plan.count[:, None, None, None] > 0, kv[:, 0], cache[at])
        return cache
    window = plan.used if in_place else cache.shape[1]
    index = torch.arange(window, device=cache.device) - plan.start[:, None]  # (R, window)
    inside = (index >= 0) & (index < plan.count[:, None])
    new = kv.flatten(0, 1)[_steps(plan, index, seqlen)]
    new = torch.where(inside[..., None, None, None], new, cache[:, :window])
    if not in_place:
        return new
    cache[:, :window] = new
    return cache


def gather_rows(x: Tensor, plan: Plan) -> Tensor:
    """Sort the steps of a call into the rows of the cache.

    Args:
        x: (B, L, ...).
        plan: of this call.

    Returns:
        (R, plan.width, ...): tokens of each row in order; what lies behind ``count`` is arbitrary.
    """
    index = torch.arange(plan.width, device=x.device).expand(plan.count.shape[0], -1)
    return x.flatten(0, 1)[_steps(plan, index, x.shape[1])]


def _steps(plan: Plan, index: Tensor, seqlen: int) -> Tensor:
    """Return which step (of B L) is token ``index`` (R, any) of its row, clamped to those there."""
    if plan.order is None:
        row = torch.arange(index.shape[0], device=index.device)[:, None]
        return row * seqlen + index.clamp(0, seqlen - 1)
    offset = plan.count.cumsum(0) - plan.count
    return plan.order[(offset[:, None] + index).clamp(0, plan.order.shape[0] - 1)]


def _sorted_by_row(row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sort steps by row (B, L), ``rows`` meaning none: returns order (B L,) and count (rows,)."""
    row = row.flatten()
    count = torch.zeros(rows + 1, device=row.device, dtype=torch.int64)
    count = count.scatter_add(0, row, torch.ones_like(row))
    return row.argsort(stable=True), count[:rows]
