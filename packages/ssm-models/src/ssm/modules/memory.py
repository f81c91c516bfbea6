"""What a layer with a state does with it, whatever the layer: find it, check it, replace it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn

from ssm.seq_meta import SeqMeta
from ssm.state import LayerState, State


def key_of(layer: nn.Module) -> int:
    """Return the key of a layer in ``key_value_memory_dict``: its layer_idx, or 0 if it is alone.

    Args:
        layer: module with ``layer_idx``.

    Returns:
        The key.
    """
    return 0 if layer.layer_idx is None else layer.layer_idx


def memory_of(
    layer: nn.Module, inference_params, state: State | None, rows: int
) -> dict[int, LayerState] | None:
    """Return the dict that holds the state of a layer, with an entry for it.

    An absent entry is allocated. In the protocol of mamba_ssm offset 0 is a start from nothing: the
    entry is zeroed, in place where no graph remembers it.

    Args:
        layer: module with ``layer_idx``, ``state_shapes`` and ``allocate_inference_cache``.
        inference_params: state in the protocol of mamba_ssm, or None.
        state: state that is continued, or None.
        rows: rows that this call needs.

    Returns:
        The dict, to be read and replaced at ``key_of(layer)``; None if there is no state.

    Raises:
        ValueError: both are given, the layer has no index, or the entry is that of another batch or
            layer. Nothing is changed then.
        TypeError: state is no State.
    """
    check_memory(layer, inference_params, state, rows)
    source = inference_params if state is None else state
    if source is None:
        return None
    memory, key = source.key_value_memory_dict, key_of(layer)
    if key not in memory:
        memory[key] = layer.allocate_inference_cache(rows, getattr(source, "max_seqlen", None))
    elif state is None and inference_params.seqlen_offset == 0:
        states = memory[key]
        fresh = torch.Tensor.zero_ if is_writable(states) else torch.zeros_like
        memory[key] = tuple(fresh(tensor) for tensor in states)
    return memory


def check_memory(layer: nn.Module, inference_params, state: State | None, rows: int) -> None:
    """Refuse what a call cannot continue from; nothing is changed.

    A model asks this of all its layers before the first of them writes.

    Args:
        layer: module with ``layer_idx`` and ``state_shapes``.
        inference_params: state in the protocol of mamba_ssm, or None.
        state: state that is continued, or None.
        rows: rows that this call needs.

    Raises:
        ValueError: both are given, the layer has no index, or its entry is that of another batch or
            layer.
        TypeError: state is no State, or inference_params are none.
    """
    owner, key = type(layer).__name__, key_of(layer)
    _check_source(owner, inference_params, state)
    source = inference_params if state is None else state
    if source is None:
        return
    if layer.layer_idx is None and state is None:
        raise ValueError(f"{owner}: layer_idx must be set for inference_params, got None")
    states = source.key_value_memory_dict.get(key)
    if states is None:
        return
    held = states[0].shape[0]
    if held != rows:
        name = "state" if inference_params is None else "inference_params"
        raise ValueError(f"{owner}: {name} must hold {rows} rows, got {held}")
    check_shapes(layer, states, rows)


def _check_source(owner: str, inference_params, state: State | None) -> None:
    if inference_params is not None and state is not None:
        raise ValueError(f"{owner}: state must not be given beside inference_params")
    if state is not None and not isinstance(state, State):
        raise TypeError(f"{owner}: state must be a State, got {type(state).__name__}")
    if inference_params is not None and not hasattr(inference_params, "key_value_memory_dict"):
        got = type(inference_params).__name__
        raise TypeError(f"{owner}: inference_params must have a key_value_memory_dict, got {got}")


def check_model_memory(
    owner: str, mixers: Iterable[nn.Module], inference_params, state: State | None, rows: int
) -> None:
    """Refuse the state of another model or batch before the first layer writes into it.

    Args:
        owner: class name for messages.
        mixers: layers of the model, in order.
        inference_params: state in the protocol of mamba_ssm, or None.
        state: state that is continued, or None. It holds no layer yet, or exactly those given.
        rows: rows that this call needs.

    Raises:
        ValueError: a layer is missing or left over, or its entry does not fit.
        TypeError: state is no State.
    """
    mixers = list(mixers)
    _check_source(owner, inference_params, state)
    for mixer in mixers:
        check_memory(mixer, inference_params, state, rows)
    if state is not None and not mixers and state.max_batch_size != rows:
        raise ValueError(f"{owner}: state must hold {rows} rows, got {state.max_batch_size}")
    if state is not None and state.key_value_memory_dict:
        held, wanted = sorted(state.key_value_memory_dict), sorted(map(key_of, mixers))
        if held != wanted:
            raise ValueError(f"{owner}: state must hold the layers {wanted}, got {held}")


def check_shapes(layer: nn.Module, states: LayerState, rows: int) -> None:
    """Refuse the states of another layer before anything is written into them.

    Args:
        layer: module whose ``state_shapes(rows)`` gives the shape of every state, None in it
            standing for any size.
        states: tensors. One with a single axis counts tokens and holds integers, the others are
            floating point.
        rows: rows that a call needs.

    Raises:
        ValueError: a shape, a kind of dtype or a device differs.
    """
    shapes = [tuple(state.shape) for state in states]
    wanted = layer.state_shapes(rows)
    fits = len(shapes) == len(wanted) and all(
        len(shape) == len(want)
        # `w in (None, n)` is False to torch.compile for a size n that it does not know.
        and all(w is None or w == n for n, w in zip(shape, want, strict=True))
        for shape, want in zip(shapes, wanted, strict=True)
    )
    owner = type(layer).__name__
    if not fits:
        text = ", ".join(str(want).replace("None", "*") for want in wanted)
        raise ValueError(
            f"{owner}: state must have shapes {text}, got {', '.join(map(str, shapes))}"
        )
    # A quantised layer may have no parameter: its states need only be together then.
    device = next(chain(layer.parameters(), states)).device  # torch 2.8 compiles no default of next
    for state in states:
        if state.is_floating_point() != (state.dim() > 1) or state.is_complex():
            kind = "a floating point" if state.dim() > 1 else "an integer"
            name = str(state.dtype).removeprefix("torch.")
            raise ValueError(f"{owner}: state must have {kind} dtype, got {name}")
        if state.device != device:
            raise ValueError(f"{owner}: state must be on {device}, got {state.device}")


def is_writable(states: tuple[Tensor, ...]) -> bool:
    """Say whether states may be changed in place: not while autograd follows or remembers them.

    Args:
        states: tensors of any shape.

    Returns:
        True without gradients, if no state is part of a graph.
    """
    return not torch.is_grad_enabled() and not any(state.requires_grad for state in states)


def replaced(states: LayerState, new_states: LayerState) -> LayerState:
    """Put new values in the place of a layer's states, dtypes kept.

    Args:
        states: tensors before the call.
        new_states: tensors of the same shapes, any dtype.

    Returns:
        The tensors given, overwritten, where they may be; else new tensors that gradients flow
        through.
    """
    if not is_writable(states):
        return tuple(new.to(old.dtype) for old, new in zip(states, new_states, strict=True))
    for old, new in zip(states, new_states, strict=True):
        old.copy_(new)
    return states


def step_in_place(
    mix: Callable[[Tensor, LayerState], tuple[Tensor, LayerState]],
    hidden_states: Tensor,
    states: LayerState,
) -> Tensor:
    """Run one step whose states must end up in the tensors given, also with gradients enabled.

    Args:
        mix: (hidden_states, states) -> (output, states after it), which writes into writable
            states.
        hidden_states: (B, 1, D), handed to it.
        states: changed in place.

    Returns:
        The output.
    """
    if is_writable(states):
        return mix(hidden_states, states)[0]
    # Autograd remembers the states that go in, so those given may not be among them.
    y, new_states = mix(hidden_states, tuple(state.clone() for state in states))
    with torch.no_grad():
        for state, new in zip(states, new_states, strict=True):
            state.copy_(new)
    return y


def can_step(seqlen: int, states: LayerState | None, seq_meta: SeqMeta | None) -> bool:
    """Say whether the operators for one token, which write into the states, can serve a call.

    Args:
        seqlen: L.
        states: states of the layer, or None.
        seq_meta: packing and padding.

    Returns:
        True for one token per state row without gradients.
    """
    if seqlen != 1 or states is None or not is_writable(states):
        return False
    return seq_meta is None or not seq_meta.state_per_sequence


def stepped_rows(keep: Tensor | None) -> Tensor | None:
    """Return the state row of each batch row, for ``state_indices`` of the step operators.

    Args:
        keep: (B, 1) bool, False skips the row; None skips none.

    Returns:
        (B,) int32, -1 where skipped; None where nothing is.
    """
    if keep is None:
        return None
    row = torch.arange(keep.shape[0], device=keep.device, dtype=torch.int32)
    return torch.where(keep[:, 0], row, -1)


def oldest_input(
    conv_state: Tensor, conv_inputs: Tensor, seq_meta: SeqMeta | None, context_group=None
) -> Tensor:
    """Return the input W steps back: the one state column that no later output reads.

    It is kept equal to that of single steps where that costs nothing.

    Args:
        conv_state: (S, D, W), state before this call.
        conv_inputs: (B, D, L), inputs of this call.
        seq_meta: packing and padding, behind which the column is 0.
        context_group: ranks that share the inputs, behind which it is 0 too.

    Returns:
        (S, D, 1).
    """
    width, seqlen = conv_state.shape[-1], conv_inputs.shape[-1]
    if seq_meta is not None or context_group is not None:
        return torch.zeros_like(conv_state[..., :1])
    if seqlen >= width:
        return conv_inputs[..., seqlen - width : seqlen - width + 1]
    return conv_state[..., seqlen : seqlen + 1]
