"""What a dialect of checkpoints is: a table of the fields of its config and of its tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

REQUIRED = object()
Values = dict[str, Any]


class Field(NamedTuple):
    """A field of the foreign config that is one of ours under another name.

    Args:
        name: in the foreign config.
        ours: "d_model", or "ssm_cfg.d_state" for an entry of a dict.
        default: value if the field is absent; REQUIRED for none.
    """

    name: str
    ours: str
    default: Any = REQUIRED


class Parts(NamedTuple):
    """How the rows of one of our tensors are spread over theirs.

    Args:
        stems: names of their modules, in the order of our rows.
        rows: canonical config -> rows of each; None for equal parts.
        swapped: one stem, whose second half of rows is our first.
    """

    stems: tuple[str, ...]
    rows: Callable[[Values], tuple[int, ...]] | None = None
    swapped: bool = False


@dataclass(frozen=True)
class Dialect:
    """A format of checkpoints: how its config and its names correspond to ours.

    Functions of ``derive``, ``agree`` and ``refused`` get the foreign config, defaults filled in;
    those of ``emit`` get ours in canonical form (see ``canonical.py``).

    Args:
        name: the ``model_type``, or a name of ours where the format has none.
        architecture: class of transformers, written as ``architectures``.
        fields: fields that correspond one to one.
        defaults: other fields that are read -> value if absent.
        derive: our path -> function that computes it from theirs.
        emit: their field -> function that computes it from ours.
        ours: our path -> its value in every checkpoint of this format.
        fixed: their field -> values that are supported; the first is the default,
            there too, and so never written.
        agree: their field that repeats others -> function that computes what it must be.
        kept: fields of ``emit`` that are written as they were read where that says the same model.
        legacy: former name of a field -> present name.
        nullable: fields that may be null although their default is not.
        ignored: fields that have no effect on what is computed.
        refused: (condition, what is missing here) for checkpoints that need more than we have.
        names: our stem -> their stem or Parts; a stem is a name without ".weight" or ".bias", and
            stands for all names that begin with it. Of several, the longest is taken; a stem in
            no table stays what it is. "{i}" is the number of the block.
        attention_names: the same for blocks whose mixer is attention; looked at first.
        aliases: (pattern, replacement) applied to stored names before anything else.
        skipped: pattern of stored names that are not needed.
    """

    name: str
    architecture: str = ""
    fields: tuple[Field, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    derive: Mapping[str, Callable[[Values], Any]] = field(default_factory=dict)
    emit: Mapping[str, Callable[[Values], Any]] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple] = field(default_factory=dict)
    agree: Mapping[str, Callable[[Values], Any]] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    legacy: Mapping[str, str] = field(default_factory=dict)
    nullable: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    refused: tuple[tuple[Callable[[Values], bool], str], ...] = ()
    names: Mapping[str, str | Parts] = field(default_factory=dict)
    attention_names: Mapping[str, str | Parts] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    skipped: str = ""

    def known(self) -> set[str]:
        """Return the names of all fields that a config may hold."""
        found = {entry.name for entry in self.fields}
        for table in (self.defaults, self.emit, self.fixed, self.agree, self.legacy):
            found |= set(table)
        return found | set(self.ignored)
