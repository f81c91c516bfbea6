#!/usr/bin/env python3
"""The commands of this repository; needs nothing but Python, a C++ compiler and the network once.

Usage: python3 tools/dev.py demo | test [SUITE...] | build | setup
                            [--python PYTHON] [-j JOBS] [--cuda] [--gpu-archs ARCHS]

    setup   make .venv and install what the build and the tests need
    build   setup, then configure and compile into build/; afterwards .venv/bin has python, pytest,
            ssm-models and ssm-kernels that use this checkout
    test    build, then run every test; the last line is `N passed, N failed, N skipped`
    demo    build, then let a small Mamba language model write text

--cuda insists on the CUDA kernels, which are otherwise built where nvcc is found (for the demo: and
a GPU), and puts nvcc into .venv where there is none. The CUTLASS headers follow nvcc; without them
kernels are slower.

A step that has nothing to do costs next to nothing, so there is no reason to call them one by one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BUILD = ROOT / "build"
JUNIT = BUILD / "junit"

# One pip call each: a constraint of one step never slows the search of another.
REQUIREMENTS = (
    ("torch==2.13.0",),
    (
        "meson>=1.6",
        "meson-python>=0.16",
        "nanobind>=3.0,<4",
        "ninja",
        "numpy",
        "pytest>=8",
        "safetensors",
    ),
    # Tests and a bench compare with it; nothing else needs it. It wants a newer Python than we do.
    ('transformers>=5.23,<5.24; python_version >= "3.11"',),
)

# What nvcc is made of, as wheels; with --cuda on a machine without a toolkit.
CUDA = tuple(
    f"nvidia-{part}==13.0.*"
    for part in ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
)

# Beside every nvcc, and not required: headers for products on tensor cores, and what a test reads
# machine code with, of any version that knows nvcc's.
CUTLASS = "nvidia-cutlass==4.2.*"
DISASSEMBLER = ("nvidia-cuda-cuobjdump==13.*", "nvidia-cuda-nvdisasm==13.*")

SUMMARY = "{passed} passed, {failed} failed, {skipped} skipped"

# The console scripts of the packages -> the module that each runs.
PROGRAMS = {"ssm-kernels": "ssm_kernels.cli", "ssm-models": "ssm.cli"}

# Runs in the interpreter that --python names, which may be older than this file expects.
PROBE = """
import importlib.util, json, os, sys, sysconfig
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "headers": os.path.join(sysconfig.get_path("include"), "Python.h"),
    "venv": all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
}))
"""


# What a compiler says of itself, and the first version that can translate the kernels.
OLDEST_COMPILERS = {"Free Software Foundation": 11, "Apple clang": 15, "clang": 16}


class Fault(Exception):
    """A reason to stop that the user can remove; its text is the whole message."""


def compiler_fault() -> str:
    """Return what is wrong with the C++ compiler, or an empty string."""
    named = os.environ.get("CXX", "")
    found = [
        c for c in ([named.split()[0]] if named else ["c++", "g++", "clang++"]) if shutil.which(c)
    ]
    if not found:
        return (
            "a C++ compiler must be on PATH, got none: install g++ 11 or later "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++)"
        )
    banner = subprocess.run([found[0], "--version"], capture_output=True, text=True).stdout
    dump = subprocess.run([found[0], "-dumpversion"], capture_output=True, text=True).stdout
    major = dump.split(".")[0].strip()
    oldest = next((first for maker, first in OLDEST_COMPILERS.items() if maker in banner), 0)
    if major.isdigit() and int(major) < oldest:
        rule = f"must be version {oldest} or later, got {dump.strip()}"
        return f"{found[0]} {rule}: name a newer one in CXX"
    return ""


def check_machine(python: str) -> None:
    """Raise Fault, before anything is written, if something is missing that pip cannot install."""
    try:
        probe = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=True)
        facts = json.loads(probe.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise Fault(f"--python must be a working Python 3.10 or later, got {python}") from error
    version = ".".join(map(str, facts["version"]))
    if facts["version"] < [3, 10]:
        raise Fault(f"Python must be 3.10 or later, got {version}: name a newer one with --python")
    faults = [compiler_fault()]
    if not Path(facts["headers"]).is_file():
        faults.append(
            f"the headers of Python {version} must be installed, got no {facts['headers']}: "
            "Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel"
        )
    if not facts["venv"]:
        faults.append(
            f"Python {version} must be able to make virtual environments, got no ensurepip: "
            "Debian, Ubuntu: apt install python3-venv"
        )
    faults = [fault for fault in faults if fault]
    if faults:
        raise Fault("\n".join(faults))


def say(text: str) -> None:
    """Print a line about progress, in order with the output of the programs called."""
    print(f"-- {text}", flush=True)


def call(*command: str | Path) -> int:
    """Run a program of .venv (first on PATH) in the repository; return its exit status."""
    env = dict(os.environ, PATH=f"{VENV / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
    # Neither an outer package path nor the user's own packages may stand in for what is built here.
    env.pop("PYTHONPATH", None)
    env["PYTHONNOUSERSITE"] = "1"
    return subprocess.run([str(c) for c in command], cwd=ROOT, env=env).returncode


def must(what: str, *command: str | Path) -> None:
    """Run a program; raise Fault if it fails."""
    if call(*command) != 0:
        raise Fault(f"{what} failed; the reason is above")


def pip() -> tuple[str | Path, ...]:
    """Return the begin of a command that installs into .venv."""
    return (VENV / "bin/python", "-m", "pip", "install", "--disable-pip-version-check")


def setup(arguments: argparse.Namespace) -> None:
    """Make .venv and fill it, unless it already holds exactly this."""
    # The folder belongs to it: a virtual environment does not survive being moved.
    origin = [str(VENV), shutil.which(arguments.python) or arguments.python]
    wanted = json.dumps([origin, REQUIREMENTS])
    stamp = VENV / "ssm-stamp"
    found = stamp.read_text() if stamp.is_file() and (VENV / "bin/python").exists() else ""
    if found == wanted:
        return
    check_machine(arguments.python)
    started = time.monotonic()
    if not found or json.loads(found)[0] != origin:
        say(f"making {VENV.name}")
        must("making the virtual environment", arguments.python, "-m", "venv", "--clear", VENV)
    stamp.unlink(missing_ok=True)
    quiet = () if sys.stdout.isatty() else ("-q",)
    for step in REQUIREMENTS:
        say(f"installing {', '.join(step)}")
        must("installing", *pip(), *quiet, *step)
    # Written last: an interrupted installation has no stamp and starts again.
    stamp.write_text(wanted)
    say(f"installed in {time.monotonic() - started:.0f} s")


def setup_cuda() -> None:
    """Put nvcc into .venv, unless the machine has one."""
    nvcc = VENV / "bin/nvcc"
    if shutil.which("nvcc") or nvcc.exists():
        return
    say(f"installing {', '.join(CUDA)}")
    must("installing nvcc", *pip(), "-q", *CUDA)
    root = next(VENV.glob("lib/python3*/site-packages/nvidia/cu13"), None)
    if root is None:
        raise Fault("the wheels of nvcc must hold nvidia/cu13, and do not")
    # The wheels keep libraries where nvcc does not look.
    nvcc.write_text(f'#!/bin/sh\nexec "{root}/bin/nvcc" -L"{root}/lib" "$@"\n')
    nvcc.chmod(0o755)


def has_nvcc() -> bool:
    """Say whether the build will find nvcc."""
    return shutil.which("nvcc") is not None or (VENV / "bin/nvcc").exists()


def install_if_possible(*wheels: str) -> bool:
    """Install what nothing depends on; say whether that went well."""
    say(f"installing {', '.join(wheels)}")
    return call(*pip(), "-q", "--retries", "1", "--timeout", "15", "--no-deps", *wheels) == 0


def setup_cutlass() -> str:
    """Put the CUTLASS headers into .venv if nvcc is there; return what the build will find."""
    if not has_nvcc():
        return ""
    wheel = "lib/python3*/site-packages/nvidia_cutlass-*.dist-info"
    if not any(VENV.glob(wheel)) and not install_if_possible(CUTLASS):
        say("going on without CUTLASS: CUDA kernels will multiply without tensor cores")
        return ""
    return next(VENV.glob(wheel)).name


def setup_disassembler() -> None:
    """Put cuobjdump into .venv if nvcc is there and the machine has none."""
    if not has_nvcc() or shutil.which("cuobjdump") or (VENV / "bin/cuobjdump").exists():
        return
    if not install_if_possible(*DISASSEMBLER):
        say("going on without cuobjdump: no test will read the machine code of CUDA kernels")
        return
    for name in ("nvdisasm", "cuobjdump"):
        found = next(VENV.glob(f"lib/python3*/site-packages/nvidia/cu13/bin/{name}"), None)
        if found is None:
            raise Fault(f"the wheels of cuobjdump must hold nvidia/cu13/bin/{name}, and do not")
        (VENV / "bin" / name).symlink_to(found)


def listing() -> str:
    """Hash the names of all files whose coming and going changes the build."""
    names = []
    for folder in ("packages", "tests", "third_party"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT)
            hidden = any(part.startswith((".", "__pycache__")) for part in name.parts)
            if not hidden and path.is_file():
                names.append(str(name))
    text = "\n".join([*sorted(names), (VENV / "ssm-stamp").read_text()])
    return hashlib.sha256(text.encode()).hexdigest()


def link() -> None:
    """Let the interpreter and the programs of .venv find both packages where they are built.

    Not an editable installation: that would come before the build tree that `meson test` names.
    """
    paths = (BUILD / "packages/ssm-kernels/python", ROOT / "packages/ssm-models/src")
    for site in VENV.glob("lib/python3*/site-packages"):
        (site / "ssm-checkout.pth").write_text("".join(f"{path}\n" for path in paths))
    for program, module in PROGRAMS.items():
        script = VENV / "bin" / program
        script.write_text(f'#!/bin/sh\nexec "${{0%/*}}/python" -m {module} "$@"\n')
        script.chmod(0o755)


def build(arguments: argparse.Namespace, *targets: str) -> None:
    """Configure when there is a reason to, and compile: both modules, or what is named."""
    setup(arguments)
    if arguments.cuda:
        setup_cuda()
    cuda = "enabled" if arguments.cuda else "auto"
    options = (f"-Dcuda={cuda}", f"-Dgpu_archs={arguments.gpu_archs}")
    now = "\n".join((str(ROOT), listing(), *options, setup_cutlass()))
    stamp = BUILD / "ssm-listing"
    found = stamp.read_text() if stamp.is_file() else ""
    if found != now:
        check_machine(arguments.python)
        # Meson finds files when it configures and does not notice new ones by itself. A build tree
        # that was moved keeps the old paths and has to go.
        moved = found and found.splitlines()[0] != str(ROOT)
        known = (
            ["--wipe"] if moved else ["--reconfigure"] if (BUILD / "build.ninja").is_file() else []
        )
        must("meson setup", "meson", "setup", *known, *options, BUILD)
        stamp.write_text(now)
    must("compiling", "ninja", "-C", BUILD, "-j", str(arguments.jobs), *(targets or ["all"]))
    link()


def junit_counts(path: Path) -> tuple[Counter, list[str], Counter]:
    """Read one pytest report: counts by outcome, names of the failed, skips by reason."""
    counts, failed, reasons = Counter(), [], Counter()
    for case in ElementTree.parse(path).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skip is not None:
            counts["skipped"] += 1
            reasons[skip.get("message", "")] += 1
        else:
            counts["passed"] += 1
    return counts, failed, reasons


def summarise(testlog: Path, junit: Path) -> tuple[Counter, list[str], Counter]:
    """Sum all tests: a pytest suite counts its cases, every other program counts as one."""
    counts, failed, reasons = Counter(), [], Counter()
    lines = testlog.read_text().splitlines() if testlog.is_file() else []
    for entry in map(json.loads, lines):
        name, result = entry["name"].rpartition(":")[2], entry["result"]
        report = junit / f"{name}.xml"
        cases_failed = False
        if report.is_file():
            suite, names, why = junit_counts(report)
            counts, failed, reasons = counts + suite, failed + names, reasons + why
            cases_failed = bool(names)
        elif result in ("OK", "EXPECTEDFAIL"):
            counts["passed"] += 1
        elif result == "SKIP":
            counts["skipped"] += 1
            reasons[f"{name} is not for this machine"] += 1
        # A suite may also die outside its cases: a crash, a time limit, nothing collected.
        if result not in ("OK", "EXPECTEDFAIL", "SKIP") and not cases_failed:
            counts["failed"] += 1
            failed.append(f"{name} ({result})")
    return counts, failed, reasons


def test(arguments: argparse.Namespace) -> int:
    """Build, run the tests, print the summary; return the exit status."""
    build(arguments, "all", "meson-test-prereq")
    setup_disassembler()
    testlog = BUILD / "meson-logs/testlog.json"
    # What an earlier run left must not count for this one.
    shutil.rmtree(JUNIT, ignore_errors=True)
    testlog.unlink(missing_ok=True)
    meson_test = ("meson", "test", "-C", BUILD, "--no-rebuild", "--print-errorlogs")
    status = call(*meson_test, "--num-processes", str(arguments.jobs), *arguments.suites)
    counts, failed, reasons = summarise(testlog, JUNIT)
    for reason, number in sorted(reasons.items()):
        print(f"skipped {number}: {reason}")
    for name in failed:
        print(f"failed: {name}")
    outcomes = {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")}
    print(SUMMARY.format(**outcomes), flush=True)
    return 1 if status or failed or not counts["passed"] else 0


def demo(arguments: argparse.Namespace) -> int:
    """Build what it runs on, then stream text from the committed model; return the exit status."""
    for_gpu = arguments.cuda or shutil.which("nvidia-smi")
    build(arguments, "all" if for_gpu else "cpu_package")
    return call(VENV / "bin/python", ROOT / "tools/demo.py")


COMMANDS = {"demo": demo, "test": test, "build": build, "setup": setup}


def main() -> int:
    """Do what the command line says; return the exit status."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("suites", nargs="*", help="test: only these, for example `kernels`")
    parser.add_argument("--python", default=sys.executable, help="interpreter to make .venv from")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="parallel jobs (default 2)")
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels, nvcc included")
    parser.add_argument(
        "--gpu-archs", default="auto", help="auto (default), release, or a list such as 80,90a"
    )
    # So that suites may stand behind options.
    arguments = parser.parse_intermixed_args()
    try:
        return COMMANDS[arguments.command](arguments) or 0
    except Fault as fault:
        for line in str(fault).splitlines():
            print(f"dev.py: {line}", file=sys.stderr, flush=True)
        if arguments.command == "test":
            # Whoever reads the last line finds one, and in it the failure.
            print(SUMMARY.format(passed=0, failed=1, skipped=0), flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
