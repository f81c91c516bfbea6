#!/usr/bin/env python3
"""Time the operators against their reference, torch and what the machine can do at most.

Usage: tools/bench.py [OP] [--workload NAME] [--device cpu|cuda] [--iters N] [--threads N]
                      [--mamba-repo CLONE] [--json FILE]

Per workload a table with the rows python (the reference), cpu and cuda (the compiled operator),
dispatch (``ssm.ops``, what a user calls) and torch-only peers; workloads of an operator that has a
backward get a second table, forward and backward. A clone of state-spaces/mamba adds rows with its
own functions in plain PyTorch (they need einops). Implementations are timed in turn within one run:
compare ratios of one run, not times of two. ``of bound`` is the share of the binding ceiling: the
largest of moved bytes / copy rate of a buffer of that size, multiply-adds / multiply-add rate and
exponentials / exponential rate, as counted in tools/bench/<op>.py and measured in the same run.

Before anything is timed, every compiled implementation must agree with the reference in float64;
otherwise the exit status is 1 and there is no report. SSM_ISA chooses the instruction set.

JSON (schema 1): an object with
    schema, device, iters, threads, isa, commit, modified, machine {processor, cores, l2_bytes,
    l3_bytes, system}, versions {python, torch, numpy, ssm_kernels, ssm_models}, mamba_ssm (commit
    of the clone), load_average [before, after]; null where there is nothing to tell;
    ceilings {fma_per_s, exp_per_s, copy_l2_bytes_per_s, copy_bytes_per_s,
    copy_streamed_bytes_per_s} or null; noop_us: an empty compiled call with 8 torch tensors;
    workloads: a list of {op, workload, direction ("forward" | "forward+backward"), sizes, options,
    moved_bytes, fma, exp, bound {limit ("copy" | "fma" | "exp"), ms} or null, rows: a list of
    {backend, median_ms, min_ms, max_ms, samples, calls_per_sample, vs_python, vs_forward (time
    over that of the forward alone), of_bound, saved_bytes, note}, null where it does not apply};
    first_calls: a list of {op, workload, load_ms, first_ms, median_ms, ratio}, each from a fresh
    process: importing and loading the operator, its first call, the median of the next calls; or
    {op, workload, error}.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.checkout import ROOT, find_packages
from tools.goldens import clone
from tools.goldens.files import Fault

SCHEMA = 1
# Gradients are compared on shapes cut to this: they need the whole graph of the reference.
REDUCED = {"seqlen": 100, "rows": 37}


def workloads_of(op: str) -> ModuleType:
    """Load tools/bench/<op>.py; its folder shares its name with this file and is no package."""
    path = ROOT / f"tools/bench/{op}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{op}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operators() -> list[str]:
    """List the operators that have workloads."""
    return sorted(path.stem for path in (ROOT / "tools/bench").glob("*.py"))


def selected(arguments: argparse.Namespace) -> list[tuple[str, ModuleType, object]]:
    """Return (operator, its module, case) for what the command line asks for."""
    found, names = [], set()
    for op in [arguments.op] if arguments.op else operators():
        module = workloads_of(op)
        names.update(case.name for case in module.CASES)
        wanted = [c for c in module.CASES if arguments.workload in (None, c.name)]
        found += [(case.operator or op, module, case) for case in wanted]
    if not found:
        raise Fault(
            f"--workload must be one of {', '.join(sorted(names))}, got {arguments.workload}"
        )
    return found


def implementations(op: str, tensor) -> dict[str, tuple[object, str]]:
    """Return row name -> (function or None, note) for the operator's own rows."""
    import ssm.ops
    from ssm.ops.python import reference
    from ssm.utils import dispatch

    rows = {"python": (getattr(reference, op), "")}
    for backend in ("cpu", "cuda"):
        if tensor.device.type != backend:
            rows[backend] = (None, f"unavailable: tensors are on {tensor.device.type}")
            continue
        try:
            with dispatch.use_backend(backend):
                rows[backend] = (dispatch.implementation(op, tensor), "")
        except RuntimeError as error:
            rows[backend] = (None, f"unavailable: {str(error).split(', got ')[-1]}")
    served = dispatch.why(op, tensor).split(": ", 1)[1].split(",")[0]
    rows["dispatch"] = (getattr(ssm.ops, op), f"serves {served}")
    return rows


def run(arguments: argparse.Namespace) -> dict:
    """Check, time and print everything; return the report."""
    import torch

    from ssm.utils.freed_memory import keep_freed_memory
    from tools import measure, tables, verify

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise Fault("--device must be one that torch sees, got cuda")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    report = {"schema": SCHEMA, "device": device.type, "iters": arguments.iters}
    report |= measure.facts(torch.get_num_threads())
    report["load_average"] = [os.getloadavg()[0]]
    ceilings, why_not = None, f"the processor's ceilings say nothing about {device.type}"
    report["noop_us"] = None
    if device.type == "cpu":
        try:
            ceilings = measure.Ceilings(report["threads"])
            ceilings.summary()
            report["noop_us"] = measure.noop_seconds() * 1e6
        except Exception as error:  # without the library the torch rows are still worth having
            ceilings, why_not = None, f"no ceilings: {type(error).__name__}: {error}"
    upstream, report["mamba_ssm"] = {}, None
    if arguments.mamba_repo:
        from tools import upstream_peers

        report["mamba_ssm"] = clone.check(clone.MAMBA, arguments.mamba_repo, True)
        upstream = upstream_peers.load(arguments.mamba_repo)
    timed = []
    keep_freed_memory()
    for op, module, case in selected(arguments):
        tell(f"{op} {case.name}")
        problem = module.setup(case, device)
        if problem.args[0].dtype == torch.float32:  # upstream's formulas mix no element types
            problem = replace(problem, peers=problem.peers + upstream.get(op, ()))
        small = module.setup(case.reduced(**REDUCED), device)
        rows = {
            name: (function and functools.partial(function, **problem.options), note)
            for name, (function, note) in implementations(op, problem.args[0]).items()
        }
        for name, (function, _) in rows.items():
            try:
                if function is not None:
                    verify.outputs_of(function, small)
            except AttributeError as error:  # a library from before this operator
                rows[name] = (None, f"unavailable: {error}")
        compared = {n: f for n, (f, _) in rows.items() if f is not None and n != "python"}
        compared |= {p.name: p.function for p in problem.peers if not p.yardstick}
        try:
            verify.verify(op, problem, small, compared)
        except AssertionError as error:
            raise Fault(
                f"{op} {case.name} must match the reference before it is timed, got {error}"
            ) from None
        forward = None
        for direction, work in (("forward", problem.forward), ("forward+backward", problem.both)):
            if work is not None:
                table = time_table(
                    op, case, direction, problem, work, rows, arguments.iters, synchronize
                )
                if forward is not None:
                    add_vs_forward(table, forward)
                forward = table
                # The copy rate at this table's size belongs to the same minute as its times.
                if ceilings is not None:
                    ceilings.rate("copy", work.moved)
                timed.append((table, work))
    if ceilings is not None:
        ceilings.remeasure()
    report["ceilings"] = None if ceilings is None else ceilings.summary()
    report["workloads"] = []
    tables.print_machine(report, why_not)
    for table, work in timed:
        add_bound(table, work, ceilings)
        report["workloads"].append(table)
        tables.print_table(table, device.type)
    report["first_calls"] = first_calls(arguments)
    tables.print_first_calls(report["first_calls"])
    report["load_average"].append(os.getloadavg()[0])
    return report


def time_table(op, case, direction, problem, work, rows, iters, synchronize) -> dict:
    """Time all rows of one workload in one direction; return the table without its bound."""
    import torch

    from tools import measure, verify

    calls, notes, saved = {}, {}, {}
    rows = dict(rows)
    for peer in problem.peers:
        if direction == "forward" or not (peer.yardstick or peer.slow_backward):
            rows[peer.name] = (peer.function, "")
    for name, (function, note) in rows.items():
        notes[name] = note
        if function is None:
            continue
        if direction == "forward":
            calls[name] = lambda function=function: function(*problem.args)
        else:
            calls[name] = verify.forward_and_backward(function, problem.args)
            saved[name] = verify.saved_bytes(function, problem.args)
    with torch.set_grad_enabled(direction != "forward"):
        timings = measure.interleave(calls, iters, synchronize)
    table = {
        "op": op,
        "workload": case.name,
        "direction": direction,
        "sizes": case.sizes,
        "options": {n: v if isinstance(v, bool) else str(v) for n, v in case.options.items()},
        "moved_bytes": work.moved,
        "fma": work.fma,
        "exp": work.exp,
        "bound": None,
        "rows": [],
    }
    for name in rows:
        row = dict.fromkeys(
            "backend median_ms min_ms max_ms samples calls_per_sample vs_python vs_forward "
            "of_bound saved_bytes note".split()
        )
        row |= {"backend": name, "note": notes[name]}
        if name in timings:
            timing = timings[name]
            row |= {
                "median_ms": timing.median * 1e3,
                "min_ms": timing.best * 1e3,
                "max_ms": timing.worst * 1e3,
                "samples": timing.samples,
                "calls_per_sample": timing.calls_per_sample,
                "vs_python": timings["python"].median / timing.median,
                "saved_bytes": saved.get(name),
            }
        table["rows"].append(row)
    return table


def add_vs_forward(table: dict, forward: dict) -> None:
    """Add what a forward and backward costs, in forwards of the same implementation."""
    alone = {row["backend"]: row["median_ms"] for row in forward["rows"]}
    for row in table["rows"]:
        if row["median_ms"] is not None:
            row["vs_forward"] = row["median_ms"] / alone[row["backend"]]


def add_bound(table: dict, work, ceilings) -> None:
    """Add the binding ceiling of a table and each row's share of it."""
    if ceilings is None:
        return
    seconds = {
        "copy": work.moved / ceilings.rate("copy", work.moved),
        "fma": work.fma / ceilings.rate("fma"),
        "exp": work.exp / ceilings.rate("exp"),
    }
    limit = max(seconds, key=seconds.get)
    table["bound"] = {"limit": limit, "ms": seconds[limit] * 1e3}
    for row in table["rows"]:
        if row["median_ms"] is not None:
            row["of_bound"] = table["bound"]["ms"] / row["median_ms"]


def first_calls(arguments: argparse.Namespace) -> list[dict]:
    """Measure, per operator and in a fresh process, the first call against the median call."""
    from tools import measure

    found, seen = [], set()
    for op, module, case in selected(arguments):
        if op in seen:
            continue
        seen.add(op)
        row = module.__name__.removeprefix("bench_")
        options = [row, "--workload", case.name, "--device", arguments.device, "--first-call"]
        if arguments.threads:
            options += ["--threads", str(arguments.threads)]
        child = measure.in_fresh_process(options)
        item = {"op": op, "workload": case.name}
        if child.returncode == 0:
            item |= json.loads(child.stdout)
        else:  # no reason to lose the minutes before it
            item["error"] = (child.stderr.strip().splitlines() or ["no message"])[-1]
        found.append(item)
    return found


def measure_first_call(arguments: argparse.Namespace) -> None:
    """Print one JSON object: loading, first call and median call of one workload."""
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    (op, module, case), *_ = selected(arguments)
    problem = module.setup(case, torch.device(arguments.device))
    started = time.perf_counter()
    import ssm.ops
    from ssm.utils import dispatch

    dispatch.implementation(op, problem.args[0])
    loaded = time.perf_counter()
    function, times = getattr(ssm.ops, op), []
    with torch.no_grad():
        for _ in range(12):
            begin = time.perf_counter()
            function(*problem.args, **problem.options)
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e3)
    median = sorted(times[1:])[len(times[1:]) // 2]
    print(
        json.dumps(
            {
                "load_ms": (loaded - started) * 1e3,
                "first_ms": times[0],
                "median_ms": median,
                "ratio": times[0] / median,
            }
        )
    )


def tell(text: str) -> None:
    """Show on a terminal what is going on; the report comes at the end."""
    if sys.stderr.isatty():
        print(f"bench: {text}", file=sys.stderr)


def positive(text: str) -> int:
    """Read a count from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def json_file(text: str) -> Path:
    """Read the name of a file that can be written, before minutes are spent on its content."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"must name a file in a folder that exists, got {text}")
    return path


def main() -> int:
    """Do what the command line says; return the exit status."""
    # The usage line is argparse's own.
    summary, _, details = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        prog="bench",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="?", choices=operators(), help="default: all")
    parser.add_argument("--workload", metavar="NAME", help="default: all of the operator")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--iters", type=positive, default=20, help="samples per row, default 20")
    parser.add_argument("--threads", type=positive, help="default: torch's own choice")
    parser.add_argument(
        "--mamba-repo", type=Path, metavar="CLONE", help="of state-spaces/mamba: rows of its own"
    )
    parser.add_argument("--json", type=json_file, metavar="FILE", help="also write the report")
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mamba_repo and arguments.device != "cpu":
        parser.error("--mamba-repo must go with --device cpu, got cuda: there its kernels count")
    find_packages()
    try:
        if arguments.first_call:
            measure_first_call(arguments)
            return 0
        report = run(arguments)
        if arguments.json:
            draft = arguments.json.with_name(f".{arguments.json.name}.part")
            draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            draft.replace(arguments.json)
    except (Fault, OSError) as fault:
        print(f"bench: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
