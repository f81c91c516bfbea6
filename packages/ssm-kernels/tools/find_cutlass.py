"""Find the CUTLASS headers.

Usage: find_cutlass.py [explicit folder]

Prints the version and then one include folder per line, or nothing when there is no CUTLASS. An
explicit folder (argument or CUTLASS_PATH) that holds none is an error: falling back would hide a
typing mistake.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

SYSTEM = ("/usr/local/cutlass", "/opt/cutlass", "/usr/local", "/usr")


def include_of(folder: Path) -> Path | None:
    """Return the folder to include from, given a checkout, a prefix or an include folder."""
    for candidate in (folder / "include", folder):
        if (candidate / "cutlass/cutlass.h").is_file():
            return candidate
    return None


def version_of(include: Path) -> str:
    """Read MAJOR.MINOR.PATCH from cutlass/version.h."""
    header = include / "cutlass/version.h"
    text = header.read_text() if header.is_file() else ""
    parts = [re.search(rf"#define CUTLASS_{p} +(\d+)", text) for p in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(m.group(1) if m else "0" for m in parts)


def candidates() -> list[Path]:
    """List where an unasked-for CUTLASS may lie: the nvidia-cutlass wheel, then system prefixes."""
    found = []
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None:
        found += [Path(p) / "source" for p in spec.submodule_search_locations or ()]
    return found + [Path(p) for p in SYSTEM]


def main() -> int:
    """Print what was found; return the exit status."""
    argument = sys.argv[1] if len(sys.argv) > 1 else ""
    explicit = argument or os.environ.get("CUTLASS_PATH", "")
    for folder in [Path(explicit)] if explicit else candidates():
        include = include_of(folder)
        if include is not None:
            print(version_of(include))
            print(include)
            # packed_stride.hpp and its neighbours live outside include/.
            tools = include.parent / "tools/util/include"
            if tools.is_dir():
                print(tools)
            return 0
    if explicit:
        name = "-Dcutlass" if argument else "CUTLASS_PATH"
        print(
            f"{name} must name a folder with include/cutlass/cutlass.h, got {explicit}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
