"""Tensors in files: what is there is known from the headers, and is read one tensor at a time."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# A header larger than this is no header: the format has the same bound.
MOST_HEADER_BYTES = 100_000_000
# Rows are converted in pieces of this size, so that no second copy of a large tensor exists.
PIECE_BYTES = 1 << 24
INDEX_ENDING = ".index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """What a file says about a tensor.

    Args:
        dtype: as stored.
        shape: as stored.
        path: file that holds it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file, whose header is checked against its size when it is opened.

    The file is read, not mapped: of a mapped file that is cut short later a page is missing, which
    ends the process, and its pages would count beside the tensors made of them.

    Args:
        path: the file.

    Raises:
        ValueError: the header is damaged, or the file is longer or shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._starts: dict[str, int] = {}
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
            if size < 8 or length > MOST_HEADER_BYTES or 8 + length > size:
                raise self._fault(f"{size} bytes, in which no header has room")
            try:
                header = json.loads(file.read(length), object_pairs_hook=self._no_twins)
            except (ValueError, RecursionError) as error:
                raise self._fault(f"a damaged header ({error})") from error
        if not isinstance(header, dict):
            raise self._fault("a header that is no JSON object")
        self.metadata = header.pop("__metadata__", {})
        self._read_header(header, 8 + length, size)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, device=None, dtype=None
    ) -> Tensor:
        """Read a tensor, or rows of it.

        Args:
            name: of the tensor.
            start: first row.
            stop: row behind the last one; None is the end.
            device: of the result; None is the CPU.
            dtype: of the result; None is the stored one.

        Returns:
            A tensor of its own.

        Raises:
            ValueError: the file has become shorter since it was opened.
        """
        entry = self.entries[name]
        shape, first = entry.shape, self._starts[name]
        if shape:
            row = math.prod(shape[1:]) * entry.dtype.itemsize
            shape = (len(range(*slice(start, stop).indices(shape[0]))), *shape[1:])
            first += start * row
        target = torch.empty(shape, dtype=dtype or entry.dtype)
        flat = target.reshape(-1)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(first)
            if target.dtype == entry.dtype:
                self._fill(file, flat, name)
            else:
                step = PIECE_BYTES // entry.dtype.itemsize
                for begin in range(0, flat.numel(), step):
                    part = flat[begin : begin + step]
                    stored = torch.empty(part.numel(), dtype=entry.dtype)
                    self._fill(file, stored, name)
                    part.copy_(stored)
        return target if device is None else target.to(device)

    def release(self, name: str) -> None:
        """Forget a tensor that is not needed any more; nothing is held here."""

    def _fill(self, file, flat: Tensor, name: str) -> None:
        if not flat.numel():
            return
        room = memoryview(flat.view(torch.uint8).numpy())
        while room:
            count = file.readinto(room)
            if not count:
                raise self._fault(f"an end of file in tensor {name}")
            room = room[count:]

    def _read_header(self, header: dict, base: int, size: int) -> None:
        spans = []
        for name, value in header.items():
            try:
                dtype, shape, (start, stop) = (
                    DTYPES[value["dtype"]],
                    tuple(value["shape"]),
                    value["data_offsets"],
                )
                numbers = [*shape, start, stop]
                if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
                    raise TypeError("a number in it is no size")
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._fault(f"a damaged entry of tensor {name} ({error})") from error
            self.entries[name] = Entry(dtype, shape, self.path)
            self._starts[name] = base + start
            if stop - start != self.entries[name].nbytes:
                raise self._fault(
                    f"{stop - start} bytes for tensor {name} of {value['dtype']} {shape}"
                )
            spans.append((start, stop, name))
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                raise self._fault(f"tensor {name} at byte {start} of the data, not at {end}")
            if base + stop > size:
                raise self._fault(f"an end of file in tensor {name}")
            end = stop
        if base + end != size:
            raise self._fault(f"{size - base - end} bytes behind the last tensor")

    def _no_twins(self, pairs: list) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands there twice")
        return found

    def _fault(self, reason: str) -> ValueError:
        return ValueError(
            f"from_pretrained: {self.path} must be a whole safetensors file, got {reason}"
        )


class PickleFile:
    """A file of torch.save, never allowed to run code.

    Args:
        path: the file.

    Raises:
        ValueError: the file is damaged, or holds anything but a dict of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = {}
        # On "meta" the names and shapes are read, and none of the data.
        found = load_torch_file(path, "from_pretrained", "meta")
        if not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(t, Tensor) and t.layout == torch.strided
            for name, t in found.items()
        ):
            raise ValueError(f"from_pretrained: {path} must hold a dict of tensors")
        self.entries = {n: Entry(t.dtype, tuple(t.shape), path) for n, t in found.items()}
        self._held: dict[str, Tensor] | None = None
        self._given: set[int] = set()

    def read(
        self, name: str, start: int = 0, stop: int | None = None, device=None, dtype=None
    ) -> Tensor:
        """Read a tensor, or rows of it; see ``SafetensorsFile.read``."""
        if self._held is None or name not in self._held:
            self._held = dict(load_torch_file(self.path, "from_pretrained"))
        tensor = self._held[name].detach()
        if tensor.dim():
            tensor = tensor[start:stop]
        # A view would keep what it is a part of, and two names of one storage would stay tied.
        is_own = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        is_own = is_own and tensor.data_ptr() not in self._given
        self._given.add(tensor.data_ptr())
        return tensor.to(device=device, dtype=dtype, copy=not is_own).contiguous()

    def release(self, name: str) -> None:
        """Forget a tensor that is not needed any more."""
        if self._held is not None:
            self._held.pop(name, None)
            if not self._held:
                self._held = None


class Tensors:
    """The tensors of one checkpoint, in one file or in several.

    Args:
        files: opened files, no name in two of them.
        path: what errors name: the file, or the index of the files.
    """

    def __init__(self, files: list[SafetensorsFile | PickleFile], path: Path) -> None:
        self.path = path
        self.files = files
        self._file_of = {name: file for file in files for name in file.entries}
        self.entries = {name: file.entries[name] for name, file in self._file_of.items()}

    def read(self, name: str, *args, **kwargs) -> Tensor:
        """Read a tensor, or rows of it; see ``SafetensorsFile.read``."""
        return self._file_of[name].read(name, *args, **kwargs)

    def release(self, name: str) -> None:
        """Forget a tensor that is not needed any more."""
        self._file_of[name].release(name)


def open_tensors(directory: Path, names: tuple[str, ...]) -> Tensors:
    """Open the first file of a list that is there; no tensor is read.

    Args:
        directory: of the checkpoint.
        names: files in order of preference; behind each, its index of shards is looked for.

    Returns:
        The tensors.

    Raises:
        FileNotFoundError: none is there, or a shard that the index names is not.
        ValueError: a file is damaged, or an index does not fit its files.
    """
    for name in names:
        path = directory / name
        if path.is_file():
            return Tensors([_open(path)], path)
        index = directory / (name + INDEX_ENDING)
        if index.is_file():
            return _open_shards(index)
    raise FileNotFoundError(
        f"from_pretrained: {directory} must hold {' or '.join(names)}, got neither"
        if len(names) > 1
        else f"from_pretrained: {directory} must hold {names[0]}, got none"
    )


def load_torch_file(path: Path, owner: str, device="cpu"):
    """Read a torch.save file with ``weights_only=True``.

    Args:
        path: the file.
        owner: who asks, for messages.
        device: where the tensors shall be.

    Returns:
        What was saved.

    Raises:
        ValueError: the file is damaged or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, LookupError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{owner}: {path} must be a whole file of tensors, got {reason}"
        ) from error


def _open(path: Path) -> SafetensorsFile | PickleFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def _open_shards(index: Path) -> Tensors:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(where, dict) or not where:
            raise TypeError("weight_map is no dict of names")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"from_pretrained: {index} must be a JSON index with a weight_map, got {error!r}"
        ) from error
    files = {}
    for tensor, shard in where.items():
        # A path, of whatever system, could lead anywhere.
        if not isinstance(shard, str) or not shard or set(shard) & set("/\\:\0") or shard == "..":
            raise ValueError(
                f"from_pretrained: {index} must name files beside it, got {shard!r} for {tensor}"
            )
        path = index.parent / shard
        if shard not in files:
            if not path.is_file():
                raise FileNotFoundError(
                    f"from_pretrained: {index.parent} must hold {shard}, which {index.name} names, "
                    "got none"
                )
            files[shard] = _open(path)
        if tensor not in files[shard].entries:
            raise ValueError(
                f"from_pretrained: {path} must hold {tensor}, as {index.name} says, got none"
            )
    for shard, file in files.items():
        for tensor in file.entries:
            if where.get(tensor) != shard:
                raise ValueError(
                    f"from_pretrained: {index} must name every tensor of {shard}, got none for "
                    f"{tensor}"
                )
    return Tensors(list(files.values()), index)
