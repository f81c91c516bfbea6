"""Builds the packages for tools/gpu_check.py on a machine that may have no network.

Needed besides torch with CUDA: nvcc, g++ 11 or later with the headers of this Python, and the
Python packages numpy, meson, ninja and nanobind. With safetensors models are checked as well, with
nvidia-cutlass matrices are multiplied on tensor cores. Those that are missing are taken from a
folder of wheels, which `pip download` fills on another machine. No virtual environment is made and
nothing is installed: all that is written lies in build/gpu_check.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tools import dev
from tools.checkout import ROOT

BUILD = ROOT / "build/gpu_check"
SITE = BUILD / "site"
# Module -> the package that has it.
NEEDED = {"numpy": "numpy", "mesonbuild": "meson", "ninja": "ninja", "nanobind": "nanobind"}
WANTED = {"safetensors": "safetensors", "cutlass_library": "nvidia-cutlass"}
# Where nvcc lies that is not on PATH: in images with the toolkit, and as a wheel.
TOOLKITS = (Path("/usr/local/cuda/bin"), Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin"))
PROBE = "from ssm_kernels import _cuda; print(*_cuda.architectures)"
# What a result of gpu_check depends on.
SOURCES = ("packages", "tests", "tools")


class Fault(Exception):
    """A reason to stop; its text is the message."""


def sources_digest() -> str:
    """Return a hash of all sources: a checkout without git has no commit, a changed one a wrong."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".build"}:
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def has_kernels() -> bool:
    """Say whether CUDA kernels can be imported as things are; in a process of its own."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, env=environment)
    return done.returncode == 0


def use() -> None:
    """Put the build first on the path, if there is one, and what came from wheels behind all."""
    if BUILD.is_dir():
        sys.path.insert(0, str(BUILD / "packages/ssm-kernels/python"))
    if SITE.is_dir():
        sys.path.append(str(SITE))


def find_toolkit() -> None:
    """Put nvcc and compute-sanitizer on PATH where they lie in a usual place beside it."""
    for folder in TOOLKITS:
        if shutil.which("nvcc") is None and (folder / "nvcc").is_file():
            os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{folder}"


def build(wheels: Path | None) -> None:
    """Compile what has changed and put it first on the path.

    Args:
        wheels: folder with the wheels of Python packages that are missing here, or None.

    Raises:
        Fault: something is missing, or the build fails.
    """
    find_toolkit()
    if SITE.is_dir():
        sys.path.append(str(SITE))
    # Where a build of gpu_check's own exists, it is the one to be kept up to date.
    if not BUILD.exists() and has_kernels():
        return
    if wheels is not None:
        install(wheels)
    lacking = missing(NEEDED)
    faults = [dev.compiler_fault()]
    if lacking:
        faults.append(
            f"gpu_check needs {', '.join(lacking)} to build: where there is a network, run "
            f"`pip download -d wheels {' '.join(lacking)}`, and name that folder by --wheels"
        )
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        faults.append(f"gpu_check needs the headers of this Python, and found no {headers}")
    if shutil.which("nvcc") is None:
        faults.append("gpu_check needs nvcc on PATH, as images with the CUDA toolkit have it")
    faults = [fault for fault in faults if fault]
    if faults:
        raise Fault("\n".join(faults))
    if missing({"cutlass_library": ""}) and "CUTLASS_PATH" not in os.environ:
        print("-- no wheel of nvidia-cutlass: matrices are multiplied without tensor cores, slowly")
    meson = [sys.executable, "-m", "mesonbuild.mesonmain"]
    if not (BUILD / "build.ninja").is_file():
        options = ["-Dcuda=enabled", "-Dtests=false"]
        _run("configuring", [*meson, "setup", str(BUILD), str(ROOT), *options])
    _run("compiling", [*meson, "compile", "-C", str(BUILD)])
    use()
    if not has_kernels():
        raise Fault(f"gpu_check built kernels that this Python cannot import: see {BUILD}")


def missing(wanted: dict[str, str]) -> list[str]:
    """Return the packages of those modules that cannot be imported."""
    return [package for module, package in wanted.items() if not _has(module)]


def install(wheels: Path) -> None:
    """Take what is missing from a folder of wheels, as far as it is there."""
    held = {path.name.split("-")[0].lower().replace("_", "-") for path in wheels.glob("*.whl")}
    chosen = [package for package in missing(NEEDED | WANTED) if package in held]
    if chosen:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        _run("installing", [*pip, "--find-links", str(wheels), "--target", str(SITE), *chosen])
        sys.path.append(str(SITE))
        importlib.invalidate_caches()


def _has(module: str) -> bool:
    if module == "ninja" and shutil.which("ninja"):
        return True
    return importlib.util.find_spec(module) is not None


def _run(what: str, command: list[str]) -> None:
    """Run a step and show what it says; Fault if it fails."""
    programs = [str(Path(sys.executable).parent), str(SITE / "bin"), os.environ.get("PATH", "")]
    environment = {**os.environ, "PATH": os.pathsep.join(programs)}
    if SITE.is_dir():
        before = os.environ.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), before]))
    print(f"-- {what}", flush=True)
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        raise Fault(f"gpu_check: {what} failed; the reason is above")
