"""The functions of the ``causal_conv1d`` package, under its names and with its signatures."""

import torch

from ssm import ops
from ssm.ops.python.check import check_int, check_tensor
from ssm.seq_meta import SeqMeta
from ssm.utils.dispatch import use_backend

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "causal_conv1d_varlen_states_ref",
]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Convolve every channel with its own short causal filter, as ``causal_conv1d`` does.

    Any width, any strides, and ``seq_idx`` beside ``initial_states``, which enter the first
    sequence of each row.

    Args:
        x: (B, D, L), float64 | float32 | bfloat16 | float16.
        weight: (D, W).
        bias: (D,).
        seq_idx: (B, L), int32 | int64. Sequence of each step; -1 skips the step and gives 0.
        initial_states: (B, D, W - 1). The inputs before the first step.
        return_final_states: also return the last W - 1 inputs.
        final_states_out: (B, D, W - 1). Where to write them; read with ``return_final_states``
            only.
        activation: None, "silu" or "swish".

    Returns:
        out (B, D, L), dtype of x; with ``return_final_states`` also final_states (B, D, W - 1).

    Raises:
        ValueError: a shape, dtype or value breaks the contract of ``ssm.ops.dw_causal_conv``.

    Source:
        Interface of causal_conv1d 1.6; the operator is docs/ops/dw_causal_conv.md.
    """
    meta = None if seq_idx is None else SeqMeta(seq_idx=seq_idx)
    if not return_final_states:
        return ops.dw_causal_conv(
            x, weight, bias, activation, initial_state=initial_states, seq_meta=meta
        )
    out, final_states = ops.dw_causal_conv(
        x,
        weight,
        bias,
        activation,
        initial_state=initial_states,
        return_final_state=True,
        seq_meta=meta,
    )
    if final_states_out is not None:
        form = {"B, D, W - 1": tuple(final_states.shape)}
        check_tensor("causal_conv1d_fn", "final_states_out", final_states_out, form, x.device)
        final_states = final_states_out.copy_(final_states)
    return out, final_states


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
):
    """Advance the causal convolution by one token, or a few, updating its window in place.

    Args:
        x: (B, D) or (B, D, T), float64 | float32 | bfloat16 | float16.
        conv_state: (R, D, K), K at least W - 1. The last K inputs, updated in place.
        weight: (D, W).
        bias: (D,).
        activation: None, "silu" or "swish".
        cache_seqlens: (B,), int32. Tokens seen by each row; makes the window a circular buffer.
        conv_state_indices: (B,), integers. Row of the window of each batch row, negative to skip
            it. No row may be named twice.

    Returns:
        out, shape and dtype of x.

    Raises:
        ValueError: a shape, dtype or value breaks the contract of ``ssm.ops.dw_causal_conv_step``.

    Source:
        Interface of causal_conv1d 1.6; the operator is docs/ops/dw_causal_conv_step.md.
    """
    return ops.dw_causal_conv_step(
        x,
        conv_state,
        weight,
        bias,
        activation,
        cache_seqlens=_int32(cache_seqlens),
        state_indices=state_rows(conv_state_indices),
    )


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """Return the last inputs of each packed sequence, as windows to decode from.

    Args:
        x: (T, D), any dtype. The inputs of all sequences, one behind the other.
        cu_seqlens: (S + 1,), int32 | int64. Where each sequence begins and ends.
        state_len: inputs per window.

    Returns:
        states (S, D, state_len), dtype of x; 0 in front of sequences that are shorter.

    Raises:
        ValueError: a sequence ends behind the inputs.

    Source:
        Interface of causal_conv1d 1.6.
    """
    name = "causal_conv1d_varlen_states"
    check_tensor(name, "x", x, {"T, D": tuple("TD")}, dtypes=(getattr(x, "dtype", None),))
    SeqMeta(cu_seqlens=cu_seqlens)  # checks it
    if cu_seqlens.device != x.device:
        raise ValueError(f"{name}: cu_seqlens must be on {x.device}, got {cu_seqlens.device}")
    check_int(name, "state_len", state_len, 0)
    total, _ = x.shape
    ends = cu_seqlens[1:].long()
    if ends.numel() and int(ends[-1]) > total:
        raise ValueError(
            f"causal_conv1d_varlen_states: cu_seqlens must end at or before {total}, "
            f"got {int(ends[-1])}"
        )
    step = ends[:, None] + torch.arange(-state_len, 0, device=x.device)  # (S, state_len)
    inside = step >= cu_seqlens[:-1].long()[:, None]
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return padded[torch.where(inside, step, total)].transpose(1, 2)


@use_backend("python")
def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Run ``causal_conv1d_fn`` on the reference.

    Args:
        x: (B, D, L).
        weight: (D, W).
        bias: (D,).
        initial_states: (B, D, W - 1). The inputs before the first step.
        return_final_states: also return the last W - 1 inputs.
        final_states_out: (B, D, W - 1). Where to write them.
        activation: None, "silu" or "swish".

    Returns:
        out (B, D, L); with ``return_final_states`` also final_states (B, D, W - 1).

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of causal_conv1d 1.6.
    """
    return causal_conv1d_fn(
        x, weight, bias, None, initial_states, return_final_states, final_states_out, activation
    )


@use_backend("python")
def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """Run ``causal_conv1d_update`` on the reference.

    Args:
        x: (B, D) or (B, D, T).
        conv_state: (B, D, K), K at least W - 1. Updated in place.
        weight: (D, W).
        bias: (D,).
        activation: None, "silu" or "swish".
        cache_seqlens: (B,), int32. Tokens seen by each row; makes the window a circular buffer.

    Returns:
        out, shape and dtype of x.

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of causal_conv1d 1.6.
    """
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    """Run ``causal_conv1d_varlen_states``, which is plain torch.

    Args:
        x: (T, D), any dtype.
        cu_seqlens: (S + 1,), int32 | int64.
        state_len: inputs per window.

    Returns:
        states (S, D, state_len), dtype of x.

    Raises:
        ValueError: what the namesake refuses.

    Source:
        Interface of causal_conv1d 1.6.
    """
    return causal_conv1d_varlen_states(x, cu_seqlens, state_len)


def state_rows(indices):
    """Return rows as the operators take them, -1 for every negative one: upstream skips all."""
    if not isinstance(indices, torch.Tensor) or indices.dtype not in _INTEGERS:
        return indices
    return indices.long().clamp(-1, torch.iinfo(torch.int32).max).int()


def _int32(indices):
    """Return indices in the width that the kernels read; the upstream package takes any."""
    if isinstance(indices, torch.Tensor) and indices.dtype == torch.int64:
        return indices.int()
    return indices
