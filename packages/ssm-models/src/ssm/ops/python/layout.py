"""Which steps and which rows of a state the reference operators read, write and skip."""

from typing import NamedTuple

import torch

from ssm.seq_meta import SeqMeta


class Layout(NamedTuple):
    """Layout of a batch. S is the number of states: sequences of ``cu_seqlens``, else rows."""

    keep: torch.Tensor  # (B, L) bool: the step is not skipped
    state: torch.Tensor  # (B, L) int64: the step's row of the (S, ...) states; S where it has none
    previous: torch.Tensor  # (B, L) int64: the last kept step of the row before this one, or -1
    resets: torch.Tensor  # (B, L) bool: a sequence starts here, not from what entered the row
    nstates: int  # S
    per_sequence: bool  # states are per sequence of cu_seqlens; such a sequence resets to its own


def layout_of(seq_meta: SeqMeta | None, batch: int, seqlen: int, device) -> Layout:
    """Work out the layout of a batch; without ``seq_meta`` each row is one sequence."""
    if seq_meta is None:
        step = torch.arange(seqlen, device=device).expand(batch, seqlen)
        row = torch.arange(batch, device=device)[:, None].expand(batch, seqlen)
        keep = torch.ones(batch, seqlen, dtype=torch.bool, device=device)
        return Layout(keep, row, step - 1, ~keep, batch, False)
    ids = seq_meta.positions(batch, seqlen, device)
    layout = layout_of_ids(ids)
    if not seq_meta.state_per_sequence:
        return layout
    nstates = seq_meta.num_sequences
    resets = layout.resets | (layout.keep & (layout.previous < 0))
    state = torch.where(layout.keep, ids.long(), nstates)
    return layout._replace(state=state, resets=resets, nstates=nstates, per_sequence=True)


def layout_of_ids(ids: torch.Tensor) -> Layout:
    """Work out the layout of a batch from its sequence ids (B, L); one state per row."""
    (batch, seqlen), device, ids = ids.shape, ids.device, ids.long()
    step = torch.arange(seqlen, device=device).expand(batch, seqlen)
    row = torch.arange(batch, device=device)[:, None].expand(batch, seqlen)
    keep = ids >= 0
    latest = torch.where(keep, step, -1)
    if seqlen:
        latest = latest.cummax(1).values
    previous = torch.nn.functional.pad(latest, (1, 0), value=-1)[:, :seqlen]
    follows = ids.gather(1, previous.clamp(min=0)) == ids
    resets = keep & (previous >= 0) & ~follows
    return Layout(keep, row, previous, resets, batch, False)


def last_kept(layout: Layout) -> torch.Tensor:
    """Return (S,) int64: flat position b * L + t of the last kept step of each state, or -1."""
    device = layout.keep.device
    flat = torch.arange(layout.keep.numel(), device=device)
    # Skipped steps go to an extra state that is cut off.
    state = torch.where(layout.keep, layout.state, layout.nstates).flatten()
    last = torch.full((layout.nstates + 1,), -1, dtype=torch.int64, device=device)
    return last.scatter_reduce(0, state, flat, "amax")[: layout.nstates]


def select_steps(layout: Layout, x: torch.Tensor, time_axis: int = 1) -> torch.Tensor:
    """Return x, its batch axis first, with 0 in the skipped steps, whatever stood there."""
    shape = [1] * x.ndim
    shape[0], shape[time_axis] = layout.keep.shape
    return torch.where(layout.keep.reshape(shape), x, 0.0)


def read_rows(state, state_indices, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which batch rows are served (B,), and a copy of their rows; 0 for the others."""
    if state_indices is None:
        return torch.ones(batch, dtype=torch.bool, device=state.device), state.clone()
    keep = state_indices >= 0
    padded = torch.cat([state, state.new_zeros(1, *state.shape[1:])])
    return keep, padded[torch.where(keep, state_indices, state.shape[0]).long()]


def write_rows(state, state_indices, rows) -> None:
    """Write (B, ...) rows back to the state, in place."""
    if state_indices is None:
        state.copy_(rows)
        return
    batch, nrows = rows.shape[0], state.shape[0]
    # Which batch row writes each row of the state; batch + r where row r keeps its content.
    writer = batch + torch.arange(nrows + 1, device=state.device)
    row = torch.where(state_indices >= 0, state_indices, nrows).long()
    writer[row] = torch.arange(batch, device=state.device)
    state.copy_(torch.cat([rows.to(state.dtype), state])[writer[:nrows]])


def rows_or_zero(keep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return y (B, ...) with 0 in the batch rows that are not served."""
    return torch.where(keep.reshape(-1, *[1] * (y.ndim - 1)), y, 0.0)
