"""The operators: plain functions that hand their arguments to the best implementation.

The full contract of each is the docstring of the function of the same name in
``ssm.ops.python.reference``; ``ssm.utils.dispatch.why`` says what serves it. Importing this package
loads the kernels of the CPU where there are some, so that no call has to. Tensors are float64,
float32, bfloat16 or float16 in any mixture and with any strides; computation and states are in
float64 if the main input is, else in float32.
"""

from ssm.utils.dispatch import implementation, load_cpu_kernels
from ssm.utils.freed_memory import expect_large_tensors

__all__ = [
    "dw_causal_conv",
    "dw_causal_conv_step",
    "fused_layer_norm",
    "gated_norm",
    "selective_scan",
    "selective_state_step",
    "ssd_bmm_chunk",
    "ssd_chunk_cumsum",
    "ssd_chunk_output",
    "ssd_chunk_scan",
    "ssd_chunk_state",
    "ssd_state_passing",
    "swiglu",
]


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
    seq_meta=None,
):
    """Run a selective state-space recurrence over a sequence.

    Args:
        u: (B, D, L). Input.
        delta: (B, D, L). Step size.
        A: (D, N). Continuous decay.
        B: (D, N), (B, N, L) or (B, G, N, L). Input matrix.
        C: (D, N), (B, N, L) or (B, G, N, L). Output matrix.
        D: (D,). Skip weight.
        z: (B, D, L). Gate.
        dt_bias: (D,). Bias of the step size.
        softplus: apply softplus to the step size.
        return_last_state: also return the state after the last step.
        initial_state: (S, D, N). State before the first step.
        seq_meta: SeqMeta. Packed sequences and skipped steps.

    Returns:
        y (B, D, L) in the dtype of u; with ``return_last_state`` also last_state (S, D, N).

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), eq. 2-4.
    """
    return implementation("selective_scan", u)(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        softplus,
        return_last_state,
        initial_state=initial_state,
        seq_meta=seq_meta,
    )


def selective_state_step(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=True, *, state_indices=None
):
    """Advance a selective state-space recurrence by one token, or a few, in place.

    Args:
        state: (R, D, N) or (R, H, P, N). Updated in place.
        x: (B, D) or (B, H, P); with a token axis after B for several tokens, like dt, B, C, z.
        dt: (B, D); or (B, H) or (B, H, P). Step size.
        A: (D, N); or (H,) or (H, P, N). Continuous decay.
        B: (B, N) or (B, G, N). Input matrix.
        C: (B, N) or (B, G, N). Output matrix.
        D: (D,); or (H,) or (H, P). Skip weight.
        z: as x. Gate.
        dt_bias: (D,); or (H,) or (H, P). Bias of the step size.
        softplus: apply softplus to the step size.
        state_indices: (B,), int32. Row of the state of each batch row, -1 to skip it.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), eq. 2-4; Dao & Gu 2024 (arXiv:2405.21060), eq. 1.
    """
    return implementation("selective_state_step", x)(
        state, x, dt, A, B, C, D, z, dt_bias, softplus, state_indices=state_indices
    )


def ssd_chunk_scan(
    X,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    seq_meta=None,
    initial_states=None,
    *,
    dt_bias=None,
    softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
):
    """Run the state-space dual (Mamba-2) recurrence over a sequence, chunk by chunk.

    Args:
        X: (B, L, H, P). Input.
        dt: (B, L, H). Step size.
        A: (H,). Continuous decay.
        B: (B, L, G, N). Input matrix.
        C: (B, L, G, N). Output matrix.
        chunk_size: steps per chunk, at least 1.
        D: (H,) or (H, P). Skip weight.
        z: (B, L, H, P). Gate.
        seq_meta: SeqMeta. Packed sequences and skipped steps.
        initial_states: (S, H, P, N). State before the first step.
        dt_bias: (H,). Bias of the step size.
        softplus: apply softplus to the step size.
        dt_limit: (low, high), to which the step size is clamped.
        return_final_states: also return the state after the last step.

    Returns:
        y (B, L, H, P) in the dtype of X; with ``return_final_states`` also final_states
        (S, H, P, N).

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), section 6.
    """
    return implementation("ssd_chunk_scan", X)(
        X,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        z,
        seq_meta,
        initial_states,
        dt_bias=dt_bias,
        softplus=softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )


def ssd_chunk_cumsum(
    dt,
    A,
    chunk_size,
    *,
    dt_bias=None,
    softplus=False,
    dt_limit=(0.0, float("inf")),
    seq_idx=None,
):
    """Compute step sizes and logarithmic decays by chunk: stage 1 of :func:`ssd_chunk_scan`.

    Args:
        dt: (B, L, H). Step size.
        A: (H,). Continuous decay.
        chunk_size: steps Q per chunk, at least 1 and below 2**31.
        dt_bias: (H,). Bias of the step size.
        softplus: apply softplus to the step size.
        dt_limit: (low, high), to which the step size is clamped.
        seq_idx: (B, L), int32. -1 skips a step.

    Returns:
        dt_out and dA_cumsum, (B, H, C, Q) each, float64 if dt is, else float32; C = ceil(L / Q).

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        docs/ops/ssd_stages.md.
    """
    return implementation("ssd_chunk_cumsum", dt)(
        dt,
        A,
        chunk_size,
        dt_bias=dt_bias,
        softplus=softplus,
        dt_limit=dt_limit,
        seq_idx=seq_idx,
    )


def ssd_chunk_state(x, B, dt, dA_cumsum, *, seq_idx=None):
    """Compute the state that each chunk adds: stage 2 of :func:`ssd_chunk_scan`.

    Args:
        x: (B, L, H, P). Input.
        B: (B, L, G, N). Input matrix.
        dt: (B, H, C, Q). Step size, from :func:`ssd_chunk_cumsum`.
        dA_cumsum: (B, H, C, Q), from :func:`ssd_chunk_cumsum`.
        seq_idx: (B, L), int32. Sequence of each step, -1 to skip it.

    Returns:
        states (B, C, H, P, N), float64 if x is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        docs/ops/ssd_stages.md.
    """
    return implementation("ssd_chunk_state", x)(x, B, dt, dA_cumsum, seq_idx=seq_idx)


def ssd_state_passing(states, dA_cumsum, *, initial_states=None, seq_idx=None):
    """Pass the state from chunk to chunk: stage 3 of :func:`ssd_chunk_scan`.

    Args:
        states: (B, C, H, P, N). What each chunk adds, from :func:`ssd_chunk_state`.
        dA_cumsum: (B, H, C, Q), from :func:`ssd_chunk_cumsum`.
        initial_states: (B, H, P, N). State before the first step.
        seq_idx: (B, L), int32. Sequence of each step, -1 to skip it.

    Returns:
        states_in (B, C, H, P, N), the state that enters each chunk, and final_states
        (B, H, P, N); float64 if states is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        docs/ops/ssd_stages.md.
    """
    return implementation("ssd_state_passing", states)(
        states, dA_cumsum, initial_states=initial_states, seq_idx=seq_idx
    )


def ssd_bmm_chunk(C, B, chunk_size):
    """Multiply C and B of all pairs of steps of a chunk: stage 4 of :func:`ssd_chunk_scan`.

    Args:
        C: (B, L, G, N). Output matrix.
        B: (B, L, G, N). Input matrix.
        chunk_size: steps Q per chunk, at least 1 and below 2**31.

    Returns:
        CB (B, C, G, Q, Q) with CB[i, j] = C[i] . B[j], float64 if C is, else float32.

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        docs/ops/ssd_stages.md.
    """
    return implementation("ssd_bmm_chunk", C)(C, B, chunk_size)


def ssd_chunk_output(CB, x, dt, dA_cumsum, C, states_in, *, D=None, z=None, seq_idx=None):
    """Compute the outputs from the other stages: stage 5 of :func:`ssd_chunk_scan`.

    Args:
        CB: (B, C, G, Q, Q), from :func:`ssd_bmm_chunk`.
        x: (B, L, H, P). Input.
        dt: (B, H, C, Q). Step size, from :func:`ssd_chunk_cumsum`.
        dA_cumsum: (B, H, C, Q), from :func:`ssd_chunk_cumsum`.
        C: (B, L, G, N). Output matrix.
        states_in: (B, C, H, P, N), from :func:`ssd_state_passing`.
        D: (H,) or (H, P). Skip weight.
        z: (B, L, H, P). Gate.
        seq_idx: (B, L), int32. Sequence of each step, -1 to skip it.

    Returns:
        y (B, L, H, P) in the dtype of x.

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        docs/ops/ssd_stages.md.
    """
    return implementation("ssd_chunk_output", x)(
        CB, x, dt, dA_cumsum, C, states_in, D=D, z=z, seq_idx=seq_idx
    )


def dw_causal_conv(
    x,
    weight,
    bias=None,
    activation="silu",
    *,
    initial_state=None,
    return_final_state=False,
    seq_meta=None,
):
    """Convolve every channel with its own short causal filter.

    Args:
        x: (B, D, L). Input.
        weight: (D, W) or (D, 1, W).
        bias: (D,).
        activation: "silu", "swish" (the same), "identity" or None (the same).
        initial_state: (S, D, W - 1). The inputs before the first step, oldest first.
        return_final_state: also return the last W - 1 inputs.
        seq_meta: SeqMeta. Packed sequences and skipped steps.

    Returns:
        y (B, D, L) in the dtype of x; with ``return_final_state`` also final_state (S, D, W - 1).

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), section 3.4.
    """
    return implementation("dw_causal_conv", x)(
        x,
        weight,
        bias,
        activation,
        initial_state=initial_state,
        return_final_state=return_final_state,
        seq_meta=seq_meta,
    )


def dw_causal_conv_step(
    x, conv_state, weight, bias=None, activation="silu", *, cache_seqlens=None, state_indices=None
):
    """Advance the causal convolution by one token, or a few, updating its window in place.

    Args:
        x: (B, D) or (B, D, T). Input.
        conv_state: (R, D, K), K at least W - 1. The last K inputs, updated in place.
        weight: (D, W) or (D, 1, W).
        bias: (D,).
        activation: "silu", "swish", "identity" or None.
        cache_seqlens: (B,), int32. Tokens seen by each row; makes the window a circular buffer.
        state_indices: (B,), int32. Row of the window of each batch row, -1 to skip it.

    Returns:
        y, shape and dtype of x.

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), section 3.4.
    """
    return implementation("dw_causal_conv_step", x)(
        x,
        conv_state,
        weight,
        bias,
        activation,
        cache_seqlens=cache_seqlens,
        state_indices=state_indices,
    )


def fused_layer_norm(
    x,
    weight,
    bias,
    residual=None,
    is_rms=False,
    eps=1e-5,
    prenorm=True,
    residual_in_fp32=True,
):
    """Add a residual stream and normalise the sum over the last axis.

    Args:
        x: (..., D). Input.
        weight: (D,).
        bias: (D,) or None.
        residual: as x in shape, or None.
        is_rms: root-mean-square norm instead of layer norm.
        eps: added to the variance; positive.
        prenorm: also return the sum.
        residual_in_fp32: return the sum in float64 if x is, else float32.

    Returns:
        y (..., D) in the dtype of x; with ``prenorm`` also the sum (..., D).

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        Ba et al. 2016 (arXiv:1607.06450), eq. 4; Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    return implementation("fused_layer_norm", x)(
        x, weight, bias, residual, is_rms, eps, prenorm, residual_in_fp32
    )


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
):
    """Normalise groups of the last axis and multiply by a gate.

    Args:
        x: (..., D). Input.
        weight: (D,).
        bias: (D,) or None.
        z: as x in shape, or None: no gate.
        is_rms: root-mean-square norm instead of layer norm.
        eps: added to the variance; positive.
        group_size: channels that share their statistics; divides D. None takes all.
        norm_before_gate: gate what was normalised instead of normalising what was gated.

    Returns:
        y (..., D) in the dtype of x.

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), section 7.1.
    """
    return implementation("gated_norm", x)(
        x,
        weight,
        bias,
        z,
        is_rms=is_rms,
        eps=eps,
        group_size=group_size,
        norm_before_gate=norm_before_gate,
    )


def swiglu(gate, up=None):
    """Multiply one half of a feed-forward layer by the SiLU of the other.

    Args:
        gate: (..., D); or (..., 2 D) without ``up``: the gate in the first half, up in the second.
        up: as gate in shape, or None.

    Returns:
        y (..., D) in the dtype of gate.

    Raises:
        ValueError: an argument breaks the contract; the message names it.

    Source:
        Shazeer 2020 (arXiv:2002.05202), eq. 5.
    """
    return implementation("swiglu", gate)(gate, up)


load_cpu_kernels()
expect_large_tensors()
