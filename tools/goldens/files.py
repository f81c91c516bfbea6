"""What all goldens share: seed, limits, faults, and files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path

SEED = 20240531


class Fault(Exception):
    """A reason to stop; its text is the whole message."""


def versions(*packages: str) -> dict:
    """Return the versions of Python and of packages that have been imported or can be."""
    from importlib import import_module

    found = {"python": platform.python_version()}
    return found | {name: import_module(name).__version__ for name in sorted(packages)}


def digest(data: bytes) -> str:
    """Return the SHA-256 of a file's content, as the manifest has it."""
    return hashlib.sha256(data).hexdigest()


def encode(tensors: dict, flags: dict) -> bytes:
    """Return a safetensors file.

    Args:
        tensors: name -> torch.Tensor.
        flags: what else belongs to the call; JSON in the metadata. One key: safetensors writes
            several in an order that changes from process to process.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, {"flags": json.dumps(flags, sort_keys=True)})


def write(path: Path, data: bytes) -> None:
    """Write a file so that an interruption leaves the one before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(data)
    draft.replace(path)


def write_json(path: Path, content: object) -> None:
    """Write JSON as git shows it well."""
    write(path, (json.dumps(content, indent=1) + "\n").encode())
