"""tools/gpu_check.py rehearsed on the CPU: it finds faults, goes on where it stopped, ends in time.

Judge: what it wrote. The kernels that it is for need a GPU; here those of the CPU stand in.
"""

import json
import subprocess
import sys

import pytest

import ssm.ops
from ssm.utils import decoding_graph
from tests.recorded_graph import Recorder
from tools import gpu_build, gpu_check


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the program and returns its status and its file."""

    def check(*words: str) -> tuple[int, dict]:
        path = tmp_path / "found.json"
        command = ["gpu_check.py", "--device", "cpu", "--json", str(path), *words]
        monkeypatch.setattr(sys, "argv", command)
        status = gpu_check.main()
        return status, json.loads(path.read_text()) if path.exists() else {}

    return check


@pytest.fixture
def is_built():
    pytest.importorskip("ssm_kernels", reason="the rehearsal needs the CPU kernels")


def test_small_matrix_passes(run, is_built):
    status, found = run("--small", "--part", "matrix", "--op", "swiglu", "--op", "selective_scan")
    assert status == 0
    assert found["items"]["matrix/swiglu/tiny/float32"] == {"served": "outputs and gradients"}
    assert found["items"]["matrix/selective_scan/padded/float32"]


def test_wrong_result_is_a_fault(run, is_built, monkeypatch):
    right = ssm.ops.swiglu
    monkeypatch.setattr(ssm.ops, "swiglu", lambda *a, **k: right(*a, **k) * 1.001)
    status, found = run("--small", "--part", "matrix", "--op", "swiglu")
    assert status == 1
    assert "worst at" in found["items"]["matrix/swiglu/odd/float32"]["fault"]


def test_wrong_gradient_is_a_fault(run, is_built, monkeypatch):
    right = ssm.ops.swiglu
    monkeypatch.setattr(
        ssm.ops,
        "swiglu",
        lambda gate, up=None: right(gate, up) + 0.01 * (gate - gate.detach()).sum(),
    )
    status, found = run("--small", "--part", "matrix", "--op", "swiglu")
    assert status == 1
    assert found["items"]["matrix/swiglu/odd/float32"]["fault"].startswith("AssertionError: dgate")


def test_fallback_is_a_fault(run, is_built):
    from ssm.utils import dispatch

    with dispatch.use_backend("python"):
        status, found = run("--small", "--part", "matrix", "--op", "swiglu")
    assert status == 1
    assert "another backend" in found["items"]["matrix/swiglu/odd/float32"]["fault"]


def test_run_goes_on_where_it_stopped(run, is_built, monkeypatch):
    run("--small", "--part", "matrix", "--op", "swiglu")
    monkeypatch.setattr(gpu_check, "compare", lambda *_: pytest.fail("measured again"))
    status, found = run("--small", "--part", "matrix", "--op", "swiglu")
    assert status == 0
    assert found["items"]


def test_time_is_kept(run, is_built):
    status, found = run("--minutes", "0.0000001", "--part", "matrix", "--op", "swiglu")
    assert status == 1
    assert not found


@pytest.mark.parametrize("is_blamed", [True, False])
def test_item_that_kills_the_process_is_a_fault(run, is_built, tmp_path, is_blamed):
    _, found = run("--small", "--part", "matrix", "--op", "swiglu")
    item = "matrix/swiglu/odd/float32"
    del found["items"][item]
    (tmp_path / "found.json").write_text(json.dumps({**found, "running": item}))
    blame = ("--blame", item) if is_blamed else ()
    status, found = run("--small", "--part", "matrix", "--op", "swiglu", *blame)
    assert status == (1 if is_blamed else 0)
    assert "running" not in found
    assert ("fault" in found["items"][item]) == is_blamed


HANG = """
import sys, time
from pathlib import Path
from tools import gpu_build, gpu_check
report = gpu_check.Report(Path(sys.argv[1]), {}, None)
report.run("slow", time.sleep, 60, patience=0.1)
"""


def test_item_that_hangs_ends_the_process(tmp_path):
    path = tmp_path / "found.json"
    done = subprocess.run([sys.executable, "-c", HANG, str(path)], cwd=gpu_check.ROOT, timeout=50)
    assert done.returncode == gpu_check.LOST
    assert json.loads(path.read_text())["running"] == "slow"
    report = gpu_check.Report(path, {}, None, "slow")
    assert report.faults() == {"slow": "the process crashed or hung"}


@pytest.mark.parametrize(
    ("statuses", "running", "want"),
    [((0,), "", 0), ((3, 3, 1), "", 1), ((-11, 0), "item", 0), ((-11, 0), "", 1)],
    ids=["well", "lost twice", "killed within an item", "killed elsewhere"],
)
def test_processes_follow_one_another(tmp_path, monkeypatch, statuses, running, want):
    path, left, seen = tmp_path / "found.json", list(statuses), []
    path.write_text(json.dumps({"running": running} if running else {}))

    def process(command):
        seen.append(command)
        return subprocess.CompletedProcess(command, left.pop(0))

    monkeypatch.setattr(subprocess, "run", process)
    assert gpu_check.supervise(["--part", "matrix"], path, 7.0) == want
    assert seen[0][2:] == ["--part", "matrix", "--worker", "--deadline", "7.0"]
    if running:
        assert seen[1] == [*seen[0], "--blame", running]
    assert len(left) == (1 if want == 1 and len(statuses) == 2 else 0)


def test_sanitizer_looks_for_the_operator_at_fault(tmp_path, monkeypatch):
    seen = []

    def sanitize(program, command):
        seen.append([word for word in command[5:] if word in ("a", "b")])
        return (
            {"clean": True} if command[2] != "racecheck" or "a" not in command else {"fault": "x"}
        )

    monkeypatch.setattr(gpu_check, "sanitize", sanitize)
    report = gpu_check.Report(tmp_path / "found.json", {}, None)
    gpu_check.check_sanitizer(report, ["a", "b"])
    assert seen == [["a", "b"], ["a", "b"], ["a"], ["b"], ["a", "b"], ["a", "b"]]
    assert list(report.faults()) == ["sanitizer/racecheck", "sanitizer/racecheck/a"]


def test_lost_gpu_ends_the_process_after_the_fault_is_kept(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_check, "is_usable", lambda: False)
    report = gpu_check.Report(tmp_path / "found.json", {}, None)
    with pytest.raises(SystemExit) as stopped:
        report.run("first", fails)
    assert stopped.value.code == gpu_check.LOST
    assert list(gpu_check.Report(tmp_path / "found.json", {}, None).faults()) == ["first"]


def test_build_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_build, "has_kernels", lambda: False)
    monkeypatch.setattr(gpu_build, "_has", lambda module: module == "numpy")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(gpu_build.Fault) as fault:
        gpu_build.build(None)
    for text in ("C++ compiler", "pip download -d wheels meson ninja nanobind", "nvcc on PATH"):
        assert text in str(fault.value)
    assert not (tmp_path / "build").exists()


def test_build_runs_meson_and_uses_what_it_made(tmp_path, monkeypatch):
    commands, answers = [], [False, True]
    monkeypatch.setattr(gpu_build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_build, "has_kernels", lambda: answers.pop(0))
    monkeypatch.setattr(gpu_build, "_has", lambda module: True)
    monkeypatch.setattr(gpu_build.dev, "compiler_fault", lambda: "")
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def step(what, command):
        (tmp_path / "build").mkdir(exist_ok=True)
        commands.append(command[1:4])

    monkeypatch.setattr(gpu_build, "_run", step)
    gpu_build.build(None)
    assert commands == [["-m", "mesonbuild.mesonmain", word] for word in ("setup", "compile")]
    assert sys.path[0] == str(tmp_path / "build/packages/ssm-kernels/python")


def test_kernels_that_are_there_are_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_build, "has_kernels", lambda: True)
    monkeypatch.setattr(gpu_build, "_run", lambda *_: pytest.fail("built"))
    gpu_build.build(None)


def test_digest_follows_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    path = tmp_path / "packages/one/kernel.cu"
    path.parent.mkdir(parents=True)
    path.write_text("a")
    first = gpu_build.sources_digest()
    assert gpu_build.sources_digest() == first
    path.write_text("b")
    assert gpu_build.sources_digest() != first


def test_benches_run(run, is_built):
    status, found = run("--part", "ceilings", "--part", "bench", "--op", "swiglu")
    assert status == 0
    assert set(found["items"]["bench/swiglu/b8_l2k_d5120"]) == {"ms", "bytes", "copy_ms", "of_copy"}


def test_decoding_runs(run, is_built, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(decoding_graph.RECORDERS, "cpu", recorder)
    status, found = run("--part", "decoding")
    assert status == 0
    assert set(found["items"]["decoding/mamba2_130m/b64"]) == {"ms_per_token", "without_graph"}
    assert len(recorder.replays) == len(found["items"]) == 8
    assert min(recorder.replays) > 0


def test_other_tokens_with_a_graph_are_a_fault(run, is_built, monkeypatch):
    def forgetful(step, device):
        logits = step()
        return lambda: None, logits

    monkeypatch.setitem(decoding_graph.RECORDERS, "cpu", forgetful)
    status, found = run("--part", "decoding")
    assert status == 1
    assert "other bits with a graph" in found["items"]["decoding/mamba1_130m/b1"]["fault"]


def test_without_gpu_says_so(monkeypatch, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "needs a GPU" in capsys.readouterr().err
