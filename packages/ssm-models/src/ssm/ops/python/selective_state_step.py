"""One token, or a few, of the selective scan, specified in PyTorch."""

import torch

from ssm.ops.python import arithmetic, check
from ssm.ops.python.layout import read_rows, rows_or_zero, write_rows


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
            rounded to its dtype once per call. No other argument may lie in its memory.
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
    acc, several = arithmetic.acc_dtype(x), x.ndim == state.ndim

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
        dts = arithmetic.softplus(dts)
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
        y = y * arithmetic.silu(tokens(z, 4))
    write_rows(state, state_indices, h.reshape(x.shape[0], *state.shape[1:]))
    return rows_or_zero(keep, y.reshape(x.shape)).to(x.dtype)


def _matrix_per_head(matrix, nheads):
    """Return B or C, (B, T, N) or (B, T, G, N), as (B, T, H, N)."""
    if matrix.ndim == 3:
        return matrix[:, :, None].expand(-1, -1, nheads, -1)
    return matrix.repeat_interleave(nheads // matrix.shape[2], 2)
