"""The console script ssm-kernels: facts, self-test and timings, for people and as JSON.

Judge: the library's own answers, and a self-test that is made to fail.
"""

import json
import os
import subprocess
import sys

import pytest
import ssm_kernels
from ssm_kernels import _build, cli, selftest


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ssm_kernels.cli", *arguments]
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, **env}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def test_info_states_what_is_loaded():
    found = json.loads(run("info", "--json").stdout)
    assert found["version"] == ssm_kernels.__version__
    assert found["isa"] in found["available_isas"]
    assert found["operators"] == _build.OPERATORS
    lines = run("info").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(found)


@pytest.mark.parametrize("isa", ssm_kernels.available_isas())
def test_isa_forced_is_isa_used(isa):
    assert json.loads(run("info", "--json", SSM_ISA=isa).stdout)["isa"] == isa


def test_rejects_unknown_isa():
    result = run("info", SSM_ISA="sse9")
    assert result.returncode == 1
    assert result.stderr == (
        "ssm-kernels: SSM_ISA must be auto, baseline, avx2 or avx512, got sse9\n"
    )


def test_selftest_covers_every_operator():
    assert set(selftest.CASES) >= set(_build.OPERATORS)


def test_selftest_passes_on_every_isa():
    result = run("selftest", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    errors = json.loads(result.stdout)["errors"]
    assert list(errors) == list(ssm_kernels.available_isas())
    assert all(set(found) == set(_build.OPERATORS) for found in errors.values())


def test_selftest_fails_on_a_wrong_result(monkeypatch, capsys):
    op = _build.OPERATORS[0]
    case = selftest.CASES[op]
    wrong = selftest.Case(
        case.inputs, lambda a: [g + 1e-3 for g in case.call(a)], case.judge, case.size
    )
    monkeypatch.setitem(selftest.CASES, op, wrong)
    error = selftest.error_of(op)
    assert error > selftest.TOLERANCE
    assert cli.report({"baseline": {op: error}}, as_json=False) == 1
    assert "FAILED" in capsys.readouterr().out
    assert cli.report({"baseline": {op: 1e-7}}, as_json=False) == 0
    assert cli.report({"baseline": {"error": "exit status -11: no message"}}, as_json=True) == 1


def test_selftest_fails_on_nan(monkeypatch):
    op = _build.OPERATORS[0]
    case = selftest.CASES[op]
    broken = selftest.Case(
        case.inputs, lambda a: [g * float("nan") for g in case.call(a)], case.judge, case.size
    )
    monkeypatch.setitem(selftest.CASES, op, broken)
    assert selftest.error_of(op) == float("inf")


def test_bench_prints_a_time_for_every_operator():
    rows = json.loads(run("bench", "--iters", "2", "--json").stdout)["rows"]
    assert [row["op"] for row in rows] == _build.OPERATORS
    assert all(row["median_ms"] > 0 for row in rows)


def test_bench_times_what_is_asked_for():
    options = "--iters 1 --json --threads 1 --op dw_causal_conv_step".split()
    found = json.loads(run("bench", *options).stdout)
    (row,) = found["rows"]
    assert (row["op"], found["num_threads"]) == ("dw_causal_conv_step", 1)
    # x, y, weight and bias, and the state twice, as it is written too.
    assert row["bytes"] == 4 * 1536 * (1 + 1 + 4 + 1 + 3 + 3)


def test_bench_rejects_an_unknown_operator():
    result = run("bench", "--op", "softmax")
    assert result.returncode == 1
    assert result.stderr == (
        f"ssm-kernels: bench: --op must be one of {', '.join(_build.OPERATORS)}, got softmax\n"
    )


@pytest.mark.parametrize("command", ["selftest", "bench"])
def test_says_what_is_missing_without_numpy(command):
    program = (
        "import sys; sys.modules['numpy'] = None; from ssm_kernels.cli import main;"
        f"sys.argv = ['ssm-kernels', '{command}']; sys.exit(main())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert child.returncode == 1
    assert child.stderr == "ssm-kernels: selftest and bench need NumPy: pip install numpy\n"


def test_rejects_iters_below_one():
    result = run("bench", "--iters", "0")
    assert result.returncode == 2
    assert "must be a positive integer, got 0" in result.stderr


def test_a_closed_pipe_is_not_an_error():
    command = f"{sys.executable} -c 'from ssm_kernels.cli import main; main()' info | true"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=env)
    assert (result.returncode, result.stderr) == (0, "")
