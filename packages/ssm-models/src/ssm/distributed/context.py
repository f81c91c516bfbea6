"""Context parallelism: the ranks hold consecutive parts of a sequence and pass states on."""

from __future__ import annotations

import math
from numbers import Integral

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssm import ops
from ssm.distributed.carry import carry, links
from ssm.distributed.collectives import check_apart, check_group, rank_of, summed
from ssm.seq_meta import SeqMeta


def own_steps(seqlen: int, group) -> slice:
    """Return which steps of a sequence a rank takes, if all take the same number or one less.

    Any other cut serves as well, as long as the ranks hold consecutive parts in their order.

    Args:
        seqlen: L over all ranks.
        group: ranks; None is one.

    Returns:
        A slice of the axis of time.

    Raises:
        TypeError: seqlen is no int, or group no process group.
        ValueError: seqlen is negative, or this process is not in the group.
    """
    ranks = check_group("own_steps", "group", group)
    if isinstance(seqlen, bool) or not isinstance(seqlen, Integral):
        raise TypeError(f"own_steps: seqlen must be an int, got {seqlen!r}")
    if seqlen < 0:
        raise ValueError(f"own_steps: seqlen must not be negative, got {seqlen}")
    rank = rank_of(group)
    return slice(seqlen * rank // ranks, seqlen * (rank + 1) // ranks)


def copy_parameters(model: nn.Module, group) -> None:
    """Give the parameters and buffers of the first rank to all.

    Args:
        model: the same on all ranks but for the values.
        group: ranks.
    """
    root = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, root, group=group)


def sum_gradients(model: nn.Module, group) -> None:
    """Replace the gradient of every parameter by its sum over the ranks, the same bits on each.

    Behind ``backward`` of a loss that is this rank's share (not its mean) of the whole loss.

    Args:
        model: replicated; a parameter without a gradient counts as 0.
        group: ranks.
    """
    by_kind: dict[tuple, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for parameters in by_kind.values():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # One exchange for all of them: most are small.
        total = summed(torch.cat([gradient.flatten() for gradient in gradients]), group)
        parts = total.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def operators(owner: str, group, process_group=None):
    """Return what holds the operators over time: ``ssm.ops``, or the same ones over the ranks.

    Args:
        owner: class name for messages.
        group: ranks that hold consecutive parts of the sequence; None is one.
        process_group: ranks that hold parts of the heads; None is one.

    Returns:
        An object with ``selective_scan``, ``ssd_chunk_scan`` and ``dw_causal_conv``.

    Raises:
        TypeError: group is no process group.
        ValueError: this process is not in the group, or other ranks are in both.
    """
    if group is None or check_group(owner, "context_group", group) == 1:
        return ops
    check_apart(owner, group, process_group)
    return ContextOperators(group)


class ContextOperators:
    """The operators over time, for a sequence of which each rank holds a part.

    Arguments and results are those of ``ssm.ops``; tensors with an axis L hold this rank's steps
    there. The parts may differ in length, and be empty. Initial and final states are those of the
    whole sequence, the same on all ranks. All ranks must make the same calls, and all must call
    ``backward``. A gradient is that of the sum of all ranks' losses: add up those of parameters and
    of initial states over the ranks.

    The scans run twice over their steps: from a zero state, for the state that this rank adds, then
    from the state that the ranks before leave (see docs/distributed.md).

    Args:
        group: process group; its order is that of the sequence.

    Raises:
        TypeError: group is no process group.
        ValueError: group is None, or this process is not in it.
    """

    def __init__(self, group) -> None:
        if group is None:
            raise ValueError("ContextOperators: group must be a process group, got None")
        check_group("ContextOperators", "group", group)
        self.group = group

    def selective_scan(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        softplus: bool = False,
        return_last_state: bool = False,
        *,
        initial_state: Tensor | None = None,
        seq_meta: SeqMeta | None = None,
    ):
        """Run ``ssm.ops.selective_scan`` over the steps of all ranks; ``seq_meta`` is of this one.

        Returns:
            y (B, D, L) for this rank's steps, or (y, last_state (B, D, N) behind the last rank).

        Raises:
            ValueError: an argument breaks the contract of the operator, or seq_meta has cu_seqlens.
        """
        keep, enters, passes = self._sequences(seq_meta, u.shape[0], u.shape[-1], u.device)
        settings = {"dt_bias": dt_bias, "softplus": softplus, "seq_meta": seq_meta}
        _, local = ops.selective_scan(u, delta, A, B, C, **settings, return_last_state=True)
        acc = local.dtype
        keep = None if keep is None else keep[:, None]
        bias = None if dt_bias is None else dt_bias[:, None]
        steps = _step_sizes(delta, bias, softplus, keep, acc)
        factor = torch.exp(A.to(acc) * steps.sum(-1)[..., None])  # (B, D, N)
        entering, last = self._carry(
            initial_state, local, factor, enters, passes, (u, delta, A, B, C, dt_bias)
        )
        y = ops.selective_scan(u, delta, A, B, C, D, z, **settings, initial_state=entering)
        y = tied(y, entering, u.shape[-1])
        return (y, last) if return_last_state else y

    def ssd_chunk_scan(
        self,
        X: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        seq_meta: SeqMeta | None = None,
        initial_states: Tensor | None = None,
        *,
        dt_bias: Tensor | None = None,
        softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
    ):
        """Run ``ssm.ops.ssd_chunk_scan`` over the steps of all ranks; ``seq_meta`` is of this one.

        Returns:
            y (B, L, H, P) for this rank's steps, or (y, final states (B, H, P, N) behind the last
            rank).

        Raises:
            ValueError: an argument breaks the contract of the operator, or seq_meta has cu_seqlens.
        """
        keep, enters, passes = self._sequences(seq_meta, *X.shape[:2], X.device)
        settings = {"dt_bias": dt_bias, "softplus": softplus, "dt_limit": dt_limit}
        _, local = ops.ssd_chunk_scan(
            X, dt, A, B, C, chunk_size, None, None, seq_meta, **settings, return_final_states=True
        )
        acc = local.dtype
        keep = None if keep is None else keep[..., None]
        steps = _step_sizes(dt, dt_bias, softplus, keep, acc, dt_limit)
        factor = torch.exp(A.to(acc) * steps.sum(1))[..., None, None]  # (B, H, 1, 1)
        entering, last = self._carry(
            initial_states, local, factor, enters, passes, (X, dt, A, B, C, dt_bias)
        )
        y = ops.ssd_chunk_scan(X, dt, A, B, C, chunk_size, D, z, seq_meta, entering, **settings)
        y = tied(y, entering, X.shape[1])
        return (y, last) if return_final_states else y

    def dw_causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = "silu",
        *,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
        seq_meta: SeqMeta | None = None,
    ):
        """Run ``ssm.ops.dw_causal_conv`` over the steps of all ranks; ``seq_meta`` is of this one.

        Returns:
            y (B, D, L) for this rank's steps, or (y, final_state (B, D, W - 1) behind the last
            rank).

        Raises:
            ValueError: an argument breaks the contract of the operator, or seq_meta has cu_seqlens.
        """
        batch, _, seqlen = x.shape
        memory = weight.shape[-1] - 1
        keep, enters, passes = self._sequences(seq_meta, batch, seqlen, x.device)
        if seq_meta is None:
            local = x[..., max(seqlen - memory, 0) :]
            local = F.pad(local, (memory - local.shape[-1], 0))
            count = torch.full((batch,), min(seqlen, memory), device=x.device)
        else:
            # Which inputs are the last ones of the last sequence is the operator's knowledge.
            _, local = ops.dw_causal_conv(
                x, weight, bias, activation, return_final_state=True, seq_meta=seq_meta
            )
            count = torch.where(passes, keep.sum(1).clamp(max=memory), memory)
        if initial_state is not None:
            initial_state = initial_state.to(x.dtype)
        entering, last = self._carry(initial_state, local, count, enters, None, (x, weight, bias))
        y = ops.dw_causal_conv(
            x, weight, bias, activation, initial_state=entering, seq_meta=seq_meta
        )
        y = tied(y, entering, seqlen)
        return (y, last) if return_final_state else y

    def _sequences(self, seq_meta, batch, seqlen, device):
        """Return (steps that count (B, L), rows that go on from the rank before, and to the next).

        All three are None without packing and padding.
        """
        if seq_meta is None:
            return None, None, None
        if seq_meta.state_per_sequence:
            raise ValueError(
                "ContextOperators: seq_meta must hold seq_idx or mask of this rank's steps, "
                "got cu_seqlens"
            )
        ids = seq_meta.positions(batch, seqlen, device)
        return ids >= 0, *links(ids, self.group)

    def _carry(self, initial, local, transition, enters, passes, inputs):
        """Return the states that enter this rank's sequences, and those behind the last rank."""
        follows = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (initial, *inputs)
        )
        if initial is None:
            initial = torch.zeros_like(local)
        rows = (-1, *[1] * (local.dim() - 1))
        if passes is not None:
            transition = torch.where(passes.view(rows), transition, 0)
        if follows and not local.requires_grad:
            # An empty part depends on nothing, yet its rank must take part in the backward.
            local = local.detach().requires_grad_()
        entering, last = carry(initial.to(local.dtype), local, transition, self.group)
        if enters is not None:
            entering = torch.where(enters.view(rows), entering, 0)
        return entering, last


def _step_sizes(dt, dt_bias, softplus, keep, acc, limit=None):
    """Return finished step sizes in the accumulate type, 0 where skipped."""
    if keep is not None:
        # Before any arithmetic: the gradient of what is not selected would be 0 * NaN.
        dt = torch.where(keep, dt, 0)
    dt = dt.to(acc)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)
    if softplus:
        dt = torch.logaddexp(dt, torch.zeros_like(dt))
    if limit is not None:
        dt = dt.clamp(*limit)
    return dt if keep is None else torch.where(keep, dt, 0)


def tied(y: Tensor, source: Tensor, seqlen: int) -> Tensor:
    """Make the result of a rank without steps depend on an exchange, whose backward needs all.

    Args:
        y: result; empty if seqlen is 0.
        source: what the exchange gave.
        seqlen: steps of this rank.

    Returns:
        y.
    """
    return y if seqlen else y + (source.sum() * 0).to(y.dtype)
