"""The stages of the state-space dual scan between torch and ``ssm_kernels``: allocation, shapes.

Kernels give no gradient here. Where one is asked for, the reference serves: what trains calls
``ssd_chunk_scan``, and what asks for gradients of the parts gets the right ones, slowly.
"""

import math

import ssm_kernels
import torch

from ssm.ops.compiled.library import define, is_eager, refuse_as
from ssm.ops.python import check, reference
from ssm.ops.python.arithmetic import acc_dtype


def _threads() -> dict:
    return {"num_threads": torch.get_num_threads()}


def _sizes(tensor, *axes):
    """Return some sizes of a tensor; where it has too few axes, or is none, it is refused later."""
    shape = getattr(tensor, "shape", ())
    return [shape[a] for a in axes if a < len(shape)]


def _served_by_reference(*inputs) -> bool:
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in inputs)


# Step sizes and decays ----------------------------------------------------------------------------


def _cumsum_fake(dt, A, dt_bias, seq_idx, chunk_size, softplus, low, high):
    nchunks = -(-dt.shape[1] // chunk_size)
    shape = (dt.shape[0], dt.shape[2], nchunks, chunk_size)
    return tuple(dt.new_empty(shape, dtype=acc_dtype(dt)) for _ in range(2))


def _cumsum(dt, A, dt_bias, seq_idx, chunk_size, softplus, low, high):
    step, decay = _cumsum_fake(dt, A, dt_bias, seq_idx, chunk_size, softplus, low, high)
    ssm_kernels.ssd_chunk_cumsum_fwd(
        dt,
        A,
        dt_bias,
        seq_idx,
        dt_out=step,
        dA_cumsum=decay,
        softplus=softplus,
        dt_limit=(low, high),
        **_threads(),
    )
    return step, decay


_cumsum_op = define(
    "ssd_chunk_cumsum(Tensor dt, Tensor A, Tensor? dt_bias, Tensor? seq_idx, SymInt chunk_size, "
    "bool softplus, float low, float high) -> (Tensor dt_out, Tensor dA_cumsum)",
    _cumsum,
    _cumsum_fake,
)


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
    if _served_by_reference(*inputs):
        return reference.ssd_chunk_cumsum(
            dt,
            A,
            chunk_size,
            dt_bias=dt_bias,
            softplus=softplus,
            dt_limit=dt_limit,
            seq_idx=seq_idx,
        )
    # What the outputs are made from, and what the kernel does not see as it was given.
    check.check_tensor("ssd_chunk_cumsum", "dt", dt, {"B, L, H": ("B", "L", "H")})
    check.check_int("ssd_chunk_cumsum", "chunk_size", chunk_size, 1)
    check.check_limit("ssd_chunk_cumsum", dt_limit)
    call = _cumsum if is_eager(*inputs, seq_idx) else _cumsum_op
    return call(dt, A, dt_bias, seq_idx, chunk_size, bool(softplus), *map(float, dt_limit))


# What a chunk adds to the state -------------------------------------------------------------------


def _state_fake(x, B, dt, dA_cumsum, seq_idx):
    shape = (*_sizes(x, 0), *_sizes(dt, 2), *_sizes(x, 2, 3), *_sizes(B, 3))
    return x.new_empty(shape, dtype=acc_dtype(x))


def _state(x, B, dt, dA_cumsum, seq_idx):
    states = _state_fake(x, B, dt, dA_cumsum, seq_idx)
    ssm_kernels.ssd_chunk_state_fwd(x, B, dt, dA_cumsum, seq_idx, states=states, **_threads())
    return states


_state_op = define(
    "ssd_chunk_state(Tensor x, Tensor B, Tensor dt, Tensor dA_cumsum, Tensor? seq_idx) "
    "-> Tensor states",
    _state,
    _state_fake,
)


@refuse_as(check.ssd_chunk_state)
def ssd_chunk_state(x, B, dt, dA_cumsum, *, seq_idx=None):
    """Run stage 2 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    inputs = (x, B, dt, dA_cumsum)
    if _served_by_reference(*inputs):
        return reference.ssd_chunk_state(*inputs, seq_idx=seq_idx)
    return (_state if is_eager(*inputs, seq_idx) else _state_op)(*inputs, seq_idx)


# From chunk to chunk ------------------------------------------------------------------------------


def _passing_fake(states, dA_cumsum, initial_states, seq_idx):
    final = (*_sizes(states, 0), *states.shape[2:])
    acc = acc_dtype(states)
    return states.new_empty(states.shape, dtype=acc), states.new_empty(final, dtype=acc)


def _passing(states, dA_cumsum, initial_states, seq_idx):
    states_in, final_states = _passing_fake(states, dA_cumsum, initial_states, seq_idx)
    ssm_kernels.ssd_state_passing_fwd(
        states,
        dA_cumsum,
        initial_states,
        seq_idx,
        states_in=states_in,
        final_states=final_states,
        **_threads(),
    )
    return states_in, final_states


_passing_op = define(
    "ssd_state_passing(Tensor states, Tensor dA_cumsum, Tensor? initial_states, Tensor? seq_idx) "
    "-> (Tensor states_in, Tensor final_states)",
    _passing,
    _passing_fake,
)


@refuse_as(check.ssd_state_passing)
def ssd_state_passing(states, dA_cumsum, *, initial_states=None, seq_idx=None):
    """Run stage 3 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    inputs = (states, dA_cumsum, initial_states)
    if _served_by_reference(*inputs):
        return reference.ssd_state_passing(
            states, dA_cumsum, initial_states=initial_states, seq_idx=seq_idx
        )
    return (_passing if is_eager(*inputs, seq_idx) else _passing_op)(*inputs, seq_idx)


# C B^T --------------------------------------------------------------------------------------------


def _bmm_fake(C, B, chunk_size):
    nchunks = -(-C.shape[1] // chunk_size)
    groups = math.lcm(*_sizes(C, 2), *_sizes(B, 2))
    shape = (C.shape[0], nchunks, groups, chunk_size, chunk_size)
    return C.new_empty(shape, dtype=acc_dtype(C))


def _bmm(C, B, chunk_size):
    products = _bmm_fake(C, B, chunk_size)
    ssm_kernels.ssd_bmm_chunk_fwd(C, B, CB=products, **_threads())
    return products


_bmm_op = define(
    "ssd_bmm_chunk(Tensor C, Tensor B, SymInt chunk_size) -> Tensor CB", _bmm, _bmm_fake
)


@refuse_as(check.ssd_bmm_chunk)
def ssd_bmm_chunk(C, B, chunk_size):
    """Run stage 4 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    if _served_by_reference(C, B):
        return reference.ssd_bmm_chunk(C, B, chunk_size)
    check.ssd_bmm_chunk(C, B, chunk_size)  # the output is made from all of them
    return (_bmm if is_eager(C, B) else _bmm_op)(C, B, chunk_size)


# The outputs --------------------------------------------------------------------------------------


def _output_fake(CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx):
    return torch.empty_like(x)


def _output(CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx):
    y = torch.empty_like(x)
    ssm_kernels.ssd_chunk_output_fwd(
        CB, x, dt, dA_cumsum, C, states_in, D, z, seq_idx, y=y, **_threads()
    )
    return y


_output_op = define(
    "ssd_chunk_output(Tensor CB, Tensor x, Tensor dt, Tensor dA_cumsum, Tensor C, "
    "Tensor states_in, Tensor? D, Tensor? z, Tensor? seq_idx) -> Tensor y",
    _output,
    _output_fake,
)


@refuse_as(check.ssd_chunk_output)
def ssd_chunk_output(CB, x, dt, dA_cumsum, C, states_in, *, D=None, z=None, seq_idx=None):
    """Run stage 5 on compiled kernels; contract: ``ssm.ops.python.reference``."""
    inputs = (CB, x, dt, dA_cumsum, C, states_in, D, z)
    if _served_by_reference(*inputs):
        return reference.ssd_chunk_output(*inputs[:6], D=D, z=z, seq_idx=seq_idx)
    return (_output if is_eager(*inputs, seq_idx) else _output_op)(*inputs, seq_idx)
