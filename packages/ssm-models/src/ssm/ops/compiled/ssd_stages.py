"""The stages of the state-space dual scan between torch and ``ssm_kernels``.

Allocation, gradients, shapes; per stage: a forward, a backward, and what calls them. Kept for a
backward are the inputs; for the one that passes states, what it gave in their place.
"""

import math

import torch
from ssm_kernels import (
    ssd_bmm_chunk_bwd,
    ssd_bmm_chunk_fwd,
    ssd_chunk_cumsum_bwd,
    ssd_chunk_cumsum_bwd_workspace,
    ssd_chunk_cumsum_fwd,
    ssd_chunk_output_bwd,
    ssd_chunk_output_bwd_workspace,
    ssd_chunk_output_fwd,
    ssd_chunk_state_bwd,
    ssd_chunk_state_fwd,
    ssd_state_passing_bwd,
    ssd_state_passing_bwd_workspace,
    ssd_state_passing_fwd,
)

from ssm.ops.compiled.library import (
    define,
    differentiate,
    finite,
    is_eager,
    num_threads,
    refuse_as,
    refuse_second_gradient,
    stream,
    unbounded,
    workspace,
)
from ssm.ops.python import check
from ssm.ops.python.arithmetic import acc_dtype


def _sizes(tensor, *axes):
    """Return some sizes of a tensor; where it has too few axes, or is none, it is refused later."""
    shape = getattr(tensor, "shape", ())
    return [shape[a] for a in axes if a < len(shape)]


def _like(main, *tensors):
    """Return one empty gradient per tensor; no element where there is no tensor."""
    return tuple(main.new_empty(0) if t is None else torch.empty_like(t) for t in tensors)


def _given(gradients, tensors):
    """Return the gradients of the tensors that there are, None for the others."""
    return [None if t is None else g for g, t in zip(gradients, tensors, strict=True)]


# Step sizes and decays ----------------------------------------------------------------------------


def _cumsum_fake(dt, A, dt_bias, seq_idx, chunk_size, softplus, low, high):
    nchunks = -(-dt.shape[1] // chunk_size)
    shape = (dt.shape[0], dt.shape[2], nchunks, chunk_size)
    return tuple(dt.new_empty(shape, dtype=acc_dtype(dt)) for _ in range(2))


def _cumsum(dt, A, dt_bias, seq_idx, chunk_size, softplus, low, high):
    step, decay = _cumsum_fake(dt, A, dt_bias, seq_idx, chunk_size, softplus, low, high)
    ssd_chunk_cumsum_fwd(
        dt,
        A,
        dt_bias,
        seq_idx,
        dt_out=step,
        dA_cumsum=decay,
        softplus=softplus,
        dt_limit=(unbounded(low), unbounded(high)),
        num_threads=num_threads(),
        stream=stream(dt),
    )
    return step, decay


def _cumsum_bwd_fake(dt, A, dt_bias, *_):
    return _like(dt, dt, A, dt_bias)


def _cumsum_bwd(dt, A, dt_bias, seq_idx, ddt_out, ddA_cumsum, softplus, low, high):
    gradients = _like(dt, dt, A, dt_bias)
    ddt, dA, ddt_bias = _given(gradients, (dt, A, dt_bias))
    ssd_chunk_cumsum_bwd(
        dt,
        A,
        dt_bias,
        seq_idx,
        ddt_out=ddt_out,
        ddA_cumsum=ddA_cumsum,
        ddt=ddt,
        dA=dA,
        ddt_bias=ddt_bias,
        softplus=softplus,
        dt_limit=(unbounded(low), unbounded(high)),
        num_threads=num_threads(),
        stream=stream(dt),
        workspace=workspace(dt, ssd_chunk_cumsum_bwd_workspace, dt, ddt_out, ddA_cumsum),
    )
    return gradients


_cumsum_op = define(
    "ssd_chunk_cumsum_fwd(Tensor dt, Tensor A, Tensor? dt_bias, Tensor? seq_idx, "
    "SymInt chunk_size, bool softplus, float low, float high) "
    "-> (Tensor dt_out, Tensor dA_cumsum)",
    _cumsum,
    _cumsum_fake,
)
_cumsum_bwd_op = define(
    "ssd_chunk_cumsum_bwd(Tensor dt, Tensor A, Tensor? dt_bias, Tensor? seq_idx, "
    "Tensor? ddt_out, Tensor? ddA_cumsum, bool softplus, float low, float high) "
    "-> (Tensor ddt, Tensor dA, Tensor ddt_bias)",
    _cumsum_bwd,
    _cumsum_bwd_fake,
)


def _cumsum_context(ctx, inputs, output):
    *tensors, _, ctx.softplus, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _cumsum_backward(ctx, ddt_out, ddA_cumsum):
    if ddt_out is None and ddA_cumsum is None:
        return (None,) * 8
    dt, A, dt_bias, seq_idx = ctx.saved_tensors
    gradients = _cumsum_bwd_op(
        *(dt, A, dt_bias, seq_idx, ddt_out, ddA_cumsum), ctx.softplus, ctx.low, ctx.high
    )
    return (*_given(gradients, (dt, A, dt_bias)), *(None,) * 5)


differentiate("ssd_chunk_cumsum_fwd", _cumsum_context, _cumsum_backward)
refuse_second_gradient("ssd_chunk_cumsum_bwd")


@refuse_as(check.ssd_chunk_cumsum)
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
    """Run stage 1 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    inputs = (dt, A, dt_bias)
    # What the outputs are made from, and what the kernel does not see as it was given.
    check.check_tensor("ssd_chunk_cumsum", "dt", dt, {"B, L, H": ("B", "L", "H")})
    check.check_chunk_size("ssd_chunk_cumsum", chunk_size)
    check.check_limit("ssd_chunk_cumsum", dt_limit)
    call = _cumsum if is_eager(*inputs, seq_idx) else _cumsum_op
    low, high = (finite(float(bound)) for bound in dt_limit)
    return call(dt, A, dt_bias, seq_idx, chunk_size, bool(softplus), low, high)


# What a chunk adds to the state -------------------------------------------------------------------


def _state_fake(x, B, dt, dA_cumsum, seq_idx):
    shape = (*_sizes(x, 0), *_sizes(dt, 2), *_sizes(x, 2, 3), *_sizes(B, 3))
    return x.new_empty(shape, dtype=acc_dtype(x))


def _state(x, B, dt, dA_cumsum, seq_idx):
    states = _state_fake(x, B, dt, dA_cumsum, seq_idx)
    ssd_chunk_state_fwd(
        x, B, dt, dA_cumsum, seq_idx, states=states, num_threads=num_threads(), stream=stream(x)
    )
    return states


def _state_bwd_fake(x, B, dt, dA_cumsum, seq_idx, dstates):
    return _like(x, x, B, dt, dA_cumsum)


def _state_bwd(x, B, dt, dA_cumsum, seq_idx, dstates):
    gradients = _like(x, x, B, dt, dA_cumsum)
    dx, dB, ddt, ddA_cumsum = gradients
    ssd_chunk_state_bwd(
        x,
        B,
        dt,
        dA_cumsum,
        seq_idx,
        dstates=dstates,
        dx=dx,
        dB=dB,
        ddt=ddt,
        ddA_cumsum=ddA_cumsum,
        num_threads=num_threads(),
        stream=stream(x),
    )
    return gradients


_state_op = define(
    "ssd_chunk_state_fwd(Tensor x, Tensor B, Tensor dt, Tensor dA_cumsum, Tensor? seq_idx) "
    "-> Tensor states",
    _state,
    _state_fake,
)
_state_bwd_op = define(
    "ssd_chunk_state_bwd(Tensor x, Tensor B, Tensor dt, Tensor dA_cumsum, Tensor? seq_idx, "
    "Tensor dstates) -> (Tensor dx, Tensor dB, Tensor ddt, Tensor ddA_cumsum)",
    _state_bwd,
    _state_bwd_fake,
)


def _state_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _state_backward(ctx, dstates):
    return (*_state_bwd_op(*ctx.saved_tensors, dstates), None)


differentiate("ssd_chunk_state_fwd", _state_context, _state_backward)
refuse_second_gradient("ssd_chunk_state_bwd")


@refuse_as(check.ssd_chunk_state)
def ssd_chunk_state(x, B, dt, dA_cumsum, *, seq_idx=None):
    """Run stage 2 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    inputs = (x, B, dt, dA_cumsum)
    return (_state if is_eager(*inputs, seq_idx) else _state_op)(*inputs, seq_idx)


# From chunk to chunk ------------------------------------------------------------------------------


def _passing_fake(states, dA_cumsum, initial_states, seq_idx):
    final = (*_sizes(states, 0), *states.shape[2:])
    acc = acc_dtype(states)
    return states.new_empty(states.shape, dtype=acc), states.new_empty(final, dtype=acc)


def _passing(states, dA_cumsum, initial_states, seq_idx):
    states_in, final_states = _passing_fake(states, dA_cumsum, initial_states, seq_idx)
    ssd_state_passing_fwd(
        states,
        dA_cumsum,
        initial_states,
        seq_idx,
        states_in=states_in,
        final_states=final_states,
        num_threads=num_threads(),
        stream=stream(states),
    )
    return states_in, final_states


def _passing_bwd_fake(states_in, dA_cumsum, seq_idx, dstates_in, dfinal_states):
    shape = (*_sizes(states_in, 0), *states_in.shape[2:])
    return (
        states_in.new_empty(states_in.shape),
        torch.empty_like(dA_cumsum),
        states_in.new_empty(shape),
    )


def _passing_bwd(states_in, dA_cumsum, seq_idx, dstates_in, dfinal_states):
    gradients = _passing_bwd_fake(states_in, dA_cumsum, seq_idx, dstates_in, dfinal_states)
    dstates, ddA_cumsum, dinitial_states = gradients
    ssd_state_passing_bwd(
        states_in,
        dA_cumsum,
        seq_idx,
        dstates_in=dstates_in,
        dfinal_states=dfinal_states,
        dstates=dstates,
        ddA_cumsum=ddA_cumsum,
        dinitial_states=dinitial_states,
        num_threads=num_threads(),
        stream=stream(states_in),
        workspace=workspace(states_in, ssd_state_passing_bwd_workspace, states_in, dA_cumsum),
    )
    return gradients


_passing_op = define(
    "ssd_state_passing_fwd(Tensor states, Tensor dA_cumsum, Tensor? initial_states, "
    "Tensor? seq_idx) -> (Tensor states_in, Tensor final_states)",
    _passing,
    _passing_fake,
)
_passing_bwd_op = define(
    "ssd_state_passing_bwd(Tensor states_in, Tensor dA_cumsum, Tensor? seq_idx, "
    "Tensor? dstates_in, Tensor? dfinal_states) "
    "-> (Tensor dstates, Tensor ddA_cumsum, Tensor dinitial_states)",
    _passing_bwd,
    _passing_bwd_fake,
)


def _passing_context(ctx, inputs, output):
    states, dA_cumsum, initial_states, seq_idx = inputs
    ctx.save_for_backward(output[0], dA_cumsum, seq_idx)
    ctx.dtype = states.dtype
    ctx.initial_dtype = None if initial_states is None else initial_states.dtype
    ctx.set_materialize_grads(False)


def _passing_backward(ctx, dstates_in, dfinal_states):
    if dstates_in is None and dfinal_states is None:
        return (None,) * 4
    dstates, ddA_cumsum, dinitial_states = _passing_bwd_op(
        *ctx.saved_tensors, dstates_in, dfinal_states
    )
    initial = None if ctx.initial_dtype is None else dinitial_states.to(ctx.initial_dtype)
    return dstates.to(ctx.dtype), ddA_cumsum, initial, None


differentiate("ssd_state_passing_fwd", _passing_context, _passing_backward)
refuse_second_gradient("ssd_state_passing_bwd")


@refuse_as(check.ssd_state_passing)
def ssd_state_passing(states, dA_cumsum, *, initial_states=None, seq_idx=None):
    """Run stage 3 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    inputs = (states, dA_cumsum, initial_states)
    return (_passing if is_eager(*inputs, seq_idx) else _passing_op)(*inputs, seq_idx)


# C B^T --------------------------------------------------------------------------------------------


def _bmm_fake(C, B, chunk_size):
    nchunks = -(-C.shape[1] // chunk_size)
    groups = math.lcm(*_sizes(C, 2), *_sizes(B, 2))
    shape = (C.shape[0], nchunks, groups, chunk_size, chunk_size)
    return C.new_empty(shape, dtype=acc_dtype(C))


def _bmm(C, B, chunk_size):
    products = _bmm_fake(C, B, chunk_size)
    ssd_bmm_chunk_fwd(C, B, CB=products, num_threads=num_threads(), stream=stream(C))
    return products


def _bmm_bwd_fake(C, B, dCB):
    return _like(C, C, B)


def _bmm_bwd(C, B, dCB):
    dC, dB = _like(C, C, B)
    ssd_bmm_chunk_bwd(C, B, dCB=dCB, dC=dC, dB=dB, num_threads=num_threads(), stream=stream(C))
    return dC, dB


_bmm_op = define(
    "ssd_bmm_chunk_fwd(Tensor C, Tensor B, SymInt chunk_size) -> Tensor CB", _bmm, _bmm_fake
)
_bmm_bwd_op = define(
    "ssd_bmm_chunk_bwd(Tensor C, Tensor B, Tensor dCB) -> (Tensor dC, Tensor dB)",
    _bmm_bwd,
    _bmm_bwd_fake,
)


def _bmm_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _bmm_backward(ctx, dCB):
    return (*_bmm_bwd_op(*ctx.saved_tensors, dCB), None)


differentiate("ssd_bmm_chunk_fwd", _bmm_context, _bmm_backward)
refuse_second_gradient("ssd_bmm_chunk_bwd")


@refuse_as(check.ssd_bmm_chunk)
def ssd_bmm_chunk(C, B, chunk_size):
    """Run stage 4 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    check.ssd_bmm_chunk(C, B, chunk_size)  # the output is made from all of them
    return (_bmm if is_eager(C, B) else _bmm_op)(C, B, chunk_size)


# The outputs --------------------------------------------------------------------------------------


def _output_fake(CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx):
    return torch.empty_like(x)


def _output(CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx):
    y = torch.empty_like(x)
    ssd_chunk_output_fwd(
        CB,
        x,
        dt,
        dA_cumsum,
        C,
        states_in,
        D,
        z,
        seq_idx,
        y=y,
        num_threads=num_threads(),
        stream=stream(x),
    )
    return y


def _output_bwd_fake(*inputs):
    return _like(inputs[1], *inputs[:8])


def _output_bwd(*inputs):
    *tensors, seq_idx, dy = inputs
    CB, x, dt, _, C, _, D, z = tensors
    gradients = _like(tensors[1], *tensors)
    dCB, dx, ddt, ddA_cumsum, dC, dstates_in, dD, dz = _given(gradients, tensors)
    ssd_chunk_output_bwd(
        *tensors,
        seq_idx,
        dy=dy,
        dCB=dCB,
        dx=dx,
        ddt=ddt,
        ddA_cumsum=ddA_cumsum,
        dC=dC,
        dstates_in=dstates_in,
        dD=dD,
        dz=dz,
        num_threads=num_threads(),
        stream=stream(x),
        workspace=workspace(x, ssd_chunk_output_bwd_workspace, CB, x, dt, C, D, z),
    )
    return gradients


_OUTPUT_INPUTS = (
    "Tensor CB, Tensor x, Tensor dt, Tensor dA_cumsum, Tensor C, Tensor states_in, Tensor? D, "
    "Tensor? z, Tensor? seq_idx"
)
_output_op = define(
    f"ssd_chunk_output_fwd({_OUTPUT_INPUTS}) -> Tensor y",
    _output,
    _output_fake,
)
_output_bwd_op = define(
    f"ssd_chunk_output_bwd({_OUTPUT_INPUTS}, Tensor dy) -> (Tensor dCB, Tensor dx, Tensor ddt, "
    "Tensor ddA_cumsum, Tensor dC, Tensor dstates_in, Tensor dD, Tensor dz)",
    _output_bwd,
    _output_bwd_fake,
)


def _output_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _output_backward(ctx, dy):
    inputs = ctx.saved_tensors
    return (*_given(_output_bwd_op(*inputs, dy), inputs[:8]), None)


differentiate("ssd_chunk_output_fwd", _output_context, _output_backward)
refuse_second_gradient("ssd_chunk_output_bwd")


@refuse_as(check.ssd_chunk_output)
def ssd_chunk_output(CB, x, dt, dA_cumsum, C, states_in, *, D=None, z=None, seq_idx=None):
    """Run stage 5 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    inputs = (CB, x, dt, dA_cumsum, C, states_in, D, z)
    return (_output if is_eager(*inputs, seq_idx) else _output_op)(*inputs, seq_idx)
