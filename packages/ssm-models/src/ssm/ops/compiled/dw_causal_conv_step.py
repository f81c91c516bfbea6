"""The step of the causal convolution between torch and ``ssm_kernels``."""

import torch
from ssm_kernels import dw_causal_conv_step_fwd

from ssm.ops.compiled.dw_causal_conv import is_silu
from ssm.ops.compiled.library import define, is_eager, may_update, num_threads, refuse_as, stream
from ssm.ops.python import check, reference


def _forward(x, conv_state, weight, bias, cache_seqlens, state_indices, silu):
    y = torch.empty_like(x)
    dw_causal_conv_step_fwd(
        x,
        conv_state,
        weight,
        bias,
        cache_seqlens,
        state_indices,
        y=y,
        silu=silu,
        num_threads=num_threads(),
        stream=stream(x),
    )
    # The kernel wrote behind torch's back; a graph that saved the state must notice.
    torch.autograd.graph.increment_version(conv_state)
    return y


def _forward_fake(x, conv_state, weight, bias, cache_seqlens, state_indices, silu):
    return torch.empty_like(x)


_fwd = define(
    "dw_causal_conv_step_fwd(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
    "Tensor? cache_seqlens, Tensor? state_indices, bool silu) -> Tensor",
    _forward,
    _forward_fake,
)


@refuse_as(check.dw_causal_conv_step)
def dw_causal_conv_step(
    x, conv_state, weight, bias=None, activation="silu", *, cache_seqlens=None, state_indices=None
):
    """Run the step on compiled kernels; contract: ``ssm.ops.python.reference``."""
    silu = is_silu("dw_causal_conv_step", activation)
    if is_eager(x, conv_state, weight, bias, cache_seqlens, state_indices):
        return _forward(x, conv_state, weight, bias, cache_seqlens, state_indices, silu)
    inputs = (x, conv_state, weight, bias)
    if not may_update(conv_state, x, weight, bias):
        # A step has no backward of its own; decoding runs without gradients.
        return reference.dw_causal_conv_step(
            *inputs, activation, cache_seqlens=cache_seqlens, state_indices=state_indices
        )
    return _fwd(*inputs, cache_seqlens, state_indices, silu)
