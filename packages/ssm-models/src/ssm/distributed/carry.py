"""A state that passes through the ranks in order, each adding to it: forward and backward.

    h[0] = initial,    h[i + 1] = transition[i](h[i]) + local[i],    i = 0 ... ranks - 1

Rank i wants h[i], where it starts, and perhaps h[ranks], where the sequence ends. All ranks
exchange (local, transition) at once and each walks the few steps for itself, in the same order: one
exchange instead of a wait for every rank before, and the same bits on all. The backward is the same
walk from the other end (reverse mode of a linear recurrence), again with one exchange.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssm.distributed.collectives import gathered, rank_of


def carry(initial: Tensor, local: Tensor, transition: Tensor, group) -> tuple[Tensor, Tensor]:
    """Return the state that enters this rank and the one behind the last rank.

    Args:
        initial: (B, ...), h[0], the same on all ranks. Its gradient arrives at the first rank and
            is 0 elsewhere: the sum over the ranks is the gradient, as for every parameter.
        local: like initial, state of this rank's steps if they started from 0.
        transition: what becomes of the state that enters. Floating point: a factor that broadcasts
            to (B, ...), with a gradient. Integers (B,): the last axis moves that many places to the
            front, zeros follow.
        group: ranks, in the order of the sequence.

    Returns:
        h[rank] and h[ranks], like initial.
    """
    return _Carry.apply(initial, local, transition, group)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, initial, local, transition, group):
        locals_, transitions = gathered(local, group), gathered(transition, group)
        states = [initial.clone()]
        for rank in range(group.size()):
            states.append(_apply(transitions[rank], states[-1]) + locals_[rank])
        ctx.group = group
        rank = rank_of(group)
        # Only this rank's own factor gets a gradient here, so only its state is kept.
        entering = states[rank] if transition.is_floating_point() else None
        ctx.save_for_backward(transitions, entering)
        return states[rank].clone(), states[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dentering, dfinal):
        transitions, entering = ctx.saved_tensors
        rank = rank_of(ctx.group)
        gradients = gathered(torch.stack([dentering, dfinal]), ctx.group)
        flowing = gradients[:, 1].sum(0)
        for number in reversed(range(ctx.group.size())):
            if number == rank:
                dlocal, dtransition = flowing, None
                if entering is not None:
                    dtransition = (flowing * entering).sum_to_size(transitions[rank].shape)
            flowing = _transpose(transitions[number], flowing) + gradients[number, 0]
        dinitial = flowing if rank == 0 else torch.zeros_like(flowing)
        return dinitial, dlocal, dtransition, None


def _apply(transition: Tensor, state: Tensor) -> Tensor:
    if transition.is_floating_point():
        return transition * state
    return _move(state, transition)


def _transpose(transition: Tensor, gradient: Tensor) -> Tensor:
    if transition.is_floating_point():
        return transition * gradient
    return _move(gradient, -transition)


def _move(x: Tensor, places: Tensor) -> Tensor:
    """Return x[..., j + places[b]] for row b, 0 where there is none."""
    width = x.shape[-1]
    source = torch.arange(width, device=x.device) + places[:, None]
    inside = ((source >= 0) & (source < width)).view(len(x), *[1] * (x.dim() - 2), width)
    source = source.clamp(0, max(width - 1, 0)).view(inside.shape).expand_as(x)
    return torch.where(inside, x.gather(-1, source), 0)


def links(ids: Tensor, group) -> tuple[Tensor, Tensor]:
    """Say where sequences go on from one rank to the next.

    Args:
        ids: (B, L) int, sequence ids of this rank's steps, -1 = skipped. L may differ.
        group: ranks, in the order of the sequence.

    Returns:
        enters: (B,) bool, the state that enters is that of this rank's first sequence.
        passes: (B,) bool, it also reaches the end of this rank's steps.
    """
    batch, seqlen = ids.shape
    header = ids.new_zeros((4, batch))
    if seqlen:
        keep = ids >= 0
        step = torch.arange(seqlen, device=ids.device).expand(batch, -1)
        last_kept = torch.where(keep, step, -1).cummax(1).values
        before = F.pad(last_kept, (1, 0), value=-1)[:, :seqlen]
        id_before = ids.gather(1, before.clamp(min=0))
        begins = keep & (before >= 0) & (ids != id_before)
        first = keep.long().argmax(1, keepdim=True)
        last = last_kept[:, -1:].clamp(min=0)
        header = torch.stack(
            [
                keep.any(1).to(ids.dtype),
                begins.any(1).to(ids.dtype),
                ids.gather(1, first)[:, 0],
                ids.gather(1, last)[:, 0],
            ]
        )
    mine = rank_of(group)
    seen = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    newest = ids.new_zeros(batch)
    for rank, (some, changes, first, last) in enumerate(gathered(header, group)):
        some, changes = some.bool(), changes.bool()
        enters = ~some | ~seen | (first == newest)
        if rank == mine:
            found = enters, enters & ~changes
        newest = torch.where(some, last, newest)
        seen = seen | some
    return found
