"""The judge of the reference: every operator as a float64 NumPy loop over tokens, without torch.

Written from the contract, not from the reference, one sequence and one token at a time, so that
the two can only agree by both being right. Arguments as in ``ssm.ops``; arrays of any float dtype;
``seq_meta`` is a dict as made by ``tests.cases``. States are always returned, never updated.
"""

import numpy as np


def _f64(array):
    return None if array is None else np.asarray(array, np.float64)


def _softplus(x):
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def _silu(x):
    return x * 0.5 * (1.0 + np.tanh(0.5 * x))


def positions(seq_meta, batch: int, seqlen: int) -> tuple[np.ndarray, bool, int]:
    """Return the canonical ids (B, L) int32, state_per_sequence, and the number S of states."""
    ids = np.zeros((batch, seqlen), np.int32)
    if seq_meta is None:
        return ids, False, batch
    cu_seqlens, per_sequence, nstates = seq_meta.get("cu_seqlens"), False, batch
    if cu_seqlens is not None:
        per_sequence, nstates = True, len(cu_seqlens) - 1
        flat = np.full(batch * seqlen, -1, np.int32)
        for s in range(nstates):
            flat[cu_seqlens[s] : cu_seqlens[s + 1]] = s
        ids = flat.reshape(batch, seqlen)
    elif seq_meta.get("seq_idx") is not None:
        ids = np.asarray(seq_meta["seq_idx"], np.int32)
    if seq_meta.get("mask") is not None:
        ids = np.where(seq_meta["mask"], ids, -1).astype(np.int32)
    return ids, per_sequence, nstates


def runs(seq_meta, batch: int, seqlen: int) -> list[tuple[int, list[int], int | None, int | None]]:
    """Cut a batch into its sequences, in order.

    Returns:
        One (row, steps, from, to) per sequence: the steps of the row that it keeps, the state it
        starts from and the state it ends in; None: it starts from zero, or its end is not asked
        for.
    """
    ids, per_sequence, _ = positions(seq_meta, batch, seqlen)
    found = []
    for row in range(batch):
        of_row = []
        for t in range(seqlen):
            if ids[row, t] < 0:
                continue
            if not of_row or ids[row, t] != ids[row, of_row[-1][-1]]:
                of_row.append([])
            of_row[-1].append(t)
        for i, steps in enumerate(of_row):
            if per_sequence:
                s = int(ids[row, steps[0]])
                found.append((row, steps, s, s))
            else:
                last = i == len(of_row) - 1
                found.append((row, steps, row if i == 0 else None, row if last else None))
    return found


def selective_scan(
    u, delta, A, B, C, D=None, z=None, dt_bias=None, softplus=False, *, initial_state=None,
    seq_meta=None,
):  # fmt: skip
    """Return y (B, D, L) and last_state (S, D, N)."""
    u, delta, A, B, C, D, z, dt_bias = map(_f64, (u, delta, A, B, C, D, z, dt_bias))
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    nstates = positions(seq_meta, batch, seqlen)[2]
    states = (
        np.zeros((nstates, dim, dstate)) if initial_state is None else _f64(initial_state).copy()
    )

    def at(matrix, row, t):
        """Return B or C as (D, N)."""
        if matrix.ndim == 2:
            return matrix
        if matrix.ndim == 3:
            return np.tile(matrix[row, :, t], (dim, 1))
        per_group = dim // matrix.shape[1]
        return np.array([matrix[row, d // per_group, :, t] for d in range(dim)]).reshape(
            dim, dstate
        )

    y = np.zeros((batch, dim, seqlen))
    for row, steps, start, end in runs(seq_meta, batch, seqlen):
        h = np.zeros((dim, dstate)) if start is None else states[start].copy()
        for t in steps:
            dt = delta[row, :, t] + (0.0 if dt_bias is None else dt_bias)
            dt = _softplus(dt) if softplus else dt
            decay = np.exp(dt[:, None] * A)
            h = decay * h + (dt * u[row, :, t])[:, None] * at(B, row, t)
            out = (h * at(C, row, t)).sum(1)
            if D is not None:
                out = out + D * u[row, :, t]
            if z is not None:
                out = out * _silu(z[row, :, t])
            y[row, :, t] = out
        if end is not None:
            states[end] = h
    return y, states


def selective_state_step(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=True, *, state_indices=None
):
    """Return y, as x, and the updated state."""
    state, x, dt, A, B, C, D, z, dt_bias = map(_f64, (state, x, dt, A, B, C, D, z, dt_bias))
    state, y = state.copy(), np.zeros(x.shape)
    channels, dstate = state.shape[1:-1], state.shape[-1]
    several = x.ndim == state.ndim

    def full(array, shape):
        """Spread what is given per head over the channels of the head."""
        array = array.reshape(array.shape + (1,) * (len(shape) - array.ndim))
        return np.broadcast_to(array, shape)

    def per_channel(matrix):
        """Return B or C of one token, (N,) or (G, N), as (channels, N)."""
        if matrix.ndim == 1:
            return np.broadcast_to(matrix, (*channels, dstate))
        out = np.zeros((*channels, dstate))
        for head in range(channels[0]):
            out[head] = matrix[head // (channels[0] // matrix.shape[0])]
        return out

    for row in range(x.shape[0]):
        slot = row if state_indices is None else int(state_indices[row])
        if slot < 0:
            continue
        for token in range(x.shape[1]) if several else [None]:
            here = (row,) if token is None else (row, token)
            step = full(dt[here], channels)
            if dt_bias is not None:
                step = step + full(dt_bias, channels)
            step = _softplus(step) if softplus else step
            decay = np.exp(step[..., None] * full(A, (*channels, dstate)))
            drive = (step * x[here])[..., None] * per_channel(B[here])
            state[slot] = decay * state[slot] + drive
            out = (state[slot] * per_channel(C[here])).sum(-1)
            if D is not None:
                out = out + full(D, channels) * x[here]
            if z is not None:
                out = out * _silu(z[here])
            y[here] = out
    return y, state


def ssd_chunk_scan(
    X, dt, A, B, C, chunk_size=None, D=None, z=None, seq_meta=None, initial_states=None, *,
    dt_bias=None, softplus=False, dt_limit=(0.0, np.inf),
):  # fmt: skip
    """Return y (B, L, H, P) and final_states (S, H, P, N); without chunks."""
    X, dt, A, B, C, D, z, dt_bias = map(_f64, (X, dt, A, B, C, D, z, dt_bias))
    (batch, seqlen, heads, headdim), dstate = X.shape, B.shape[3]
    nstates = positions(seq_meta, batch, seqlen)[2]
    states = np.zeros((nstates, heads, headdim, dstate))
    states = states if initial_states is None else _f64(initial_states).copy()
    y = np.zeros(X.shape)
    for row, steps, start, end in runs(seq_meta, batch, seqlen):
        h = np.zeros((heads, headdim, dstate)) if start is None else states[start].copy()
        for t in steps:
            for head in range(heads):
                step = dt[row, t, head] + (0.0 if dt_bias is None else dt_bias[head])
                step = np.clip(_softplus(step) if softplus else step, *dt_limit)
                b = B[row, t, head // (heads // B.shape[2])]
                c = C[row, t, head // (heads // C.shape[2])]
                x = X[row, t, head]
                h[head] = np.exp(step * A[head]) * h[head] + step * np.outer(x, b)
                y[row, t, head] = h[head] @ c
                if D is not None:
                    y[row, t, head] += D[head] * x
        if end is not None:
            states[end] = h
    if z is not None:
        # Skipped steps may hold NaN.
        kept = positions(seq_meta, batch, seqlen)[0] >= 0
        y[kept] *= _silu(z[kept])
    return y, states


def dw_causal_conv(x, weight, bias=None, activation="silu", *, initial_state=None, seq_meta=None):
    """Return y (B, D, L) and final_state (S, D, W - 1)."""
    x, weight, bias = map(_f64, (x, weight, bias))
    batch, dim, seqlen = x.shape
    width = weight.shape[-1]
    weight = weight.reshape(dim, width)
    nstates = positions(seq_meta, batch, seqlen)[2]
    states = np.zeros((nstates, dim, width - 1))
    states = states if initial_state is None else _f64(initial_state).copy()
    y = np.zeros(x.shape)
    for row, steps, start, end in runs(seq_meta, batch, seqlen):
        window = np.zeros((dim, width - 1)) if start is None else states[start].copy()
        for t in steps:
            window = np.concatenate([window, x[row, :, t : t + 1]], 1)  # (D, W)
            out = (window * weight).sum(1) + (0.0 if bias is None else bias)
            y[row, :, t] = _silu(out) if activation in ("silu", "swish") else out
            window = window[:, 1:]
        if end is not None:
            states[end] = window
    return y, states


def dw_causal_conv_step(
    x, conv_state, weight, bias=None, activation="silu", *, cache_seqlens=None, state_indices=None
):
    """Return y, as x, and the updated conv_state."""
    x, state, weight, bias = map(_f64, (x, conv_state, weight, bias))
    state, memory, width = state.copy(), state.shape[2], weight.shape[-1]
    tokens = x if x.ndim == 3 else x[:, :, None]
    weight, y = weight.reshape(tokens.shape[1], width), np.zeros(tokens.shape)
    for row in range(tokens.shape[0]):
        slot = row if state_indices is None else int(state_indices[row])
        if slot < 0:
            continue
        for t in range(tokens.shape[2]):
            token = tokens[row, :, t]
            if cache_seqlens is None:
                past = [state[slot, :, memory - k] for k in range(width - 1, 0, -1)]
            else:
                seen = int(cache_seqlens[row]) + t
                past = [state[slot, :, (seen - k) % memory] for k in range(width - 1, 0, -1)]
            out = sum(weight[:, k] * value for k, value in enumerate([*past, token]))
            out = out + (0.0 if bias is None else bias)
            y[row, :, t] = _silu(out) if activation in ("silu", "swish") else out
            if memory == 0:
                continue
            if cache_seqlens is None:
                state[slot] = np.concatenate([state[slot, :, 1:], token[:, None]], 1)
            else:
                state[slot, :, seen % memory] = token
    return y.reshape(x.shape), state


def fused_layer_norm(x, weight, bias, residual=None, is_rms=False, eps=1e-5):
    """Return y (..., D) and the sum (..., D)."""
    x, weight, bias, residual = map(_f64, (x, weight, bias, residual))
    total = x if residual is None else x + residual
    y = np.zeros(x.shape)
    for index in np.ndindex(x.shape[:-1]):
        if x.shape[-1] == 0:
            break
        row = total[index]
        row = row if is_rms else row - row.mean()
        y[index] = row / np.sqrt((row * row).mean() + eps) * weight
        if bias is not None:
            y[index] += bias
    return y, total


def gated_norm(
    x, weight, bias=None, z=None, *, is_rms=True, eps=1e-5, group_size=None, norm_before_gate=True
):
    """Return y (..., D), one group after the other."""
    x, weight, bias, z = map(_f64, (x, weight, bias, z))
    y, dim = np.zeros(x.shape), x.shape[-1]
    size = dim if group_size is None else group_size
    for index in np.ndindex(x.shape[:-1]):
        for start in range(0, dim, max(size, 1)):
            here = slice(start, start + size)
            row = x[index][here]
            gate = 1.0 if z is None else _silu(z[index][here])
            row = row if norm_before_gate else row * gate
            row = row if is_rms else row - row.mean()
            out = row / np.sqrt((row * row).mean() + eps) * weight[here]
            if bias is not None:
                out = out + bias[here]
            y[index][here] = out * gate if norm_before_gate else out
    return y


def swiglu(gate, up=None):
    """Return silu(gate) * up (..., D)."""
    gate, up = map(_f64, (gate, up))
    if up is None:
        half = gate.shape[-1] // 2
        gate, up = gate[..., :half], gate[..., half:]
    return _silu(gate) * up
