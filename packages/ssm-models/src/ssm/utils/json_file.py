"""JSON in which every name stands once: of two values for a name, readers take different ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return the values of a JSON text.

    Args:
        text: to be read.

    Returns:
        The values.

    Raises:
        ValueError: it is no JSON, or an object holds a name twice.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_without_twins)


def read_json(path: Path, owner: str) -> Any:
    """Return the values of a JSON file.

    Args:
        path: of the file.
        owner: who asks, for messages.

    Returns:
        The values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or an object holds a name twice; the message names the file.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{owner}: {path} must be a JSON file, got {error}") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"a name stands there twice: {name!r}")
        found[name] = value
    return found
