"""Reads goldens/: tensors that were computed once and kept, by hash."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import load

FOLDER = Path(__file__).resolve().parents[1] / "goldens"
REFRESH = "see goldens/README.md; `python3 tools/refresh_goldens.py` writes them anew"
REFRESH_UPSTREAM = (
    "see goldens/README.md; `python3 tools/refresh_goldens.py --mamba-repo CLONE --conv-repo CLONE"
    " --rotary-repo CLONE` writes them anew"
)


@dataclass(frozen=True)
class Golden:
    """One file, by the prefixes of its names.

    Arrays are float64, float32, int or bool. There are no ``weights`` without a backward, and
    ``parameters`` are those of modules.
    """

    arguments: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)
    gradients: dict = field(default_factory=dict)
    parameters: dict = field(default_factory=dict)


def manifest(folder: Path = FOLDER) -> list[dict]:
    """Return what the manifest says of every golden: file, case, seed, sha256 and more."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["goldens"]


def read(entry: dict, folder: Path = FOLDER, refresh: str = REFRESH) -> Golden:
    """Return one golden.

    Args:
        entry: of the manifest.
        folder: that holds the manifest.
        refresh: what the message of a refusal ends with.

    Returns:
        Golden; ``seq_meta`` among the arguments is a dict of its fields.

    Raises:
        ValueError: the file is missing, or not the one that the manifest describes.
    """
    path = folder / entry["file"]
    data = path.read_bytes() if path.exists() else None
    digest = "no file" if data is None else hashlib.sha256(data).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(
            f"goldens: {entry['file']} must have the sha256 {entry['sha256']} of the manifest, "
            f"got {digest}; {refresh}"
        )
    found = Golden()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    found.arguments.update(json.loads(header["__metadata__"]["flags"]))
    for name, array in load(data).items():
        kind, _, rest = name.partition(".")
        kept = getattr(found, f"{kind}s")
        part = re.fullmatch(r"seq_meta\.(\w+)", rest)
        if part:
            kept["seq_meta"] = (kept.get("seq_meta") or {}) | {part[1]: array}
        else:
            kept[rest] = np.asarray(array)
    return found


class UpstreamGoldens:
    """The goldens of one kind of device, checked against the table of tests.golden_cases.

    Args:
        folder: that holds their manifest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = {entry["file"]: entry for entry in manifest(folder)}

    def read(self, case) -> Golden:
        """Return the golden of an entry of the table.

        Raises:
            ValueError: the manifest has none, or one of another table or with another hash.
        """
        file = f"{case}.safetensors"
        entry = self.entries.get(file)
        if entry is None:
            raise ValueError(
                f"goldens: {self.folder.name}/manifest.json must list {file}, got no such entry; "
                f"{REFRESH_UPSTREAM}"
            )
        if entry["case"] != repr(case):
            raise ValueError(
                f"goldens: {file} must be of the case {case!r}, got {entry['case']}; "
                f"{REFRESH_UPSTREAM}"
            )
        return read(entry, self.folder, REFRESH_UPSTREAM)


def upstream(folder: Path = FOLDER) -> list[UpstreamGoldens]:
    """Return the goldens of every kind of device that upstream's code was run on."""
    return [UpstreamGoldens(p.parent) for p in sorted(folder.glob("upstream/*/manifest.json"))]
