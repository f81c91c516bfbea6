"""The gradients of the state-space dual scan as a GPU rounds them; see tests/ssd_rounding.py."""

import math

import numpy as np

from tests import judge
from tests.ssd_rounding import pieces, rounded


def _silu(z):
    gate = 1 / (1 + np.exp(-z))
    return z * gate, gate * (1 + z * (1 - gate))


class _Head:
    """One head of one row: what its pieces share, and its gradients."""

    def __init__(self, dtype, arguments, ids, row, head, given, how):
        """Round what products take."""
        self.round = lambda values: rounded(np.asarray(values, "f4"), dtype)
        self.A, there = arguments["A"][head], (ids[row] >= 0)[:, None]
        heads = arguments["X"].shape[2]
        group_B, group_C = (head // (heads // arguments[n].shape[2]) for n in "BC")
        take = lambda values: np.where(there, values, 0)  # noqa: E731
        self.x = take(self.round(arguments["X"][row, :, head]))
        self.b = take(self.round(arguments["B"][row, :, group_B]))
        self.c = take(self.round(arguments["C"][row, :, group_C]))
        self.dy = take(given["dy"][row, :, head])
        self.slope_of_z = None
        g = self.dy
        if arguments["z"] is not None:
            gate, self.slope_of_z = _silu(take(arguments["z"][row, :, head]))
            g = g * gate
        self.g = self.round(g)
        D = arguments["D"]
        self.D = 0 if D is None else D[head]
        bias = arguments["dt_bias"]
        raw = arguments["dt"][row, :, head] + (0 if bias is None else bias[head])
        size = np.logaddexp(0, raw) if how["softplus"] else raw
        slope = 1 / (1 + np.exp(-raw)) if how["softplus"] else np.ones_like(raw)
        passes = (size >= how["dt_limit"][0]) & (size <= how["dt_limit"][1]) & there[:, 0]
        self.slope = np.where(passes, slope, 0)
        size = np.where(there[:, 0], np.clip(size, *how["dt_limit"]), 0)
        self.size = size.astype("f4")

    def piece(self, begin, end):
        """Decays of a piece: between steps, into them, out of them, through all."""
        total = np.cumsum(self.size[begin:end].astype("f8") * self.A)
        between = np.tril(np.exp(np.minimum(total[:, None] - total, 0)))
        out_of = np.exp(total[-1] - total)
        return tuple(
            np.asarray(v, "f4") for v in (between, np.exp(total), out_of, np.exp(total[-1]))
        )


def ssd_chunk_scan(
    dtype, dy, dfinal_states, X, dt, A, B, C, chunk_size=None, D=None, z=None, seq_meta=None,
    initial_states=None, *, dt_bias=None, softplus=False, dt_limit=(0.0, np.inf),
):  # fmt: skip
    """Return the gradients of what the judge takes, operands rounded to `dtype`, by name."""
    arguments = {"X": X, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    arguments |= {"initial_states": initial_states}
    arguments, given = (
        {n: None if v is None else np.asarray(v, "f4") for n, v in values.items()}
        for values in (arguments, {"dy": dy, "dfinal_states": dfinal_states})
    )
    how = {"softplus": softplus, "dt_limit": dt_limit}
    batch, seqlen, heads, headdim = arguments["X"].shape
    ids, per_sequence, num_states = judge.positions(seq_meta, batch, seqlen)
    if dfinal_states is None:
        shape = (num_states, heads, headdim, arguments["B"].shape[3])
        given["dfinal_states"] = np.zeros(shape, "f4")
    dfinal, initial = given["dfinal_states"], arguments["initial_states"]
    grads = {n: np.zeros(v.shape, "f4") for n, v in arguments.items() if v is not None}
    grads["initial_states"] = dfinal.copy()
    group_heads = [heads // arguments[n].shape[2] for n in "BC"]
    shared = max(math.gcd(*group_heads), 1)
    zero = np.zeros((headdim, arguments["B"].shape[3]), "f4")
    for row in range(batch):
        cuts = pieces(ids[row], per_sequence)
        dS = {}
        for head in range(heads):
            own = _Head(dtype, arguments, ids, row, head, given, how)
            group_B, group_C = (head // count for count in group_heads)
            H = zero if per_sequence or initial is None else initial[row, head]
            entering, sequence, of = [], None, []
            for begin, end, started in cuts:
                if started is not None:
                    known = per_sequence and initial is not None
                    H, sequence = initial[started, head] if known else zero, started
                between, _, out_of, through = own.piece(begin, end)
                entering.append(own.round(H))
                of.append(sequence)
                here = slice(begin, end)
                left = (own.size[here] * out_of)[:, None]
                H = through * H + own.round(own.x[here] * left).T @ own.b[here]
            last = of[-1] if of else None
            dH = (
                zero
                if per_sequence and last is None
                else dfinal[last if per_sequence else row, head]
            )
            for i in range(len(cuts) - 1, -1, -1):
                begin, end, started = cuts[i]
                here = slice(begin, end)
                between, into, out_of, through = own.piece(begin, end)
                x, g, b, c, size = (v[here] for v in (own.x, own.g, own.b, own.c, own.size))
                H, leaving, left = entering[i], own.round(dH), size * out_of
                S, G = c @ b.T, (g @ x.T) * between
                M = own.round(S * between * size)
                CH, BdH = c @ H.T, b @ leaving.T
                if own.slope_of_z is not None:
                    y = into[:, None] * CH + M @ x + own.D * x
                    grads["z"][row, here, head] = own.dy[here] * y * own.slope_of_z[here]
                grads["X"][row, here, head] = M.T @ g + left[:, None] * BdH + own.D * g
                grads["C"][row, here, group_C] += own.round(g * into[:, None]) @ H
                grads["B"][row, here, group_B] += own.round(x * left[:, None]) @ leaving
                dS[i, head // shared] = dS.get((i, head // shared), 0) + G * size
                of_H, of_dH = into * (g * CH).sum(1), (x * BdH).sum(1)
                W = np.tril(G * S, -1) * size
                rows = np.concatenate([np.cumsum(W, 1) - W, W[:, :0]], 1)
                crossing = np.tril(rows).sum(0) if len(W) else of_H
                exponent = crossing + np.cumsum(of_H[::-1])[::-1]
                exponent = exponent + np.cumsum(left * of_dH) - left * of_dH
                exponent = exponent + through * (H * leaving).sum()
                direct = (G * S).sum(0) + out_of * of_dH
                ddt = (own.A * exponent + direct) * own.slope[here]
                grads["dt"][row, here, head] = ddt
                grads["A"][head] += (exponent * size).sum()
                if "dt_bias" in grads:
                    grads["dt_bias"][head] += ddt.sum()
                if "D" in grads:
                    share = (g * x).sum(0)
                    grads["D"][head] += share if grads["D"].ndim == 2 else share.sum()
                dH = through * dH + own.round(g * into[:, None]).T @ c
                if started is not None:
                    if per_sequence:
                        grads["initial_states"][started, head] = dH
                    before = of[i - 1] if i > 0 else None
                    dH = dfinal[before, head] if per_sequence and before is not None else zero
            if not per_sequence:
                grads["initial_states"][row, head] = dH
        for (i, unit), sums in dS.items():
            begin, end, _ = cuts[i]
            own = _Head(dtype, arguments, ids, row, unit * shared, given, how)
            group_B, group_C = (unit * shared // count for count in group_heads)
            grads["C"][row, begin:end, group_C] += own.round(sums) @ own.b[begin:end]
            grads["B"][row, begin:end, group_B] += own.round(sums).T @ own.c[begin:end]
    return grads
