"""The operators as functions that make their outputs, in the framework of the main input.

A thin layer for exploring and for small programs: the kernels check all arguments, and their
docstrings have the full contract. A loop that cares for allocations calls the kernels.
"""

from __future__ import annotations

import math
import sys

from . import _cpu


class _Maker:
    """Makes output arrays of the kind of one array, without importing its framework."""

    def __init__(self, op: str, name: str, array):
        if not all(hasattr(array, need) for need in ("shape", "dtype", "__dlpack__")):
            raise TypeError(
                f"{op}: {name} must be an array or tensor with DLPack, got {type(array).__name__}"
            )
        if hasattr(array, "__array_namespace__"):
            home = array.__array_namespace__()
        else:  # torch, NumPy 1: the module that defined the array is loaded
            home = sys.modules[type(array).__module__.partition(".")[0]]
        self.array, self.home, self.finish = array, home, lambda out: out
        if home.__name__.startswith("jax"):
            # JAX arrays are immutable: arrays of NumPy, which JAX loads, are written and converted.
            self.home, self.finish = sys.modules["numpy"], home.asarray

    def empty(self, shape, dtype=None):
        """Return an array to write into; its dtype is the main input's unless given."""
        dtype = self.array.dtype if dtype is None else dtype
        if self.home.__name__ == "numpy":
            return self.home.empty(shape, dtype)
        return self.home.empty(shape, dtype=dtype, device=self.array.device)

    def acc_dtype(self):
        """Return the dtype of states and sums: float64 if the main input's is, else float32."""
        float64 = self.home.float64
        return float64 if self.array.dtype == float64 else self.home.float32


def _silu(op: str, activation) -> bool:
    """Tell whether an activation is SiLU."""
    if activation not in ("silu", "swish", "identity", None):
        raise ValueError(
            f"{op}: activation must be 'silu', 'swish', 'identity' or None, got {activation!r}"
        )
    return activation in ("silu", "swish")


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
    seq_idx=None,
    num_threads=0,
):
    """Run the selective scan: Gu & Dao 2023, arXiv:2312.00752, eq. 2-4.

    Args:
        u: (B, D, L), the main input. This and the others as for ``selective_scan_fwd``.
        delta: (B, D, L).
        A: (D, N).
        B: (D, N), (B, N, L) or (B, G, N, L).
        C: as B.
        D: (D,).
        z: (B, D, L).
        dt_bias: (D,).
        softplus: apply softplus to the step size.
        return_last_state: also return the state after the last step of each row.
        initial_state: (B, D, N).
        seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
        num_threads: 0 means the process-wide setting.

    Returns:
        y (B, D, L) in the dtype of u; with ``return_last_state`` also last_state (B, D, N),
        float64 if u is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = _Maker("selective_scan", "u", u)
    y, last_state = make.empty(u.shape), None
    if return_last_state:
        last_state = make.empty((*u.shape[:1], *getattr(A, "shape", ())), make.acc_dtype())
    _cpu.selective_scan_fwd(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_state,
        seq_idx,
        y=y,
        last_state=last_state,
        softplus=softplus,
        num_threads=num_threads,
    )
    return (make.finish(y), make.finish(last_state)) if return_last_state else make.finish(y)


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
    num_threads=0,
):
    """Advance the selective recurrence by one token, or a few, in place.

    Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2-4; Dao & Gu 2024, arXiv:2405.21060, eq. 1.

    Args:
        state: (R, D, N) or (R, H, P, N). Updated in place, so not of a framework whose arrays are
            immutable. This and the others as for ``selective_state_step_fwd``.
        x: (B, D) or (B, H, P), the main input; with a token axis after B for several tokens.
        dt: (B, D); or (B, H) or (B, H, P).
        A: (D, N); or (H,) or (H, P, N).
        B: (B, N) or (B, G, N).
        C: as B.
        D: (D,); or (H,) or (H, P).
        z: as x.
        dt_bias: as D.
        softplus: apply softplus to the step size.
        state_indices: (B,) int32. Row of the state of each batch row, -1 to skip it.
        num_threads: 0 means the process-wide setting.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack, or the state is read-only.
    """
    make = _Maker("selective_state_step", "x", x)
    y = make.empty(x.shape)
    _cpu.selective_state_step_fwd(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        state_indices,
        y=y,
        softplus=softplus,
        num_threads=num_threads,
    )
    return make.finish(y)


def dw_causal_conv(
    x,
    weight,
    bias=None,
    activation="silu",
    *,
    initial_state=None,
    return_final_state=False,
    seq_idx=None,
    num_threads=0,
):
    """Convolve every channel with its own causal filter.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4.

    Args:
        x: (B, D, L), the main input. This and the others as for ``dw_causal_conv_fwd``.
        weight: (D, W).
        bias: (D,).
        activation: "silu", "swish" (the same), "identity" or None (the same).
        initial_state: (B, D, W - 1). The inputs before the first step, oldest first.
        return_final_state: also return the last W - 1 inputs.
        seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
        num_threads: 0 means the process-wide setting.

    Returns:
        y (B, D, L) in the dtype of x; with ``return_final_state`` also final_state (B, D, W - 1).

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    op = "dw_causal_conv"
    make, silu = _Maker(op, "x", x), _silu(op, activation)
    y, final_state = make.empty(x.shape), None
    if return_final_state:
        width = max([1, *getattr(weight, "shape", ())[-1:]])
        final_state = make.empty((*x.shape[:2], width - 1))
    _cpu.dw_causal_conv_fwd(
        x,
        weight,
        bias,
        initial_state,
        seq_idx,
        y=y,
        final_state=final_state,
        silu=silu,
        num_threads=num_threads,
    )
    return (make.finish(y), make.finish(final_state)) if return_final_state else make.finish(y)


def dw_causal_conv_step(
    x,
    conv_state,
    weight,
    bias=None,
    activation="silu",
    *,
    cache_seqlens=None,
    state_indices=None,
    num_threads=0,
):
    """Advance the causal convolution by one token, or a few, updating its window in place.

    Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4.

    Args:
        x: (B, D) or (B, D, T), the main input. This and the others as for
            ``dw_causal_conv_step_fwd``.
        conv_state: (R, D, K). The last K inputs, updated in place, so not of a framework whose
            arrays are immutable.
        weight: (D, W).
        bias: (D,).
        activation: "silu", "swish" (the same), "identity" or None (the same).
        cache_seqlens: (B,) int32. Tokens seen by each row; makes the window a circular buffer.
        state_indices: (B,) int32. Row of the window of each batch row, -1 to skip it.
        num_threads: 0 means the process-wide setting.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack, or the window is read-only.
    """
    op = "dw_causal_conv_step"
    make, silu = _Maker(op, "x", x), _silu(op, activation)
    y = make.empty(x.shape)
    _cpu.dw_causal_conv_step_fwd(
        x,
        conv_state,
        weight,
        bias,
        cache_seqlens,
        state_indices,
        y=y,
        silu=silu,
        num_threads=num_threads,
    )
    return make.finish(y)


def fused_layer_norm(
    x,
    weight,
    bias=None,
    residual=None,
    is_rms=False,
    eps=1e-5,
    prenorm=True,
    residual_in_fp32=True,
    *,
    num_threads=0,
):
    """Add a residual stream and normalise the sum over the last axis.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4; Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

    Args:
        x: (..., D), the main input. This and the others as for ``fused_layer_norm_fwd``.
        weight: (D,).
        bias: (D,).
        residual: as x in shape.
        is_rms: root-mean-square norm instead of layer norm.
        eps: added to the variance; positive.
        prenorm: also return the sum.
        residual_in_fp32: return the sum in float64 if x is, else float32; otherwise in the dtype
            of the residual, or of x.
        num_threads: 0 means the process-wide setting.

    Returns:
        y (..., D) in the dtype of x; with ``prenorm`` also the sum (..., D).

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = _Maker("fused_layer_norm", "x", x)
    y, total = make.empty(x.shape), None
    if prenorm:
        dtype = make.acc_dtype() if residual_in_fp32 else getattr(residual, "dtype", None)
        total = make.empty(x.shape, dtype)
    _cpu.fused_layer_norm_fwd(
        x,
        weight,
        bias,
        residual,
        y=y,
        residual_out=total,
        is_rms=is_rms,
        eps=eps,
        num_threads=num_threads,
    )
    return (make.finish(y), make.finish(total)) if prenorm else make.finish(y)


def ssd_chunk_scan(
    X,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    *,
    initial_states=None,
    seq_idx=None,
    num_threads=0,
):
    """Run the state-space dual scan: Dao & Gu 2024, arXiv:2405.21060, eq. 1.

    Args:
        X: (B, L, H, P), the main input. This and the others as for ``ssd_chunk_scan_fwd``.
        dt: (B, L, H).
        A: (H,).
        B: (B, L, G, N).
        C: (B, L, G, N), with a group count of its own.
        D: (H,) or (H, P).
        z: (B, L, H, P).
        dt_bias: (H,).
        softplus: apply softplus to the step size.
        dt_limit: (low, high), to which the step size is clamped last.
        return_final_states: also return the state after the last step of each row.
        initial_states: (B, H, P, N).
        seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
        num_threads: 0 means the process-wide setting.

    Returns:
        y (B, L, H, P) in the dtype of X; with ``return_final_states`` also final_states
        (B, H, P, N), float64 if X is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = _Maker("ssd_chunk_scan", "X", X)
    y, final_states = make.empty(X.shape), None
    if return_final_states:
        dstate = getattr(B, "shape", (1,))[-1:]
        final_states = make.empty((*X.shape[:1], *X.shape[2:], *dstate), make.acc_dtype())
    _cpu.ssd_chunk_scan_fwd(
        X,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        y=y,
        final_states=final_states,
        dt_low=dt_limit[0],
        dt_high=dt_limit[1],
        softplus=softplus,
        num_threads=num_threads,
    )
    return (make.finish(y), make.finish(final_states)) if return_final_states else make.finish(y)


def ssd_chunk_cumsum(
    dt,
    A,
    chunk_size,
    *,
    dt_bias=None,
    softplus=False,
    dt_limit=(0.0, float("inf")),
    seq_idx=None,
    num_threads=0,
):
    """Compute step sizes and logarithmic decays by chunk: stage 1 of the state-space dual scan.

    Source: Dao & Gu 2024, arXiv:2405.21060, listing 1.

    Args:
        dt: (B, L, H), the main input. This and the others as for ``ssd_chunk_cumsum_fwd``.
        A: (H,).
        chunk_size: steps Q per chunk, at least 1.
        dt_bias: (H,).
        softplus: apply softplus to the step size.
        dt_limit: (low, high), to which the step size is clamped.
        seq_idx: (B, L) int32. -1 skips a step.
        num_threads: 0 means the process-wide setting.

    Returns:
        dt_out and dA_cumsum, (B, H, C, Q) each, float64 if dt is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = _Maker("ssd_chunk_cumsum", "dt", dt)
    nchunks = _chunks("ssd_chunk_cumsum", dt, chunk_size)
    shape = (*dt.shape[:1], *dt.shape[2:], nchunks, chunk_size)
    dt_out, decay = (make.empty(shape, make.acc_dtype()) for _ in range(2))
    _cpu.ssd_chunk_cumsum_fwd(
        dt,
        A,
        dt_bias,
        seq_idx,
        dt_out=dt_out,
        dA_cumsum=decay,
        softplus=softplus,
        dt_limit=dt_limit,
        num_threads=num_threads,
    )
    return make.finish(dt_out), make.finish(decay)


def ssd_chunk_state(x, B, dt, dA_cumsum, *, seq_idx=None, num_threads=0):
    """Compute the state that each chunk adds: stage 2 of the state-space dual scan.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 6.

    Args:
        x: (B, L, H, P), the main input. This and the others as for ``ssd_chunk_state_fwd``.
        B: (B, L, G, N).
        dt: (B, H, C, Q).
        dA_cumsum: (B, H, C, Q).
        seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
        num_threads: 0 means the process-wide setting.

    Returns:
        states (B, C, H, P, N), float64 if x is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = _Maker("ssd_chunk_state", "x", x)
    nchunks, dstate = (getattr(t, "shape", ())[i : i + 1] for t, i in ((dt, 2), (B, 3)))
    states = make.empty((*x.shape[:1], *nchunks, *x.shape[2:], *dstate), make.acc_dtype())
    _cpu.ssd_chunk_state_fwd(x, B, dt, dA_cumsum, seq_idx, states=states, num_threads=num_threads)
    return make.finish(states)


def ssd_state_passing(states, dA_cumsum, *, initial_states=None, seq_idx=None, num_threads=0):
    """Pass the state from chunk to chunk: stage 3 of the state-space dual scan.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 6.

    Args:
        states: (B, C, H, P, N), the main input. This and the others as for
            ``ssd_state_passing_fwd``.
        dA_cumsum: (B, H, C, Q).
        initial_states: (B, H, P, N).
        seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
        num_threads: 0 means the process-wide setting.

    Returns:
        states_in (B, C, H, P, N), the state that enters each chunk, and final_states
        (B, H, P, N); float64 if states is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = _Maker("ssd_state_passing", "states", states)
    states_in = make.empty(states.shape, make.acc_dtype())
    final_states = make.empty((*states.shape[:1], *states.shape[2:]), make.acc_dtype())
    _cpu.ssd_state_passing_fwd(
        states,
        dA_cumsum,
        initial_states,
        seq_idx,
        states_in=states_in,
        final_states=final_states,
        num_threads=num_threads,
    )
    return make.finish(states_in), make.finish(final_states)


def ssd_bmm_chunk(C, B, chunk_size, *, num_threads=0):
    """Multiply C and B of all pairs of steps of a chunk: stage 4 of the state-space dual scan.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 6.

    Args:
        C: (B, L, G, N), the main input. This and the others as for ``ssd_bmm_chunk_fwd``.
        B: (B, L, G, N), with a group count of its own.
        chunk_size: steps Q per chunk, at least 1.
        num_threads: 0 means the process-wide setting.

    Returns:
        CB (B, C, G, Q, Q), float64 if C is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = _Maker("ssd_bmm_chunk", "C", C)
    nchunks = _chunks("ssd_bmm_chunk", C, chunk_size)
    groups = math.lcm(*(n for m in (C, B) for n in getattr(m, "shape", ())[2:3]))
    shape = (*C.shape[:1], nchunks, groups, chunk_size, chunk_size)
    products = make.empty(shape, make.acc_dtype())
    _cpu.ssd_bmm_chunk_fwd(C, B, CB=products, num_threads=num_threads)
    return make.finish(products)


def ssd_chunk_output(
    CB, x, dt, dA_cumsum, C, states_in, *, D=None, z=None, seq_idx=None, num_threads=0
):
    """Compute the outputs from the other stages: stage 5 of the state-space dual scan.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 6.

    Args:
        CB: (B, C, G, Q, Q). This and the others as for ``ssd_chunk_output_fwd``.
        x: (B, L, H, P), the main input.
        dt: (B, H, C, Q).
        dA_cumsum: (B, H, C, Q).
        C: (B, L, G, N).
        states_in: (B, C, H, P, N).
        D: (H,) or (H, P).
        z: (B, L, H, P).
        seq_idx: (B, L) int32. Equal neighbours belong to one sequence, -1 skips a step.
        num_threads: 0 means the process-wide setting.

    Returns:
        y (B, L, H, P) in the dtype of x.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = _Maker("ssd_chunk_output", "x", x)
    y = make.empty(x.shape)
    _cpu.ssd_chunk_output_fwd(
        CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx, y=y, num_threads=num_threads
    )
    return make.finish(y)


def _chunks(op: str, main, chunk_size) -> int:
    """Return how many chunks of `chunk_size` the time axis of (B, L, ...) has."""
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"{op}: chunk_size must be an int, got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1, got {chunk_size}")
    return -(-(main.shape[1] if len(main.shape) > 1 else 0) // chunk_size)
