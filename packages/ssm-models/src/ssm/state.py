"""The one state object of a model: what it remembers between two calls."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssm.utils.files import write_file

LayerState = tuple[Tensor, ...]

# Marks a file as a state and numbers the layout of its names and metadata.
FILE_FORMAT = "ssm_state 1"
LENGTHS = "lengths_per_sample"
# A tensor with this many axes is a KV cache (B, T, 2, H, P); axis 1 is room, of any size.
CACHE_AXES = 5


class State:
    """Recurrent state of every layer, and the number of tokens that went into it.

    ``model(x, state=state)`` continues from the state and leaves the state behind the last token;
    the sequence may be cut anywhere. A State also follows the ``inference_params`` protocol of
    mamba_ssm (``key_value_memory_dict``, ``seqlen_offset``, ``max_batch_size``, ``max_seqlen``,
    ``lengths_per_sample``), where the caller advances ``seqlen_offset`` and offset 0 means a start
    from nothing.

    While gradients are enabled, a forward pass replaces the tensors instead of writing into them,
    so that gradients flow from one segment into the one before; ``detach`` cuts them (truncated
    backpropagation through time). Without gradients the tensors keep their storage.

    The first axis of every tensor is the row: a row of the batch, or a sequence of ``cu_seqlens``.
    That is all that ``fork``, ``gather``, ``update``, ``save`` and ``load`` know of the layers.

    Args:
        key_value_memory_dict: layer index -> tensors of that layer, whose first axis is the rows.
            Mamba1 holds (conv_state (B, D, W), model dtype; ssm_state (B, D, N), float32 or
            float64), Mamba2 (conv_state (B, d_ssm + 2 G N, W), ssm_state (B, H, P, N)).
        max_batch_size: rows of every tensor.
        max_seqlen: tokens that the state can take; None where no layer has a limit.
        seqlen_offset: tokens seen so far, padding included; one number for all rows, so that of
            the longest. Language models advance it, a mixer called alone does not.

    Raises:
        TypeError: a number is no int.
        ValueError: a number is negative.
    """

    def __init__(
        self,
        key_value_memory_dict: dict[int, LayerState] | None = None,
        max_batch_size: int = 0,
        max_seqlen: int | None = None,
        seqlen_offset: int = 0,
    ) -> None:
        numbers = {"max_batch_size": max_batch_size, "seqlen_offset": seqlen_offset}
        if max_seqlen is not None:
            numbers["max_seqlen"] = max_seqlen
        for name, value in numbers.items():
            _check_number(name, value)
        self.key_value_memory_dict = {} if key_value_memory_dict is None else key_value_memory_dict
        self.max_batch_size = max_batch_size
        self.max_seqlen = max_seqlen
        self.seqlen_offset = seqlen_offset
        self.batch_size_offset = 0
        self.lengths_per_sample = None

    def reset(self, max_seqlen: int | None = None, max_batch_size: int | None = None) -> State:
        """Forget everything: zero all tensors, in place where no graph holds them; count from 0.

        Args:
            max_seqlen: new limit; None keeps the present one.
            max_batch_size: must be the present one or None; rows are fixed at allocation.

        Returns:
            The state itself.

        Raises:
            ValueError: max_batch_size differs from the allocated rows.
        """
        if max_batch_size is not None and max_batch_size != self.max_batch_size:
            raise ValueError(
                f"State: max_batch_size must stay {self.max_batch_size}, got {max_batch_size}"
            )
        if max_seqlen is not None:
            _check_number("max_seqlen", max_seqlen)
            self.max_seqlen = max_seqlen
        # A tensor that is part of a graph must stay what it was for the backward pass.
        self._replace(
            lambda tensor: torch.zeros_like(tensor) if tensor.requires_grad else tensor.zero_()
        )
        self.seqlen_offset = 0
        return self

    def clone(self) -> State:
        """Return an independent copy; gradients flow through it."""
        return self._copy(lambda tensor: tensor.clone(), self.max_batch_size)

    def fork(self, n: int) -> State:
        """Return an independent state with every row n times, as beam search wants it.

        Row i becomes rows i n ... i n + n - 1. Gradients flow through it.

        Args:
            n: copies of each row, 0 or more.

        Returns:
            A state of n times as many rows.

        Raises:
            TypeError: n is no int.
            ValueError: n is negative.
        """
        n = _integer("n", n)
        _check_number("n", n)
        return self._copy(lambda tensor: tensor.repeat_interleave(n, dim=0), n * len(self))

    def gather(self, indices: Tensor) -> State:
        """Return an independent state of the rows asked for; gradients flow through it.

        Args:
            indices: (R,) int or a list; rows in any order, as often as wanted.

        Returns:
            A state of R rows.

        Raises:
            TypeError: indices holds no integers.
            ValueError: indices has another shape, or names a row that does not exist.
        """
        indices = self._rows(indices)
        return self._copy(
            lambda tensor: tensor.index_select(0, indices.to(tensor.device)), len(indices)
        )

    def update(self, indices: Tensor, other: State) -> State:
        """Replace rows by those of another state: a new request takes the slot of a finished one.

        Written in place where no graph holds the tensors, gradients flow through it elsewhere.
        ``seqlen_offset`` becomes the larger of the two.

        Args:
            indices: (R,) int or a list, all different: row ``indices[i]`` becomes row i of other.
            other: state of the same model with R rows.

        Returns:
            The state itself.

        Raises:
            TypeError: indices holds no integers.
            ValueError: indices or other does not fit; nothing is changed then.
        """
        indices = self._rows(indices)
        if len(indices.unique()) != len(indices):
            raise ValueError(f"State: indices must all differ, got {indices.tolist()}")
        if not isinstance(other, State):
            raise TypeError(f"State: other must be a State, got {type(other).__name__}")
        if len(other) != len(indices):
            raise ValueError(f"State: other must hold {len(indices)} rows, got {len(other)}")
        # In place, a row could be overwritten before it is read.
        source = self.clone() if other is self else other
        mine, others = self._tensors(), source._tensors()
        if _layout(mine, room=True) != _layout(others, room=True):
            raise ValueError(
                "State: other must hold the layers of this state, "
                f"got {_text(_layout(others))} for {_text(_layout(mine))}"
            )
        if self.max_seqlen is not None and _longest(others) > self.max_seqlen:
            raise ValueError(
                f"State: other must hold at most max_seqlen = {self.max_seqlen} tokens, "
                f"got {_longest(others)}"
            )
        for name, tensor in mine.items():
            rows = others[name].to(tensor)
            if tensor.dim() == CACHE_AXES:
                room = max(tensor.shape[1], rows.shape[1])
                tensor, rows = _with_room(tensor, room), _with_room(rows, room)
            if torch.is_grad_enabled() or tensor.requires_grad or rows.requires_grad:
                mine[name] = tensor.index_copy(0, indices.to(tensor.device), rows)
            else:
                mine[name] = tensor.index_copy_(0, indices.to(tensor.device), rows)
        self._assign(mine)
        self.seqlen_offset = max(self.seqlen_offset, other.seqlen_offset)
        return self

    def detach(self) -> State:
        """Cut the gradient history, in place (a TBPTT segment ends here); return the state.

        What a graph holds is copied: later calls may write into the state before that graph's
        backward pass has run.
        """
        self._replace(lambda tensor: tensor.detach().clone() if tensor.requires_grad else tensor)
        return self

    def to(self, *args, **kwargs) -> State:
        """Move or cast as ``torch.Tensor.to`` does, in place; return the state.

        Tensors of integers, such as lengths, are moved and not cast.

        Raises:
            ValueError: the dtype is not floating point; nothing is changed then.
        """
        dtype = torch.empty(0).to(*args, **kwargs).dtype
        if not dtype.is_floating_point:
            raise ValueError(f"State: dtype must be floating point, got {dtype}")

        def move(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            return tensor.to(torch.empty(0, device=tensor.device).to(*args, **kwargs).device)

        self._replace(move)
        return self

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, which appears complete or not at all.

        Args:
            path: file to make; one that exists is replaced.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = self._tensors()
        metadata = {
            "format": FILE_FORMAT,
            "seqlen_offset": json.dumps(self.seqlen_offset),
            "max_seqlen": json.dumps(self.max_seqlen),
            "rows": json.dumps(self.max_batch_size),
            "layout": json.dumps(_layout(tensors)),
        }
        # Copies: the format takes neither views nor two names for one storage.
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        write_file(Path(path), lambda part: save_file(tensors, part, metadata))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> State:
        """Read a state that ``save`` wrote; what follows is bitwise what would have followed.

        Args:
            path: file.
            device: where the tensors shall live; None is the CPU.

        Returns:
            The state.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is cut short, or no state.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"State: {path} must be a file that save wrote, got none")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FILE_FORMAT:
                    raise ValueError(f"format {metadata.get('format')!r}")
                # Always a copy: what safetensors returns lies in the mapped file.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            offset, limit, rows, layout = (
                json.loads(metadata[name])
                for name in ("seqlen_offset", "max_seqlen", "rows", "layout")
            )
            counts = {"seqlen_offset": offset, "rows": rows, "max_seqlen": limit}
            for name, value in counts.items():
                is_free = name == "max_seqlen" and value is None
                if not is_free and (type(value) is not int or value < 0):
                    raise ValueError(f"{name} {value!r}")
            if not isinstance(layout, dict):
                raise ValueError(f"layout {layout!r}")
            if layout != _layout(tensors):
                raise ValueError(f"tensors {_text(_layout(tensors))} for {_text(layout)}")
            wrong = {len(tensor) for tensor in tensors.values()} - {rows}
            if wrong:
                raise ValueError(f"tensors of {wrong.pop()} rows for {rows}")
            state = cls(None, rows, limit, offset)
            state._assign(tensors)
        except (SafetensorError, OSError, ValueError, TypeError, LookupError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ValueError(f"State: {path} must be a whole state file, got {reason}") from error
        return state.to(device)

    def _rows(self, indices) -> Tensor:
        """Return row numbers as (R,) int64, checked."""
        try:
            indices = torch.as_tensor(indices)
        except (RuntimeError, TypeError, ValueError):
            got = type(indices).__name__
            raise TypeError(f"State: indices must be a tensor or list of ints, got {got}") from None
        if indices.dim() != 1:
            raise ValueError(f"State: indices must have shape (R,), got {tuple(indices.shape)}")
        if len(indices) == 0:
            return indices.long()
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"State: indices must hold integers, got {indices.dtype}")
        # One transfer for both, as reading a value waits for the device.
        low, high = torch.stack(indices.long().aminmax()).tolist()
        if low < 0 or high >= len(self):
            wrong = low if low < 0 else high
            raise ValueError(f"State: indices must lie in [0, {len(self)}), got {wrong}")
        return indices.long()

    def _become(self, other: State) -> None:
        """Take the values of another state of the same model and rows, which is given up."""
        mine = self._tensors()
        for name, tensor in other._tensors().items():
            held = mine.get(name)
            same = held is not None and (held.shape, held.dtype) == (tensor.shape, tensor.dtype)
            if same and not (torch.is_grad_enabled() or held.requires_grad or tensor.requires_grad):
                mine[name] = held.copy_(tensor)
            else:
                mine[name] = tensor
        self._assign(mine)
        self.seqlen_offset = other.seqlen_offset

    def _copy(self, function: Callable[[Tensor], Tensor], rows: int) -> State:
        copy = State(dict(self.key_value_memory_dict), rows, self.max_seqlen, self.seqlen_offset)
        copy.batch_size_offset = self.batch_size_offset
        copy.lengths_per_sample = self.lengths_per_sample
        copy._replace(function)
        return copy

    def _replace(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer, tensors in self.key_value_memory_dict.items():
            self.key_value_memory_dict[layer] = tuple(function(tensor) for tensor in tensors)
        if self.lengths_per_sample is not None:
            self.lengths_per_sample = function(self.lengths_per_sample)

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name: "<layer>.<number>", and the lengths."""
        found = {
            f"{layer}.{number}": tensor
            for layer, tensors in sorted(self.key_value_memory_dict.items())
            for number, tensor in enumerate(tensors)
        }
        if self.lengths_per_sample is not None:
            found[LENGTHS] = self.lengths_per_sample
        return found

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors that ``_tensors`` named."""
        layers: dict[int, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            if name == LENGTHS:
                self.lengths_per_sample = tensor
            else:
                layer, number = map(int, name.split("."))
                layers.setdefault(layer, {})[number] = tensor
        for layer, held in sorted(layers.items()):
            self.key_value_memory_dict[layer] = tuple(held[number] for number in range(len(held)))

    def __len__(self) -> int:
        """Return the number of rows."""
        for tensors in self.key_value_memory_dict.values():
            return tensors[0].shape[0]
        return self.max_batch_size

    def __bool__(self) -> bool:
        """Say that there is a state, also where it has no rows."""
        return True

    def __repr__(self) -> str:
        return (
            f"State(layers={len(self.key_value_memory_dict)}, batch={self.max_batch_size}, "
            f"seqlen_offset={self.seqlen_offset})"
        )


def _layout(tensors: dict[str, Tensor], room: bool = False) -> dict[str, list]:
    """Return name -> [dtype, shape without rows]; with ``room`` without the room of KV caches."""
    found = {}
    for name, tensor in tensors.items():
        shape = list(tensor.shape[1:])
        if room and tensor.dim() == CACHE_AXES:
            shape[0] = -1
        found[name] = [str(tensor.dtype).removeprefix("torch."), shape]
    return found


def _longest(tensors: dict[str, Tensor]) -> int:
    """Return the tokens of the longest row of any attention, whose counts have a single axis."""
    counts = [t for name, t in tensors.items() if t.dim() == 1 and name != LENGTHS]
    return max((int(t.max()) for t in counts if t.numel()), default=0)


def _text(layout: dict[str, list]) -> str:
    """Write a layout in one line."""
    return ", ".join(f"{name} {dtype} {tuple(shape)}" for name, (dtype, shape) in layout.items())


def _with_room(cache: Tensor, room: int) -> Tensor:
    """Return a KV cache (B, T, 2, H, P) with room for more tokens."""
    missing = room - cache.shape[1]
    if not missing:
        return cache
    return torch.cat([cache, cache.new_zeros(len(cache), missing, *cache.shape[2:])], dim=1)


def _check_number(name: str, value) -> None:
    """Refuse what cannot count rows or tokens; those of a traced length can."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        value = _integer(name, value)
    if value < 0:
        raise ValueError(f"State: {name} must not be negative, got {value}")


def _integer(name: str, value) -> int:
    """Return a Python int; takes the integers of numpy and torch, but no bool."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"State: {name} must be an int, got {value!r}") from None
