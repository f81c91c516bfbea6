"""The functions of ``mamba_ssm`` over the operators of ``ssm.ops``."""

import torch
import torch.nn.functional as F

from ssm import ops
from ssm.compat.causal_conv1d import state_rows
from ssm.compat.complex_scan import selective_scan_complex
from ssm.compat.norms import rmsnorm_fn
from ssm.ops.python.check import FLOATS, check_int, check_tensor
from ssm.seq_meta import SeqMeta

__all__ = [
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]

_COMPLEX = (torch.complex64, torch.complex128)


def selective_scan_fn(
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
    """Run the selective scan of Mamba-1.

    Args:
        u: (B, D, L), float64 | float32 | bfloat16 | float16. Input.
        delta: (B, D, L). Step size.
        A: (D, N), real or complex. Continuous decay.
        B: (D, N), (B, N, L) or (B, G, N, L). Input matrix. Beside a complex A one that varies with
            the step has 2 L in place of L: pairs of real and imaginary part.
        C: (D, N), (B, N, L) or (B, G, N, L), with 2 L as B. Output matrix.
        D: (D,). Skip weight.
        z: (B, D, L). Gate.
        delta_bias: (D,). Bias of the step size.
        delta_softplus: apply softplus to the step size.
        return_last_state: also return the state after the last step.

    Returns:
        out (B, D, L), dtype of u; with ``return_last_state`` also last_state (B, D, N), float32 or
        float64, complex if A is, through which gradients flow.

    Raises:
        ValueError: a shape does not fit a complex A, or what ``ssm.ops.selective_scan`` refuses.

    Source:
        Interface of mamba_ssm 2.3; the operator is docs/ops/selective_scan.md.
    """
    return _selective_scan(
        "selective_scan_fn",
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        bool(delta_softplus),
        return_last_state,
    )


def selective_state_update(
    state,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    state_batch_indices=None,
):
    """Advance the recurrence of Mamba-1 or Mamba-2 by one token, updating the state in place.

    Args:
        state: (R, D, N) or (R, H, P, N), float64 | float32 | bfloat16 | float16.
        x: (B, D) or (B, H, P). Input.
        dt: as x. Step size.
        A: (D, N) or (H, P, N), real. Continuous decay.
        B: (B, N) or (B, G, N). Input matrix.
        C: (B, N) or (B, G, N). Output matrix.
        D: (D,) or (H, P). Skip weight.
        z: as x. Gate.
        dt_bias: (D,) or (H, P). Bias of the step size.
        dt_softplus: apply softplus to the step size.
        state_batch_indices: (B,), integers. Row of the state of each batch row, negative to skip
            it. No row may be named twice.

    Returns:
        out, shape and dtype of x.

    Raises:
        ValueError: A is complex, or what ``ssm.ops.selective_state_step`` refuses.

    Source:
        Interface of mamba_ssm 2.3; the operator is docs/ops/selective_state_step.md.
    """
    _refuse_complex("selective_state_update", A)
    return ops.selective_state_step(
        state,
        x,
        dt,
        A,
        B,
        C,
        D,
        z,
        dt_bias,
        bool(dt_softplus),
        state_indices=state_rows(state_batch_indices),
    )


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
    state_dtype=None,
):
    """Run the state-space dual scan of Mamba-2.

    Args:
        x: (B, L, H, P), float64 | float32 | bfloat16 | float16. Input.
        dt: (B, L, H). Step size.
        A: (H,). Continuous decay.
        B: (B, L, G, N). Input matrix.
        C: (B, L, G, N). Output matrix.
        chunk_size: accepted; results do not depend on it but for rounding.
        D: (H,) or (H, P). Skip weight.
        z: (B, L, H, P). Gate.
        dt_bias: (H,). Bias of the step size.
        initial_states: (B, H, P, N). State before the first step of each row.
        seq_idx: (B, L), int32 | int64. Sequence of each step, -1 to skip it.
        cu_seqlens: (S + 1,), int32 | int64. Read with ``return_varlen_states`` only.
        dt_softplus: apply softplus to the step size.
        dt_limit: (low, high), to which the step size is clamped.
        return_final_states: also return the state after the last step of each row.
        return_varlen_states: also return the state after each sequence of ``cu_seqlens``; one row,
            and ``seq_idx`` must describe the same sequences.
        state_dtype: accepted; states are in float32 or better whatever it is, so float64 needs
            float64 tensors.

    Returns:
        out (B, L, H, P), dtype of x; then, where asked for, final_states (B, H, P, N) and
        varlen_states (S, H, P, N), float32 or float64.

    Raises:
        ValueError: an argument breaks a rule above, or what ``ssm.ops.ssd_chunk_scan`` refuses.
        TypeError: state_dtype is no dtype.

    Source:
        Interface of mamba_ssm 2.3; the operator is docs/ops/ssd_chunk_scan.md.
    """
    name = "mamba_chunk_scan_combined"
    check_tensor(name, "x", x, {"B, L, H, P": tuple("BLHP")})
    _check_state_dtype(name, state_dtype, x)
    meta = None if seq_idx is None else SeqMeta(seq_idx=seq_idx)
    if return_varlen_states:
        meta, initial_states = _varlen(name, x, cu_seqlens, seq_idx, initial_states)
    result = ops.ssd_chunk_scan(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        z,
        meta,
        initial_states,
        dt_bias=dt_bias,
        softplus=bool(dt_softplus),
        dt_limit=dt_limit,
        return_final_states=return_final_states or return_varlen_states,
    )
    if not return_varlen_states:
        return result
    out, varlen_states = result
    if not return_final_states:
        return out, varlen_states
    # The row ends with its last sequence that has a step.
    filled = (cu_seqlens[1:] > cu_seqlens[:-1]).nonzero()
    last = int(filled[-1]) if filled.numel() else 0
    return out, varlen_states[last : last + 1], varlen_states


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
    state_dtype=None,
):
    """Run all of a Mamba-2 block that lies behind its in_proj, from operators.

    Args:
        zxbcdt: (B, L, 2 M + 2 H P + 2 G N + H), float64 | float32 | bfloat16 | float16: what
            in_proj gives. M, what is left over, are channels of a gated MLP in front.
        conv1d_weight: (H P + 2 G N, W).
        conv1d_bias: (H P + 2 G N,) or None.
        dt_bias: (H,). Bias of the step size.
        A: (H,). Continuous decay.
        D: (H,) or (H, P). Skip weight.
        chunk_size: accepted; results do not depend on it but for rounding.
        initial_states: (B, H, P, N). State before the first step of each row; the convolution
            starts from nothing.
        seq_idx: (B, L), int32 | int64. Sequence of each step, -1 to skip it.
        dt_limit: (low, high), to which the step size is clamped behind softplus.
        return_final_states: also return the state after the last step of each row.
        activation: of the convolution: "silu", "swish" or None.
        rmsnorm_weight: (H P,). Weight of the gated norm; None gates without a norm.
        rmsnorm_eps: added to the mean square.
        outproj_weight: (E, M + H P). None leaves the projection out.
        outproj_bias: (E,) or None.
        headdim: P, needed where D is (H,).
        ngroups: G, groups of heads that share B and C, and of channels that share a mean square.
        norm_before_gate: ``norm(y) * silu(z)``, else ``norm(y * silu(z))``.
        state_dtype: accepted; states are in float32 or better whatever it is.

    Returns:
        out (B, L, M + H P), or (B, L, E) behind the projection; with ``return_final_states`` also
        final_states (B, H, P, N).

    Raises:
        ValueError: sizes do not fit, or what an operator refuses.
        TypeError: D is no tensor, or state_dtype no dtype.

    Source:
        Interface of mamba_ssm 2.3; Dao & Gu 2024 (arXiv:2405.21060), section 7.
    """
    name = "mamba_split_conv1d_scan_combined"
    check_tensor(name, "zxbcdt", zxbcdt, {"B, L, K": tuple("BLK")})
    check_tensor(name, "conv1d_weight", conv1d_weight, {"K, W": tuple("KW")})
    check_int(name, "ngroups", ngroups, 1)
    _check_state_dtype(name, state_dtype, zxbcdt)
    nheads, headdim = _heads(name, D, headdim)
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError(f"{name}: outproj_bias must be None without outproj_weight, got a tensor")
    dim, channels = nheads * headdim, conv1d_weight.shape[0]
    rest = channels - dim
    if rest < 0 or rest % (2 * ngroups):
        raise ValueError(
            f"{name}: conv1d_weight must have H P + 2 G N = {dim} + {2 * ngroups} N rows, "
            f"got {channels}"
        )
    mlp = zxbcdt.shape[-1] - dim - channels - nheads
    if mlp < 0 or mlp % 2:
        raise ValueError(
            f"{name}: zxbcdt must have 2 M + {dim + channels + nheads} channels, "
            f"got {zxbcdt.shape[-1]}"
        )
    _check_projection(name, "outproj", outproj_weight, outproj_bias, mlp // 2 + dim, zxbcdt)
    side, z, xBC, dt = zxbcdt.split([mlp, dim, channels, nheads], dim=-1)
    meta = None if seq_idx is None else SeqMeta(seq_idx=seq_idx)
    xBC = ops.dw_causal_conv(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, activation, seq_meta=meta
    ).transpose(1, 2)
    x, B, C = xBC.split([dim, rest // 2, rest // 2], dim=-1)
    gate = z.unflatten(-1, (nheads, headdim)) if rmsnorm_weight is None else None
    y, final_states = ops.ssd_chunk_scan(
        x.unflatten(-1, (nheads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, rest // 2 // ngroups)),
        C.unflatten(-1, (ngroups, rest // 2 // ngroups)),
        chunk_size,
        D,
        gate,
        meta,
        initial_states,
        dt_bias=dt_bias,
        softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if mlp:
        y = torch.cat([ops.swiglu(side), y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final_states) if return_final_states else y


def mamba_inner_fn(
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
    checkpoint_lvl=1,
    b_rms_weight=None,
    c_rms_weight=None,
    dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):
    """Run all of a Mamba-1 block that lies behind its in_proj, from operators.

    Args:
        xz: (B, 2 D, L), float64 | float32 | bfloat16 | float16: what in_proj gives, channels first.
        conv1d_weight: (D, 1, W).
        conv1d_bias: (D,) or None.
        x_proj_weight: (R + 2 N, D). Projection to step size, B and C; the N rows of what is given
            are not read and may be missing; 2 N in place of N, pairs of real and imaginary part,
            if A is complex.
        delta_proj_weight: (D, R).
        out_proj_weight: (E, D).
        out_proj_bias: (E,) or None.
        A: (D, N), real or complex. Continuous decay.
        B: input matrix as in :func:`selective_scan_fn`; None takes it from the projection.
        C: output matrix as in :func:`selective_scan_fn`; None takes it from the projection.
        D: (D,). Skip weight.
        delta_bias: (D,). Bias of the step size.
        B_proj_bias: (N,). Added to a projected B.
        C_proj_bias: (N,). Added to a projected C.
        delta_softplus: apply softplus to the step size.
        checkpoint_lvl: 0 or 1, accepted: 1 saved memory upstream; what the operators save for their
            backward does not depend on it.
        b_rms_weight: (N,). Root-mean-square norm of a projected B.
        c_rms_weight: (N,). The same for C.
        dt_rms_weight: (D,). The same for the step size, behind its projection, as upstream has it;
            Falcon Mamba defines it in front of the projection.
        b_c_dt_rms_eps: eps of these norms.

    Returns:
        out (B, L, E).

    Raises:
        ValueError: a norm is asked for where B or C is given, checkpoint_lvl is no level, or what
            an operator refuses.

    Source:
        Interface of mamba_ssm 2.3; Gu & Dao 2023 (arXiv:2312.00752), section 3.4.
    """
    name = "mamba_inner_fn"
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"{name}: checkpoint_lvl must be 0 or 1, got {checkpoint_lvl!r}")
    for letter, given, weight in (("b", B, b_rms_weight), ("c", C, c_rms_weight)):
        if given is not None and weight is not None:
            raise ValueError(
                f"{name}: {letter}_rms_weight must be None where {letter.upper()} is given, "
                "got a tensor"
            )
    check_tensor(name, "xz", xz, {"B, 2 D, L": tuple("BDL")})
    dim = xz.shape[1] // 2
    if xz.shape[1] % 2:
        raise ValueError(f"{name}: xz must have 2 D channels, got {xz.shape[1]}")
    check_tensor(name, "delta_proj_weight", delta_proj_weight, {"D, R": (dim, "R")}, xz.device)
    check_tensor(name, "A", A, {"D, N": (dim, "N")}, xz.device, (*FLOATS, *_COMPLEX))
    rank, numbers = delta_proj_weight.shape[1], 2 if _is_complex(A) else 1
    dstate = numbers * A.shape[-1]
    # Rows of what is given may be there: as upstream, those of C are counted from the end.
    is_whole = B is None and C is None
    rows = rank + 2 * dstate if is_whole else "R"
    check_tensor(name, "x_proj_weight", x_proj_weight, {"R + 2 N, D": (rows, dim)}, xz.device)
    least, got = rank + dstate * ((B is None) + (C is None)), x_proj_weight.shape[0]
    if got < least:
        raise ValueError(f"{name}: x_proj_weight must have at least {least} rows, got {got}")
    _check_projection(name, "out_proj", out_proj_weight, out_proj_bias, dim, xz)
    for argument, bias in (("B_proj_bias", B_proj_bias), ("C_proj_bias", C_proj_bias)):
        check_tensor(name, argument, bias, {"N": (dstate,)}, xz.device, optional=True)
    x, z = xz.chunk(2, dim=1)
    x = ops.dw_causal_conv(x, conv1d_weight, conv1d_bias, "silu")
    projected = F.linear(x.transpose(1, 2), x_proj_weight)  # (B, L, R + 2 N)

    def normed(tensor, weight):
        return tensor if weight is None else rmsnorm_fn(tensor, weight, None, eps=b_c_dt_rms_eps)

    def matrix(given, columns, bias, weight):
        if given is not None:
            return given
        part = projected[..., columns]
        part = part if bias is None else part + bias.to(part.dtype)
        part = normed(part, weight).transpose(1, 2)  # (B, N, L)
        if numbers == 1:
            return part
        return part.unflatten(1, (-1, numbers)).transpose(2, 3).flatten(2)  # (B, N, 2 L)

    y = _selective_scan(
        name,
        x,
        normed(F.linear(projected[..., :rank], delta_proj_weight), dt_rms_weight).transpose(1, 2),
        A,
        matrix(B, slice(rank, rank + dstate), B_proj_bias, b_rms_weight),
        matrix(C, slice(-dstate, None), C_proj_bias, c_rms_weight),
        D,
        z,
        delta_bias,
        bool(delta_softplus),
        False,
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _check_projection(name, argument, weight, bias, width, x):
    """Refuse a projection that does not fit, or that is in another dtype than what it takes."""
    if weight is None:
        return
    check_tensor(name, f"{argument}_weight", weight, {"E, D": ("E", width)}, x.device)
    form = {"E": (weight.shape[0],)}
    check_tensor(name, f"{argument}_bias", bias, form, x.device, optional=True)


def _is_complex(matrix):
    return isinstance(matrix, torch.Tensor) and matrix.is_complex()


def _selective_scan(name, u, delta, A, *arguments):
    if _is_complex(A):
        return selective_scan_complex(name, u, delta, A, *arguments)
    return ops.selective_scan(u, delta, A, *arguments)


def _refuse_complex(name, A):
    if _is_complex(A):
        got = str(A.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: A must be real, got {got}")


def _check_state_dtype(name, state_dtype, x):
    if state_dtype is None:
        return
    if not isinstance(state_dtype, torch.dtype):
        raise TypeError(f"{name}: state_dtype must be a torch.dtype, got {state_dtype!r}")
    wider = state_dtype == torch.float64 and x.dtype != torch.float64
    if wider or not state_dtype.is_floating_point:
        got = str(state_dtype).removeprefix("torch.")
        rule = "be at most float32 for tensors that are not float64"
        raise ValueError(f"{name}: state_dtype must {rule}, got {got}")


def _heads(name, D, headdim):
    """Return the number and the width of the heads that D tells of."""
    if not isinstance(D, torch.Tensor):
        raise TypeError(f"{name}: D must be a torch.Tensor, got {type(D).__name__}")
    if D.ndim == 2:
        return tuple(D.shape)
    check_tensor(name, "D", D, {"H": ("H",)})
    if headdim is None:
        raise ValueError(f"{name}: headdim must be given where D has shape (H,), got None")
    check_int(name, "headdim", headdim, 1)
    return D.shape[0], headdim


def _varlen(name, x, cu_seqlens, seq_idx, initial_states):
    """Return the layout with a state per sequence, and the states that enter the sequences."""
    for argument, value in (("cu_seqlens", cu_seqlens), ("seq_idx", seq_idx)):
        if value is None:
            raise ValueError(f"{name}: {argument} must be given for varlen states, got None")
    if x.shape[0] != 1:
        raise ValueError(f"{name}: x must have batch 1 for varlen states, got {x.shape[0]}")
    meta = SeqMeta(seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    if initial_states is None:
        return meta, None
    check_tensor(name, "initial_states", initial_states, {"B, H, P, N": (1, *"HPN")}, x.device)
    # The state of the row enters its first sequence with a step; the others start from zero.
    filled = (cu_seqlens[1:] > cu_seqlens[:-1]).nonzero()
    first = int(filled[0]) if filled.numel() else 0
    entering = initial_states.new_zeros(meta.num_sequences, *initial_states.shape[1:])
    return meta, torch.cat([entering[:first], initial_states, entering[first + 1 :]])
