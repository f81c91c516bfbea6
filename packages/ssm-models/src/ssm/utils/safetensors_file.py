"""A safetensors file: its header is checked at once, its tensors are read one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssm.utils.json_file import parse_json

# A header larger than this is no header: the format has the same bound.
MOST_HEADER_BYTES = 100_000_000
# Rows are converted in pieces of this size, so that no second copy of a large tensor exists.
PIECE_BYTES = 1 << 24
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
                header = parse_json(file.read(length))
            except (ValueError, RecursionError) as error:
                raise self._fault(f"a damaged header ({error})") from error
        if not isinstance(header, dict):
            raise self._fault("a header that is no JSON object")
        self.metadata = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(
            isinstance(value, str) for value in self.metadata.values()
        ):
            raise self._fault("a __metadata__ that is no object of strings")
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

    def _fault(self, reason: str) -> ValueError:
        return ValueError(
            f"from_pretrained: {self.path} must be a whole safetensors file, got {reason}"
        )
