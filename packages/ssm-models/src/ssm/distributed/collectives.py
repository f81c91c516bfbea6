"""Sums and exchanges between ranks, each with the one that its gradient needs.

Every function is the identity for one rank. All ranks of a group must call the same functions in
the same order, and all must call ``backward``: a rank that does not makes the others wait.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def check_group(owner: str, name: str, group) -> int:
    """Refuse what is no group, or a group without this process.

    Args:
        owner: class or function name for messages.
        name: the argument.
        group: a process group, or None.

    Returns:
        The number of ranks; 1 for None.

    Raises:
        TypeError: group is no process group.
        ValueError: this process is not in the group.
    """
    if group is None:
        return 1
    if not dist.is_available() or not (
        isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER
    ):
        kind = type(group).__name__
        raise TypeError(f"{owner}: {name} must be a torch.distributed process group, got {kind}")
    if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
        raise ValueError(f"{owner}: {name} must contain this process, got a group without it")
    return group.size()


def check_apart(owner: str, context_group, process_group) -> None:
    """Refuse a rank that would hold other steps and other heads than this one at once.

    Args:
        owner: class name for messages.
        context_group: ranks that hold parts of the steps, or None.
        process_group: ranks that hold parts of the heads, or None.

    Raises:
        ValueError: the groups share more than this process.
    """
    if context_group is None or process_group is None:
        return
    ranks = dist.get_process_group_ranks
    shared = sorted({*ranks(context_group)} & {*ranks(process_group)})
    if len(shared) > 1:
        raise ValueError(
            f"{owner}: context_group must share no rank but this one with process_group, "
            f"got {shared} in both"
        )


def rank_of(group) -> int:
    """Return the number of this process in a group.

    Args:
        group: process group, or None.

    Returns:
        From 0; 0 for None.
    """
    return 0 if group is None else dist.get_rank(group)


def gathered(x: Tensor, group) -> Tensor:
    """Return the tensors of all ranks, without gradient.

    Args:
        x: any shape, the same on all ranks.
        group: ranks.

    Returns:
        (ranks, *x.shape), in the order of the ranks.
    """
    ranks = group.size()
    found = torch.empty((ranks, *x.shape), dtype=x.dtype, device=x.device)
    if ranks == 1:
        return found.copy_(x.detach()[None])
    dist.all_gather(list(found.unbind(0)), x.detach().contiguous(), group)
    return found


def summed(x: Tensor, group) -> Tensor:
    """Return the sum over all ranks, the same bits on each, without gradient.

    Args:
        x: any shape, the same on all ranks; kept as it is.
        group: ranks.

    Returns:
        A new tensor.
    """
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


def parts_summed(x: Tensor, group) -> Tensor:
    """Sum over all ranks and keep one part of axis 0 each, without gradient.

    Args:
        x: (ranks * n, ...).
        group: ranks.

    Returns:
        (n, ...).
    """
    x = x.detach().contiguous()
    found = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    dist.reduce_scatter(found, list(x.chunk(group.size())), group=group)
    return found


def concatenated(x: Tensor, group) -> Tensor:
    """Join the tensors of all ranks along axis 0, without gradient.

    Args:
        x: (n, ...).
        group: ranks.

    Returns:
        (ranks * n, ...).
    """
    return gathered(x, group).flatten(0, 1)


def own_part(x: Tensor, group) -> Tensor:
    """Return the part of axis 0 that belongs to this rank, without gradient.

    Args:
        x: (ranks * n, ...).
        group: ranks.

    Returns:
        (n, ...).
    """
    count = x.shape[0] // group.size()
    return x.detach().narrow(0, rank_of(group) * count, count).clone()


class _Exchange(torch.autograd.Function):
    """A linear exchange and the one that is its transpose."""

    @staticmethod
    def forward(ctx, x, group, forward, backward):
        ctx.group, ctx.transposed = group, backward
        return forward(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return ctx.transposed(gradient, ctx.group), None, None, None


def _exchange(forward: Callable, backward: Callable, x: Tensor, group) -> Tensor:
    if group is None or group.size() == 1:
        return x
    return _Exchange.apply(x, group, forward, backward)


def _same(x: Tensor, group) -> Tensor:
    return x.detach().clone()


def to_all(x: Tensor, group) -> Tensor:
    """Give a replicated x to work that the ranks share: its gradient is the sum over the ranks.

    Args:
        x: the same on all ranks.
        group: ranks; None is one.

    Returns:
        x.
    """
    return _exchange(_same, summed, x, group)


def from_all(x: Tensor, group) -> Tensor:
    """Sum what each rank has worked out; what follows is replicated, and so is its gradient.

    Args:
        x: a part of the sum.
        group: ranks; None is one.

    Returns:
        The sum over the ranks.
    """
    return _exchange(summed, _same, x, group)


def through_all(x: Tensor, group) -> Tensor:
    """Sum over the ranks for further work that the ranks share: ``to_all`` of ``from_all``.

    Args:
        x: a part of the sum.
        group: ranks; None is one.

    Returns:
        The sum over the ranks.
    """
    return _exchange(summed, summed, x, group)


def gather_tokens(x: Tensor, group) -> Tensor:
    """Join the tokens of all ranks for work that the ranks share.

    Args:
        x: (n, ...), tokens of this rank.
        group: ranks; None is one.

    Returns:
        (ranks * n, ...). Its gradient is summed over the ranks and cut again.
    """
    return _exchange(concatenated, parts_summed, x, group)


def scatter_tokens(x: Tensor, group) -> Tensor:
    """Sum over the ranks and keep the tokens of this rank.

    Args:
        x: (ranks * n, ...), a part of the sum.
        group: ranks; None is one.

    Returns:
        (n, ...).
    """
    return _exchange(parts_summed, concatenated, x, group)


def take_tokens(x: Tensor, group) -> Tensor:
    """Keep the tokens of this rank; the gradient is joined.

    Args:
        x: (ranks * n, ...), the same on all ranks.
        group: ranks; None is one.

    Returns:
        (n, ...).
    """
    return _exchange(own_part, concatenated, x, group)


def join_tokens(x: Tensor, group) -> Tensor:
    """Join the tokens of all ranks for work that each rank does in whole; the gradient is cut.

    Args:
        x: (n, ...), tokens of this rank.
        group: ranks; None is one.

    Returns:
        (ranks * n, ...), the same on all ranks.
    """
    return _exchange(concatenated, own_part, x, group)


def same_random_state(group, device=None) -> None:
    """Continue with the random numbers of the first rank on all ranks.

    What is drawn after this is the same everywhere, so that each rank can draw a parameter whole
    and keep its part, and replicated parameters are replicas.

    Args:
        group: ranks; None is one.
        device: where parameters will be drawn.
    """
    if group is None or group.size() == 1:
        return
    device = torch.get_default_device() if device is None else torch.device(device)
    root = dist.get_global_rank(group, 0)
    state = torch.get_rng_state()
    is_cuda = device.type == "cuda"
    if is_cuda:
        state = torch.cat([state, torch.cuda.get_rng_state(device)])
    # NCCL takes tensors of its device only.
    carrier = state.to(device) if is_cuda else state
    dist.broadcast(carrier, root, group=group)
    state = carrier.cpu()
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size])
    if is_cuda:
        torch.cuda.set_rng_state(state[size:], device)
