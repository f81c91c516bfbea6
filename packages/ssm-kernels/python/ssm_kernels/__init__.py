"""Compiled selective state space kernels on arrays of any framework with DLPack."""

from __future__ import annotations

from pathlib import Path

from ._cpu import *  # noqa: F403
from ._cpu import version as _version

__version__ = _version()


def get_include() -> str:
    """Return the folder of the C++ headers, for `-I`.

    Returns:
        Path of the folder that holds `ssm/`.
    """
    return str(Path(__file__).parent / "include")
