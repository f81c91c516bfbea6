"""Timing for tools/bench.py: interleaved samples, the machine's ceilings, the facts of the run."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tools.checkout import ROOT

# A sample below this is mostly clock and scheduler: short calls are repeated within one.
MIN_SAMPLE_S = 5e-4
# What one implementation may cost per workload: only the reference ever gets near it.
BUDGET_S = 4.0
# A call longer than this has its caches full of its own data anyway.
WARM_S = 0.1
CEILING_S = 0.15


@dataclass(frozen=True)
class Timing:
    """Seconds per call over all samples of one implementation."""

    median: float
    best: float
    worst: float
    samples: int
    calls_per_sample: int


def interleave(
    calls: dict[str, Callable[[], object]],
    iters: int,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time several implementations in turn, so that a drift of the machine hits all of them.

    Every sample of a short call follows an untimed one, which brings its own data back into the
    caches. A slow implementation gets fewer samples, spread over the whole run.

    Args:
        calls: name -> the call.
        iters: samples of each.
        synchronize: waits until the device has finished.

    Returns:
        name -> Timing.
    """
    plan = {}
    for name, call in calls.items():
        seconds = _once(call, 1, synchronize)
        # The first call of a short one pays for what it loads.
        seconds = _once(call, 1, synchronize) if seconds < 1.0 else seconds
        samples = iters if seconds * iters <= BUDGET_S else max(1, int(BUDGET_S / seconds))
        plan[name] = (samples, max(1, round(MIN_SAMPLE_S / seconds)), seconds < WARM_S)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(iters):
        for name, (samples, inner, warm) in plan.items():
            if (turn + 1) * samples // iters > turn * samples // iters:
                if warm:
                    calls[name]()
                times[name].append(_once(calls[name], inner, synchronize))
    return {
        name: Timing(statistics.median(t), min(t), max(t), len(t), plan[name][1])
        for name, t in times.items()
    }


def _once(call: Callable[[], object], inner: int, synchronize: Callable[[], object]) -> float:
    """Return the mean seconds of `inner` calls in a row."""
    synchronize()
    started = time.perf_counter()
    for _ in range(inner):
        call()
    synchronize()
    return max((time.perf_counter() - started) / inner, 1e-9)


class Ceilings:
    """What this processor can do at most, measured when asked for and asked again at the end.

    A rate is the best seen in the run: a neighbour on the machine can only make it smaller, and a
    ceiling that is too low would flatter every kernel under it.
    """

    def __init__(self, threads: int):
        """Measure nothing yet.

        Raises:
            ImportError: the compiled library is not there.
        """
        from ssm_kernels import _cpu

        self._probe, self._threads = _cpu._ceiling, threads
        self._rates: dict[tuple[str, int], float] = {}

    def rate(self, name: str, nbytes: int = 0, again: bool = False) -> float:
        """Return fma or exp in elements per second, or copy or copy_streamed in bytes per second.

        Args:
            name: of the limit.
            nbytes: of a copy: the size of source and destination together.
            again: measure even if it was measured before.
        """
        key = (name, max(nbytes, 4096 * self._threads) if nbytes else 0)
        if again or key not in self._rates:
            measured = self._probe(name, self._threads, CEILING_S, key[1])
            self._rates[key] = max(measured, self._rates.get(key, 0.0))
        return self._rates[key]

    def remeasure(self) -> None:
        """Give every ceiling another chance, at another time of the run."""
        for name, nbytes in list(self._rates):
            self.rate(name, nbytes, again=True)

    def summary(self) -> dict[str, float]:
        """Return the ceilings of the machine by their names in the JSON."""
        l2, last = cache_bytes(2), cache_bytes(3)
        return {
            "fma_per_s": self.rate("fma"),
            "exp_per_s": self.rate("exp"),
            "copy_l2_bytes_per_s": self.rate("copy", l2 * self._threads // 2),
            "copy_bytes_per_s": self.rate("copy", max(8 * last, 256 << 20)),
            "copy_streamed_bytes_per_s": self.rate("copy_streamed", max(8 * last, 256 << 20)),
        }


def cache_bytes(level: int) -> int:
    """Return the size of a cache of this machine; what is usual where the system does not say."""
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (folder / "level").read_text().strip() == str(level):
                size = (folder / "size").read_text().strip()
                return int(size.rstrip("KM")) << {"K": 10, "M": 20}.get(size[-1], 0)
        except (OSError, ValueError):
            continue
    return {1: 32 << 10, 2: 1 << 20, 3: 32 << 20}[level]


def facts(threads: int) -> dict:
    """Return what is needed to compare this run with another one; all of it fit for JSON."""
    import torch

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["numpy"] = version("numpy")
    isa = None
    try:
        import ssm_kernels

        versions["ssm_kernels"], isa = ssm_kernels.__version__, ssm_kernels.active_isa()
    except Exception as error:  # a broken library is a fact of the run, not a reason to end it
        versions["ssm_kernels"] = f"not usable: {type(error).__name__}: {error}"
    import ssm

    versions["ssm_models"] = getattr(ssm, "__version__", None)
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "l2_bytes": cache_bytes(2),
            "l3_bytes": cache_bytes(3),
            "system": platform.platform(),
        },
        "isa": isa,
        "threads": threads,
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def processor_name(cpuinfo: str) -> str:
    """Return what /proc/cpuinfo calls the first processor; on Arm it has numbers for a name."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        return fields["model name"]
    numbers = [
        f"{name[4:]} {fields[name]}" for name in ("CPU implementer", "CPU part") if name in fields
    ]
    return ", ".join([platform.processor() or platform.machine(), *numbers])


def _processor() -> str:
    try:
        return processor_name(Path("/proc/cpuinfo").read_text())
    except OSError:
        return processor_name("")


def _git(*words: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def noop_seconds() -> float:
    """Return the median seconds of an empty compiled call that takes eight torch tensors.

    Raises:
        ImportError: the compiled library is not there.
    """
    import torch
    from ssm_kernels import _cpu

    tensors = [torch.zeros(4, 4) for _ in range(8)]
    return interleave({"noop": lambda: _cpu._noop(*tensors)}, 30)["noop"].median


def in_fresh_process(arguments: list[str]) -> subprocess.CompletedProcess:
    """Run tools/bench.py again with these arguments, with the packages this process found."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(ROOT / "tools/bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)
