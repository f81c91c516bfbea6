"""Clones of upstream: which commit they are, and their modules, imported without being installed.

On a CPU the pure PyTorch references are all that is wanted, but upstream's files import Triton and
compiled extensions on their first lines. Stand-ins serve these imports; a kernel that is called all
the same stops the run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.goldens.files import Fault


@dataclass(frozen=True)
class Repository:
    """A repository of upstream.

    Args:
        name: owner and name.
        option: of the command line that names the clone.
        package: folder in it that is imported.
        commit: the goldens are of.
    """

    name: str
    option: str
    package: str
    commit: str


MAMBA = Repository(
    "state-spaces/mamba",
    "--mamba-repo",
    "mamba_ssm",
    "10b5d6358f27966f6a40e4bf0baa17a460688128",
)
CONV = Repository(
    "Dao-AILab/causal-conv1d",
    "--conv-repo",
    "causal_conv1d",
    "0d2252d161f25f7907bbd05985c08ab98d255874",
)
ROTARY = Repository(
    "Dao-AILab/flash-attention",
    "--rotary-repo",
    "flash_attn",
    "060c9188beec3a8b62b33a3bfa6d5d2d44975fab",
)
REPOSITORIES = (MAMBA, CONV, ROTARY)


def check(repository: Repository, folder: Path, allow_other_commit: bool = False) -> str:
    """Return the commit of a clone.

    Args:
        repository: that the folder must hold.
        folder: root of the work tree.
        allow_other_commit: take any commit; changes that are not committed stay refused.

    Raises:
        Fault: the folder holds no clone of that repository, another commit or a changed tree.
    """
    option, root = repository.option, _git(folder, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != folder.resolve():
        raise Fault(f"{option} must be the root of a git clone of {repository.name}, got {folder}")
    if not (folder / repository.package).is_dir():
        raise Fault(
            f"{option} must hold {repository.package}/ of {repository.name}, got {folder} without"
        )
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None or not (allow_other_commit or commit == repository.commit):
        raise Fault(
            f"{option} must be at commit {repository.commit} without --allow-other-commit, "
            f"got {commit}"
        )
    changed = _git(folder, "status", "--porcelain")
    if changed is None or changed:
        lines = (changed or "git status failed").splitlines()
        raise Fault(
            f"{option} must be a clone without changes, got {len(lines)}, "
            f"the first: {lines[0].strip()}"
        )
    return commit


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says of a folder, or None where it refuses."""
    # Inside a hook, git would take these in place of the folder.
    environment = {n: v for n, v in os.environ.items() if not n.startswith("GIT_")}
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise Fault(f"git must be on PATH, got {error}") from None
    return run.stdout.rstrip("\n") if run.returncode == 0 else None


class Absent:
    """Whatever a stand-in is asked for: a decorator, a setting, a base class; never a kernel."""

    def __init__(self, kwargs: object = None, *_, **settings) -> None:
        vars(self).update(settings, kwargs=kwargs)  # kwargs: what upstream reads of a Config

    def __call__(self, *_, **__) -> Absent:
        """Stand for what a decorator or a constructor would return."""
        return self

    def __getitem__(self, grid: object) -> None:
        raise Fault("a kernel must not be called on cpu, got a launch from upstream's code")


class _StandIn(types.ModuleType):
    """A module all of whose attributes are Absent."""

    __version__ = "3.0.0"  # of Triton: upstream asks for it

    def __getattr__(self, name: str) -> type[Absent]:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Absent,), {})


# What upstream's files import and its references have no use for.
_STAND_INS = (
    "triton",
    "triton.language",
    "selective_scan_cuda",
    "causal_conv1d.cpp_functions",
    "flash_attn.ops.triton.rotary",
    "mamba_ssm.modules.mamba3",  # of later commits, for which there are no goldens
    "huggingface_hub",
    "transformers",
    "transformers.generation",
    "transformers.utils",
    "transformers.utils.hub",
)
# Packages without which upstream has fallbacks; they count as missing unless a clone was loaded.
_OPTIONAL = ("causal_conv1d", "flash_attn")


@contextlib.contextmanager
def _replaced(modules: dict) -> Iterator[None]:
    """Put modules, or None for ones that cannot be imported, in place of the installed ones."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _package(name: str, folder: Path) -> types.ModuleType:
    """Return a package that finds its modules in a folder and runs no __init__.py."""
    found = types.ModuleType(name)
    found.__path__ = [str(folder)]
    return found


def modules(repository: Repository, folder: Path, names: tuple[str, ...], device: str) -> dict:
    """Import modules of a clone.

    Args:
        repository: the clone is of.
        folder: root of the clone.
        names: modules, from the package's folder on, in the order in which they are imported.
        device: "cpu" puts the stand-ins in place of kernels.

    Returns:
        Last part of a module's name -> module.

    Raises:
        Fault: something that upstream imports is not installed.
    """
    sys.dont_write_bytecode = True  # the clone stays as it is
    package = repository.package
    standing = {}
    if device == "cpu":
        standing = {name: _StandIn(name) for name in _STAND_INS}
        standing["triton"].language = standing["triton.language"]
        standing |= {name: None for name in _OPTIONAL if name not in sys.modules}
    if package not in sys.modules:
        # Its own __init__.py would import all modules, before any of them can be looked at.
        sys.modules[package] = _package(package, folder / package)
    standing.pop(package, None)
    with _replaced(standing):
        return installed(repository, names, device)


def installed(repository: Repository, names: tuple[str, ...], device: str) -> dict:
    """Import modules of a repository's package from where Python finds it.

    Args:
        repository: whose package it is.
        names: modules, from the package's folder on.
        device: for the message.

    Returns:
        Last part of a module's name -> module.

    Raises:
        Fault: the package, or something that it imports, is not installed.
    """
    try:
        return {
            n.split(".")[-1]: importlib.import_module(f"{repository.package}.{n}") for n in names
        }
    except ImportError as error:
        raise Fault(
            f"{error.name} must be installed to import {repository.name} on {device}, got "
            f"{type(error).__name__}: {error}; nothing but running upstream's code needs it"
        ) from None
