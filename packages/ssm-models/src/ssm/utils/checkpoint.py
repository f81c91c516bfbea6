"""A checkpoint that has been opened: its format, its config and its names, and no tensor yet."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from ssm.models.config import MambaConfig
from ssm.utils import dialects
from ssm.utils.dialects.canonical import canonical
from ssm.utils.dialects.configs import decode, read_values
from ssm.utils.dialects.names import Piece, pieces_of, present_name, stored_shapes
from ssm.utils.hub import BIN_FILE, CONFIG_FILE, CONSOLIDATED_FILE, PARAMS_FILE, SAFETENSORS_FILE
from ssm.utils.json_file import read_json
from ssm.utils.tensor_files import Tensors, open_tensors

TIED = ("lm_head.weight", "backbone.embedding.weight")
MOST_NAMES = 10


@dataclass
class Checkpoint:
    """What is known of a checkpoint before a tensor is read.

    Args:
        path: of the config.
        dialect: format of the config and of the names.
        config: in our form.
        tensors: the files, opened.
    """

    path: Path
    dialect: dialects.Dialect
    config: MambaConfig
    tensors: Tensors


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read the config of a checkpoint and the headers of its tensors.

    Args:
        directory: of the checkpoint.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: a file is missing; the message lists what was sought.
        ValueError: a file is damaged, or the config is not supported; the message names the file.
    """
    path = directory / CONFIG_FILE
    is_mistral = not path.is_file() and (directory / PARAMS_FILE).is_file()
    if is_mistral:
        path = directory / PARAMS_FILE
    elif not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {directory} must hold {CONFIG_FILE}, got none")
    values = read_json(path, "from_pretrained")
    try:
        values = decode(values)
        if not isinstance(values, dict):
            raise TypeError(f"from_pretrained: config must be a dict, got {type(values).__name__}")
        dialect = dialects.CODESTRAL if is_mistral else dialects.find(values)
        if dialect is dialects.STATE_SPACES:
            config = MambaConfig.from_dict(values)
        else:
            config = read_values(dialect, values, dialects.GENERIC)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{error} in {path}") from error
    weights = (CONSOLIDATED_FILE,) if is_mistral else (SAFETENSORS_FILE, BIN_FILE)
    return Checkpoint(path, dialect, config, open_tensors(directory, weights))


def plan_reading(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, list[Piece]], str | None]:
    """Find every tensor of a model in the files, or say in one sentence what does not fit.

    Args:
        checkpoint: to be read.
        shapes: name -> shape of the model's tensors, lm_head included.

    Returns:
        pieces: our name -> its pieces under the names of the files, a tied lm_head left out.
        second: stored name of a tied lm_head that must equal the embedding, or None.

    Raises:
        ValueError: tensors are missing, left over, of another shape or no floating point.
    """
    form, entries = canonical(checkpoint.config), checkpoint.tensors.entries
    stored: dict[str, str] = {}
    for name in entries:
        present = present_name(checkpoint.dialect, name)
        if present is None:
            continue
        if present in stored:
            raise ValueError(
                f"from_pretrained: {checkpoint.tensors.path} must hold {present} once, got it as "
                f"{stored[present]} and as {name}"
            )
        stored[present] = name
    pieces = {
        name: pieces_of(checkpoint.dialect, form, name, shape) for name, shape in shapes.items()
    }
    second = None
    if checkpoint.config.tie_embeddings:
        head, embedding = (pieces[name][0].name for name in TIED)
        del pieces[TIED[0]]
        if head in stored and embedding not in stored:
            stored[embedding] = stored.pop(head)
        elif head in stored:
            second = stored.pop(head)
    wanted = stored_shapes(pieces, shapes)
    _compare(wanted, stored, checkpoint)
    if second is not None and entries[second].shape != wanted[embedding]:
        raise ValueError(different_twins(checkpoint, stored[embedding], second))
    return {
        name: [piece._replace(name=stored[piece.name]) for piece in parts]
        for name, parts in pieces.items()
    }, second


def different_twins(checkpoint: Checkpoint, first: str, second: str) -> str:
    """Return the complaint about two tensors that should be one.

    Args:
        checkpoint: that holds them.
        first: stored name of the embedding.
        second: stored name of lm_head.

    Returns:
        A sentence.
    """
    return (
        f"from_pretrained: {checkpoint.tensors.path} must hold {second} equal to {first} if the "
        "config ties them, got different tensors"
    )


def _compare(wanted: dict[str, tuple], stored: dict[str, str], checkpoint: Checkpoint) -> None:
    entries = checkpoint.tensors.entries
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted]
    wrong, integers = [], []
    for name, original in stored.items():
        entry = entries[original]
        if name in wanted and entry.shape != wanted[name]:
            wrong.append(f"{name} {entry.shape} for {wanted[name]}")
        if not entry.dtype.is_floating_point:
            integers.append(f"{name} {entry.dtype}")
    faults = []
    if missing:
        faults.append("missing " + _list(_with_nearest(missing, unexpected)))
    if unexpected:
        faults.append("unexpected " + _list(_with_nearest(unexpected, missing)))
    if wrong:
        faults.append("wrong shape " + _list(wrong))
    if integers:
        faults.append("no floating point in " + _list(integers))
    if faults:
        raise ValueError(
            f"from_pretrained: {checkpoint.tensors.path} must hold the tensors of its "
            f"{checkpoint.path.name} ({checkpoint.dialect.name}), got {'; '.join(faults)}"
        )


def _with_nearest(names: list[str], candidates: list[str]) -> list[str]:
    hints = []
    for name in names[:MOST_NAMES]:
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
        hints.append(f"{name} (nearest {near[0]})" if near else name)
    return hints + names[MOST_NAMES:]


def _list(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
