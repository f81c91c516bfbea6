"""The operators as functions that make their outputs, in the framework of the main input.

A thin layer for exploring and for small programs: the kernels check all arguments, and their
docstrings have the full contract. A loop that cares for allocations calls the kernels.
"""

from __future__ import annotations

from . import _cpu
from .maker import Maker


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
    make = Maker("selective_scan", "u", u)
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
    make = Maker("selective_state_step", "x", x)
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
    make, silu = Maker(op, "x", x), _silu(op, activation)
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
    make, silu = Maker(op, "x", x), _silu(op, activation)
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
    make = Maker("fused_layer_norm", "x", x)
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


def gated_norm(
    x,
    weight,
    bias=None,
    z=None,
    *,
    is_rms=True,
    eps=1e-5,
    group_size=None,
    norm_before_gate=True,
    num_threads=0,
):
    """Normalise groups of the last axis and multiply by a gate.

    Source: Dao & Gu 2024, arXiv:2405.21060, section 7.1.

    Args:
        x: (..., D), the main input. This and the others as for ``gated_norm_fwd``.
        weight: (D,).
        bias: (D,).
        z: as x in shape. Gate.
        is_rms: root-mean-square norm instead of layer norm.
        eps: added to the variance; positive.
        group_size: channels that share their statistics; divides D. None takes all.
        norm_before_gate: gate what was normalised instead of normalising what was gated.
        num_threads: 0 means the process-wide setting.

    Returns:
        y (..., D) in the dtype of x.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = Maker("gated_norm", "x", x)
    y = make.empty(x.shape)
    _cpu.gated_norm_fwd(
        x,
        weight,
        bias,
        z,
        y=y,
        is_rms=is_rms,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        num_threads=num_threads,
    )
    return make.finish(y)


def swiglu(gate, up=None, *, num_threads=0):
    """Multiply one half of a feed-forward layer by the SiLU of the other.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 5.

    Args:
        gate: (..., D), the main input; or (..., 2 D) without ``up``, the gate in the first half.
        up: as gate in shape.
        num_threads: 0 means the process-wide setting.

    Returns:
        y (..., D) in the dtype of gate.

    Raises:
        ValueError: an argument breaks the contract; the message names it.
        TypeError: an argument is not an array with DLPack.
    """
    make = Maker("swiglu", "gate", gate)
    shape = tuple(gate.shape)
    # A shape that the kernel refuses, it refuses by name.
    y = make.empty(shape if up is not None or not shape else (*shape[:-1], shape[-1] // 2))
    _cpu.swiglu_fwd(gate, up, y=y, num_threads=num_threads)
    return make.finish(y)
