"""tools/bench.py reports what it promises and refuses to time what is wrong."""

import argparse
import itertools
import json
import subprocess
import sys

import pytest
import torch

from ssm.ops.python import reference
from ssm.utils import dispatch
from tools import bench, measure, tables, verify
from tools.workload import Case, Draw, channel_last, nbytes

CASES = [
    pytest.param(module, case, id=f"{op}-{case.name}")
    for op in bench.operators()
    for module in [bench.workloads_of(op)]
    for case in module.CASES
]


def run_bench(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, options)])
    return bench.main()


@pytest.fixture
def one_table(monkeypatch):
    """Leave out what a test of the report does not need: minutes of it."""
    monkeypatch.setattr(measure, "CEILING_S", 0.002)
    monkeypatch.setattr(measure, "BUDGET_S", 0.05)
    monkeypatch.setattr(bench, "first_calls", lambda arguments: [])
    return ("dw_causal_conv_step", "--workload", "decode_mamba130m", "--iters", "2")


def test_every_compiled_operator_has_workloads():
    found = [(row, bench.workloads_of(row).CASES) for row in bench.operators()]
    assert {case.operator or row for row, cases in found for case in cases} == {*dispatch.COMPILED}
    assert {row for row, _ in found} == {dispatch.FILES.get(op, op) for op in dispatch.COMPILED}


@pytest.mark.parametrize(("module", "case"), CASES)
def test_counted_work_is_within_what_the_tensors_hold(module, case):
    small = case.reduced(seqlen=32, rows=16, batch=1)
    problem = module.setup(small, torch.device("cpu"))
    tensors = [a for a in problem.args if isinstance(a, torch.Tensor)]
    held = sum(t.numel() * t.element_size() for t in tensors)
    if case.operator:
        # A stage may give more than it reads.
        outputs = getattr(reference, case.operator)(*problem.args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert problem.forward.moved == held + nbytes(*outputs)
    else:
        # Everything is read once and the outputs are at most as much again.
        assert held < problem.forward.moved <= 2 * held
    assert problem.forward.fma > problem.forward.exp >= 0
    if problem.both is not None:
        assert problem.both.moved > 2 * problem.forward.moved
        assert problem.both.fma > 2 * problem.forward.fma


def test_scan_bound_is_the_documented_count():
    (case,) = (c for c in bench.workloads_of("selective_scan").CASES if c.name == "prefill_2k_d512")
    problem = bench.workloads_of("selective_scan").setup(case, torch.device("cpu"))
    elements = 2048 * 512
    assert problem.forward.fma == elements * (9 * 16 + 15 + 9 + 3)
    assert problem.forward.exp == elements * (16 + 2)


def test_channel_last_twin_holds_the_same_values():
    module = bench.workloads_of("dw_causal_conv")
    plain, twin = (c for c in module.CASES if c.name.startswith("prefill_2k_d1536"))
    x, y = (module.setup(c.reduced(seqlen=16), "cpu").args[0] for c in (plain, twin))
    assert x.stride(2) == 1
    assert y.stride(1) == 1
    assert torch.equal(x, y)
    assert channel_last(x).stride() == y.stride()


def test_report_has_the_documented_fields(monkeypatch, capsys, tmp_path, one_table):
    target = tmp_path / "report.json"
    assert run_bench(monkeypatch, *one_table, "--json", target) == 0
    report = json.loads(target.read_text())
    fields = bench.__doc__.split("JSON (schema 1)")[1]
    assert all(name in fields for name in report)
    assert report["schema"] == 1
    assert len(report["load_average"]) == 2
    (table,) = report["workloads"]
    assert all(name in fields for name in table)
    rows = {row["backend"]: row for row in table["rows"]}
    assert list(rows) == ["python", "cpu", "cuda", "dispatch"]
    assert all(name in fields for row in rows.values() for name in row)
    assert rows["python"]["vs_python"] == 1.0
    assert rows["cuda"]["note"] == "unavailable: tensors are on cpu"
    assert rows["cuda"]["median_ms"] is None
    printed = capsys.readouterr().out
    assert "== dw_causal_conv_step :: decode_mamba130m :: device=cpu ==" in printed
    if dispatch.has_cpu_kernels():
        assert rows["cpu"]["of_bound"] > 0
        assert table["bound"]["limit"] in ("copy", "fma", "exp")
        assert report["noop_us"] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_wrong_result_is_not_timed(monkeypatch, capsys, tmp_path, one_table):
    def wrong(*args):
        return reference.dw_causal_conv_step(*args) + 1e-4

    monkeypatch.setattr(dispatch, "implementation", lambda op, tensor: wrong)
    target = tmp_path / "report.json"
    assert run_bench(monkeypatch, *one_table, "--json", target) == 1
    printed = capsys.readouterr()
    assert "decode_mamba130m must match the reference before it is timed" in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not target.exists()


def test_wrong_gradient_is_found():
    module = bench.workloads_of("dw_causal_conv")
    problem = module.setup(module.CASES[0].reduced(seqlen=40, dim=24), torch.device("cpu"))
    conv = problem.peers[0].function
    verify.verify("dw_causal_conv", problem, problem, {"torch": conv})

    def detached_bias(x, weight, bias, activation):
        return conv(x, weight, bias.detach() + 0.5 * (bias - bias.detach()), activation)

    with pytest.raises(AssertionError, match="half: gradient 2"):
        verify.verify("dw_causal_conv", problem, problem, {"half": detached_bias})


def test_updated_state_is_compared():
    module = bench.workloads_of("selective_state_step")
    problem = module.setup(module.CASES[0].reduced(nheads=24), torch.device("cpu"))

    def forgetful(state, *args):
        return reference.selective_state_step(state.clone(), *args)

    with pytest.raises(AssertionError, match="forgetful: output 1"):
        verify.verify("selective_state_step", problem, problem, {"forgetful": forgetful})


def test_missing_kernels_are_a_note(monkeypatch, one_table, capsys):
    def absent(op, tensor):
        raise RuntimeError(f"{op}: backend cpu must be loadable when it is forced, got no library")

    monkeypatch.setattr(dispatch, "implementation", absent)
    rows = bench.implementations("dw_causal_conv_step", torch.zeros(1))
    assert rows["cpu"] == (None, "unavailable: no library")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--workload", "none"], "--workload must be one of"),
        (["--json", "/no/such/folder/x.json"], "must name a file in a folder that exists"),
        (["--iters", "0"], "must be a positive integer, got 0"),
        (["no_such_operator"], "invalid choice: 'no_such_operator'"),
    ],
)
def test_rejects_options(monkeypatch, capsys, options, sentence):
    try:
        status = run_bench(monkeypatch, *options)
    except SystemExit as stop:
        status = stop.code
    assert status not in (0, None)
    assert sentence in capsys.readouterr().err


def test_processor_has_a_name_on_any_architecture():
    assert (
        measure.processor_name("processor\t: 0\nmodel name\t: A chip\n\nmodel name\t: B\n")
        == "A chip"
    )
    numbers = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\nCPU part\t: 0xd41\n"
    assert measure.processor_name(numbers).endswith(", implementer 0x41, part 0xd40")
    assert measure.processor_name("") not in ("", "unknown")


def test_interleaving_takes_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = measure.interleave(calls, 3)
    assert {name: t.samples for name, t in timings.items()} == {"a": 3, "b": 3}
    changes = sum(x != y for x, y in itertools.pairwise(order))
    assert changes >= 6
    assert all(t.best <= t.median <= t.worst for t in timings.values())


def test_case_reduced_only_shrinks():
    case = Case("any", {"batch": 2, "seqlen": 50})
    assert case.reduced(seqlen=10, rows=3).sizes == {"batch": 2, "seqlen": 10}
    assert case.reduced(seqlen=100).sizes == case.sizes
    assert torch.equal(Draw("cpu").normal(3), Draw("cpu").normal(3))


def step_arguments():
    return argparse.Namespace(
        op="dw_causal_conv_step", workload=None, device="cpu", threads=1, iters=1
    )


def test_first_call_comes_from_a_fresh_process(capsys):
    (item,) = bench.first_calls(step_arguments())
    assert item["workload"] == "decode_mamba130m"
    assert item["ratio"] == pytest.approx(item["first_ms"] / item["median_ms"])
    assert item["load_ms"] > 0
    tables.print_first_calls([item])
    assert "x the median call" in capsys.readouterr().out


def test_failed_first_call_is_told_and_loses_nothing(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no library\n")
    monkeypatch.setattr(measure, "in_fresh_process", lambda options: failed)
    found = bench.first_calls(step_arguments())
    assert found[0]["error"] == "ImportError: no library"
    tables.print_first_calls(found)
    assert "decode_mamba130m: none, ImportError: no library" in capsys.readouterr().out
