"""The selective scan of Mamba-1, specified in PyTorch."""

import torch

from ssm.ops.python import arithmetic, check
from ssm.ops.python.layout import last_kept, layout_of, select_steps


def selective_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    seq_meta=None,
):
    """Run a selective state-space recurrence over a sequence.

    Computes, with ``dt = delta + dt_bias`` (through softplus if asked for),
    ``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t]``, ``y[t] = sum_n C[t] h[t] + D u[t]`` and, with
    a gate, ``y[t] silu(z[t])``.

    Args:
        u: (B, D, L), float64 | float32 | bfloat16 | float16. Input.
        delta: (B, D, L), any of these dtypes, like every tensor below. Step size.
        A: (D, N). Continuous decay, negative for a stable state.
        B: (D, N) constant, (B, N, L), or (B, G, N, L) where G divides D. Input matrix.
        C: as B, in a form of its own choice. Output matrix.
        D: (D,). Skip weight.
        z: (B, D, L). Gate.
        dt_bias: (D,). Added to delta.
        softplus: apply ``softplus(x) = max(x, 0) + log1p(exp(-|x|))`` to the step size.
        return_last_state: also return the state after the last step.
        initial_state: (S, D, N). State before the first step; zeros if not given. S is the number
            of sequences of ``seq_meta.cu_seqlens`` if given, else B.
        seq_meta: SeqMeta. Packed sequences and skipped steps.

    Returns:
        y: (B, D, L), dtype of u. Output; 0 where the step is skipped.
        last_state: (S, D, N), float64 if u is, else float32. Only if ``return_last_state``. State
            after the last step not skipped, of each sequence of ``cu_seqlens``, else of each row;
            the initial state if there is no such step.

    Raises:
        TypeError: an argument is not a tensor, or seq_meta not a SeqMeta.
        ValueError: a shape, dtype or device breaks the contract above; the message names the
            argument.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), eq. 2-4: A discretised by zero-order hold (eq. 4), B by
        Euler's rule, as the authors' code does.

    Example:
        >>> y, state = selective_scan(u, delta, A, B, C, softplus=True, return_last_state=True)
    """
    check.selective_scan(u, delta, A, B, C, D, z, dt_bias, initial_state, seq_meta)
    (batch, dim, seqlen), dstate, acc = u.shape, A.shape[1], arithmetic.acc_dtype(u)
    layout = layout_of(seq_meta, batch, seqlen, u.device)

    x = select_steps(layout, u.to(acc), 2)
    dt = select_steps(layout, delta.to(acc), 2)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)[:, None]
    if softplus:
        dt = arithmetic.softplus(dt)
    dt = select_steps(layout, dt, 2)  # a skipped step decays by exp(0) = 1 and is driven by 0
    decay_rate = A.to(acc)
    inputs = _matrix_per_step(layout, B.to(acc), dim)
    outputs = _matrix_per_step(layout, C.to(acc), dim)

    zeros = torch.zeros(1, dim, dstate, dtype=acc, device=u.device)
    initial = zeros.expand(layout.nstates, dim, dstate)
    if initial_state is not None:
        initial = initial_state.to(acc)
    h = zeros.expand(batch, dim, dstate) if layout.per_sequence else initial
    entering = [zeros] * seqlen  # what a sequence starts from, at each step
    if layout.per_sequence and initial_state is not None:
        # One more row, for the steps that have no state.
        entering = torch.cat([initial, zeros])[layout.state].unbind(1)
    resets = layout.resets[:, :, None, None].unbind(1)
    ys, hs = [], []
    for t, (x_t, dt_t) in enumerate(zip(x.unbind(2), dt.unbind(2), strict=True)):
        if seq_meta is not None:
            h = torch.where(resets[t], entering[t], h)
        h = torch.exp(dt_t[:, :, None] * decay_rate) * h + (dt_t * x_t)[:, :, None] * inputs[t]
        ys.append((h * outputs[t]).sum(2))
        if layout.per_sequence and return_last_state:
            hs.append(h)

    y = torch.stack(ys, 2) if ys else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(acc)[:, None] * x
    if z is not None:
        y = y * arithmetic.silu(select_steps(layout, z.to(acc), 2))
    y = select_steps(layout, y, 2).to(u.dtype)
    if not return_last_state:
        return y
    if layout.per_sequence:
        reached = torch.stack(hs, 1).flatten(0, 1) if hs else initial[:0]
        last = last_kept(layout)
        without_steps = len(reached) + torch.arange(layout.nstates, device=u.device)
        return y, torch.cat([reached, initial])[torch.where(last >= 0, last, without_steps)]
    return y, h if seqlen else h.clone()  # never the caller's own tensor


def _matrix_per_step(layout, matrix, dim):
    """Return, per step, B or C so that it broadcasts against a state (B, D, N)."""
    seqlen = layout.keep.shape[1]
    if matrix.ndim == 2:
        return [matrix] * seqlen
    matrix = select_steps(layout, matrix, matrix.ndim - 1)
    if matrix.ndim == 3:
        return [m[:, None] for m in matrix.unbind(2)]
    return [m.repeat_interleave(dim // m.shape[1], 1) for m in matrix.unbind(3)]
