"""Files that are there completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path


def named_path(owner: str, name: str | os.PathLike) -> Path:
    """Return the path that a caller names.

    Args:
        owner: who was called, for messages.
        name: what it was given.

    Returns:
        The path.

    Raises:
        TypeError: it is no name.
        ValueError: it is empty, which would be the current directory.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"{owner}: directory must be a str or a path, got {name!r}")
    if name == "":
        raise ValueError(f"{owner}: directory must have a name, got ''")
    return Path(name)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Make ``path`` by ``write(temporary path)`` and a rename, so that it is never half written.

    Args:
        path: file to make; one that exists is replaced.
        write: makes the file that it is given the name of.

    Raises:
        OSError: as ``write`` raises it; the temporary file is removed.
    """
    write_files({path: write})


def write_files(
    writes: Mapping[Path, Callable[[Path], object]], replaced: Iterable[Path] = ()
) -> None:
    """Make several files, none of which is renamed before all are written.

    So a write that fails leaves all of the old files, and not a mixture of old and new ones.

    Args:
        writes: file to make -> what makes the file that it is given the name of.
        replaced: files that those under other names replace. They are removed before the others
            get their names: whoever is interrupted leaves too little to be read, never the old
            weights beside the new ones.

    Raises:
        OSError: as a ``write`` raises it; the temporary files are removed.
    """
    made = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in writes}
    try:
        for path, temporary in made.items():
            # Some writers make a file that only its owner can read; keep the mode that the umask
            # gives.
            temporary.touch()
            mode = temporary.stat().st_mode
            writes[path](temporary)
            temporary.chmod(mode)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        for path in replaced:
            path.unlink()
        for path, temporary in made.items():
            os.replace(temporary, path)
    finally:
        for temporary in made.values():
            temporary.unlink(missing_ok=True)
