"""The operators of Mamba-2's chunked scan as functions that make their outputs: ``operators``."""

from __future__ import annotations

import math

from . import _cpu
from .maker import Maker


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
    make = Maker("ssd_chunk_scan", "X", X)
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
    make = Maker("ssd_chunk_cumsum", "dt", dt)
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
    make = Maker("ssd_chunk_state", "x", x)
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
    make = Maker("ssd_state_passing", "states", states)
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
    make = Maker("ssd_bmm_chunk", "C", C)
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
    make = Maker("ssd_chunk_output", "x", x)
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
