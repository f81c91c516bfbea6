"""Make the Mamba models of transformers run on our kernels, and undo it.

``enable()`` replaces what the modeling modules of transformers call; models that are already loaded
are served from their next call on, and so is every model that is loaded later. ``disable()`` puts
everything back. Importing this module changes nothing and does not import transformers.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from ssm.integrations.transformers_functions import MAMBA1, MAMBA2, missing_kernels, serves_device
from ssm.integrations.transformers_mixers import (
    gated_norm,
    language_model,
    mamba1_mixer,
    mamba2_mixer,
    rms_norm,
)

__all__ = ["FAMILIES", "LEVELS", "TESTED", "disable", "enable", "status"]

LEVELS = ("functions", "mixers")
# Versions of transformers, without the last number, on which the tests of this repository ran.
TESTED = ("5.23",)


class Family(NamedTuple):
    """What is replaced in one modeling module: function -> maker, and method owner -> maker."""

    functions: dict[str, Callable]
    methods: dict[str, Callable]


def _mamba1(prefix: str, mixer: str) -> Family:
    return Family(MAMBA1, {prefix + mixer: mamba1_mixer, **_around(prefix)})


def _mamba2(prefix: str, mixer: str, gated: str | None = None) -> Family:
    methods = {prefix + mixer: mamba2_mixer, gated or f"{prefix}RMSNormGated": gated_norm}
    return Family(MAMBA2, methods | _around(prefix))


def _around(prefix: str) -> dict[str, Callable]:
    """Return what is replaced outside the mixers of a family, whose classes share a prefix."""
    return {f"{prefix}RMSNorm": rms_norm, f"{prefix}ForCausalLM": language_model}


# Name of a model type in transformers -> what is replaced for it.
FAMILIES = {
    "mamba": _mamba1("Mamba", "Mixer"),
    "falcon_mamba": _mamba1("FalconMamba", "Mixer"),
    "jamba": _mamba1("Jamba", "MambaMixer"),
    "mamba2": _mamba2("Mamba2", "Mixer", "MambaRMSNormGated"),
    "bamba": _mamba2("Bamba", "Mixer"),
    "zamba2": _mamba2("Zamba2", "MambaMixer"),
    "nemotron_h": _mamba2("NemotronH", "Mamba2Mixer"),
    "granitemoehybrid": _mamba2("GraniteMoeHybrid", "MambaLayer"),
    "falcon_h1": _mamba2("FalconH1", "Mixer"),
}
_MODULES = {f"transformers.models.{name}.modeling_{name}": name for name in FAMILIES}


class _Change(NamedTuple):
    """One attribute that was replaced."""

    owner: object  # a module or a class
    name: str
    original: Callable
    replacement: Callable


_level: list[str] = []  # the level that is enabled, or nothing
_changes: dict[str, list[_Change]] = {}  # family -> what was replaced in it
_refused: dict[str, str] = {}  # family -> why nothing was


def enable(level: str = "mixers") -> None:
    """Serve the Mamba models of transformers, loaded or yet to be loaded, with our kernels.

    Calling it again with the same level does nothing; with another, it changes the level. What has
    no kernels here (a device, an activation) is left to transformers.

    Args:
        level: "mixers" replaces kernel functions, mixers and norms, and repairs what transformers
            gets wrong (docs/transformers.md). "functions" replaces the kernel functions only and
            computes what transformers computes; it depends less on the version and is slower.

    Raises:
        ValueError: level is no level.
        RuntimeError: transformers is not installed, or older than 5, or, for level "mixers", not a
            tested version.

    Warns:
        UserWarning: no kernels load, so that all is left to transformers; this version of
            transformers was not tested, or a family in it is not what it was in the tested ones
            and is left as it is.

    Source:
        docs/transformers.md.
    """
    if level not in LEVELS:
        raise ValueError(f"enable: level must be one of {', '.join(LEVELS)}, got {level!r}")
    if _level == [level]:
        return
    _check_version(_version(), level)
    disable()
    # Loads the kernels, so that the first call of a model need not.
    if not serves_device("cpu") and not serves_device("cuda"):
        warnings.warn(
            "enable: kernels must load to serve the models, which are left to transformers, got "
            f"{missing_kernels()}",
            stacklevel=2,
        )
    _level.append(level)
    sys.meta_path.insert(0, _FINDER)
    for module_name in _MODULES:
        if module_name in sys.modules:
            _replace(sys.modules[module_name])


def disable() -> None:
    """Put back what :func:`enable` replaced; without it, do nothing.

    What somebody else has replaced since then is left as it is.

    Source:
        docs/transformers.md.
    """
    _level.clear()
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    for changes in _changes.values():
        for owner, name, original, replacement in changes:
            if vars(owner).get(name) is replacement:
                setattr(owner, name, original)
    _changes.clear()
    _refused.clear()


def status() -> dict:
    """Say what is replaced.

    Returns:
        A dict with "level" (None if disabled), "transformers" (its version, None if absent),
        "tested" (whether that is a tested version), "devices" (device types that are served) and
        "families": name -> {"imported": whether its modeling module is loaded, "replaced": names of
        what is replaced now, "reason": why nothing is, or ""}.

    Source:
        docs/transformers.md.
    """
    version = _version()
    families = {}
    for module_name, name in _MODULES.items():
        imported = module_name in sys.modules
        reason = _refused.get(name, "")
        if not _level:
            reason = "disabled"
        elif not imported:
            reason = "not imported yet, will be replaced when it is"
        replaced = [
            change.name if inspect.ismodule(change.owner) else f"{change.owner.__name__}.forward"
            for change in _changes.get(name, ())
            if vars(change.owner).get(change.name) is change.replacement
        ]
        families[name] = {"imported": imported, "replaced": replaced, "reason": reason}
    return {
        "level": _level[0] if _level else None,
        "transformers": version,
        "tested": version is not None and _is_tested(version),
        "devices": [device for device in ("cpu", "cuda") if serves_device(device)],
        "families": families,
    }


def _version() -> str | None:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_tested(version: str) -> bool:
    return ".".join(version.split(".")[:2]) in TESTED


def _check_version(version: str | None, level: str) -> None:
    tested = ", ".join(f"{number}.*" for number in TESTED)
    if version is None:
        raise RuntimeError("enable: transformers must be installed, got no such package")
    if int(version.split(".")[0]) < 5:
        raise RuntimeError(f"enable: transformers must be version 5 or later, got {version}")
    if _is_tested(version):
        return
    if level == "mixers":
        # Forward passes know attributes and caches that change between versions.
        raise RuntimeError(f"enable: level mixers must have transformers {tested}, got {version}")
    warnings.warn(
        f"enable: transformers {version} was not tested with these kernels ({tested} was); "
        "families that differ are left as they are",
        stacklevel=3,
    )


def _missing(module: ModuleType, family: Family, level: str) -> str:
    """Return what a modeling module lacks of what would be replaced, or nothing."""
    for name in family.functions:
        if not callable(getattr(module, name, None)):
            return f"{module.__name__} has no function {name}"
    for name in family.methods if level == "mixers" else ():
        if not callable(getattr(getattr(module, name, None), "forward", None)):
            return f"{module.__name__} has no class {name}"
    return ""


def _replace(module: ModuleType) -> None:
    """Replace what the level asks for in a modeling module, all of it or nothing."""
    name, level = _MODULES[module.__name__], _level[0]
    family = FAMILIES[name]
    missing = _missing(module, family, level)
    if missing:
        _refused[name] = missing
        warnings.warn(f"enable: {missing}: {name} models are left as they are", stacklevel=2)
        return
    targets = [(module, function, maker) for function, maker in family.functions.items()]
    if level == "mixers":
        targets += [(getattr(module, c), "forward", maker) for c, maker in family.methods.items()]
    changes = _changes[name] = []
    for owner, attribute, maker in targets:
        original = getattr(owner, attribute)
        replacement = maker(original)
        setattr(owner, attribute, replacement)
        changes.append(_Change(owner, attribute, original, replacement))


class _Finder:
    """Sees the modeling modules when they are imported, and replaces in them what is to be."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Return the spec that the others find, with a loader that replaces afterwards."""
        if name not in _MODULES:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """A loader that hands the executed module to :func:`_replace`."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        """Leave the creation to the loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module):
        """Execute the module, then replace in it."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if _level:
            _replace(module)


_FINDER = _Finder()
