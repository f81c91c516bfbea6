"""Which step reads which: attention within one call, and onto a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm.modules.kv_cache import Layout, Plan, gather_rows, plan_alone, write
from ssm.modules.memory import is_writable
from ssm.seq_meta import SeqMeta

# Sequences of unequal length are padded to one batch up to this multiple of their tokens.
MOST_PADDING = 2


def attend_within(
    q: Tensor, kv: Tensor, layout: Layout | None, causal: bool, scale: float | None
) -> Tensor:
    """Attend within a call that has no state.

    Args:
        q: (B, L, H, P), queries.
        kv: (B, L, 2, Hkv, P), keys and values.
        layout: packing and padding; None for neither.
        causal: whether a step sees itself and the past only.
        scale: of the scores; None is P^-0.5.

    Returns:
        (B, L, H, P); finite and without meaning where skipped.
    """
    k, v = kv.unbind(2)
    if layout is None:
        return attend(q, k, v, None, causal, scale)
    if causal and q.numel() and not torch.compiler.is_compiling():
        plan, row = plan_alone(layout)
        return _attend_rows(q, kv, None, plan, row, layout.rank, scale)
    return attend(q, k, v, _same_sequence(layout, causal), False, scale)


def attend_onto(
    q: Tensor,
    kv: Tensor,
    cache: Tensor,
    plan: Plan,
    layout: Layout | None,
    seq_meta: SeqMeta | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Put keys and values into a cache and attend causally to all that a step may see.

    Args:
        q: (B, L, H, P), queries.
        kv: (B, L, 2, Hkv, P), keys and values.
        cache: (R, T, 2, Hkv, P); overwritten where no graph remembers it.
        plan: from ``plan_write``.
        layout: packing and padding; None for neither.
        seq_meta: what the layout was made of.
        scale: of the scores; None is P^-0.5.

    Returns:
        (B, L, H, P), finite and without meaning where skipped; and the cache after the call.
    """
    in_place = is_writable((cache,))
    per_sequence = layout is not None and seq_meta.state_per_sequence
    if layout is not None and not per_sequence and seq_meta.seq_idx is not None:
        # A later sequence of the row overwrites what the first one reads.
        y = _attend_packed(q, kv, cache, plan, layout, scale)
        return y, write(cache, kv, plan, in_place)
    cache = write(cache, kv, plan, in_place)
    if plan.uniform == 0:
        return attend(q, *kv.unbind(2), None, True, scale), cache
    if per_sequence:
        row = layout.ids.clamp(min=0)
        return _attend_rows(q, kv, cache, plan, row, layout.rank, scale), cache
    k, v = cache[:, : plan.used].to(q.dtype).unbind(2)
    if plan.uniform is not None and q.shape[1] == 1:
        return attend(q, k, v, None, False, scale), cache
    slot = positions_of(q, layout, plan, seq_meta)
    return attend(q, k, v, _up_to(slot, plan.used), False, scale), cache


def positions_of(
    x: Tensor, layout: Layout | None, plan: Plan | None, seq_meta: SeqMeta | None
) -> Tensor:
    """Count the tokens of its sequence that come before each step: its position and its slot.

    Args:
        x: (B, L, ...), of which the shape and the device are read.
        layout: packing and padding; None for neither.
        plan: that of a call with a state, else None.
        seq_meta: what the layout was made of.

    Returns:
        (B, L) or (1, L) int64.
    """
    if layout is None:
        step = torch.arange(x.shape[1], device=x.device)[None]
        if plan is None:
            return step
        return step + (plan.lengths[:, None] if plan.uniform is None else plan.uniform)
    if plan is None or plan.lengths.numel() == 0:
        return layout.rank
    if seq_meta.state_per_sequence:
        return layout.rank + plan.lengths[layout.ids.clamp(min=0)]
    return layout.rank + torch.where(layout.sequence == 1, plan.lengths[:, None], 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend by scaled dot products (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        q: (B, L, H, P).
        k: (B, S, Hkv, P), Hkv divides H: head h reads key head h // (H / Hkv).
        v: (B, S, Hkv, P).
        mask: (B or 1, L, S) bool, True = may be read; every query must have one. Excludes causal.
        causal: step i reads keys 0 to i; L must be S.
        scale: of the scores; None is P^-0.5.

    Returns:
        (B, L, H, P); 0 where there are no keys.
    """
    batch, seqlen, nheads, headdim = q.shape
    if q.numel() == 0 or k.shape[1] == 0:
        return torch.zeros_like(q)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    groups = k.shape[1]
    mask = None if mask is None else mask[:, None]
    if seqlen == 1:
        # The queries that share a key head lie side by side: keys are read once, never repeated.
        q = q.reshape(batch, groups, nheads // groups, headdim)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return y.reshape(batch, 1, nheads, headdim)
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=bool(groups != nheads),  # torch.jit.trace has tensors for sizes
    )
    return y.transpose(1, 2)


def _attend_rows(q, kv, cache, plan, row, rank, scale):
    """Attend within sequences that have a row of the plan each; row and rank (B, L) of each step.

    The work is that of the tokens there are, up to a factor of ``MOST_PADDING``.
    """
    rows = plan.count.shape[0]
    if rows == 0 or plan.width == 0:  # no sequence, or none with a step
        return torch.zeros_like(q)
    tracing = torch.compiler.is_compiling()
    if not tracing and rows * plan.width > MOST_PADDING * q.shape[0] * q.shape[1]:
        return _attend_one_by_one(q, kv, cache, plan, scale)
    if cache is None:
        # Behind the tokens of a row lie others: hidden by the causal mask, but 0 * NaN is NaN.
        inside = torch.arange(plan.width, device=q.device) < plan.count[:, None]
        k, v = gather_rows(kv, plan).masked_fill(~inside[..., None, None, None], 0).unbind(2)
        return attend(gather_rows(q, plan), k, v, None, True, scale)[row, rank]
    k, v = cache[:, : plan.used].to(q.dtype).unbind(2)
    slot = plan.start[:, None] + torch.arange(plan.width, device=q.device)
    return attend(gather_rows(q, plan), k, v, _up_to(slot, plan.used), False, scale)[row, rank]


def _attend_one_by_one(q, kv, cache, plan, scale):
    """Attend to one sequence after the other: no padding, one call for each."""
    flat_q, flat_kv, parts, begin = q.flatten(0, 1), kv.flatten(0, 1), [], 0
    for row, (start, count) in enumerate(
        zip(plan.start.tolist(), plan.count.tolist(), strict=True)
    ):
        steps = plan.order[begin : begin + count][None]
        begin += count
        if cache is None:
            k, v = flat_kv[steps].unbind(2)
            parts.append(attend(flat_q[steps], k, v, None, True, scale)[0])
        else:
            k, v = cache[row : row + 1, : start + count].to(q.dtype).unbind(2)
            slot = torch.arange(start, start + count, device=q.device)[None]
            mask = _up_to(slot, start + count)
            parts.append(attend(flat_q[steps], k, v, mask, False, scale)[0])
    found = torch.cat(parts)
    y = found.new_zeros(flat_q.shape).index_copy(0, plan.order[:begin], found)
    return y.unflatten(0, q.shape[:2])


def _attend_packed(q, kv, cache, plan, layout, scale):
    """Attend where the first sequence of a row continues the one in the cache."""
    k, v = torch.cat([cache[:, : plan.held].to(q.dtype), kv], dim=1).unbind(2)
    slot = torch.arange(plan.held, device=q.device)
    past = (layout.sequence == 1)[..., None] & (slot < plan.lengths[:, None, None])
    mask = torch.cat([past, _same_sequence(layout, True)], dim=-1)
    return attend(q, k, v, mask, False, scale)


def _same_sequence(layout: Layout, causal: bool) -> Tensor:
    """Return (B, L, L) bool: may step i read step j? Skipped steps read each other, unheard."""
    mask = layout.sequence[:, :, None] == layout.sequence[:, None, :]
    return mask.tril() if causal else mask


def _up_to(slot: Tensor, used: int) -> Tensor:
    """Return (B or 1, L, used) bool: slots up to and with that of the query, slot (B or 1, L)."""
    return torch.arange(used, device=slot.device) <= slot[..., None]
