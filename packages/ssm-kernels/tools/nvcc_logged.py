"""Compile one CUDA source and keep what ptxas says of its kernels.

Usage: nvcc_logged.py LOG NVCC ARGUMENTS...

ptxas writes registers, stack and spills of every kernel to the standard error of nvcc, where a
build drowns them. They go to LOG, which tests/test_cuda_build.py reads; everything else is shown.
"""

import re
import subprocess
import sys
from pathlib import Path

OF_PTXAS = re.compile(r"^ptxas info|^\s+\d+ bytes (stack frame|cumulative)")


def main(log: str, *command: str) -> int:
    """Run the compiler; return its exit status."""
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    said = done.stderr.splitlines(keepends=True)
    Path(log).write_text("".join(line for line in said if OF_PTXAS.match(line)))
    sys.stderr.write("".join(line for line in said if not OF_PTXAS.match(line) and line.strip()))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
