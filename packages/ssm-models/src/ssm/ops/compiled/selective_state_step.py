"""The step between torch and ``ssm_kernels``: allocation, the update in place, shapes.

Kernels give no gradient here. Where one is asked for, the reference serves: decoding runs without
gradients, and what asks for them anyway gets the right ones, slowly.
"""

import torch
from ssm_kernels import selective_state_step_fwd

from ssm.ops.compiled.library import define, is_eager, may_update, num_threads, refuse_as, stream
from ssm.ops.python import check, reference


def _step(state, x, dt, A, B, C, D, z, dt_bias, state_indices, softplus):
    y = torch.empty_like(x)
    selective_state_step_fwd(
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
        num_threads=num_threads(),
        stream=stream(x),
    )
    # The kernel wrote behind torch's back; a graph that saved the state must notice.
    torch.autograd.graph.increment_version(state)
    return y


def _fake(state, x, *_):
    return torch.empty_like(x)


_op = define(
    "selective_state_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? state_indices, bool softplus) -> Tensor",
    _step,
    _fake,
)


@refuse_as(check.selective_state_step)
def selective_state_step(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, softplus=True, *, state_indices=None
):
    """Run the step on compiled kernels; contract: ``ssm.ops.python.reference``.

    With a gradient to compute, the reference serves instead.
    """
    if is_eager(state, x, dt, A, B, C, D, z, dt_bias, state_indices):
        return _step(state, x, dt, A, B, C, D, z, dt_bias, state_indices, bool(softplus))
    inputs = (state, x, dt, A, B, C, D, z, dt_bias)
    if not may_update(*inputs):
        return reference.selective_state_step(*inputs, softplus, state_indices=state_indices)
    return _op(*inputs, state_indices, bool(softplus))
