"""Decoding with CUDA graphs: one step of a model, captured once and replayed for every token.

A step of decoding is hundreds of small kernels, and launching them takes the processor longer than
running them takes the GPU. A graph launches all of them at once. It runs on fixed addresses, so the
state of a text moves into the tensors of the graph while it decodes, and back when it ends.

Sizes are fixed as well: in a graph, attention reads the whole room of its cache and leaves out what
is empty. So the room begins small and doubles when it is full, with a graph for each.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssm.modules.kv_cache import without_reading
from ssm.state import CACHE_AXES, LayerState, State
from ssm.utils import dispatch

Step = Callable[[], Tensor]


def record_cuda(step: Step, device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Capture a function in a CUDA graph.

    Args:
        step: reads and writes tensors that outlive the graph, and does not wait for the device.
        device: where they lie.

    Returns:
        A function that replays it on the current stream, and the tensor (of the graph's own memory)
        that each replay overwrites with the result.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), _capturing:
        # What is loaded or chosen at a first launch must not be so while a graph is captured.
        step()
        stream = _streams.setdefault(device.index, torch.cuda.Stream(device))
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = step()
    return graph.replay, result


# One stream per device for all captures: torch keeps working memory for every stream that
# multiplied matrices, and its own default is a stream of the device that came first.
_streams: dict[int, torch.cuda.Stream] = {}
_capturing = threading.Lock()

# Device type -> what captures a step there. Other devices decode without graphs.
RECORDERS: dict[str, Callable] = {"cuda": record_cuda}


# Tokens in the cache of an attention below which no smaller graph is worth capturing.
LEAST_ROOM = 256


class DecodingGraph:
    """One step of decoding, captured, and the tensors that it reads and writes.

    Args:
        model: as in ``generate``. The graph does not keep it alive.
        state: one like it will be decoded from; its values are not looked at.
        room: tokens that the caches of attentions take; None where there are none.
        record: entry of ``RECORDERS``.

    Raises:
        ValueError: the model does not step its state in place.
    """

    def __init__(self, model: nn.Module, state: State, room: int | None, record: Callable) -> None:
        self.room = room
        # What outlives this call may be no inference tensor, which nobody could write to later.
        with torch.inference_mode(False), torch.no_grad():
            self.layers = {
                layer: tuple(_zeros_like(tensor, room) for tensor in held)
                for layer, held in state.key_value_memory_dict.items()
            }
            device = _device_of(state)
            self._tokens = torch.zeros(len(state), 1, dtype=torch.int64, device=device)
            own = State(dict(self.layers), state.max_batch_size, room)

            def step() -> Tensor:
                with without_reading():
                    return model(self._tokens, state=own, num_last_tokens=1).logits[:, -1]

            with _without_cast_cache(device.type):
                self._replay, self._logits = record(step, device)
        if _addresses(own.key_value_memory_dict) != _addresses(self.layers):
            raise ValueError(
                "generate: cg must be False for a model that does not step its state in place, "
                "got True"
            )

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row, (B,) int64; return the logits (B, V), the caller's to keep."""
        self._tokens.copy_(tokens[:, None])
        self._replay()
        return self._logits.clone()


class Decoder:
    """The decoding steps of one call of ``generate``: replayed where that works, else run.

    Between two steps the State holds the tensors of the graph, so that whoever looks at it sees
    where the text stands; ``close`` gives it back its own. A graph serves one call at a time.

    Args:
        model: as in ``generate``.
        state: continued by every step.
        graphs: whether graphs are wanted.
    """

    def __init__(self, model, state: State, graphs: bool) -> None:
        self._model, self._state = model, state
        self._wanted = graphs
        self._graph: DecodingGraph | None = None
        self._key: tuple = ()
        self._own: dict[int, LayerState] = {}
        self._held = 0  # tokens in the longest row, or more

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row.

        Args:
            tokens: (B,) int64.

        Returns:
            (B, V), logits of the tokens after these.
        """
        if self._graph is not None and not (self._is_lent() and self._has_room()):
            self.close()  # the next one has more room, or starts from what the caller put in
        if self._graph is None and self._wanted:
            self._wanted = why_not(self._model, self._state) is None
        if not self._wanted:
            return self._model(tokens[:, None], state=self._state, num_last_tokens=1).logits[:, -1]
        if self._graph is None:
            self._lend()
        logits = self._graph.step(tokens)
        self._state.seqlen_offset += 1
        self._held += 1
        return logits

    @torch.no_grad()
    def close(self) -> None:
        """Give the state back its own tensors, with the values reached, and keep the graph."""
        if self._graph is None:
            return
        memory = self._state.key_value_memory_dict
        for layer, lent in self._graph.layers.items():
            if memory.get(layer) is lent:
                memory[layer] = _with_room(self._own[layer], self._held)
                _copy(lent, memory[layer])
        self._own = {}
        _kept[self._model] = (self._key, self._graph)
        self._graph = None

    def _lend(self) -> None:
        self._held = _tokens_in(self._state)
        room = _room_for(self._state, self._held)
        self._key = _key(self._model, self._state, room)
        self._graph = _take(self._model, self._state, room, self._key)
        memory = self._state.key_value_memory_dict
        self._own = dict(memory)
        for layer, lent in self._graph.layers.items():
            for tensor in lent:
                if tensor.dim() == CACHE_AXES:
                    tensor.zero_()  # of another text, where a NaN would reach this one as 0 * NaN
            _copy(memory[layer], lent)
            memory[layer] = lent

    def _has_room(self) -> bool:
        return self._graph.room is None or self._held < self._graph.room

    def _is_lent(self) -> bool:
        memory = self._state.key_value_memory_dict
        return all(memory.get(layer) is lent for layer, lent in self._graph.layers.items())


def why_not(model, state: State) -> str | None:
    """Say why a model decodes without graphs from a state.

    Args:
        model: as in ``generate``.
        state: with tensors of every layer.

    Returns:
        The reason; None if graphs serve.
    """
    held = [tensor for states in state.key_value_memory_dict.values() for tensor in states]
    if not isinstance(model, nn.Module) or not held or not len(state):
        return "there is nothing to capture"
    if (device := _device_of(state).type) not in RECORDERS:
        return f"device type {device} has no graphs"
    limit = state.max_seqlen if _has_cache(state) else None
    if limit is not None and _tokens_in(state) >= limit:
        return "the cache of its attention is full"
    if any(getattr(module, "process_group", None) is not None for module in model.modules()):
        return "its ranks exchange data outside of the GPU's own queue"
    if any(tensor.requires_grad for tensor in held):
        return "autograd remembers the state, which may therefore not be written in place"
    return None


def release(model: nn.Module) -> None:
    """Give up the graph that ``generate`` keeps for a model, and its memory.

    Args:
        model: as in ``generate``; one without a graph is left alone.
    """
    _kept.pop(model, None)


# The last graph of each model, while nobody uses it. Not an attribute: a graph can neither be
# copied nor pickled, and models are.
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, DecodingGraph]]
_kept = weakref.WeakKeyDictionary()


def _take(model: nn.Module, state: State, room: int | None, key: tuple) -> DecodingGraph:
    """Return the kept graph if it was captured under the same key, else a new one."""
    known, graph = _kept.pop(model, (None, None))
    if known == key:
        return graph
    del graph  # before the memory of another one is needed
    return DecodingGraph(model, state, room, RECORDERS[_device_of(state).type])


def _has_cache(state: State) -> bool:
    held = state.key_value_memory_dict.values()
    return any(tensor.dim() == CACHE_AXES for tensors in held for tensor in tensors)


def _tokens_in(state: State) -> int:
    """Return how many tokens the longest row of a cache holds, or more."""
    # The one kind of state with a single axis: tokens of each row.
    held = state.key_value_memory_dict.values()
    lengths = [tensor.amax() for tensors in held for tensor in tensors if tensor.dim() == 1]
    return max(state.seqlen_offset, int(torch.stack(lengths).amax()) if lengths else 0)


def _room_for(state: State, tokens: int) -> int | None:
    """Return the room of the graph that adds to so many tokens."""
    if not _has_cache(state):
        return None
    room = max(LEAST_ROOM, 1 << tokens.bit_length())
    return room if state.max_seqlen is None else min(room, state.max_seqlen)


def _zeros_like(tensor: Tensor, room: int | None) -> Tensor:
    if tensor.dim() != CACHE_AXES:
        return torch.zeros_like(tensor)
    return tensor.new_zeros(len(tensor), room, *tensor.shape[2:])


def _key(model: nn.Module, state: State, room: int | None) -> tuple:
    """Return what a captured step depends on, apart from values in memory."""
    device = _device_of(state)
    kind = device.type
    # Replays are ordered by their stream; on another one they could overtake each other.
    stream = torch.cuda.current_stream(device).cuda_stream if kind == "cuda" else None
    weights = [*model.parameters(), *model.buffers()]
    return (
        stream,
        room,
        {n: [_form_of_state(s) for s in held] for n, held in state.key_value_memory_dict.items()},
        [(tensor.data_ptr(), _form(tensor)) for tensor in weights],
        model.training,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        dispatch.why("selective_state_step", device),
    )


def _form(tensor: Tensor) -> tuple:
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _form_of_state(tensor: Tensor) -> tuple:
    if tensor.dim() != CACHE_AXES:
        return _form(tensor)
    return tensor.device, tensor.dtype, len(tensor), tensor.shape[2:]  # the graph has its own room


def _device_of(state: State) -> torch.device:
    for tensors in state.key_value_memory_dict.values():
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def _addresses(layers: dict[int, LayerState]) -> dict[int, list[int]]:
    return {layer: [tensor.data_ptr() for tensor in held] for layer, held in layers.items()}


def _copy(source: LayerState, target: LayerState) -> None:
    """Write values into other tensors; of a cache as many slots as both have."""
    for new, old in zip(source, target, strict=True):
        if old.dim() == CACHE_AXES:
            slots = min(new.shape[1], old.shape[1])
            new, old = new[:, :slots], old[:, :slots]
        old.copy_(new)


def _with_room(states: LayerState, tokens: int) -> LayerState:
    """Return the states, but another cache, empty, in the place of one with too little room."""
    if not any(tensor.dim() == CACHE_AXES and tensor.shape[1] < tokens for tensor in states):
        return states
    return tuple(_zeros_like(t, tokens) if t.dim() == CACHE_AXES else t for t in states)


def _without_cast_cache(kind: str):
    """Keep autocast as it is, but without its copies of weights: they end with its block."""
    return torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
