"""What several commands offer and ask of their options."""

import os
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_directory(command: str, option: str, path: Path) -> None:
    """Refuse a place where no directory can be written, before the work whose result goes there.

    Args:
        command: the first word of the sentence.
        option: the option that names the place.
        path: of the directory; it is made later, if absent.

    Raises:
        ValueError: the path or a part of it is a file, or may not be written.
    """
    last = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not last.is_dir():
        raise ValueError(f"{command}: {option} must be a directory, got {path} with a file {last}")
    if not os.access(last, os.W_OK | os.X_OK):
        raise ValueError(f"{command}: {option} must be writable, got {path} without the right to")
