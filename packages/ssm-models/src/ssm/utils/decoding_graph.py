"""Decoding with CUDA graphs: one step of a model, captured once and replayed for every token.

A step of decoding is hundreds of small kernels, and launching them takes the processor longer than
running them takes the GPU. A graph launches all of them at once. It runs on fixed addresses, so the
state of a text moves into the tensors of the graph while it decodes, and back when it ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssm.state import State
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


class DecodingGraph:
    """One step of decoding, captured, and the tensors that it reads and writes.

    Args:
        model: as in ``generate``. The graph does not keep it alive.
        state: one like it will be decoded from; its values are not looked at.
        record: entry of ``RECORDERS``.

    Raises:
        ValueError: the model does not step its state in place.
    """

    def __init__(self, model: nn.Module, state: State, record: Callable) -> None:
        # What outlives this call may be no inference tensor, which nobody could write to later.
        with torch.inference_mode(False), torch.no_grad():
            self.layers = {
                layer: tuple(torch.zeros_like(tensor) for tensor in held)
                for layer, held in state.key_value_memory_dict.items()
            }
            device = _device_of(state)
            self._tokens = torch.zeros(len(state), 1, dtype=torch.int64, device=device)
            own = State(dict(self.layers), state.max_batch_size, state.max_seqlen)

            def step() -> Tensor:
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
        self._own: dict[int, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row.

        Args:
            tokens: (B,) int64.

        Returns:
            (B, V), logits of the tokens after these.
        """
        if self._graph is not None and not self._is_lent():
            self.close()  # the caller put other tensors into the state
        if self._graph is None and self._wanted:
            self._wanted = why_not(self._model, self._state) is None
        if not self._wanted:
            return self._model(tokens[:, None], state=self._state, num_last_tokens=1).logits[:, -1]
        if self._graph is None:
            self._lend()
        logits = self._graph.step(tokens)
        self._state.seqlen_offset += 1
        return logits

    @torch.no_grad()
    def close(self) -> None:
        """Give the state back its own tensors, with the values reached, and keep the graph."""
        if self._graph is None:
            return
        memory = self._state.key_value_memory_dict
        for layer, lent in self._graph.layers.items():
            if memory.get(layer) is lent:
                memory[layer] = _copied(lent, self._own[layer])
        self._own = {}
        _kept[self._model] = (self._key, self._graph)
        self._graph = None

    def _lend(self) -> None:
        self._key = _key(self._model, self._state)
        self._graph = _take(self._model, self._state, self._key)
        memory = self._state.key_value_memory_dict
        self._own = dict(memory)
        for layer, lent in self._graph.layers.items():
            memory[layer] = _copied(memory[layer], lent)

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
    # The one kind of state with a single axis: how many tokens each row of the cache holds.
    if any(tensor.dim() == 1 for tensor in held):
        return "the cache of an attention grows, and a graph would read all of its room every time"
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


def _take(model: nn.Module, state: State, key: tuple) -> DecodingGraph:
    """Return the kept graph if it was captured under the same key, else a new one."""
    known, graph = _kept.pop(model, (None, None))
    if known == key:
        return graph
    del graph  # before the memory of another one is needed
    return DecodingGraph(model, state, RECORDERS[_device_of(state).type])


def _key(model: nn.Module, state: State) -> tuple:
    """Return what a captured step depends on, apart from values in memory."""
    device = _device_of(state)
    kind = device.type
    # Replays are ordered by their stream; on another one they could overtake each other.
    stream = torch.cuda.current_stream(device).cuda_stream if kind == "cuda" else None
    weights = [*model.parameters(), *model.buffers()]
    return (
        stream,
        {n: [_form(tensor) for tensor in t] for n, t in state.key_value_memory_dict.items()},
        [(tensor.data_ptr(), _form(tensor)) for tensor in weights],
        model.training,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        dispatch.why("selective_state_step", device),
    )


def _form(tensor: Tensor) -> tuple:
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _device_of(state: State) -> torch.device:
    for tensors in state.key_value_memory_dict.values():
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def _addresses(layers: dict[int, tuple[Tensor, ...]]) -> dict[int, list[int]]:
    return {layer: [tensor.data_ptr() for tensor in held] for layer, held in layers.items()}


def _copied(source: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Write values into other tensors, and return those."""
    for new, old in zip(source, target, strict=True):
        old.copy_(new)
    return target


def _without_cast_cache(kind: str):
    """Keep autocast as it is, but without its copies of weights: they end with its block."""
    return torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
