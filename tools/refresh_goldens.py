#!/usr/bin/env python3
"""Write the goldens: of our own reference, or of the official implementation.

Usage: tools/refresh_goldens.py [--output DIR]
       tools/refresh_goldens.py --mamba-repo CLONE [--conv-repo CLONE] [--rotary-repo CLONE]
                                [--device cpu|cuda:N] [--allow-other-commit] [--output DIR]

The first form writes DIR/ops/<op>/<case>.safetensors with DIR/manifest.json for each small case of
tests/cases.py, and held_out.json and greedy.json beside each checkpoint DIR/models/<name>/.
Arguments are rounded to float32; outputs and gradients come from ``ssm.ops.python.reference`` in
float64 on these rounded arguments and are rounded once.

The second form writes DIR/upstream/<cpu|cuda>/ with a manifest.json of its own: each call of
tests/golden_cases.py, run by the code of a clone of state-spaces/mamba; on a CPU by its pure
PyTorch references in float64, without Triton or compiled extensions. It needs einops. Calls of the
causal convolution need a clone of Dao-AILab/causal-conv1d too, and rotary embeddings one of
Dao-AILab/flash-attention; without one, their goldens stay as they are.
The clones must be unchanged and at the commits in tools/goldens/clone.py.

The same machine and the same versions give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.checkout import ROOT, find_packages
from tools.goldens import checkpoints, clone, operators, upstream
from tools.goldens.files import Fault


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="refresh_goldens", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, default=ROOT / "goldens", metavar="DIR", help="default: goldens/")
    for repository in clone.REPOSITORIES:
        what = f"clone of {repository.name} at {repository.commit[:12]}"
        add(repository.option, type=Path, metavar="CLONE", help=what)
    add("--device", default="cpu", help="where upstream's code runs: cpu (default) or cuda:N")
    add(
        "--allow-other-commit",
        action="store_true",
        help="take clones at other commits; the manifest names them",
    )
    found = parser.parse_args(arguments)
    others = found.conv_repo is not None or found.rotary_repo is not None
    if found.mamba_repo is None:
        if others or found.allow_other_commit or found.device != "cpu":
            parser.error("--mamba-repo must be given with any option but --output, got none")
    elif found.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda:N, got {found.device}")
    elif found.device != "cpu" and others:
        parser.error("--conv-repo and --rotary-repo are for cpu: a GPU uses installed packages")
    given = (found.mamba_repo, found.conv_repo, found.rotary_repo)
    pairs = zip(clone.REPOSITORIES, given, strict=True)
    found.clones = {repository: path for repository, path in pairs if path is not None}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    given = parse(arguments)
    find_packages()
    import torch

    # Sums over blocks of work depend on how many threads share them.
    torch.set_num_threads(1)
    place = given.output
    try:
        if given.mamba_repo is None:
            files = operators.refresh(place)
            checkpoints.refresh(place)
        else:
            files = upstream.refresh(place, given.clones, given.device, given.allow_other_commit)
            place = place / "upstream" / given.device.partition(":")[0]
    except (Fault, OSError) as fault:
        print(f"refresh_goldens: {fault}", file=sys.stderr)
        return 1
    total = sum((place / golden["file"]).stat().st_size for golden in files)
    print(f"{len(files)} goldens, {total / 1024:.0f} KiB, in {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
