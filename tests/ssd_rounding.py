"""The state-space dual scan as a GPU rounds it: what accuracy products in 16 bits can have.

A model, not a judge: float32 in NumPy, with the operands of matrix products rounded where the CUDA
kernels round them (docs/ops/ssd_chunk_scan.md, "On a GPU"). Kernels are held to twice its error.
"""

import numpy as np

from tests import judge

TILE = 64


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Return float32 numbers as the bits of bfloat16, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, "f4").view("u4").astype("u8")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u2")


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 numbers that `dtype` holds."""
    if dtype == "bfloat16":
        return (bfloat16_bits(values).astype("u4") << 16).view("f4")
    return np.asarray(values, "f4").astype(dtype).astype("f4")


def pieces(ids: np.ndarray, per_sequence: bool) -> list[tuple[int, int, int | None]]:
    """Cut one row into (begin, end, the sequence that starts there or None)."""
    found, before = [], -1
    for begin in range(0, len(ids), TILE):
        end = min(begin + TILE, len(ids))
        cut, started = begin, None
        for step in range(begin, end):
            if ids[step] < 0 or ids[step] == before:
                continue
            if before >= 0 or per_sequence:
                if step > cut:
                    found.append((cut, step, started))
                cut, started = step, int(ids[step])
            before = int(ids[step])
        found.append((cut, end, started))
    return found


def ssd_chunk_scan(
    dtype, X, dt, A, B, C, chunk_size=None, D=None, z=None, seq_meta=None, initial_states=None, *,
    dt_bias=None, softplus=False, dt_limit=(0.0, np.inf),
):  # fmt: skip
    """Return y and final_states of what the judge takes, operands rounded to `dtype`, by name."""
    X, dt, A, B, C, D, z, dt_bias, initial_states = (
        None if value is None else np.asarray(value, "f4")
        for value in (X, dt, A, B, C, D, z, dt_bias, initial_states)
    )
    ids, per_sequence, num_states = judge.positions(seq_meta, *X.shape[:2])
    if initial_states is None:
        initial_states = np.zeros((num_states, *X.shape[2:], B.shape[3]), "f4")
    batch, _, heads, headdim = X.shape
    size = dt + (0 if dt_bias is None else dt_bias)
    if softplus:
        size = np.maximum(size, 0) + np.log1p(np.exp(-np.abs(size)))
    size = np.where(ids[..., None] < 0, 0, np.clip(size, *dt_limit))
    size = size.astype("f4")
    y, final = np.zeros_like(X), initial_states.copy()
    for row in range(batch):
        for head in range(heads):
            group_B, group_C = (head // (heads // M.shape[2]) for M in (B, C))
            H = np.zeros((headdim, B.shape[3]), "f4") if per_sequence else final[row, head].copy()
            open_id = None
            for begin, end, started in pieces(ids[row], per_sequence):
                if started is not None:
                    if per_sequence and open_id is not None:
                        final[open_id, head] = H
                    H = initial_states[started, head] if per_sequence else np.zeros_like(H)
                    open_id = started
                here = (row, slice(begin, end))
                there = (ids[here] >= 0)[:, None]
                x = np.where(there, rounded(X[here][:, head], dtype), 0)
                b = np.where(there, rounded(B[here][:, group_B], dtype), 0)
                c = np.where(there, rounded(C[here][:, group_C], dtype), 0)
                s = size[here][:, head]
                total = np.cumsum(s.astype("f8") * A[head])
                between = np.tril(np.exp(np.minimum(total[:, None] - total, 0)))
                M = rounded((c @ b.T) * (between * s).astype("f4"), dtype)
                entering = (c @ rounded(H, dtype).T) * np.exp(total).astype("f4")[:, None]
                y[here][:, head] = entering + M @ x
                left = (s * np.exp(total[-1] - total)).astype("f4")[:, None]
                H = np.float32(np.exp(total[-1])) * H + rounded(x * left, dtype).T @ b
            if not per_sequence:
                final[row, head] = H
            elif open_id is not None:
                final[open_id, head] = H
    if D is not None:
        y += rounded(X, dtype) * (D if D.ndim == 2 else D[:, None])
    if z is not None:
        y *= z / (1 + np.exp(-z))
    return {"y": np.where(ids[..., None, None] < 0, 0, y), "final_states": final}
