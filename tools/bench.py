#!/usr/bin/env python3
"""Time the operators against their reference, torch and what the machine can do at most.

Usage: tools/bench.py [OP] [--workload NAME] [--device cpu|cuda] [--iters N] [--threads N]
                      [--json FILE]

Per workload a table with the rows python (the reference), cpu and cuda (the compiled operator),
dispatch (``ssm.ops``, what a user calls) and torch-only peers; workloads of an operator that has a
backward get a second table, forward and backward. Implementations are timed in turn within one run:
compare ratios of one run, not times of two. ``of bound`` is the share of the binding ceiling: the
largest of moved bytes / copy rate of a buffer of that size, multiply-adds / multiply-add rate and
exponentials / exponential rate, as counted in tools/bench/<op>.py and measured in the same run.

Before anything is timed, every compiled implementation must agree with the reference in float64;
otherwise the exit status is 1 and there is no report. SSM_ISA chooses the instruction set.

JSON (schema 1): an object with
    schema, device, iters, threads, isa, commit, modified, machine {processor, cores, l2_bytes,
    l3_bytes, system}, versions {python, torch, numpy, ssm_kernels, ssm_models}, load_average
    [before, after]; null where there is nothing to tell;
    ceilings {fma_per_s, exp_per_s, copy_l2_bytes_per_s, copy_bytes_per_s,
    copy_streamed_bytes_per_s} or null; noop_us: an empty compiled call with 8 torch tensors;
    workloads: a list of {op, workload, direction ("forward" | "forward+backward"), sizes, options,
    moved_bytes, fma, exp, bound {limit ("copy" | "fma" | "exp"), ms} or null, rows: a list of
    {backend, median_ms, min_ms, max_ms, samples, calls_per_sample, vs_python, of_bound,
    saved_bytes, note}, all null but backend and note where a row is not available};
    first_calls: a list of {op, workload, load_ms, first_ms, median_ms, ratio}, each from a fresh
    process: importing and loading the operator, its first call, the median of the next calls.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.checkout import ROOT, find_packages

SCHEMA = 1
# Gradients are compared on shapes cut to this: they need the whole graph of the reference.
REDUCED = {"seqlen": 100, "rows": 37}


class Fault(Exception):
    """A reason to stop; its text is the whole message."""


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
        found += [(op, module, case) for case in wanted]
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

    from tools import measure, verify

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
    tables = []
    for op, module, case in selected(arguments):
        problem = module.setup(case, device)
        rows = implementations(op, problem.args[0])
        for name in ("cpu", "cuda", "dispatch"):
            if rows[name][0] is None:
                continue
            try:
                verify.verify(op, module, case, REDUCED, rows[name][0], device)
            except AssertionError as error:
                raise Fault(
                    f"{op} ({name}) must match the reference before it is timed, got {error}"
                ) from None
            except AttributeError as error:  # a build of the library from before this operator
                rows[name] = (None, f"unavailable: {error}")
        for direction, work in (("forward", problem.forward), ("forward+backward", problem.both)):
            if work is not None:
                table = time_table(
                    op, case, direction, problem, work, rows, arguments.iters, synchronize
                )
                # The copy rate at this table's size belongs to the same minute as its times.
                if ceilings is not None:
                    ceilings.rate("copy", work.moved)
                tables.append((table, work))
    if ceilings is not None:
        ceilings.remeasure()
    report["ceilings"] = None if ceilings is None else ceilings.summary()
    report["workloads"] = []
    print_machine(report, why_not)
    for table, work in tables:
        add_bound(table, work, ceilings)
        report["workloads"].append(table)
        print_table(table, device.type)
    report["first_calls"] = first_calls(arguments)
    print_first_calls(report["first_calls"])
    report["load_average"].append(os.getloadavg()[0])
    return report


def time_table(op, case, direction, problem, work, rows, iters, synchronize) -> dict:
    """Time all rows of one workload in one direction; return the table without its bound."""
    import torch

    from tools import measure, verify

    calls, notes, saved = {}, {}, {}
    rows = dict(rows)
    for peer in problem.peers:
        if peer.differentiable or direction == "forward":
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
        "options": case.options,
        "moved_bytes": work.moved,
        "fma": work.fma,
        "exp": work.exp,
        "bound": None,
        "rows": [],
    }
    for name in rows:
        row = dict.fromkeys(
            "backend median_ms min_ms max_ms samples calls_per_sample vs_python of_bound "
            "saved_bytes note".split()
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
    for op, _, case in selected(arguments):
        if op in seen:
            continue
        seen.add(op)
        options = [op, "--workload", case.name, "--device", arguments.device, "--first-call"]
        if arguments.threads:
            options += ["--threads", str(arguments.threads)]
        child = measure.in_fresh_process(options)
        if child.returncode != 0:
            raise Fault(f"the first call of {op} failed: {child.stderr.strip().splitlines()[-1:]}")
        found.append({"op": op, "workload": case.name, **json.loads(child.stdout)})
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
            function(*problem.args)
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


def milliseconds(value: float) -> str:
    """Return a time with four digits that count."""
    return f"{value:.2f}" if value >= 100 else f"{value:#.4g}"


def print_machine(report: dict, why_not: str) -> None:
    """Print the facts and the ceilings."""
    machine, versions = report["machine"], report["versions"]
    print(
        f"{machine['processor']}, {machine['cores']} cores, {report['threads']} threads, "
        f"{report['isa'] or 'no compiled library'}, torch {versions['torch']}, ssm-kernels "
        f"{versions['ssm_kernels']}, commit {(report['commit'] or 'unknown')[:12]}"
        f"{' and changes' if report['modified'] else ''}"
    )
    load = report["load_average"][0]
    if load > machine["cores"] / 2:
        print(f"the machine was busy: load average {load:.1f} at the start; times are too long")
    found = report["ceilings"]
    if found is None:
        print(why_not)
    else:
        print(
            f"ceilings: {found['fma_per_s'] / 1e9:.1f} G multiply-adds/s "
            f"({2 * found['fma_per_s'] / 1e9:.0f} GFLOPS), {found['exp_per_s'] / 1e9:.2f} G exp/s, "
            f"copy {found['copy_l2_bytes_per_s'] / 1e9:.0f} GB/s in L2, "
            f"{found['copy_bytes_per_s'] / 1e9:.1f} GB/s in memory "
            f"({found['copy_streamed_bytes_per_s'] / 1e9:.1f} GB/s with streaming stores)"
        )
    if report["noop_us"] is not None:
        print(f"empty compiled call with 8 torch tensors: {report['noop_us']:.2f} us")


def print_table(table: dict, device: str) -> None:
    """Print one workload."""
    title = [table["op"], table["workload"]]
    if table["direction"] != "forward":
        title.append(table["direction"])
    print(f"\n== {' :: '.join([*title, f'device={device}'])} ==")
    lines = [("backend", "time (ms)", "min - max", "vs python", "of bound", "notes")]
    for row in table["rows"]:
        if row["median_ms"] is None:
            lines.append((row["backend"], "n/a", "n/a", "n/a", "n/a", row["note"]))
            continue
        notes = [row["note"]] if row["note"] else []
        notes.append(f"{row['samples']} samples")
        if row["saved_bytes"] is not None:
            notes.append(f"saves {row['saved_bytes'] / 1e6:.1f} MB")
        lines.append(
            (
                row["backend"],
                milliseconds(row["median_ms"]),
                f"{milliseconds(row['min_ms'])} - {milliseconds(row['max_ms'])}",
                f"{row['vs_python']:.2f}x",
                "n/a" if row["of_bound"] is None else f"{100 * row['of_bound']:.1f} %",
                ", ".join(notes),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, tuple("-" * width for width in widths))
    for i, line in enumerate(lines):
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("|-" + "-|-".join(cells) + "-|" if i == 1 else "| " + " | ".join(cells) + " |")
    if table["bound"]:
        print(
            f"bound: {milliseconds(table['bound']['ms'])} ms by {table['bound']['limit']} "
            f"({table['moved_bytes'] / 1e6:.2f} MB moved, {table['fma'] / 1e6:.2f} M "
            f"multiply-adds, {table['exp'] / 1e6:.2f} M exp)"
        )


def print_first_calls(found: list[dict]) -> None:
    """Print how much longer a first call takes."""
    print("\nfirst call in a fresh process, through dispatch")
    for item in found:
        print(
            f"  {item['op']} {item['workload']}: {milliseconds(item['first_ms'])} ms, "
            f"{item['ratio']:.2f}x the median call {milliseconds(item['median_ms'])} ms; "
            f"loading took {milliseconds(item['load_ms'])} ms before"
        )


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
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?", choices=operators(), help="default: all")
    parser.add_argument("--workload", metavar="NAME", help="default: all of the operator")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--iters", type=positive, default=20, help="samples per row, default 20")
    parser.add_argument("--threads", type=positive, help="default: torch's own choice")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="also write the report")
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
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
