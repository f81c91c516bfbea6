#!/usr/bin/env python3
"""Check and time the CUDA kernels on the machine at hand, in one command.

Usage: tools/gpu_check.py [--minutes N] [--json FILE] [--part PART ...] [--op OP ...]
                          [--wheels FOLDER]

Parts, in this order:
  ceilings   copy and matrix-product rates of the GPU
  matrix     every case of tests/cases.py in float32, bfloat16 and float16: outputs and gradients
             against the reference in float64 on the CPU, and the same bits when called again
  training   gradients of Mamba-1, Mamba-2 and hybrid models against float64 on the CPU, plain, with
             padding and packed; a few steps that must learn; the time of a step of a 130M model
  decoding   generate with cg=True and without: the same tokens and scores, those of one forward
             pass over the text, and the time per token
  long       a million tokens in one row: right, in linear time, in constant memory
  sanitizer  the small cases once more under compute-sanitizer's four tools
  bench      median times of workloads of training size, replayed from a CUDA graph and called in a
             row, with the time that moving their tensors takes at the copy rate beside each, and
             those of mamba_ssm, causal_conv1d and flashinfer on the same tensors where installed

Needs a checkout, torch with CUDA, and either ssm-kernels built with CUDA or what tools/gpu_build.py
compiles it with; nothing is fetched. FILE (default build/gpu_check.json; docs/cuda.md says how to
read it) is written after each item and continued if it was begun with the same sources on the same
kind of GPU. An item that crashes, hangs or leaves the GPU unusable is a fault, and the next one
starts in a new process. Ends with status 1 if anything is wrong, after 50 faults at the latest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import gpu_build
from tools.checkout import ROOT, find_packages

PARTS = ("ceilings", "matrix", "training", "decoding", "long", "sanitizer", "bench")
DTYPES = ("float32", "bfloat16", "float16")
MOST_FAULTS = 50
SMALL = ("tiny", "odd", "packed_holes", "padded", "seq_idx", "indices")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Seconds after which an item counts as hanging; the sanitizer's have more than its own limit.
PATIENCE, SANITIZER_LIMIT = 300, 600
# Status of a process that must be followed by another one.
LOST = 3


class Report:
    """What is known so far: item -> result. Kept in a file, so that a run can be continued."""

    def __init__(
        self, path: Path, environment: dict, deadline: float | None, blamed: str | None = None
    ):
        self.path, self.deadline = path, deadline
        self.found = {"environment": environment, "items": {}}
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before.get("environment") == environment:
                self.found = before
        self.found.pop("running", None)
        if blamed is not None:
            self._keep(blamed, {"fault": "the process crashed or hung"})

    @property
    def items(self) -> dict:
        """Return item -> result; a result with `fault` is one that is wrong."""
        return self.found["items"]

    def faults(self) -> dict:
        """Return what is wrong."""
        return {name: item["fault"] for name, item in self.items.items() if "fault" in item}

    def run(self, name: str, measure, *arguments, patience: float = PATIENCE) -> None:
        """Measure an item, unless it is known already or the time or the patience is over."""
        late = self.deadline is not None and time.time() > self.deadline
        if name in self.items or late or len(self.faults()) >= MOST_FAULTS:
            return
        self.found["running"] = name
        self._write()
        watch = threading.Timer(patience, os._exit, (LOST,))
        watch.daemon = True
        watch.start()
        try:
            result = measure(*arguments)
        except Exception as error:  # one broken kernel must not hide the others
            said = f"{type(error).__name__}: {str(error)[:500]}"
            result = {"skipped" if is_excused(error) else "fault": said}
        finally:
            watch.cancel()
        self.found.pop("running")
        self._keep(name, result)
        if not {"fault", "skipped"}.isdisjoint(result) and not is_usable():
            sys.exit(LOST)

    def _keep(self, name: str, result: dict) -> None:
        self.items[name] = result
        print(f"{name:64} {summary(result)}", flush=True)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # In one step: the process may be killed at any moment.
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def is_excused(error: Exception) -> bool:
    """Say whether an error is of the machine: too little memory, or a package that is missing."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] not in ("ssm", "ssm_kernels", "tests", "tools")
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError")


def is_usable() -> bool:
    """Say whether the GPU still answers: an illegal access ends all work of a process on it."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def summary(result: dict) -> str:
    """Return a result in one line."""
    if "fault" in result:
        return f"FAULT {result['fault'].splitlines()[0]}"
    shown = {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in result.items()}
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def environment_of(device: str) -> dict:
    """Return what a result depends on."""
    import torch

    from tools import measure

    facts = measure.facts(1)
    found = {"commit": facts["commit"], "modified": facts["modified"], "device": device}
    found |= {"sources": gpu_build.sources_digest(), "torch": torch.__version__}
    if device == "cpu":
        return found
    from ssm_kernels import _build, _cuda

    from ssm.utils import dispatch

    return {
        **found,
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "kernels": _build.CUDA,
        "architectures": list(_cuda.architectures),
        # Some files hold several operators.
        "operators": [
            op for op in dispatch.OPERATORS if dispatch.FILES.get(op, op) in _cuda.operators
        ],
    }


def driver_version() -> str | None:
    """Return what nvidia-smi says, where there is one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]


def check_matrix(report: Report, operators: list[str], device: str, small: bool) -> None:
    """Compare every case, or only the small ones in float32, with the reference in float64."""
    from tests.cases import CASES

    for op in operators:
        for case in CASES[op]:
            if small and str(case) not in SMALL:
                continue
            for dtype in DTYPES[:1] if small else DTYPES:
                report.run(f"matrix/{op}/{case}/{dtype}", compare, op, case, dtype, device)


def compare(op: str, case, dtype: str, device: str) -> dict:
    """Return how the operator was served, or raise what is wrong."""
    import torch

    import ssm.ops
    from ssm.ops.python import reference
    from ssm.utils import dispatch
    from tests.cases import make
    from tests.tensors import tensors
    from tests.tolerances import assert_close
    from tools.goldens.operators import IN_PLACE, call, draw_weights, gradients, is_float

    narrow = tensors(make(case, 1), getattr(torch, dtype))
    wide = {n: a.double() if is_float(a) else a for n, a in narrow.items()}
    there = {n: to_device(a, device) for n, a in narrow.items()}
    with torch.no_grad():
        want = call(op, getattr(reference, op), wide)
        got = call(op, getattr(ssm.ops, op), there)
        again = call(op, getattr(ssm.ops, op), there)
        on_cpu = call(op, getattr(ssm.ops, op), narrow)
    main = next(a for a in there.values() if is_float(a))
    served = dispatch.why(op, main)
    if f": {device}," not in served:
        raise AssertionError(f"served by another backend: {served}")
    bounds = bounds_of(op, dtype, narrow, want, device)
    cpu_bounds = bounds_of(op, dtype, narrow, want, "cpu")
    for name, value in want.items():
        assert_close(name, got[name], value, bounds[name])
        assert_close(f"{name} of the CPU kernels", on_cpu[name], value, cpu_bounds[name])
        if not torch.equal(bits(got[name]), bits(again[name])):
            raise AssertionError(f"{name}: other bits in a second call")
    if op in IN_PLACE:
        return {"served": "outputs"}
    weights = draw_weights(want)

    def differentiate(function, arguments, like):
        used = {n: w.to(like[n].device, like[n].dtype) for n, w in weights.items()}
        return gradients(lambda given: call(op, function, given), arguments, used)

    rounded = {n: w.to(got[n].dtype) for n, w in weights.items()}
    weights = {n: w.double() for n, w in rounded.items()}
    want = differentiate(getattr(reference, op), wide, want)
    found = differentiate(getattr(ssm.ops, op), there, got)
    again = differentiate(getattr(ssm.ops, op), there, got)
    bounds = gradient_bounds_of(op, dtype, narrow, weights, want, device)
    for name, value in want.items():
        assert_close(f"d{name}", found[name], value, bounds[name])
        if not torch.equal(bits(found[name]), bits(again[name])):
            raise AssertionError(f"d{name}: other bits in a second call")
    return {"served": "outputs and gradients"}


def bounds_of(op: str, dtype: str, arguments: dict, want: dict, device: str) -> dict:
    """Return how far each output may be from `want`.

    Products of 16 bits round their operands on a GPU: there the bound is what the row of the
    operator says, and twice the error of a model that rounds at the same points.
    """
    from tests import ssd_rounding
    from tests.tensors import arrays
    from tests.tolerances import TOLERANCES

    row = TOLERANCES[op, dtype]
    bounds = dict.fromkeys(want, row)
    if op != "ssd_chunk_scan" or dtype == "float32" or device == "cpu":
        return bounds
    for name, rounded in ssd_rounding.ssd_chunk_scan(dtype, **arrays(arguments)).items():
        error = abs(rounded - want[name].numpy()).max(initial=0.0)
        bounds[name] = row._replace(atol=row.atol + 2 * float(error))
    return bounds


def gradient_bounds_of(
    op: str, dtype: str, arguments: dict, weights: dict, want: dict, device: str
) -> dict:
    """Return how far each gradient may be from `want`, as bounds_of; `weights` are the outputs'."""
    from tests import ssd_rounding_bwd
    from tests.tensors import arrays
    from tests.tolerances import TOLERANCES

    row = TOLERANCES[f"{op}_bwd", dtype]
    bounds = dict.fromkeys(want, row)
    if op != "ssd_chunk_scan" or dtype == "float32" or device == "cpu":
        return bounds
    given = arrays({"dy": weights["y"], "dfinal_states": weights["final_states"]})
    model = ssd_rounding_bwd.ssd_chunk_scan(dtype, **given, **arrays(arguments))
    for name in want:
        error = abs(model[name] - want[name].numpy()).max(initial=0.0)
        bounds[name] = row._replace(atol=row.atol + 2 * float(error))
    return bounds


def to_device(value, device: str):
    """Return a tensor on the device; what is no tensor stays as it is."""
    return value.to(device) if hasattr(value, "to") else value


def bits(tensor):
    """Return a tensor whose equality is that of bits, NaN included."""
    import torch

    sizes = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return tensor.detach().contiguous().view(sizes[tensor.element_size()])


def check_sanitizer(report: Report, operators: list[str]) -> None:
    """Run the small cases under every tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
        command += ["--worker", "--small", "--part", "matrix"]
        if tool == "memcheck":
            # What torch asks of the driver and expects to fail is no fault of a kernel.
            command[3:3] = ["--report-api-errors", "no"]

        def check(name: str, those: list[str], command: list[str] = command) -> None:
            words = [word for op in those for word in ("--op", op)]
            patience = SANITIZER_LIMIT + PATIENCE
            report.run(name, sanitize, program, [*command, *words], patience=patience)

        # Starting under the sanitizer takes longest: one by one only to find who is at fault.
        check(f"sanitizer/{tool}", operators)
        if "fault" in report.items.get(f"sanitizer/{tool}", {}):
            for op in operators:
                check(f"sanitizer/{tool}/{op}", [op])


def sanitize(program: str | None, command: list[str]) -> dict:
    """Run one tool; a fault is what it says."""
    if program is None:
        return {"skipped": "compute-sanitizer is not installed"}
    scratch = ROOT / "build/gpu_check_small.json"
    scratch.unlink(missing_ok=True)
    done = subprocess.run(
        [*command, "--json", str(scratch)], capture_output=True, text=True, timeout=SANITIZER_LIMIT
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()[-30:]
        return {"fault": "\n".join([f"status {done.returncode}", *said])}
    return {"clean": True}


def supervise(words: list[str], path: Path, deadline: float | None) -> int:
    """Run this program in a process of its own, and once more after each item that broke it."""
    command = [sys.executable, __file__, *words, "--worker"]
    if deadline is not None:
        command += ["--deadline", str(deadline)]
    blame = []
    while True:
        status = subprocess.run([*command, *blame]).returncode
        if status in (0, 1, 2):
            return status
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        # Who ends this process as well, by a limit of time say, blames no item.
        blame = ["--blame", known["running"]] if "running" in known else []
        if status != LOST and not blame:
            print(f"gpu_check: the process ended with status {status}", file=sys.stderr)
            return 1


def prepare(arguments: argparse.Namespace) -> None:
    """Find kernels, built if need be; gpu_build.Fault if there are none, or no GPU."""
    import torch

    if arguments.worker:
        return gpu_build.use()
    if not torch.cuda.is_available():
        raise gpu_build.Fault("gpu_check needs a GPU that torch sees, and found none")
    return gpu_build.build(arguments.wheels)


def main() -> int:
    """Run the parts; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="stop after about this time; default: never")
    parser.add_argument("--json", type=Path, default=ROOT / "build/gpu_check.json")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--op", action="append", help="default: all that have CUDA kernels")
    parser.add_argument("--small", action="store_true", help="only the small cases, in float32")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the build may need")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--blame", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    deadline = arguments.deadline
    if deadline is None and arguments.minutes:
        deadline = time.time() + 60 * arguments.minutes
    find_packages()
    if arguments.device == "cuda":
        try:
            prepare(arguments)
        except gpu_build.Fault as fault:
            print(f"gpu_check: {fault}", file=sys.stderr)
            return 2
        if not arguments.worker:
            return supervise(sys.argv[1:], arguments.json, deadline)
    return work(arguments, deadline)


def work(arguments: argparse.Namespace, deadline: float | None) -> int:
    """Measure what is not known yet; return the exit status."""
    from tools import gpu_bench, gpu_decoding, gpu_long, gpu_training

    environment = environment_of(arguments.device)
    operators = arguments.op or environment.get("operators") or ["selective_scan", "swiglu"]
    report = Report(arguments.json, environment, deadline, arguments.blame)
    parts = arguments.part or PARTS
    if "ceilings" in parts:
        gpu_bench.measure_ceilings(report, arguments.device)
    if "matrix" in parts:
        check_matrix(report, operators, arguments.device, arguments.small)
    if "training" in parts:
        gpu_training.check(report, arguments.device)
    if "decoding" in parts:
        gpu_decoding.check(report, arguments.device)
    if "long" in parts:
        gpu_long.check(report, arguments.device)
    if "sanitizer" in parts and arguments.device == "cuda":
        check_sanitizer(report, operators)
    if "bench" in parts:
        gpu_bench.measure(report, operators, arguments.device)
    faults = report.faults()
    print(f"{len(report.items)} items, {len(faults)} faults: {arguments.json}")
    return 1 if faults or not report.items else 0


if __name__ == "__main__":
    sys.exit(main())
