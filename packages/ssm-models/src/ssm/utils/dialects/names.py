"""Tensor names by their table: which rows of which of their tensors one of ours consists of."""

from __future__ import annotations

import re
from typing import NamedTuple

from ssm.utils.dialects.table import Dialect, Parts, Values

LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")


class Piece(NamedTuple):
    """Rows of one of our tensors, and where they stand in one of theirs.

    Args:
        name: of their tensor.
        start: first row there.
        stop: row behind the last one there.
        row: first row in ours.
    """

    name: str
    start: int
    stop: int
    row: int


def pieces_of(dialect: Dialect, form: Values, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Say what one of our tensors is made of.

    Args:
        dialect: with the tables.
        form: canonical config.
        name: of our tensor.
        shape: of our tensor.

    Returns:
        Its pieces, in the order of our rows.
    """
    match = LAYER.fullmatch(name)
    block = int(match[1]) if match else -1
    inner = match[2] if match else name
    tables = [dialect.names]
    if block in form["attn_layer_idx"]:
        tables.insert(0, dialect.attention_names)
    where, ending = inner, ""
    for table in tables:
        stems = [s for s in table if inner == s or inner.startswith(s + ".")]
        if stems:
            stem = max(stems, key=len)
            where, ending = table[stem], inner[len(stem) :]
            break
    prefix = ""
    if match:
        prefix = dialect.names.get("backbone.layers", "backbone.layers.{i}.").format(i=block)
    rows = shape[0] if shape else 1
    if isinstance(where, str):
        return [Piece(prefix + where + ending, 0, rows, 0)]
    return _parts(where, form, prefix, ending, rows)


def _parts(parts: Parts, form: Values, prefix: str, ending: str, rows: int) -> list[Piece]:
    if parts.swapped:
        name, half = prefix + parts.stems[0] + ending, rows // 2
        return [Piece(name, half, rows, 0), Piece(name, 0, half, half)]
    count = len(parts.stems)
    sizes = parts.rows(form) if parts.rows else (rows // count,) * count
    found, row = [], 0
    for stem, size in zip(parts.stems, sizes, strict=True):
        found.append(Piece(prefix + stem + ending, 0, size, row))
        row += size
    return found


def stored_shapes(pieces: dict[str, list[Piece]], shapes: dict[str, tuple]) -> dict[str, tuple]:
    """Say which tensors a file must hold.

    Args:
        pieces: our name -> its pieces.
        shapes: our name -> its shape.

    Returns:
        Their name -> its shape.
    """
    rows: dict[str, int] = {}
    inner: dict[str, tuple] = {}
    for ours, parts in pieces.items():
        for piece in parts:
            rows[piece.name] = max(rows.get(piece.name, 0), piece.stop)
            inner[piece.name] = shapes[ours]
    return {name: (count, *inner[name][1:]) for name, count in rows.items()}


def present_name(dialect: Dialect, stored: str) -> str | None:
    """Return the name under which a stored tensor is looked for; None if it is not needed.

    Args:
        dialect: with the tables.
        stored: name in the file.

    Returns:
        The name without what older writers called differently.
    """
    for pattern, replacement in dialect.aliases:
        stored = re.sub(pattern, replacement, stored)
    if dialect.skipped and re.search(dialect.skipped, stored):
        return None
    return stored
