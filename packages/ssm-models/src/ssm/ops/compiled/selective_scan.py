"""The selective scan between torch and ``ssm_kernels``: allocation, gradients, shapes."""

import torch
from ssm_kernels import (
    selective_scan_bwd,
    selective_scan_bwd_workspace,
    selective_scan_fwd,
    selective_scan_fwd_workspace,
)

from ssm.ops.compiled.library import (
    define,
    differentiate,
    flat_size,
    is_eager,
    num_threads,
    refuse_as,
    refuse_second_gradient,
    stream,
    unflatten,
    wants_gradient,
    workspace,
)
from ssm.ops.python import check
from ssm.ops.python.arithmetic import acc_dtype

_STEPS = 32  # steps between saved states: kSelectiveScanCheckpoint of the kernels
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? seq_idx"
)


def _workspace(size, u, _, A, B, C, D, z, dt_bias, *rest):
    return workspace(u, size, u, A, B, C, D, dt_bias)


def _checkpoint_shape(u, A):
    chunks = (u.shape[-1] + _STEPS - 1) // _STEPS
    return u.shape[0], chunks, A.shape[-1], u.shape[1] if u.ndim > 1 else 0


def _unflattened(checkpoints, u, delta, A, *rest):
    return unflatten(checkpoints, _checkpoint_shape(u, A))


def _allocate(u, delta, A, B, C, D, z, dt_bias, initial_state, seq_idx, num_states, save):
    """Return empty y, last_state and checkpoints; the latter has no element unless saved."""
    acc = acc_dtype(u)
    saved = flat_size(_checkpoint_shape(u, A)) if save else 0
    return (
        torch.empty_like(u),
        u.new_empty((num_states, *A.shape), dtype=acc),
        u.new_empty(saved, dtype=acc),
    )


def _forward(*args):
    *inputs, softplus, per_sequence, num_states, save = args
    y, last_state, checkpoints = _allocate(*inputs, num_states, save)
    selective_scan_fwd(
        *inputs,
        y=y,
        last_state=last_state,
        checkpoints=_unflattened(checkpoints, *inputs) if save else None,
        softplus=softplus,
        state_per_sequence=per_sequence,
        num_threads=num_threads(),
        stream=stream(inputs[0]),
        workspace=_workspace(selective_scan_fwd_workspace, *inputs),
    )
    return y, last_state, checkpoints


def _forward_fake(*args):
    *inputs, _, _, num_states, save = args
    return _allocate(*inputs, num_states, save)


def _allocate_gradients(u, delta, A, B, C, D, z, dt_bias, initial_state, seq_idx):
    """Return one empty gradient per differentiable input; no element where there is no input."""
    given = (u, delta, A, B, C, D, z, dt_bias, initial_state)
    return tuple(u.new_empty(0) if t is None else torch.empty_like(t) for t in given)


def _backward_kernel(*args):
    *inputs, checkpoints, dy, dlast_state, softplus, per_sequence = args
    gradients = _allocate_gradients(*inputs)
    given = [g if t is not None else None for g, t in zip(gradients, inputs[:-1], strict=True)]
    du, ddelta, dA, dB, dC, dD, dz, ddt_bias, dinitial_state = given
    selective_scan_bwd(
        *inputs,
        checkpoints=_unflattened(checkpoints, *inputs),
        dy=dy,
        dlast_state=dlast_state,
        du=du,
        ddelta=ddelta,
        dA=dA,
        dB=dB,
        dC=dC,
        dD=dD,
        dz=dz,
        ddt_bias=ddt_bias,
        dinitial_state=dinitial_state,
        softplus=softplus,
        state_per_sequence=per_sequence,
        num_threads=num_threads(),
        stream=stream(inputs[0]),
        workspace=_workspace(selective_scan_bwd_workspace, *inputs),
    )
    return gradients


def _backward_fake(*args):
    return _allocate_gradients(*args[:10])


_fwd = define(
    f"selective_scan_fwd({_INPUTS}, bool softplus, bool state_per_sequence, SymInt num_states, "
    "bool save) -> (Tensor y, Tensor last_state, Tensor checkpoints)",
    _forward,
    _forward_fake,
)
_bwd = define(
    f"selective_scan_bwd({_INPUTS}, Tensor checkpoints, Tensor dy, Tensor? dlast_state, "
    "bool softplus, bool state_per_sequence) -> (Tensor du, Tensor ddelta, Tensor dA, Tensor dB, "
    "Tensor dC, Tensor dD, Tensor dz, Tensor ddt_bias, Tensor dinitial_state)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.per_sequence, _, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast_state, _):
    *inputs, checkpoints = ctx.saved_tensors
    if dy is None and dlast_state is None:
        return (None,) * 14
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    gradients = _bwd(*inputs, checkpoints, dy, dlast_state, ctx.softplus, ctx.per_sequence)
    given = [g if t is not None else None for g, t in zip(gradients, inputs[:-1], strict=True)]
    return (*given, None, None, None, None, None)


differentiate("selective_scan_fwd", _setup_context, _backward)
refuse_second_gradient("selective_scan_bwd")


@refuse_as(check.selective_scan)
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
    """Run the selective scan on compiled kernels; contract: ``ssm.ops.python.reference``."""
    inputs = (u, delta, A, B, C, D, z, dt_bias, initial_state)
    if u.ndim != 3 or not isinstance(A, torch.Tensor) or A.ndim != 2:
        # Shapes are read below, before the kernels check them: this raises.
        check.selective_scan(*inputs, seq_meta)
    seq_idx, per_sequence, num_states = None, False, u.shape[0]
    if seq_meta is not None:
        num_states = check.check_seq_meta("selective_scan", seq_meta, num_states)
        seq_idx = seq_meta.positions(u.shape[0], u.shape[2], u.device)
        per_sequence = seq_meta.state_per_sequence
    save = wants_gradient(*inputs)
    call = _forward if is_eager(*inputs) else _fwd
    y, last_state, _ = call(*inputs, seq_idx, bool(softplus), per_sequence, num_states, save)
    return (y, last_state) if return_last_state else y
