"""The state-space dual scan between torch and ``ssm_kernels``: allocation, gradients, shapes."""

import torch
from ssm_kernels import (
    ssd_chunk_scan_bwd,
    ssd_chunk_scan_bwd_workspace,
    ssd_chunk_scan_fwd,
    ssd_chunk_scan_fwd_workspace,
)

from ssm.ops.compiled.library import (
    define,
    differentiate,
    finite,
    flat_size,
    is_eager,
    num_threads,
    refuse_as,
    refuse_second_gradient,
    stream,
    unbounded,
    unflatten,
    wants_gradient,
    workspace,
)
from ssm.ops.python import check, reference
from ssm.ops.python.arithmetic import acc_dtype

_STEPS = 96  # steps between saved states: kSsdChunkScanCheckpoint of the kernels
_GPU_STATES = 256  # of a head, at most: kSsdChunkScanGpuStates of the kernels
# Bytes of shared memory of a block, in float32: tests/kernels/test_cuda_room.py holds the kernels
# to these.
_ROOM_BACKWARD, _ROOM_MANY_STATES = 125 << 10, 162 << 10
_INPUTS = (
    "Tensor X, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx"
)
_OPTIONS = "float dt_low, float dt_high, bool softplus, bool state_per_sequence"


def _has_room(X, dstate, save):
    """Return whether a block of the GPU of X has the shared memory that the kernels need.

    Every GPU since Ampere has as much as 16 bits need, and float32 forward to 128 states.
    """
    needed = 0
    if X.dtype == torch.float32:
        needed = max(_ROOM_MANY_STATES if dstate > 128 else 0, _ROOM_BACKWARD if save else 0)
    if needed == 0:
        return True
    properties = torch.cuda.get_device_properties(X.device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= needed


def _checkpoint_shape(X, B):
    batch, seqlen, nheads, headdim = X.shape
    return batch, (seqlen + _STEPS - 1) // _STEPS, nheads, B.shape[-1], headdim


def _unflattened(checkpoints, X, dt, A, B, *rest):
    return unflatten(checkpoints, _checkpoint_shape(X, B))


def _allocate(X, B, num_states, save):
    """Return empty y, final_states and checkpoints; the latter has no element unless saved."""
    acc = acc_dtype(X)
    saved = flat_size(_checkpoint_shape(X, B)) if save else 0
    return (
        torch.empty_like(X),
        X.new_empty((num_states, *X.shape[2:], B.shape[-1]), dtype=acc),
        X.new_empty(saved, dtype=acc),
    )


def _forward(*args):
    *inputs, dt_low, dt_high, softplus, per_sequence, num_states, save = args
    y, final_states, checkpoints = _allocate(inputs[0], inputs[3], num_states, save)
    ssd_chunk_scan_fwd(
        *inputs,
        y=y,
        final_states=final_states,
        checkpoints=_unflattened(checkpoints, *inputs) if save else None,
        dt_low=unbounded(dt_low),
        dt_high=unbounded(dt_high),
        softplus=softplus,
        state_per_sequence=per_sequence,
        num_threads=num_threads(),
        stream=stream(inputs[0]),
        workspace=workspace(
            inputs[0], ssd_chunk_scan_fwd_workspace, inputs[0], inputs[3], inputs[4]
        ),
    )
    return y, final_states, checkpoints


def _forward_fake(*args):
    return _allocate(args[0], args[3], *args[14:])


def _allocate_gradients(*inputs):
    """Return one empty gradient per differentiable input; no element where there is no input."""
    return tuple(inputs[0].new_empty(0) if t is None else torch.empty_like(t) for t in inputs[:9])


def _backward_kernel(*args):
    *inputs, checkpoints, dy, dfinal_states, dt_low, dt_high, softplus, per_sequence = args
    X, _, _, B, C, D, _, dt_bias, _, seq_idx = inputs
    gradients = _allocate_gradients(*inputs)
    given = [g if t is not None else None for g, t in zip(gradients, inputs[:-1], strict=True)]
    dX, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states = given
    ssd_chunk_scan_bwd(
        *inputs,
        checkpoints=None if X.is_cuda else _unflattened(checkpoints, *inputs),
        dy=dy,
        dfinal_states=dfinal_states,
        dX=dX,
        ddt=ddt,
        dA=dA,
        dB=dB,
        dC=dC,
        dD=dD,
        dz=dz,
        ddt_bias=ddt_bias,
        dinitial_states=dinitial_states,
        dt_low=unbounded(dt_low),
        dt_high=unbounded(dt_high),
        softplus=softplus,
        state_per_sequence=per_sequence,
        num_threads=num_threads(),
        stream=stream(X),
        workspace=workspace(X, ssd_chunk_scan_bwd_workspace, X, B, C, D, dt_bias, seq_idx),
    )
    return gradients


def _backward_fake(*args):
    return _allocate_gradients(*args[:10])


_fwd = define(
    f"ssd_chunk_scan_fwd({_INPUTS}, {_OPTIONS}, SymInt num_states, bool save) "
    "-> (Tensor y, Tensor final_states, Tensor checkpoints)",
    _forward,
    _forward_fake,
)
_bwd = define(
    f"ssd_chunk_scan_bwd({_INPUTS}, Tensor checkpoints, Tensor dy, Tensor? dfinal_states, "
    f"{_OPTIONS}) -> (Tensor dX, Tensor ddt, Tensor dA, Tensor dB, Tensor dC, Tensor dD, "
    "Tensor dz, Tensor ddt_bias, Tensor dinitial_states)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:10], inputs[10:14]
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_states, _):
    *inputs, checkpoints = ctx.saved_tensors
    if dy is None and dfinal_states is None:
        return (None,) * 16
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    gradients = _bwd(*inputs, checkpoints, dy, dfinal_states, *ctx.options)
    given = [g if t is not None else None for g, t in zip(gradients, inputs[:-1], strict=True)]
    return (*given, *(None,) * 7)


differentiate("ssd_chunk_scan_fwd", _setup_context, _backward)
refuse_second_gradient("ssd_chunk_scan_bwd")


@refuse_as(check.ssd_chunk_scan)
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
    """Run the state-space dual scan on compiled kernels; contract: ``ssm.ops.python.reference``.

    The kernels cut the sequence as it suits them: ``chunk_size`` is checked and not used.
    """
    inputs = (X, dt, A, B, C, D, z, dt_bias, initial_states)
    if X.ndim != 4 or not isinstance(B, torch.Tensor) or B.ndim != 4:
        # Shapes are read below, before the kernels check them: this raises.
        check.ssd_chunk_scan(
            X, dt, A, B, C, chunk_size, D, z, seq_meta, initial_states, dt_bias, dt_limit
        )
    check.check_int("ssd_chunk_scan", "chunk_size", chunk_size, 1)
    check.check_limit("ssd_chunk_scan", dt_limit)
    seq_idx, per_sequence, num_states = None, False, X.shape[0]
    if seq_meta is not None:
        num_states = check.check_seq_meta("ssd_chunk_scan", seq_meta, num_states)
        seq_idx = seq_meta.positions(X.shape[0], X.shape[1], X.device)
        per_sequence = seq_meta.state_per_sequence
    save = wants_gradient(*inputs)
    if X.is_cuda and (B.shape[-1] > _GPU_STATES or not _has_room(X, B.shape[-1], save)):
        # No room in registers for so many states, or in shared memory.
        return reference.ssd_chunk_scan(
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
    # On a GPU the backward finds the states again: it needs none saved.
    save = save and not X.is_cuda
    call = _forward if is_eager(*inputs) else _fwd
    low, high = (finite(float(bound)) for bound in dt_limit)
    y, final_states, _ = call(
        *inputs, seq_idx, low, high, bool(softplus), per_sequence, num_states, save
    )
    return (y, final_states) if return_final_states else y
