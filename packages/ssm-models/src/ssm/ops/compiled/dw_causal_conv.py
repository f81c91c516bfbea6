"""The causal convolution between torch and ``ssm_kernels``: allocation, gradients, shapes."""

import torch
from ssm_kernels import dw_causal_conv_bwd, dw_causal_conv_bwd_workspace, dw_causal_conv_fwd

from ssm.ops.compiled.library import (
    define,
    differentiate,
    is_eager,
    num_threads,
    refuse_as,
    refuse_second_gradient,
    stream,
    workspace,
)
from ssm.ops.python import check

_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx"


def is_silu(op: str, activation: object) -> bool:
    """Return whether an activation is SiLU; otherwise it is the identity.

    Args:
        op: operator, the first word of the sentence.
        activation: "silu" | "swish" | "identity" | None.

    Raises:
        ValueError: anything else.
    """
    is_known = activation is None or activation in ("silu", "swish", "identity")
    rule = "be 'silu', 'swish', 'identity' or None"
    check.check_value(op, "activation", is_known, rule, repr(activation))
    return activation in ("silu", "swish")


def _allocate(x, weight, bias, initial_state, seq_idx, num_states, with_state):
    """Return empty y and final_state; the latter has no element unless it is asked for."""
    state = (num_states, x.shape[1], weight.shape[-1] - 1) if with_state else (0,)
    return torch.empty_like(x), x.new_empty(state)


def _forward(*args):
    *inputs, silu, per_sequence, num_states, with_state = args
    y, final_state = _allocate(*inputs, num_states, with_state)
    dw_causal_conv_fwd(
        *inputs,
        y=y,
        final_state=final_state if with_state else None,
        silu=silu,
        state_per_sequence=per_sequence,
        num_threads=num_threads(),
        stream=stream(inputs[0]),
    )
    return y, final_state


def _forward_fake(*args):
    *inputs, _, _, num_states, with_state = args
    return _allocate(*inputs, num_states, with_state)


def _allocate_gradients(x, weight, bias, initial_state):
    """Return one empty gradient per differentiable input; no element where there is no input."""
    given = (x, weight, bias, initial_state)
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in given)


def _backward_kernel(*args):
    *inputs, dy, dfinal_state, silu, per_sequence = args
    gradients = _allocate_gradients(*inputs[:4])
    given = [g if t is not None else None for g, t in zip(gradients, inputs[:4], strict=True)]
    dx, dweight, dbias, dinitial_state = given
    dw_causal_conv_bwd(
        *inputs,
        dy=dy,
        dfinal_state=dfinal_state,
        dx=dx,
        dweight=dweight,
        dbias=dbias,
        dinitial_state=dinitial_state,
        silu=silu,
        state_per_sequence=per_sequence,
        num_threads=num_threads(),
        stream=stream(inputs[0]),
        workspace=workspace(inputs[0], dw_causal_conv_bwd_workspace, *inputs[:2], dy, dx),
    )
    return gradients


def _backward_fake(*args):
    return _allocate_gradients(*args[:4])


_fwd = define(
    f"dw_causal_conv_fwd({_INPUTS}, bool silu, bool state_per_sequence, SymInt num_states, "
    "bool with_state) -> (Tensor y, Tensor final_state)",
    _forward,
    _forward_fake,
)
_bwd = define(
    f"dw_causal_conv_bwd({_INPUTS}, Tensor dy, Tensor? dfinal_state, bool silu, "
    "bool state_per_sequence) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu, ctx.per_sequence, _, with_state = inputs
    ctx.save_for_backward(*tensors)
    if not with_state:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal_state):
    inputs = ctx.saved_tensors
    if dy is None and dfinal_state is None:
        return (None,) * 9
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    gradients = _bwd(*inputs, dy, dfinal_state, ctx.silu, ctx.per_sequence)
    given = [g if t is not None else None for g, t in zip(gradients, inputs[:4], strict=True)]
    return (*given, None, None, None, None, None)


differentiate("dw_causal_conv_fwd", _setup_context, _backward)
refuse_second_gradient("dw_causal_conv_bwd")


@refuse_as(check.dw_causal_conv)
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
    """Run the causal convolution on compiled kernels; contract: ``ssm.ops.python.reference``."""
    silu = is_silu("dw_causal_conv", activation)
    if x.ndim != 3 or not isinstance(weight, torch.Tensor) or weight.ndim < 2:
        # Shapes are read below, before the kernels check them: this raises.
        check.dw_causal_conv(x, weight, bias, activation, initial_state, seq_meta)
    seq_idx, per_sequence, num_states = None, False, x.shape[0]
    if seq_meta is not None:
        num_states = check.check_seq_meta("dw_causal_conv", seq_meta, num_states)
        seq_idx = seq_meta.positions(x.shape[0], x.shape[2], x.device)
        per_sequence = seq_meta.state_per_sequence
    inputs = (x, weight, bias, initial_state)
    call = _forward if is_eager(*inputs) else _fwd
    y, final_state = call(
        *inputs, seq_idx, silu, per_sequence, num_states, bool(return_final_state)
    )
    return (y, final_state) if return_final_state else y
