"""tools/gpu_check.py rehearsed on the CPU: it finds faults, goes on where it stopped, ends in time.

Judge: what it wrote. The kernels that it is for need a GPU; here those of the CPU stand in.
"""

import json
import sys

import pytest

import ssm.ops
from ssm.utils import decoding_graph
from tests.recorded_graph import Recorder
from tools import gpu_check


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
