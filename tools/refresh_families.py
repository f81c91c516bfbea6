#!/usr/bin/env python3
"""Write goldens/transformers: a tiny checkpoint of each family of transformers, and its logits.

Usage: tools/refresh_families.py        (needs transformers)

They let a machine without transformers hold the loading of its checkpoints against its models. The
weights are random, and rounded to bfloat16, which halves the files; the logits are those of the
rounded weights in float32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "goldens" / "transformers"
LENGTH = 20


def families(cases: dict[str, tuple[str, dict]]) -> dict[str, str]:
    """Return family -> the case that stands for it: the first of its name."""
    found: dict[str, str] = {}
    for case, (family, _) in cases.items():
        found.setdefault(family, case)
    return found


def write(family: str, case: str) -> None:
    """Write one checkpoint, its tokens and its logits."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from tests.families import build

    path = FOLDER / family
    build(case).bfloat16().save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    # Loaded again: the cast above has rounded the rotary frequencies too, which no file holds.
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(64, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    save_file({"input_ids": ids, "logits": logits}, path / "logits.safetensors")


def main() -> int:
    """Write all of them and their manifest; return the exit status."""
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers

    from tests.families import FAMILIES

    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    chosen = families(FAMILIES)
    for family, case in chosen.items():
        write(family, case)
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file())
    manifest = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "cases": chosen,
        "sha256": {
            path.relative_to(FOLDER).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
    }
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
