"""The state-space dual scan of Mamba-2, specified in PyTorch."""

import torch

from ssm.ops.python import arithmetic, check
from ssm.ops.python.layout import layout_of, select_steps


@arithmetic.without_autocast
def ssd_chunk_scan(
    X,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    seq_meta=None,
    initial_states=None,
    *,
    dt_bias=None,
    softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
):
    """Run the state-space dual (Mamba-2) recurrence over a sequence, chunk by chunk.

    Computes, with ``dt = clamp(softplus(dt + dt_bias), *dt_limit)`` (softplus only if asked for),
    ``h[t] = exp(dt[t] A) h[t-1] + dt[t] X[t] B[t]^T``, ``y[t] = h[t] C[t] + D X[t]`` and, with a
    gate, ``y[t] silu(z[t])``. Within a chunk the recurrence is a masked attention, between chunks a
    state is passed; the result does not depend on ``chunk_size`` but for rounding.

    Args:
        X: (B, L, H, P), float64 | float32 | bfloat16 | float16. Input.
        dt: (B, L, H), any of these dtypes, like every tensor below. Step size.
        A: (H,). Continuous decay, negative for a stable state.
        B: (B, L, G, N), G divides H. Input matrix.
        C: (B, L, G, N), with a group count of its own. Output matrix.
        chunk_size: steps per chunk, at least 1; it need not divide L.
        D: (H,) | (H, P). Skip weight.
        z: (B, L, H, P). Gate.
        seq_meta: SeqMeta. Packed sequences and skipped steps.
        initial_states: (S, H, P, N). State before the first step; zeros if not given. S is the
            number of sequences of ``seq_meta.cu_seqlens`` if given, else B.
        dt_bias: (H,). Added to dt.
        softplus: apply softplus to the step size.
        dt_limit: (low, high), to which the step size is clamped last.
        return_final_states: also return the state after the last step.

    Returns:
        y: (B, L, H, P), dtype of X. Output; 0 where the step is skipped.
        final_states: (S, H, P, N), float64 if X is, else float32. Only if
            ``return_final_states``; the rule of :func:`selective_scan`.

    Raises:
        TypeError: an argument is not a tensor, chunk_size not an int, or seq_meta not a SeqMeta.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), section 6 and listing 1 (segment sums).

    Example:
        >>> y, states = ssd_chunk_scan(X, dt, A, B, C, 64, return_final_states=True)
    """
    check.ssd_chunk_scan(
        X, dt, A, B, C, chunk_size, D, z, seq_meta, initial_states, dt_bias, dt_limit
    )
    (batch, seqlen, nheads, headdim), dstate, acc = X.shape, B.shape[3], arithmetic.acc_dtype(X)
    layout = layout_of(seq_meta, batch, seqlen, X.device)

    x = select_steps(layout, X.to(acc))
    step = select_steps(layout, dt.to(acc))
    if dt_bias is not None:
        step = step + dt_bias.to(acc)
    if softplus:
        step = arithmetic.softplus(step)
    step = select_steps(layout, step.clamp(*map(float, dt_limit)))
    B, C = (select_steps(layout, m.to(acc)) for m in (B, C))
    B, C = (m.repeat_interleave(nheads // m.shape[2], 2) for m in (B, C))  # (B, L, H, N)

    if initial_states is None:
        states = torch.zeros(layout.nstates, nheads, headdim, dstate, dtype=acc, device=X.device)
    else:
        states = initial_states.to(acc)
    # Steps with equal numbers belong together; number 0 takes what entered the row.
    number = layout.resets.long().cumsum(1)
    entering = torch.zeros_like(number[:, :1])
    drive = x * step[..., None]
    rows = (step * A.to(acc), drive, B, C, number, layout.state)
    ys = []
    steps = min(chunk_size, max(seqlen, 1))  # torch counts up to 64 bits only
    for a, v, B_q, C_q, n, row in zip(*(t.split(steps, 1) for t in rows), strict=True):
        if not seqlen:
            break
        # together[i, j]: j comes before i, or is i, in the same sequence.
        together = (n[:, :, None] == n[:, None, :]).tril()[:, None]  # (B, 1, Q, Q)
        decay = torch.exp(torch.where(together, _segment_sums(a), -torch.inf))  # (B, H, Q, Q)
        y = torch.einsum("bhij,bjhp->bihp", torch.einsum("bihn,bjhn->bhij", C_q, B_q) * decay, v)
        a = a.transpose(1, 2)  # (B, H, Q)
        a_in = torch.where(together, a[:, :, None], 0.0).sum(3).transpose(1, 2)  # (B, Q, H)
        C_in = C_q * torch.exp(a_in)[..., None]
        if layout.per_sequence:
            member = torch.nn.functional.one_hot(row, layout.nstates + 1)[..., :-1].to(acc)
            y = y + torch.einsum("bis,bihn,shpn->bihp", member, C_in, states)
            after = together.transpose(2, 3).triu(1)
            a_out = torch.where(after, a[:, :, None], 0.0).sum(3).transpose(1, 2)
            carry = torch.exp(torch.einsum("bhj,bjs->sh", a, member))
            new = torch.einsum("bjs,bjhp,bjhn->shpn", member, v * torch.exp(a_out)[..., None], B_q)
        else:
            enters = (n == entering)[:, :, None, None]
            y = y + torch.where(enters, torch.einsum("bihn,bhpn->bihp", C_in, states), 0.0)
            entering = n[:, -1:]
            carry = torch.where(enters[:, -1, :, 0], torch.exp(a.sum(2)), 0.0)
            new = torch.einsum("bhj,bjhp,bjhn->bhpn", decay[:, :, -1], v, B_q)
        states = carry[:, :, None, None] * states + new
        ys.append(y)

    y = torch.cat(ys, 1) if ys else torch.zeros_like(x)
    if D is not None:
        y = y + (D.to(acc) if D.ndim == 2 else D.to(acc)[:, None]) * x
    if z is not None:
        y = y * arithmetic.silu(select_steps(layout, z.to(acc)))
    y = select_steps(layout, y).to(X.dtype)
    return (y, states if ys else states.clone()) if return_final_states else y


def _segment_sums(a):
    """Return (B, H, Q, Q): the sum of a (B, Q, H) over j < k <= i, for j <= i; 0 elsewhere.

    Summed term by term, not as a difference of two cumulative sums, which cancels in float32.
    """
    seqlen = a.shape[1]
    after = torch.ones(seqlen, seqlen, dtype=torch.bool, device=a.device).tril(-1)
    a = a.transpose(1, 2)[..., None].expand(-1, -1, -1, seqlen)  # a[k] at (k, j)
    return torch.where(after, a, 0.0).cumsum(2)
