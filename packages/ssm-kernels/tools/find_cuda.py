"""Find what the CUDA kernels are compiled with, and say for which GPUs.

Usage: find_cuda.py ARCHS

ARCHS is the option gpu_archs: `auto` (the GPU of this machine, else 90a), `release` (every
generation since Ampere, and code that later drivers translate), or a list such as `80,90a`.

Prints the path of nvcc, its version, the static runtime library, and one -gencode flag per line.
Prints one line that starts with `no ` where something is missing; ends with an error where ARCHS
cannot be read.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

RELEASE = ("80", "90a", "100", "120")
WITHOUT_GPU = "90a"


def present() -> list[str]:
    """Return the architectures of the GPUs that the driver shows."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    command = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    caps = sorted(set(re.findall(r"^(\d+)\.(\d)$", found.stdout, re.M)))
    # Hopper's own instructions need the architecture-specific code.
    return [f"{major}{minor}" + ("a" if major == "9" else "") for major, minor in caps]


def gencode(archs: str) -> list[str]:
    """Return the flags for an option value.

    Raises:
        ValueError: a name is not an architecture.
    """
    if archs == "auto":
        wanted, translate = present() or [WITHOUT_GPU], False
    else:
        wanted = list(RELEASE) if archs == "release" else re.split(r"[,\s]+", archs.strip())
        translate = archs == "release"
    for arch in wanted:
        if not re.fullmatch(r"\d{2,3}a?", arch):
            raise ValueError(
                f"gpu_archs must be auto, release or a list such as 80,90a, got {archs}"
            )
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    if translate:
        flags.append(f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}")
    return flags


def main(archs: str) -> int:
    """Print what was found."""
    try:
        flags = gencode(archs)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("no nvcc on PATH")
        return 0
    version = re.search(
        r"release (\S+),",
        subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout,
    )
    # The wheels of the toolkit keep their libraries in lib, an installed one in lib64; a wrapper
    # script may stand in front of nvcc.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-E", "-"], input="", capture_output=True, text=True
    )
    top = re.search(r"^#\$ _?TOP=(\S+)", dry.stderr, re.M)
    root = Path(top.group(1) if top else Path(nvcc).resolve().parent.parent)
    libraries = [root / lib / "libcudart_static.a" for lib in ("lib64", "lib")]
    cudart = next((path.resolve() for path in libraries if path.exists()), None)
    if version is None or cudart is None:
        print(f"no usable toolkit: {nvcc} has no {'libcudart_static.a' if version else 'version'}")
        return 0
    print(nvcc, version.group(1), cudart, *flags, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
