"""The judge of compiled gradients: float64 NumPy loops over tokens, backwards, without torch.

Written from the chain rule for ``tests.judge``; ``tests/kernels`` compares them with finite
differences of that judge before anything else is compared with them.
"""

import numpy as np

from tests import judge


def _f64(array):
    return None if array is None else np.asarray(array, np.float64)


def _sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _spread(matrix, row, t, dim):
    """Return B or C at one step as (D, N)."""
    if matrix.ndim == 2:
        return matrix
    step = matrix[row, None, :, t] if matrix.ndim == 3 else matrix[row, :, :, t]
    return np.repeat(step, dim // len(step), axis=0)


def _collect(gradient, row, t, values):
    """Add gradients (D, N) of B or C at one step, in the form that B or C has."""
    if gradient.ndim == 2:
        gradient += values
    elif gradient.ndim == 3:
        gradient[row, :, t] += values.sum(0)
    else:
        groups = gradient.shape[1]
        gradient[row, :, :, t] += values.reshape(groups, -1, values.shape[1]).sum(1)


def selective_scan(
    dy, dlast_state, u, delta, A, B, C, D=None, z=None, dt_bias=None, softplus=False, *,
    initial_state=None, seq_meta=None,
):  # fmt: skip
    """Return the gradients by name, None for what was not given; dlast_state may be None.

    The gradient of a zero initial state is given too.
    """
    u, delta, A, B, C, D, z, dt_bias = map(_f64, (u, delta, A, B, C, D, z, dt_bias))
    (batch, dim, seqlen), dstate, dy = u.shape, A.shape[1], _f64(dy)
    nstates = judge.positions(seq_meta, batch, seqlen)[2]
    zeros = np.zeros((nstates, dim, dstate))
    states = zeros if initial_state is None else _f64(initial_state)
    dlast_state = zeros if dlast_state is None else _f64(dlast_state)
    # The state of a sequence without steps goes through unchanged.
    dinitial_state = dlast_state.copy()
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    grad = {name: None if a is None else np.zeros(a.shape) for name, a in given.items()}
    for row, steps, start, end in judge.runs(seq_meta, batch, seqlen):
        h, before, after, sizes = np.zeros((dim, dstate)), [], [], []
        if start is not None:
            h = states[start]
        for t in steps:
            dt = delta[row, :, t] + (0.0 if dt_bias is None else dt_bias)
            sizes.append(np.logaddexp(0.0, dt) if softplus else dt)
            before.append(h)
            drive = (sizes[-1] * u[row, :, t])[:, None] * _spread(B, row, t, dim)
            h = np.exp(sizes[-1][:, None] * A) * h + drive
            after.append(h)
        dh = np.zeros((dim, dstate)) if end is None else dlast_state[end]
        for t, dt, h_old, h in zip(
            steps[::-1], sizes[::-1], before[::-1], after[::-1], strict=True
        ):
            b, c, x, g = (
                _spread(B, row, t, dim),
                _spread(C, row, t, dim),
                u[row, :, t],
                dy[row, :, t],
            )
            if z is not None:
                gate = _sigmoid(z[row, :, t])
                out = (h * c).sum(1) + (0.0 if D is None else D * x)
                grad["z"][row, :, t] = g * out * gate * (1.0 + z[row, :, t] * (1.0 - gate))
                g = g * gate * z[row, :, t]
            _collect(grad["C"], row, t, g[:, None] * h)
            dh = dh + g[:, None] * c
            through_input = (dh * b).sum(1)
            grad["u"][row, :, t] = through_input * dt
            if D is not None:
                grad["u"][row, :, t] += D * g
                grad["D"] += g * x
            _collect(grad["B"], row, t, dh * (dt * x)[:, None])
            decay = np.exp(dt[:, None] * A)
            through_decay = dh * h_old * decay
            grad["A"] += through_decay * dt[:, None]
            ddt = (through_decay * A).sum(1) + through_input * x
            if softplus:
                raw = delta[row, :, t] + (0.0 if dt_bias is None else dt_bias)
                ddt = ddt * _sigmoid(raw)
            grad["delta"][row, :, t] = ddt
            if dt_bias is not None:
                grad["dt_bias"] += ddt
            dh = dh * decay
        if start is not None:
            dinitial_state[start] = dh
    return {**grad, "initial_state": dinitial_state}


def ssd_chunk_scan(
    dy, dfinal_states, X, dt, A, B, C, chunk_size=None, D=None, z=None, seq_meta=None,
    initial_states=None, *, dt_bias=None, softplus=False, dt_limit=(0.0, np.inf),
):  # fmt: skip
    """Return the gradients by name, None for what was not given; dfinal_states may be None.

    The gradient of zero initial states is given too.
    """
    X, dt, A, B, C, D, z, dt_bias = map(_f64, (X, dt, A, B, C, D, z, dt_bias))
    (batch, seqlen, heads, headdim), dstate, dy = X.shape, B.shape[3], _f64(dy)
    nstates = judge.positions(seq_meta, batch, seqlen)[2]
    zeros = np.zeros((nstates, heads, headdim, dstate))
    states = zeros if initial_states is None else _f64(initial_states)
    dfinal_states = zeros if dfinal_states is None else _f64(dfinal_states)
    # The state of a sequence without steps goes through unchanged.
    dinitial_states = dfinal_states.copy()
    given = {"X": X, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    grad = {name: None if a is None else np.zeros(a.shape) for name, a in given.items()}
    skip = 0.0 if D is None else D if D.ndim == 2 else D[:, None]

    def spread(matrix, row, t):
        return np.repeat(matrix[row, t], heads // matrix.shape[2], 0)  # (H, N)

    def per_group(values, groups):
        return values.reshape(groups, heads // groups, dstate).sum(1)

    for row, steps, start, end in judge.runs(seq_meta, batch, seqlen):
        h, before, after, sizes = np.zeros((heads, headdim, dstate)), [], [], []
        if start is not None:
            h = states[start]
        for t in steps:
            size = dt[row, t] + (0.0 if dt_bias is None else dt_bias)
            sizes.append(np.logaddexp(0.0, size) if softplus else size)
            size = np.clip(sizes[-1], *dt_limit)
            drive = (size[:, None] * X[row, t])[..., None] * spread(B, row, t)[:, None]
            before.append(h)
            h = np.exp(size * A)[:, None, None] * h + drive
            after.append(h)
        dh = np.zeros(h.shape) if end is None else dfinal_states[end]
        for t, free, h_old, h in zip(
            steps[::-1], sizes[::-1], before[::-1], after[::-1], strict=True
        ):
            size, x, g = np.clip(free, *dt_limit), X[row, t], dy[row, t]
            b, c = spread(B, row, t), spread(C, row, t)
            if z is not None:
                gate = _sigmoid(z[row, t])
                out = (h * c[:, None]).sum(2) + skip * x
                grad["z"][row, t] = g * out * gate * (1.0 + z[row, t] * (1.0 - gate))
                g = g * gate * z[row, t]
            dc = np.einsum("hp,hpn->hn", g, h)
            grad["C"][row, t] = per_group(dc, C.shape[2])
            dh = dh + g[..., None] * c[:, None]
            through_input = (dh * b[:, None]).sum(2)
            grad["X"][row, t] = size[:, None] * through_input + skip * g
            if D is not None:
                grad["D"] += g * x if D.ndim == 2 else (g * x).sum(1)
            db = np.einsum("hp,hpn->hn", size[:, None] * x, dh)
            grad["B"][row, t] = per_group(db, B.shape[2])
            decay = np.exp(size * A)[:, None, None]
            through_decay = (dh * h_old * decay).sum((1, 2))
            grad["A"] += through_decay * size
            dsize = through_decay * A + (through_input * x).sum(1)
            dsize = np.where((free >= dt_limit[0]) & (free <= dt_limit[1]), dsize, 0.0)
            if softplus:
                dsize *= _sigmoid(dt[row, t] + (0.0 if dt_bias is None else dt_bias))
            grad["dt"][row, t] = dsize
            if dt_bias is not None:
                grad["dt_bias"] += dsize
            dh = dh * decay
        if start is not None:
            dinitial_states[start] = dh
    return {**grad, "initial_states": dinitial_states}
