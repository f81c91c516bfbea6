"""``ssm-models info``: versions, backends and why."""

from __future__ import annotations

import importlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import ssm
from ssm.utils import dispatch


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("info", help="versions, backends and why; for bug reports")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def collect_info() -> dict:
    """Return what a bug report needs; every value can be written as JSON."""
    versions = {"ssm-models": ssm.__version__, "ssm-kernels": _kernels("__version__")}
    versions |= {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("safetensors", "numpy"):
        versions[name] = metadata.version(name)
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ("cpu", "cuda") if gpus else ("cpu",)
    return {
        "versions": versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "environment": {name: os.environ.get(name) for name in ("SSM_BACKEND", "SSM_ISA")},
        "backend": dispatch.get_available_backend(),
        "isa": _kernels("active_isa"),
        "source": str(Path(ssm.__file__).parent),
        "operators": [dispatch.why(op, device) for device in devices for op in dispatch.OPERATORS],
    }


def _kernels(name: str) -> str | None:
    """Return what ssm_kernels says about itself under a name; None where it cannot be loaded."""
    try:
        value = getattr(importlib.import_module("ssm_kernels"), name)
        return value() if callable(value) else value
    except Exception:  # a broken backend must not break the report about it
        return None


def run(arguments) -> None:
    """Print versions, threads, backends and the reason per operator."""
    info = collect_info()
    if arguments.json:
        print(json.dumps(info, indent=2))
        return
    for name, version in info["versions"].items():
        print(f"{name:<14}{version or 'cannot be loaded'}")
    for name in ("platform", "source"):
        print(f"{name:<14}{info[name]}")
    print(f"{'threads':<14}{info['threads']} of {info['cores']} cores")
    print(f"{'gpus':<14}{', '.join(info['gpus']) or 'none'}")
    for name, value in info["environment"].items():
        print(f"{name:<14}{'not set' if value is None else value}")
    print(f"{'backend':<14}{info['backend']}, instruction set {info['isa'] or 'none'}")
    for line in info["operators"]:
        print(f"  {line}")
