"""The judge of the stages' compiled gradients: float64 NumPy loops, without torch.

Written from the chain rule for ``tests.stages_judge``; ``tests/kernels`` compares them with finite
differences of that judge first. Each takes the gradients of the outputs in their order, then the
arguments of its stage, and returns the gradients by the name of the argument.
"""

import numpy as np

from tests.gradient_judge import _f64, _sigmoid
from tests.stages_judge import _last_open, _sequences


def _zeros(**arrays) -> dict:
    return {name: np.zeros(a.shape) for name, a in arrays.items() if a is not None}


def ssd_chunk_cumsum(
    ddt_out, ddA_cumsum, dt, A, chunk_size, *, dt_bias=None, softplus=False,
    dt_limit=(0.0, np.inf), seq_idx=None,
):  # fmt: skip
    """Return the gradients of dt, A and dt_bias."""
    ddt_out, ddA_cumsum, dt, A, dt_bias = map(_f64, (ddt_out, ddA_cumsum, dt, A, dt_bias))
    grad = _zeros(dt=dt, A=A, dt_bias=dt_bias)
    for row, t, head in np.ndindex(*dt.shape):
        if seq_idx is not None and seq_idx[row, t] < 0:
            continue
        chunk, i = divmod(t, chunk_size)
        raw = dt[row, t, head] + (0.0 if dt_bias is None else dt_bias[head])
        free = np.logaddexp(0.0, raw) if softplus else raw
        # A step stands in its own sum and in those of all later steps of the chunk.
        through = ddA_cumsum[row, head, chunk, i:].sum()
        grad["A"][head] += np.clip(free, *dt_limit) * through
        dstep = ddt_out[row, head, chunk, i] + A[head] * through
        if not dt_limit[0] <= free <= dt_limit[1]:
            continue
        dstep *= _sigmoid(raw) if softplus else 1.0
        grad["dt"][row, t, head] = dstep
        if dt_bias is not None:
            grad["dt_bias"][head] += dstep
    return grad


def ssd_chunk_state(dstates, x, B, dt, dA_cumsum, *, seq_idx=None):
    """Return the gradients of x, B, dt and dA_cumsum."""
    dstates, x, B, dt, dA_cumsum = map(_f64, (dstates, x, B, dt, dA_cumsum))
    (batch, seqlen, heads, _), (nchunks, size) = x.shape, dt.shape[2:]
    grad = _zeros(x=x, B=B, dt=dt, dA_cumsum=dA_cumsum)
    sequences = _sequences(seq_idx, batch, seqlen)
    for row, chunk, head in np.ndindex(batch, nchunks, heads):
        group, begin = head // (heads // B.shape[2]), chunk * size
        numbers = sequences[row][begin : begin + size]
        open_at_end = next((n for n in reversed(numbers) if n is not None), None)
        g, decays = dstates[row, chunk, head], dA_cumsum[row, head, chunk]
        for i, number in enumerate(numbers):
            if number is None or number != open_at_end:
                continue
            t = begin + i
            decay, step = np.exp(decays[-1] - decays[i]), dt[row, head, chunk, i]
            product = g @ B[row, t, group]
            grad["x"][row, t, head] = decay * step * product
            grad["B"][row, t, group] += decay * step * (x[row, t, head] @ g)
            slope = decay * (x[row, t, head] @ product)
            grad["dt"][row, head, chunk, i] = slope
            grad["dA_cumsum"][row, head, chunk, -1] += step * slope
            grad["dA_cumsum"][row, head, chunk, i] -= step * slope
    return grad


def ssd_state_passing(
    dstates_in, dfinal_states, states, dA_cumsum, *, initial_states=None, seq_idx=None
):
    """Return the gradients of states, dA_cumsum and initial_states, the latter of zeros too."""
    dstates_in, dfinal_states, states = map(_f64, (dstates_in, dfinal_states, states))
    dA_cumsum, initial_states = map(_f64, (dA_cumsum, initial_states))
    (batch, nchunks, heads), size = states.shape[:3], dA_cumsum.shape[3]
    grad = _zeros(states=states, dA_cumsum=dA_cumsum)
    grad["initial_states"] = np.zeros((batch, *states.shape[2:]))
    seqlen = nchunks * size if seq_idx is None else seq_idx.shape[1]
    sequences = _sequences(seq_idx, batch, seqlen)
    for row, head in np.ndindex(batch, heads):
        h = np.zeros(states.shape[3:]) if initial_states is None else initial_states[row, head]
        factors, entering = [], []
        for chunk in range(nchunks):
            before = _last_open(sequences[row][: chunk * size])
            after = _last_open(sequences[row][: (chunk + 1) * size])
            entering.append(h)
            factors.append(np.exp(dA_cumsum[row, head, chunk, -1]) if before == after else 0.0)
            h = factors[-1] * h + states[row, chunk, head]
        dh = dfinal_states[row, head]
        for chunk in reversed(range(nchunks)):
            grad["states"][row, chunk, head] = dh
            slope = factors[chunk] * (dh * entering[chunk]).sum()
            grad["dA_cumsum"][row, head, chunk, -1] = slope
            dh = factors[chunk] * dh + dstates_in[row, chunk, head]
        grad["initial_states"][row, head] = dh
    return grad


def ssd_bmm_chunk(dCB, C, B, chunk_size):
    """Return the gradients of C and B."""
    dCB, C, B = map(_f64, (dCB, C, B))
    grad, seqlen = _zeros(C=C, B=B), C.shape[1]
    groups = dCB.shape[2]
    for row, chunk, group, i, j in np.ndindex(*dCB.shape):
        s, t = chunk * chunk_size + i, chunk * chunk_size + j
        if s < seqlen and t < seqlen:
            c, b = group // (groups // C.shape[2]), group // (groups // B.shape[2])
            grad["C"][row, s, c] += dCB[row, chunk, group, i, j] * B[row, t, b]
            grad["B"][row, t, b] += dCB[row, chunk, group, i, j] * C[row, s, c]
    return grad


def ssd_chunk_output(dy, CB, x, dt, dA_cumsum, C, states_in, *, D=None, z=None, seq_idx=None):
    """Return the gradients of all tensors but seq_idx."""
    dy, CB, x, dt, dA_cumsum, C = map(_f64, (dy, CB, x, dt, dA_cumsum, C))
    states_in, D, z = map(_f64, (states_in, D, z))
    (batch, seqlen, heads, _), size = x.shape, dt.shape[3]
    grad = _zeros(CB=CB, x=x, dt=dt, dA_cumsum=dA_cumsum, C=C, states_in=states_in, D=D, z=z)
    sequences = _sequences(seq_idx, batch, seqlen)
    for row, t, head in np.ndindex(batch, seqlen, heads):
        number = sequences[row][t]
        if number is None:
            continue
        chunk, i = divmod(t, size)
        pairs, group = head // (heads // CB.shape[2]), head // (heads // C.shape[2])
        decay, step = dA_cumsum[row, head, chunk], dt[row, head, chunk]
        weights, h = CB[row, chunk, pairs, i], states_in[row, chunk, head]
        seen = [j for j in range(i + 1) if sequences[row][chunk * size + j] == number]
        entered = _last_open(sequences[row][: chunk * size]) == number
        into, c = np.exp(decay[i]), C[row, t, group]
        g = dy[row, t, head]
        if z is not None:
            out = sum(
                weights[j] * np.exp(decay[i] - decay[j]) * step[j] * x[row, chunk * size + j, head]
                for j in seen
            )
            out = out + (into * (h @ c) if entered else 0.0)
            out = out + (0.0 if D is None else D[head] * x[row, t, head])
            gate = _sigmoid(z[row, t, head])
            grad["z"][row, t, head] = g * out * gate * (1.0 + z[row, t, head] * (1.0 - gate))
            g = g * gate * z[row, t, head]
        for j in seen:
            s, between = chunk * size + j, np.exp(decay[i] - decay[j])
            product = (g @ x[row, s, head]) * between
            grad["CB"][row, chunk, pairs, i, j] += product * step[j]
            grad["x"][row, s, head] += weights[j] * between * step[j] * g
            grad["dt"][row, head, chunk, j] += weights[j] * product
            grad["dA_cumsum"][row, head, chunk, i] += weights[j] * product * step[j]
            grad["dA_cumsum"][row, head, chunk, j] -= weights[j] * product * step[j]
        if entered:
            grad["C"][row, t, group] += into * (g @ h)
            grad["states_in"][row, chunk, head] += into * np.outer(g, c)
            grad["dA_cumsum"][row, head, chunk, i] += into * (g @ h @ c)
        if D is not None:
            grad["x"][row, t, head] += D[head] * g
            grad["D"][head] += g * x[row, t, head] if D.ndim == 2 else g @ x[row, t, head]
    return grad
