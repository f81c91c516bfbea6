"""Lets the tools import this checkout, built or not, without an installation."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_packages() -> None:
    """Put packages and build tree on the path: behind PYTHONPATH, before what is installed."""
    named = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p in sys.path]
    first = max((sys.path.index(p) for p in named), default=-1) + 1
    build = ROOT / "build/packages/ssm-kernels/python"
    for folder in (ROOT, ROOT / "packages/ssm-models/src", build):
        if str(folder) not in sys.path:
            sys.path.insert(first, str(folder))
