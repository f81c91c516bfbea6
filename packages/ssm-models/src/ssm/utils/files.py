"""Files that are there completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make ``path`` by ``write(temporary path)`` and a rename, so that it is never half written.

    Args:
        path: file to make; one that exists is replaced.
        write: makes the file that it is given the name of.

    Raises:
        OSError: as ``write`` raises it; the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # Some writers make a file that only its owner can read; keep the mode that the umask gives.
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
