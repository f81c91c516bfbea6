"""Compile one CUDA source and keep what ptxas says of its kernels, and what it was given.

Usage: nvcc_logged.py LOG PTX NVCC ARGUMENTS...

ptxas writes registers, stack and spills of every kernel to the standard error of nvcc, where a
build drowns them. They go to LOG, which tests/test_cuda_build.py reads; everything else is shown.
The kernels as PTX go to PTX, for Hopper if it is among the architectures: tests execute them on
the host (tests/ptx).
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

OF_PTXAS = re.compile(r"^ptxas info|^\s+\d+ bytes (stack frame|cumulative)")


def main(log: str, ptx: str, *command: str) -> int:
    """Run the compiler; return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        kept = ["--keep", "--keep-dir", folder]
        done = subprocess.run([*command, *kept], stderr=subprocess.PIPE, text=True)
        modules = sorted(Path(folder).glob("*.ptx"), key=lambda path: "90a" in path.name)
        Path(ptx).write_text(modules[-1].read_text() if modules else "")
    said = done.stderr.splitlines(keepends=True)
    Path(log).write_text("".join(line for line in said if OF_PTXAS.match(line)))
    sys.stderr.write("".join(line for line in said if not OF_PTXAS.match(line) and line.strip()))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
