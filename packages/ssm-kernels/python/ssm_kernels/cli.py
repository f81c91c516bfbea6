"""The console script `ssm-kernels`: what is installed, whether it is right, how fast it is."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import ssm_kernels
from ssm_kernels import _build


class Fault(Exception):
    """A reason to stop; its text is the whole message."""


def cases() -> dict:
    """Return the problems of the operators of this build; they need NumPy."""
    try:
        from ssm_kernels import selftest
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise Fault("selftest and bench need NumPy: pip install numpy") from error
    return {op: selftest.CASES[op] for op in _build.OPERATORS if op in selftest.CASES}


def info(arguments: argparse.Namespace) -> int:
    """Print the facts."""
    found = ssm_kernels.info()
    if arguments.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:15} {', '.join(value) if isinstance(value, list) else value}")
    return 0


def selftest(arguments: argparse.Namespace) -> int:
    """Compare every operator with float64 loops, on every instruction set of this machine."""
    cases()
    if arguments.here:
        from ssm_kernels import selftest as problems

        errors = {op: problems.error_of(op) for op in cases()}
        print(json.dumps({"isa": ssm_kernels.active_isa(), "errors": errors}))
        return 0
    results = {}
    for isa in ssm_kernels.available_isas():
        # The choice is made once per process.
        command = [sys.executable, "-m", "ssm_kernels.cli", "selftest", "--here"]
        env = {
            **os.environ,
            "SSM_ISA": isa,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        child = subprocess.run(command, env=env, capture_output=True, text=True)
        if child.returncode != 0:
            reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
            results[isa] = {"error": f"exit status {child.returncode}: {reason}"}
            continue
        answer = json.loads(child.stdout)
        served = {} if answer["isa"] == isa else {"isa": f"{answer['isa']} served instead"}
        results[isa] = {**answer["errors"], **served}
    return report(results, arguments.json)


def report(results: dict[str, dict], as_json: bool) -> int:
    """Print the errors by instruction set and operator; return 1 if one is too large."""
    from ssm_kernels.selftest import TOLERANCE

    failed = 0
    for isa, errors in results.items():
        for op, error in errors.items():
            good = isinstance(error, float) and error <= TOLERANCE
            failed += not good
            if not as_json:
                shown = f"{error:.1e}" if isinstance(error, float) else error
                print(f"{isa:9} {op:22} {'ok' if good else 'FAILED'}  {shown}")
    if as_json:
        print(json.dumps({"tolerance": TOLERANCE, "failed": failed, "errors": results}))
    return 1 if failed or not results else 0


def bench(arguments: argparse.Namespace) -> int:
    """Time every operator on a problem of ordinary size."""
    problems = cases()
    chosen = arguments.op or list(problems)
    for op in chosen:
        if op not in problems:
            raise Fault(f"bench: --op must be one of {', '.join(problems)}, got {op}")
    if arguments.threads:
        ssm_kernels.set_num_threads(arguments.threads)
    import numpy as np

    rows = []
    for op in chosen:
        case = problems[op]
        arrays = case.inputs(np.random.default_rng(0), *case.size)
        times = []
        for _ in range(arguments.iters):
            started = time.perf_counter()
            outputs = case.call(arrays)
            times.append((time.perf_counter() - started) * 1e3)
        moved = sum(array.nbytes for array in (*arrays.values(), *outputs))
        median = statistics.median(times)
        rows.append({"op": op, "first_ms": times[0], "median_ms": median, "bytes": moved})
    if arguments.json:
        print(json.dumps({**ssm_kernels.info(), "iters": arguments.iters, "rows": rows}))
        return 0
    print(f"{ssm_kernels.active_isa()}, {ssm_kernels.get_num_threads()} threads")
    for row in rows:
        rate = row["bytes"] / row["median_ms"] / 1e6
        print(
            f"{row['op']:22} {row['median_ms']:9.3f} ms  {row['bytes'] / 1e6:8.2f} MB  "
            f"{rate:7.2f} GB/s   first call {row['first_ms']:9.3f} ms"
        )
    return 0


def positive(text: str) -> int:
    """Read a count from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def main() -> int:
    """Do what the command line says.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="ssm-kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (info, selftest, bench):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=function)
        if function is selftest:
            command.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
        if function is bench:
            command.add_argument("--iters", type=positive, default=20, help="default 20")
            command.add_argument("--threads", type=positive, help="default: OpenMP's")
            command.add_argument("--op", action="append", metavar="OP", help="one, or several")
    arguments = parser.parse_args()
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has seen enough (`| head`); the interpreter must not flush into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # RuntimeError is the library's word for a fault of the environment, such as a bad SSM_ISA.
    except (Fault, RuntimeError) as fault:
        print(f"ssm-kernels: {fault}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
