"""The judge of the stages of the state-space dual scan: float64 NumPy loops, without torch.

Each walks the steps of a chunk one by one, from the definition on docs/ops/ssd_stages.md, and says
per step which sequence is open. Composed (``tests.stages``) they give what ``tests.judge`` gives
for the whole. Arguments as in ``ssm.ops``; arrays of any float dtype.
"""

import math

import numpy as np

from tests.judge import _f64, _silu, _softplus


def _sequences(seq_idx, batch: int, seqlen: int) -> list[list[int | None]]:
    """Return per row and step the number of its sequence, counted from 0; None: skipped."""
    found = []
    for row in range(batch):
        numbers, count, current = [], -1, None
        for t in range(seqlen):
            ident = 0 if seq_idx is None else int(seq_idx[row, t])
            if ident >= 0 and ident != current:
                count, current = count + 1, ident
            numbers.append(None if ident < 0 else count)
        found.append(numbers)
    return found


def _last_open(numbers: list[int | None]) -> int:
    """Return the number of the sequence that is open after some steps; 0 before any."""
    return next((n for n in reversed(numbers) if n is not None), 0)


def ssd_chunk_cumsum(
    dt, A, chunk_size, *, dt_bias=None, softplus=False, dt_limit=(0.0, np.inf), seq_idx=None
):  # fmt: skip
    """Return dt_out and dA_cumsum, (B, H, C, Q)."""
    dt, A, dt_bias = map(_f64, (dt, A, dt_bias))
    batch, seqlen, heads = dt.shape
    shape = (batch, heads, math.ceil(seqlen / chunk_size), chunk_size)
    dt_out, decay = np.zeros(shape), np.zeros(shape)
    for row, head, chunk in np.ndindex(*shape[:3]):
        total = 0.0
        for i in range(chunk_size):
            t = chunk * chunk_size + i
            if t < seqlen and (seq_idx is None or seq_idx[row, t] >= 0):
                step = dt[row, t, head] + (0.0 if dt_bias is None else dt_bias[head])
                step = np.clip(_softplus(step) if softplus else step, *dt_limit)
                dt_out[row, head, chunk, i] = step
                total += step * A[head]
            decay[row, head, chunk, i] = total
    return dt_out, decay


def ssd_chunk_state(x, B, dt, dA_cumsum, *, seq_idx=None):
    """Return states (B, C, H, P, N): the recurrence from zero, one step after the other."""
    x, B, dt, dA_cumsum = map(_f64, (x, B, dt, dA_cumsum))
    (batch, seqlen, heads, headdim), (nchunks, size) = x.shape, dt.shape[2:]
    states = np.zeros((batch, nchunks, heads, headdim, B.shape[3]))
    sequences = _sequences(seq_idx, batch, seqlen)
    for row, chunk, head in np.ndindex(batch, nchunks, heads):
        h, group = states[row, chunk, head], head // (heads // B.shape[2])
        decay, current = 0.0, None
        for i in range(min(size, seqlen - chunk * size)):
            t = chunk * size + i
            h *= np.exp(dA_cumsum[row, head, chunk, i] - decay)
            decay = dA_cumsum[row, head, chunk, i]
            if sequences[row][t] is None:
                continue
            if sequences[row][t] != current:
                h[...], current = 0.0, sequences[row][t]
            h += dt[row, head, chunk, i] * np.outer(x[row, t, head], B[row, t, group])
        # The last sum is the decay of a whole chunk, also where the steps end before it does.
        h *= np.exp(dA_cumsum[row, head, chunk, -1] - decay)
    return states


def ssd_state_passing(states, dA_cumsum, *, initial_states=None, seq_idx=None):
    """Return states_in (B, C, H, P, N) and final_states (B, H, P, N)."""
    states, dA_cumsum, initial_states = map(_f64, (states, dA_cumsum, initial_states))
    (batch, nchunks, heads), size = states.shape[:3], dA_cumsum.shape[3]
    states_in, final = np.zeros(states.shape), np.zeros((batch, *states.shape[2:]))
    seqlen = nchunks * size if seq_idx is None else seq_idx.shape[1]
    sequences = _sequences(seq_idx, batch, seqlen)
    for row, head in np.ndindex(batch, heads):
        h = np.zeros(states.shape[3:])
        h = h if initial_states is None else initial_states[row, head].copy()
        for chunk in range(nchunks):
            states_in[row, chunk, head] = h
            before = _last_open(sequences[row][: chunk * size])
            after = _last_open(sequences[row][: (chunk + 1) * size])
            h = h * np.exp(dA_cumsum[row, head, chunk, -1]) if before == after else 0.0
            h = h + states[row, chunk, head]
        final[row, head] = h
    return states_in, final


def ssd_bmm_chunk(C, B, chunk_size):
    """Return CB (B, C, G, Q, Q)."""
    C, B = _f64(C), _f64(B)
    batch, seqlen = C.shape[:2]
    groups = math.lcm(C.shape[2], B.shape[2])
    shape = (batch, math.ceil(seqlen / chunk_size), groups, chunk_size, chunk_size)
    found = np.zeros(shape)
    for row, chunk, group, i, j in np.ndindex(*shape):
        s, t = chunk * chunk_size + i, chunk * chunk_size + j
        if s < seqlen and t < seqlen:
            c = C[row, s, group // (groups // C.shape[2])]
            found[row, chunk, group, i, j] = c @ B[row, t, group // (groups // B.shape[2])]
    return found


def ssd_chunk_output(CB, x, dt, dA_cumsum, C, states_in, *, D=None, z=None, seq_idx=None):
    """Return y (B, L, H, P)."""
    CB, x, dt, dA_cumsum, C = map(_f64, (CB, x, dt, dA_cumsum, C))
    states_in, D, z = map(_f64, (states_in, D, z))
    (batch, seqlen, heads, _), size = x.shape, dt.shape[3]
    y, sequences = np.zeros(x.shape), _sequences(seq_idx, batch, seqlen)
    for row, t, head in np.ndindex(batch, seqlen, heads):
        number = sequences[row][t]
        if number is None:
            continue
        chunk, i = divmod(t, size)
        decay, step = dA_cumsum[row, head, chunk], dt[row, head, chunk]
        weights = CB[row, chunk, head // (heads // CB.shape[2]), i]
        out = np.zeros(x.shape[3])
        for j in range(i + 1):
            s = chunk * size + j
            if sequences[row][s] == number:
                out += weights[j] * np.exp(decay[i] - decay[j]) * step[j] * x[row, s, head]
        if _last_open(sequences[row][: chunk * size]) == number:
            c = C[row, t, head // (heads // C.shape[2])]
            out += np.exp(decay[i]) * (states_in[row, chunk, head] @ c)
        out += 0.0 if D is None else D[head] * x[row, t, head]
        y[row, t, head] = out if z is None else out * _silu(z[row, t, head])
    return y
