"""Tensors in files: what is there is known from the headers, and is read one tensor at a time."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from ssm.utils.json_file import read_json
from ssm.utils.safetensors_file import Entry, SafetensorsFile

INDEX_ENDING = ".index.json"
# Of what stands at the end of a zip archive, and of the comment behind it.
END_BYTES = 22
MOST_COMMENT_BYTES = 2**16


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
        if tensor.is_meta:
            raise ValueError(
                f"from_pretrained: {self.path} must hold the data of {name}, got a tensor on the "
                "meta device, which has none"
            )
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
        _check_end(path)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on the byte that is damaged
        raise ValueError(
            f"{owner}: {path} must be a whole file of tensors, got {_reason(error)}"
        ) from error


def _check_end(path: Path) -> None:
    """Refuse an archive that does not end where the file does; torch would look for its end."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # no archive: a file of torch before 1.6
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - END_BYTES - MOST_COMMENT_BYTES))
        tail = file.read()
    start = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - END_BYTES + 4))
    if start < 0:
        raise ValueError("an end of file inside of the archive")
    end = start + END_BYTES + int.from_bytes(tail[start + 20 : start + 22], "little")
    if end != len(tail):
        raise ValueError(f"{len(tail) - end} bytes behind its end")


def _reason(error: Exception) -> str:
    """Say what torch.load did not like; its own words advise to read with weights_only=False."""
    text = str(error).strip()
    if isinstance(error, EOFError) or "unexpected EOF" in text:
        return "an end of file inside of it"
    if isinstance(error, pickle.UnpicklingError):
        asked = re.search(r"GLOBAL (\S+)", text)
        return f"a pickle that asks for {asked[1]}" if asked else "a pickle that is none of tensors"
    return text.split("\n")[0] or type(error).__name__


def _open(path: Path) -> SafetensorsFile | PickleFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def _open_shards(index: Path) -> Tensors:
    values = read_json(index, "from_pretrained")
    try:
        where = values["weight_map"]
        if not isinstance(where, dict) or not where:
            raise TypeError("weight_map is no dict of names")
    except (LookupError, TypeError) as error:
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
