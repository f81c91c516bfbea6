"""The scan of Mamba-1 with complex matrices, as real scans of twice the states."""

import torch

from ssm import ops

__all__ = ["selective_scan_complex"]


def selective_scan_complex(
    name, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
):
    """Run the selective scan with a complex A and take twice the real part of what it reads.

    The state turns by ``Im(A) dt`` in every step. Measured against axes that turn along, by
    ``angle = Im(A) (dt[0] + ... + dt[t])``, it only decays, by ``exp(Re(A) dt)``; what drives it is
    ``B exp(-i angle)``, what reads it is ``C exp(i angle)``. So its real and its imaginary part are
    states of one real scan, whose B and C differ from channel to channel. Angles are in float64.

    Args:
        name: of the function for messages.
        u: (B, D, L), float64 | float32 | bfloat16 | float16. Input.
        delta: (B, D, L). Step size.
        A: (D, N), complex. Continuous decay and rotation.
        B: (D, N), complex or real; or (B, N, 2 L) or (B, G, N, 2 L), real: pairs of real and
            imaginary part. Input matrix.
        C: as B, in a form of its own choice. Output matrix.
        D: (D,) or None. Skip weight.
        z: (B, D, L) or None. Gate.
        delta_bias: (D,) or None. Bias of the step size.
        delta_softplus: apply softplus to the step size.
        return_last_state: also return the state after the last step.

    Returns:
        out (B, D, L), dtype of u; with ``return_last_state`` also last_state (B, D, N), complex64
        or complex128.

    Raises:
        ValueError: B or C has none of the shapes above, or what ``ssm.ops.selective_scan`` refuses.

    Source:
        Gu & Dao 2023 (arXiv:2312.00752), eq. 2-4, with complex numbers as in its section 3.6.
    """
    _check_ranks(name, u=(u, 3), delta=(delta, 3), A=(A, 2))
    acc = torch.promote_types(u.dtype, torch.float32)
    dt = delta.to(acc)
    if delta_bias is not None:
        dt = dt + delta_bias.to(acc)[:, None]
    if delta_softplus:
        dt = torch.logaddexp(dt, dt.new_zeros(()))
    turned = dt.double().cumsum(2)[:, :, None] * A.imag.double()[:, :, None]  # (B, D, N, L)
    axes = torch.polar(torch.ones_like(turned), turned)
    drive = _matrix(name, "B", B, u, A) * axes.conj()
    read = _matrix(name, "C", C, u, A) * axes * 2
    result = ops.selective_scan(
        u,
        dt,
        torch.cat([A.real, A.real], 1).to(acc),
        torch.cat([drive.real, drive.imag], 2).to(acc),
        torch.cat([read.real, -read.imag], 2).to(acc),
        D,
        z,
        None,
        False,
        return_last_state,
    )
    if not return_last_state:
        return result
    out, (real, imaginary) = result[0], result[1].chunk(2, 2)
    angle = dt.double().sum(2)[:, :, None] * A.imag.double()
    state = torch.complex(real, imaginary)
    return out, state * torch.polar(torch.ones_like(angle), angle).to(state.dtype)


def _check_ranks(name, **arguments):
    for argument, (value, ndim) in arguments.items():
        if not isinstance(value, torch.Tensor):
            got = type(value).__name__
            raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {got}")
        if value.ndim != ndim:
            got = tuple(value.shape)
            raise ValueError(f"{name}: {argument} must have {ndim} axes, got shape {got}")


def _matrix(name, argument, matrix, u, A):
    """Return B or C as a complex tensor that broadcasts against (B, D, N, L)."""
    if not isinstance(matrix, torch.Tensor):
        got = type(matrix).__name__
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {got}")
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    shape = tuple(matrix.shape)
    if shape == (dim, dstate):
        return matrix[:, :, None].to(torch.complex128)
    variable = matrix[:, None] if matrix.ndim == 3 else matrix
    groups = variable.shape[1] if variable.ndim == 4 else 0
    fits = groups > 0 and dim % groups == 0
    if not fits or tuple(variable.shape) != (batch, groups, dstate, 2 * seqlen):
        raise ValueError(
            f"{name}: {argument} must have shape (D, N) = {(dim, dstate)}, (B, N, 2 L) = "
            f"{(batch, dstate, 2 * seqlen)} or (B, G, N, 2 L) beside a complex A, got {shape}"
        )
    if variable.is_complex():
        raise ValueError(
            f"{name}: {argument} must be real, with pairs of real and imaginary part, where it "
            f"varies with the step, got {str(matrix.dtype).removeprefix('torch.')}"
        )
    pairs = variable.double().unflatten(3, (seqlen, 2))
    return torch.complex(pairs[..., 0], pairs[..., 1]).repeat_interleave(dim // groups, 1)
