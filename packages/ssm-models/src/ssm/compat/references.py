"""The ``*_ref`` functions of ``mamba_ssm``: their namesakes on the reference.

People test with them. Each has the arguments of its namesake upstream and computes with the
operators of ``ssm.ops.python.reference``, whatever backend serves the others.
"""

import torch
import torch.nn.functional as F

from ssm import ops
from ssm.compat.functions import (
    mamba_chunk_scan_combined,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
    selective_scan_fn,
    selective_state_update,
)
from ssm.compat.norms import check_dropout, check_rows, layer_norm_fn, rmsnorm_fn
from ssm.ops.python.check import check_int, check_tensor
from ssm.utils.dispatch import use_backend

__all__ = [
    "layer_norm_ref",
    "mamba_inner_ref",
    "mamba_split_conv1d_scan_ref",
    "rms_norm_gated_ref",
    "rms_norm_ref",
    "segsum",
    "selective_scan_ref",
    "selective_state_update_ref",
    "ssd_chunk_scan_combined_ref",
    "ssd_minimal_discrete",
]


@use_backend("python")
def selective_scan_ref(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """Run ``selective_scan_fn`` on the reference.

    Args:
        u: (B, D, L), float64 | float32 | bfloat16 | float16. Input.
        delta: (B, D, L). Step size.
        A: (D, N), real or complex. Continuous decay.
        B: (D, N), (B, N, L) or (B, G, N, L), with 2 L beside a complex A. Input matrix.
        C: as B. Output matrix.
        D: (D,). Skip weight.
        z: (B, D, L). Gate.
        delta_bias: (D,).
        delta_softplus: apply softplus to the step size.
        return_last_state: also return the state after the last step.

    Returns:
        out (B, D, L); with ``return_last_state`` also last_state (B, D, N).

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of mamba_ssm 2.3.
    """
    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


@use_backend("python")
def mamba_inner_ref(
    xz,
    conv1d_weight,
    conv1d_bias,
    x_proj_weight,
    delta_proj_weight,
    out_proj_weight,
    out_proj_bias,
    A,
    B=None,
    C=None,
    D=None,
    delta_bias=None,
    B_proj_bias=None,
    C_proj_bias=None,
    delta_softplus=True,
):
    """Run ``mamba_inner_fn`` on the reference.

    Args:
        xz: (B, 2 D, L): what in_proj gives.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,) or None.
        x_proj_weight: (R + 2 N, D).
        delta_proj_weight: (D, R).
        out_proj_weight: (E, D).
        out_proj_bias: (E,) or None.
        A: (D, N), real or complex. Continuous decay.
        B: input matrix; None takes it from the projection.
        C: output matrix; None takes it from the projection.
        D: (D,). Skip weight.
        delta_bias: (D,).
        B_proj_bias: (N,).
        C_proj_bias: (N,).
        delta_softplus: apply softplus to the step size; upstream's function does so in any case.

    Returns:
        out (B, L, E).

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of mamba_ssm 2.3.
    """
    return mamba_inner_fn(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        out_proj_weight,
        out_proj_bias,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )


@use_backend("python")
def selective_state_update_ref(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False
):
    """Run ``selective_state_update`` on the reference.

    Args:
        state: (B, D, N) or (B, H, P, N). Updated in place.
        x: (B, D) or (B, H, P). Input.
        dt: as x. Step size.
        A: (D, N) or (H, P, N). Continuous decay.
        B: (B, N) or (B, G, N). Input matrix.
        C: as B. Output matrix.
        D: (D,) or (H, P). Skip weight.
        z: as x. Gate.
        dt_bias: (D,) or (H, P).
        dt_softplus: apply softplus to the step size.

    Returns:
        out, shape and dtype of x.

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of mamba_ssm 2.3.
    """
    return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


@use_backend("python")
def ssd_chunk_scan_combined_ref(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False
):
    """Run ``mamba_chunk_scan_combined`` on the reference, from a zero state.

    Args:
        x: (B, L, H, P). Input.
        dt: (B, L, H). Step size.
        A: (H,). Continuous decay.
        B: (B, L, G, N). Input matrix.
        C: (B, L, G, N). Output matrix.
        chunk_size: accepted; results do not depend on it but for rounding.
        D: (H,) or (H, P). Skip weight.
        z: (B, L, H, P). Gate.
        dt_bias: (H,).
        dt_softplus: apply softplus to the step size.

    Returns:
        out (B, L, H, P), dtype of x.

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of mamba_ssm 2.3.
    """
    return mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, dt_softplus=dt_softplus
    )


@use_backend("python")
def mamba_split_conv1d_scan_ref(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    dt_limit=(0.0, float("inf")),
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """Run ``mamba_split_conv1d_scan_combined`` on the reference, from a zero state.

    Args:
        zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H): what in_proj gives.
        conv1d_weight: (H P + 2 G N, W).
        conv1d_bias: (H P + 2 G N,) or None.
        dt_bias: (H,).
        A: (H,). Continuous decay.
        D: (H,) or (H, P). Skip weight.
        chunk_size: accepted; results do not depend on it but for rounding.
        dt_limit: (low, high), to which the step size is clamped.
        activation: of the convolution: "silu", "swish" or None.
        rmsnorm_weight: (H P,). Weight of the gated norm; None gates without a norm.
        rmsnorm_eps: added to the mean square.
        outproj_weight: (E, M + H P) or None.
        outproj_bias: (E,) or None.
        headdim: P, needed where D is (H,).
        ngroups: G.
        norm_before_gate: ``norm(y) * silu(z)``, else ``norm(y * silu(z))``.

    Returns:
        out (B, L, M + H P), or (B, L, E) behind the projection.

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of mamba_ssm 2.3.
    """
    return mamba_split_conv1d_scan_combined(
        zxbcdt,
        conv1d_weight,
        conv1d_bias,
        dt_bias,
        A,
        D,
        chunk_size,
        dt_limit=dt_limit,
        activation=activation,
        rmsnorm_weight=rmsnorm_weight,
        rmsnorm_eps=rmsnorm_eps,
        outproj_weight=outproj_weight,
        outproj_bias=outproj_bias,
        headdim=headdim,
        ngroups=ngroups,
        norm_before_gate=norm_before_gate,
    )


@use_backend("python")
def layer_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """Run ``layer_norm_fn`` on the reference, with dropout masks that may be given.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16.
        weight: (D,).
        bias: (D,) or None.
        residual: as x in shape, or None.
        x1: as x in shape: a parallel branch, added to x.
        weight1: (D,). Weight of a second norm of the same sum.
        bias1: (D,) or None.
        eps: added to the variance.
        dropout_p: probability with which elements of x and of x1 become 0.
        rowscale: (...): factor of each row of x.
        prenorm: also return the sum.
        dropout_mask: (..., D) bool, True where x is kept; None draws one.
        dropout_mask1: the same for x1.
        upcast: return the sum in float32 or better, else in the dtype of x; what is computed, is in
            float32 or better either way.

    Returns:
        out (..., D), dtype of x; then out1 and the sum where asked for.

    Raises:
        ValueError: what ``layer_norm_fn`` refuses.

    Source:
        Interface of mamba_ssm 2.3; the operator is docs/ops/fused_layer_norm.md.
    """
    return _layer_norm(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm),
        *(dropout_mask, dropout_mask1, upcast, False),
    )


@use_backend("python")
def rms_norm_ref(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    dropout_mask=None,
    dropout_mask1=None,
    upcast=False,
):
    """Do what :func:`layer_norm_ref` does, with the root-mean-square norm.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16.
        weight: (D,).
        bias: (D,) or None.
        residual: as x in shape, or None.
        x1: as x in shape: a parallel branch, added to x.
        weight1: (D,). Weight of a second norm of the same sum.
        bias1: (D,) or None.
        eps: added to the mean square.
        dropout_p: probability with which elements of x and of x1 become 0.
        rowscale: (...): factor of each row of x.
        prenorm: also return the sum.
        dropout_mask: (..., D) bool, True where x is kept; None draws one.
        dropout_mask1: the same for x1.
        upcast: return the sum in float32 or better, else in the dtype of x.

    Returns:
        As :func:`layer_norm_ref`.

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of mamba_ssm 2.3.
    """
    return _layer_norm(
        *(x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm),
        *(dropout_mask, dropout_mask1, upcast, True),
    )


@use_backend("python")
def rms_norm_gated_ref(
    x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True, upcast=True
):
    """Run ``rmsnorm_fn`` on the reference: ``rms_norm_ref`` of upstream's layernorm_gated.

    Args:
        x: (..., D), float64 | float32 | bfloat16 | float16.
        weight: (D,).
        bias: (D,) or None.
        z: as x in shape, or None: no gate.
        eps: added to the mean square.
        group_size: channels that share their mean square; None takes all.
        norm_before_gate: ``norm(x) * silu(z)``, else ``norm(x * silu(z))``.
        upcast: accepted: what is computed, is in float32 or better either way.

    Returns:
        out (..., D), dtype of x.

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of mamba_ssm 2.3.
    """
    return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)


def segsum(x):
    """Sum all stretches of the last axis: ``[i, j] = x[j + 1] + ... + x[i]``, -inf where j > i.

    Args:
        x: (..., T), floating point.

    Returns:
        (..., T, T), dtype of x.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), listing 1.
    """
    if not isinstance(x, torch.Tensor) or not x.ndim:
        check_tensor("segsum", "x", x, {"..., T": ("T",)})
    size = x.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    # Summed one stretch each, not as a difference of two sums from the start: that would cancel.
    sums = torch.where(lower.tril(-1), x[..., None], 0).cumsum(dim=-2)
    return sums.masked_fill(~lower, -torch.inf)


def ssd_minimal_discrete(X, A, B, C, block_len, initial_states=None):
    """Run the state-space dual scan with decays that are given step by step.

    It is the five stages of the operator, so backends serve it as they serve those.

    Args:
        X: (B, L, H, P), float64 | float32 | bfloat16 | float16. Input times step size.
        A: (B, L, H). Logarithm of the decay at each step: rate times step size.
        B: (B, L, H, N), or (B, L, G, N) with groups of heads. Input matrix.
        C: as B. Output matrix.
        block_len: steps per chunk; any, L need not be a multiple of it.
        initial_states: (B, H, P, N), or (B, 1, H, P, N) as upstream has it. None is zero.

    Returns:
        Y (B, L, H, P), dtype of X, and final_state (B, H, P, N), float32 or float64.

    Raises:
        ValueError: a shape does not fit.

    Source:
        Dao & Gu 2024 (arXiv:2405.21060), listing 1; docs/ops/ssd_stages.md.
    """
    name = "ssd_minimal_discrete"
    check_tensor(name, "X", X, {"B, L, H, P": tuple("BLHP")})
    check_tensor(name, "A", A, {"B, L, H": tuple(X.shape[:3])}, X.device)
    check_int(name, "block_len", block_len, 1)
    batch, _, nheads, headdim = X.shape
    state = (batch, nheads, headdim, "N")
    forms = {"B, 1, H, P, N": (batch, 1, *state[1:]), "B, H, P, N": state}
    check_tensor(name, "initial_states", initial_states, forms, X.device, optional=True)
    if initial_states is not None and initial_states.ndim == 5:
        initial_states = initial_states.squeeze(1)
    acc = torch.promote_types(X.dtype, torch.float32)
    # Steps behind the end, of which there is no input, do not decay.
    chunks = -(-A.shape[1] // block_len)
    beyond = (0, 0, 0, chunks * block_len - A.shape[1])
    decay = F.pad(A.to(acc), beyond).unflatten(1, (chunks, block_len)).permute(0, 3, 1, 2)
    dt = torch.ones_like(decay)
    dA_cumsum = decay.cumsum(dim=-1)  # (B, H, C, Q)
    states = ops.ssd_chunk_state(X, B, dt, dA_cumsum)
    states_in, final_state = ops.ssd_state_passing(states, dA_cumsum, initial_states=initial_states)
    CB = ops.ssd_bmm_chunk(C, B, block_len)
    return ops.ssd_chunk_output(CB, X, dt, dA_cumsum, C, states_in), final_state


def _layer_norm(
    x,
    weight,
    bias,
    residual,
    x1,
    weight1,
    bias1,
    eps,
    dropout_p,
    rowscale,
    prenorm,
    mask,
    mask1,
    upcast,
    is_rms,
):
    check_rows("layer_norm_ref", x, x1=x1, residual=residual)
    check_rows("layer_norm_ref", x, (torch.bool,), dropout_mask=mask, dropout_mask1=mask1)
    check_dropout("layer_norm_ref", dropout_p)
    acc = torch.promote_types(x.dtype, torch.float32)
    if upcast and residual is not None:
        residual = residual.to(acc)  # the sum comes back in the dtype of the residual
    if mask is not None or mask1 is not None:
        # Masks that are given replace drawing; rows are scaled before, which is the same.
        x = _dropped(x, mask, dropout_p)
        x1 = None if x1 is None else _dropped(x1, mask1, dropout_p)
        dropout_p = 0.0
    results = layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32=True,
        is_rms_norm=is_rms,
    )
    if not prenorm:
        return results
    return (*results[:-1], results[-1].to(acc if upcast else x.dtype))


def _dropped(x, mask, p):
    if mask is None:
        return F.dropout(x, p=p)
    return torch.where(mask, x / (1.0 - p), 0)
