"""Reads goldens/: arguments, outputs and gradients that were computed once and kept, by hash."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load

FOLDER = Path(__file__).resolve().parents[1] / "goldens"
REFRESH = "see goldens/README.md; `python3 tools/refresh_goldens.py` writes them anew"


@dataclass(frozen=True)
class Golden:
    """One file. Arrays are float32, int32 or bool; no ``weights`` without a backward."""

    arguments: dict
    outputs: dict
    weights: dict
    gradients: dict


def manifest(folder: Path = FOLDER) -> list[dict]:
    """Return what the manifest says of every golden: file, op, case, seed and sha256."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["goldens"]


def read(entry: dict, folder: Path = FOLDER) -> Golden:
    """Return one golden.

    Args:
        entry: of the manifest.
        folder: that holds the manifest.

    Returns:
        Golden; ``seq_meta`` among the arguments is a dict of its fields.

    Raises:
        ValueError: the file is not the one that the manifest describes.
    """
    data = (folder / entry["file"]).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(
            f"goldens: {entry['file']} must have the sha256 {entry['sha256']} of the manifest, "
            f"got {digest}; {REFRESH}"
        )
    kinds = {"argument": {}, "output": {}, "weight": {}, "gradient": {}}
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    kinds["argument"] |= json.loads(header["__metadata__"]["flags"])
    for name, array in load(data).items():
        kind, _, rest = name.partition(".")
        field = re.fullmatch(r"seq_meta\.(\w+)", rest)
        if field:
            kinds[kind]["seq_meta"] = (kinds[kind].get("seq_meta") or {}) | {field[1]: array}
        else:
            kinds[kind][rest] = np.asarray(array)
    return Golden(kinds["argument"], kinds["output"], kinds["weight"], kinds["gradient"])
