"""The specification: every operator of ``ssm.ops`` in plain PyTorch, differentiable by autograd.

Each function says what *correct* means; the compiled operators are judged by it. It favours the
formula over speed, but it is linear in the sequence length, forward and backward: time axes are
unbound once and outputs stacked once, because autograd of ``x[:, :, t]`` in a loop is quadratic.

Computation is in float64 if the main input is float64, else in float32 ("acc" below). Skipped
steps are selected away before they are used, never multiplied by zero, so that a NaN in padding
reaches neither values nor gradients.
"""

import torch

from ssm.ops.python import check
from ssm.ops.python.layout import (
    last_kept,
    layout_of,
    read_rows,
    rows_or_zero,
    select_steps,
    write_rows,
)


def _acc_dtype(main: torch.Tensor) -> torch.dtype:
    return torch.float64 if main.dtype == torch.float64 else torch.float32


def _softplus(x: torch.Tensor) -> torch.Tensor:
    # maximum, not clamp: at x = 0 it halves the gradient, which makes the sum's gradient 1/2.
    return torch.maximum(x, torch.zeros_like(x)) + torch.log1p(torch.exp(-x.abs()))


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


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
    (batch, dim, seqlen), dstate, acc = u.shape, A.shape[1], _acc_dtype(u)
    layout = layout_of(seq_meta, batch, seqlen, u.device)

    x = select_steps(layout, u.to(acc), 2)
    dt = select_steps(layout, delta.to(acc), 2)
    if dt_bias is not None:
        dt = dt + dt_bias.to(acc)[:, None]
    if softplus:
        dt = _softplus(dt)
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
        y = y * _silu(select_steps(layout, z.to(acc), 2))
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


def selective_state_step(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    softplus=True,
    *,
    state_indices=None,
):
    """Advance a selective state-space recurrence by one token, or a few, in place.

    The recurrence of :func:`selective_scan`, for Mamba-1 states (R, D, N) and for the heads of
    Mamba-2, states (R, H, P, N). The rank of x against the rank of the state decides whether there
    is a token axis T after the batch axis.

    Args:
        state: (R, D, N) | (R, H, P, N), float64 | float32 | bfloat16 | float16. Updated in place,
            rounded to its dtype once per call.
        x: (B, D) | (B, T, D), or (B, H, P) | (B, T, H, P); any of these dtypes, like every tensor
            below but ``state_indices``. Input.
        dt: Mamba-1: as x. Mamba-2: (B, H) | (B, H, P), with T as x. Step size.
        A: (D, N), or (H,) | (H, P, N). Continuous decay.
        B: (B, N) | (B, G, N), with T as x; G divides D (or H). Input matrix.
        C: as B, in a form of its own choice. Output matrix.
        D: (D,), or (H,) | (H, P). Skip weight.
        z: as x. Gate.
        dt_bias: (D,), or (H,) | (H, P). Added to dt.
        softplus: apply softplus to the step size.
        state_indices: (B,), int32. Row of ``state`` that each batch row uses; -1 skips the batch
            row: its y is 0 and no state changes. Without it R must be B.

    Returns:
        y: as x. Output.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or index breaks the contract above, or an index names a
            row twice; the message names the argument.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), eq. 2-4; Dao & Gu 2024 (arXiv:2405.21060), eq. 1.

    Example:
        >>> y = selective_state_step(state, x, dt, A, B, C)
    """
    check.selective_state_step(state, x, dt, A, B, C, D, z, dt_bias, state_indices)
    acc, several = _acc_dtype(x), x.ndim == state.ndim

    keep, h = read_rows(state, state_indices, x.shape[0])
    h = h.to(acc) if state.ndim == 4 else h.to(acc)[:, :, None]  # (B, H, P, N)

    def tokens(t, ndim=0):
        """Give a tensor a token axis, and a headdim axis if it is tied over the head."""
        t = rows_or_zero(keep, t.to(acc))
        t = t if several else t[:, None]
        return t[..., None] if t.ndim < ndim else t

    def heads(t):
        return t.to(acc) if t.ndim == 2 else t.to(acc)[:, None]

    # Mamba-1 is the case H = D, P = 1.
    xs, dts = tokens(x, 4), tokens(dt, 4)  # (B, T, H, P)
    rate = A.to(acc)  # (H, P, N), of size 1 where tied
    rate = rate if A.ndim == 3 else rate[:, None] if A.ndim == 2 else rate[:, None, None]
    if dt_bias is not None:
        dts = dts + heads(dt_bias)
    if softplus:
        dts = _softplus(dts)
    inputs, outputs = (_matrix_per_head(tokens(m), xs.shape[2]) for m in (B, C))

    ys = []
    for x_t, dt_t, B_t, C_t in zip(
        xs.unbind(1), dts.unbind(1), inputs.unbind(1), outputs.unbind(1), strict=True
    ):
        drive = (dt_t * x_t)[..., None] * B_t[:, :, None]
        h = torch.exp(dt_t[..., None] * rate) * h + drive
        ys.append((h * C_t[:, :, None]).sum(3))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(xs)
    if D is not None:
        y = y + heads(D) * xs
    if z is not None:
        y = y * _silu(tokens(z, 4))
    write_rows(state, state_indices, h.reshape(x.shape[0], *state.shape[1:]))
    return rows_or_zero(keep, y.reshape(x.shape)).to(x.dtype)


def _matrix_per_head(matrix, nheads):
    """Return B or C, (B, T, N) or (B, T, G, N), as (B, T, H, N)."""
    if matrix.ndim == 3:
        return matrix[:, :, None].expand(-1, -1, nheads, -1)
    return matrix.repeat_interleave(nheads // matrix.shape[2], 2)


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
    (batch, seqlen, nheads, headdim), dstate, acc = X.shape, B.shape[3], _acc_dtype(X)
    layout = layout_of(seq_meta, batch, seqlen, X.device)

    x = select_steps(layout, X.to(acc))
    step = select_steps(layout, dt.to(acc))
    if dt_bias is not None:
        step = step + dt_bias.to(acc)
    if softplus:
        step = _softplus(step)
    step = select_steps(layout, step.clamp(*dt_limit))
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
    for a, v, B_q, C_q, n, row in zip(*(t.split(chunk_size, 1) for t in rows), strict=True):
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
        y = y * _silu(select_steps(layout, z.to(acc)))
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


def dw_causal_conv(
    x,
    weight,
    bias=None,
    activation="silu",
    *,
    initial_state=None,
    return_final_state=False,
    seq_meta=None,
):
    """Convolve every channel with its own short causal filter.

    Computes ``y[t] = act(bias + sum_k weight[k] x[t - (W - 1) + k])``. What lies before the first
    step is the initial state.

    Args:
        x: (B, D, L), float64 | float32 | bfloat16 | float16, any strides. Input.
        weight: (D, W) | (D, 1, W), W at least 1; any of these dtypes, like every tensor below.
        bias: (D,).
        activation: "silu" | "swish" (the same) | "identity" | None (the same).
        initial_state: (S, D, W - 1). The W - 1 inputs before the first step, oldest first; zeros
            if not given. S is the number of sequences of ``seq_meta.cu_seqlens`` if given, else B.
        return_final_state: also return the last W - 1 inputs.
        seq_meta: SeqMeta. Packed sequences and skipped steps; the filter sees the last W - 1
            inputs of the same sequence that were not skipped.

    Returns:
        y: (B, D, L), dtype of x. Output; 0 where the step is skipped.
        final_state: (S, D, W - 1), dtype of x. Only if ``return_final_state``. The inputs an
            ``initial_state`` of a continued call must have; the rule of :func:`selective_scan`.

    Raises:
        TypeError: an argument is not a tensor, or seq_meta not a SeqMeta.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), section 3.4: the convolution of the Mamba block.

    Example:
        >>> y = dw_causal_conv(x, weight, bias)
    """
    check.dw_causal_conv(x, weight, bias, activation, initial_state, seq_meta)
    (batch, dim, seqlen), width, acc = x.shape, weight.shape[-1], _acc_dtype(x)
    layout = layout_of(seq_meta, batch, seqlen, x.device)
    taps = weight.to(acc).reshape(dim, width)

    # One line of memory: a zero, the S initial windows, then the B * L inputs, each (D,).
    memory = width - 1
    window = torch.zeros(layout.nstates, dim, memory, dtype=acc, device=x.device)
    if initial_state is not None:
        window = initial_state.to(acc)
    inputs = select_steps(layout, x.to(acc), 2)
    line = [t.transpose(1, 2).flatten(0, 1) for t in (window, inputs)]
    line = torch.cat([inputs.new_zeros(1, dim), *line])

    # before[i] is the place of the input before place i in its sequence; the zero precedes itself.
    first = 1 + layout.nstates * memory  # place of the first input
    place = torch.arange(first, first + batch * seqlen, device=x.device).view(batch, seqlen)
    newest = memory * (1 + layout.state.clamp(max=layout.nstates - 1))
    begins = layout.resets | (layout.previous < 0)
    start = newest if layout.per_sequence else torch.where(layout.resets, 0, newest)
    before_input = torch.where(begins, start, place[:, :1] + layout.previous)
    windows = torch.arange(first, device=x.device) - 1
    oldest = windows % max(memory, 1) == 0
    before = torch.cat([torch.where(oldest, 0, windows).clamp(min=0), before_input.flatten()])

    at, y = place.flatten(), 0.0
    for k in reversed(range(width)):
        y = y + taps[:, k] * line[at]
        at = before[at]
    if bias is not None:
        y = y + bias.to(acc)
    y = y if activation in (None, "identity") else _silu(y)
    y = y.view(batch, seqlen, dim).transpose(1, 2)
    y = select_steps(layout, y, 2).to(x.dtype)
    if not return_final_state:
        return y
    last = last_kept(layout)
    newest = memory * torch.arange(1, layout.nstates + 1, device=x.device)
    at = torch.where(last >= 0, first + last, newest)
    final = []
    for _ in range(memory):
        final.append(line[at])
        at = before[at]
    if not final:
        return y, x.new_zeros(layout.nstates, dim, 0)
    return y, torch.stack(final[::-1], 2).to(x.dtype)


def dw_causal_conv_step(
    x,
    conv_state,
    weight,
    bias=None,
    activation="silu",
    *,
    cache_seqlens=None,
    state_indices=None,
):
    """Advance :func:`dw_causal_conv` by one token, or a few, updating its window in place.

    Args:
        x: (B, D) | (B, D, T), float64 | float32 | bfloat16 | float16. Input.
        conv_state: (R, D, K), K at least W - 1; any of these dtypes, like every tensor below but
            the indices. The last K inputs, updated in place. Oldest first without
            ``cache_seqlens``.
        weight: (D, W) | (D, 1, W).
        bias: (D,).
        activation: "silu" | "swish" | "identity" | None.
        cache_seqlens: (B,), int32. Number of tokens that each row has seen, not negative. With it
            the window is a circular buffer: token t of the call is stored at
            ``(cache_seqlens + t) mod K``.
        state_indices: (B,), int32. Row of ``conv_state`` that each batch row uses; -1 skips the
            batch row: its y is 0 and no window changes. Without it R must be B.

    Returns:
        y: as x. Output.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or value breaks the contract above, or an index names a
            row twice; the message names the argument.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), section 3.4.

    Example:
        >>> y = dw_causal_conv_step(x, conv_state, weight, bias)
    """
    check.dw_causal_conv_step(x, conv_state, weight, bias, activation, cache_seqlens, state_indices)
    acc, memory, width = _acc_dtype(x), conv_state.shape[2], weight.shape[-1]
    tokens = x[:, :, None] if x.ndim == 2 else x
    batch, dim, ntokens = tokens.shape
    taps = weight.to(acc).reshape(dim, width)

    keep, stored = read_rows(conv_state, state_indices, batch)
    offset = torch.arange(memory, device=x.device).expand(batch, dim, memory)
    if cache_seqlens is None or not memory:
        oldest_first = stored
    else:
        # The slot that is written next holds the oldest input.
        seen = cache_seqlens.long()[:, None, None]
        oldest_first = stored.gather(2, (seen + offset) % memory)
    line = torch.cat([oldest_first.to(acc), rows_or_zero(keep, tokens.to(acc))], 2)  # (B, D, K + T)

    y = torch.zeros(batch, dim, ntokens, dtype=acc, device=x.device)
    for k in range(width):
        y = y + taps[:, k, None] * line.narrow(2, memory - (width - 1) + k, ntokens)
    if bias is not None:
        y = y + bias.to(acc)[:, None]
    y = y if activation in (None, "identity") else _silu(y)

    line = line.narrow(2, ntokens, memory)
    if cache_seqlens is not None and memory:
        line = torch.zeros_like(line).scatter(2, (seen + ntokens + offset) % memory, line)
    write_rows(conv_state, state_indices, line)
    return rows_or_zero(keep, y.reshape(x.shape)).to(x.dtype)


def fused_layer_norm(
    x,
    weight,
    bias,
    residual=None,
    is_rms=False,
    eps=1e-5,
    prenorm=True,
    residual_in_fp32=True,
):
    """Add a residual stream and normalise the sum over the last axis.

    Computes ``s = x + residual`` and ``y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias``,
    or, with ``is_rms``, ``y = s / sqrt(mean(s^2) + eps) * weight + bias``.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16. Input.
        weight: (D,), any of these dtypes, like every tensor below.
        bias: (D,) or None.
        residual: as x in shape, or None.
        is_rms: normalise by the root mean square, without subtracting the mean.
        eps: added to the variance; positive.
        prenorm: also return the sum.
        residual_in_fp32: return the sum in acc: float64 if x is, else float32.

    Returns:
        y: (..., D), dtype of x. Normalised sum.
        s: (..., D). Only if ``prenorm``. The sum, in acc if ``residual_in_fp32``, else in the dtype
            of the residual, or of x if there is none. y is computed from the unrounded sum.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or value breaks the contract above; the message names the
            argument.

    Source:
        Ba et al. 2016 (arXiv:1607.06450), eq. 4; Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.

    Example:
        >>> y, residual = fused_layer_norm(x, weight, None, residual, is_rms=True)
    """
    check.fused_layer_norm(x, weight, bias, residual, eps)
    acc = _acc_dtype(x)
    s = x.to(acc) if residual is None else x.to(acc) + residual.to(acc)
    centred = s if is_rms else s - s.mean(-1, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    y = y.to(x.dtype)
    if not prenorm:
        return y
    return y, s.to(acc if residual_in_fp32 else x.dtype if residual is None else residual.dtype)
