"""tools/gpu_check.py rehearsed on the CPU: it finds faults, goes on where it stopped, ends in time.

Judge: what it wrote. The kernels that it is for need a GPU; here those of the CPU stand in.
"""

import json
import shutil
import subprocess
import sys
import types

import pytest
import torch

import ssm.ops
from ssm.utils import decoding_graph
from tests.recorded_graph import Recorder
from tools import gpu_build, gpu_check, gpu_long, gpu_training


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


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (ModuleNotFoundError("No module named 'safetensors'", name="safetensors"), False),
        (ModuleNotFoundError("No module named 'ssm.ops'", name="ssm.ops"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("the launch must succeed"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_lacks_is_no_fault(tmp_path, error, is_fault):
    def fails():
        raise error

    report = gpu_check.Report(tmp_path / "found.json", {}, None)
    report.run("item", fails)
    assert ("fault" if is_fault else "skipped") in report.items["item"]


def test_build_says_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gpu_build, "TOOLKITS", ())
    monkeypatch.setattr(gpu_build, "has_kernels", lambda: False)
    monkeypatch.setattr(gpu_build, "_has", lambda module: module == "numpy")
    monkeypatch.setattr(gpu_build.sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(gpu_build.Fault) as fault:
        gpu_build.build(None)
    for text in (
        "C++ compiler",
        "pip download -d wheels meson ninja nanobind",
        "nvcc on PATH",
        "include/Python.h",
    ):
        assert text in str(fault.value)
    assert not (tmp_path / "build").exists()


def test_toolkit_beside_the_path_is_found(tmp_path, monkeypatch):
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(0o755)
    monkeypatch.setattr(gpu_build, "TOOLKITS", (tmp_path / "none", nvcc.parent))
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu_build.find_toolkit()
    assert shutil.which("nvcc") == str(nvcc)


def test_wheels_are_taken_as_far_as_they_are_there(tmp_path, monkeypatch):
    for name in ("nvidia_cutlass-4.2.0-py3-none-any.whl", "ninja-1.11-py3-none-any.whl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpu_build, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu_build, "_has", lambda module: module == "numpy")
    monkeypatch.setattr(sys, "path", list(sys.path))
    commands = []
    monkeypatch.setattr(gpu_build, "_run", lambda what, command: commands.append(command))
    gpu_build.install(tmp_path)
    (command,) = commands
    assert command[command.index(str(tmp_path / "site")) + 1 :] == ["ninja", "nvidia-cutlass"]
    assert sys.path[-1] == str(tmp_path / "site")


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


TIMES = {"ms", "eager_ms"}


def test_benches_run(run, is_built):
    status, found = run("--part", "ceilings", "--part", "bench", "--op", "swiglu")
    assert status == 0
    items = found["items"]
    moved = {"bytes", "copy_ms", "of_copy"}
    assert set(items["bench/swiglu/b8_l2k_d5120"]) == TIMES | moved
    assert set(items["bench/swiglu/b8_l2k_d5120/backward"]) == TIMES


def test_wrong_cpu_kernel_is_a_fault(run, is_built, monkeypatch):
    import ssm.ops

    right, calls = ssm.ops.swiglu, []

    def wrong(*args, **options):
        calls.append(args)
        # The third call of an item is that of the CPU kernels.
        return right(*args, **options) + (len(calls) == 3)

    monkeypatch.setattr(ssm.ops, "swiglu", wrong)
    status, found = run("--small", "--part", "matrix", "--op", "swiglu")
    assert status == 1
    assert any("of the CPU kernels" in item.get("fault", "") for item in found["items"].values())


@pytest.fixture
def peers(monkeypatch):
    """Let this project's own functions stand in for the packages that a GPU is compared with."""
    pytest.importorskip("safetensors", reason="ssm.compat reads states")
    from ssm.compat import causal_conv1d, mamba_ssm
    from ssm.models import config, lm

    homes = {
        "mamba_ssm.ops.selective_scan_interface": mamba_ssm,
        "mamba_ssm.ops.triton.selective_state_update": mamba_ssm,
        "mamba_ssm.ops.triton.ssd_combined": mamba_ssm,
        "mamba_ssm.models.config_mamba": config,
        "mamba_ssm.models.mixer_seq_simple": lm,
        "causal_conv1d": causal_conv1d,
        "flashinfer.mamba": mamba_ssm,
    }
    for name, module in homes.items():
        for end in range(name.count(".")):
            package = ".".join(name.split(".")[: end + 1])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, name, module)


BOTH_WAYS = {
    "selective_scan/b8_l2k_d5120": "mamba_ssm",
    "dw_causal_conv/b8_l2k_d5376": "causal_conv1d",
    "ssd_chunk_scan/b1_l1k_h80": "mamba_ssm",
    "mamba2_block/b8_l2k_h80": "mamba_ssm",
}


def test_peers_are_compared_and_timed(run, is_built, peers):
    operators = ("selective_scan", "selective_state_step", "dw_causal_conv", "ssd_chunk_scan")
    status, found = run("--part", "bench", *(word for op in operators for word in ("--op", op)))
    assert status == 0
    items = found["items"]
    for name, peer in BOTH_WAYS.items():
        assert set(items[f"bench/{name}/{peer}"]) == {*TIMES, "difference"}
        assert items[f"bench/{name}/{peer}"]["difference"] < 0.01
        assert set(items[f"bench/{name}/{peer}/backward"]) == TIMES
    for case in ("mamba_b64", "mamba2_b64"):
        for peer in ("mamba_ssm", "flashinfer"):
            assert set(items[f"bench/selective_state_step/{case}/{peer}"]) == TIMES


def test_peer_that_computes_something_else_is_not_timed(run, is_built, peers, monkeypatch):
    from ssm.compat import mamba_ssm

    right = mamba_ssm.mamba_chunk_scan_combined
    other = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")  # with one of its functions
    other.mamba_chunk_scan_combined = lambda *a, **k: 2 * right(*a, **k)
    monkeypatch.setitem(sys.modules, other.__name__, other)
    status, found = run("--part", "bench", "--op", "ssd_chunk_scan")
    assert status == 0
    skipped = found["items"]["bench/ssd_chunk_scan/b1_l1k_h80/mamba_ssm"]["skipped"]
    assert skipped.startswith("the peer computes something else")
    assert "bench/mamba2_block/b1_l1k_h80/mamba_ssm" not in found["items"]
    assert "bench/mamba2_block/b1_l1k_h80" in found["items"]


def test_training_runs(run, is_built, peers):
    status, found = run("--part", "training")
    assert status == 0
    items = found["items"]
    kinds, dtypes = ("plain", "padded", "packed"), gpu_training.BOUNDS
    want = {f"training/{m}/{k}/{d}" for m in gpu_training.MODELS for k in kinds for d in dtypes}
    want |= {f"training/{m}/learns" for m in gpu_training.MODELS}
    want |= {f"training/{m}/step{p}" for m in gpu_training.TIMED for p in ("", "/mamba_ssm")}
    assert set(items) == want
    assert items["training/hybrid/learns"]["after"] < items["training/hybrid/learns"]["before"]


def test_wrong_gradient_of_a_model_is_a_fault(run, is_built, monkeypatch):
    monkeypatch.setattr(gpu_training, "MODELS", {"mamba2": gpu_training.MODELS["mamba2"]})
    monkeypatch.setattr(gpu_training, "TIMED", {})
    right = ssm.ops.ssd_chunk_scan

    def wrong(X, *rest, **options):
        if X.dtype == torch.float64:
            return right(X, *rest, **options)
        return right(X + 0.01 * (X - X.detach()), *rest, **options)

    monkeypatch.setattr(ssm.ops, "ssd_chunk_scan", wrong)
    status, found = run("--part", "training")
    assert status == 1
    assert "from float64" in found["items"]["training/mamba2/plain/float32"]["fault"]


def test_long_rows_run(run, is_built):
    status, found = run("--part", "long")
    assert status == 0
    for name in ("long/forward", "long/backward"):
        assert set(found["items"][name]) == {"tokens", "heads", "ms", "ratio", "extra_mb"}


def test_long_row_that_loses_its_state_is_a_fault(run, is_built, monkeypatch):
    right = ssm.ops.ssd_chunk_scan

    def forgetful(X, dt, A, B, C, **options):
        if "initial_states" in options or "return_final_states" in options:
            return right(X, dt, A, B, C, **options)
        parts = zip(*(t.split(X.shape[1] // 4, 1) for t in (X, dt, B, C)), strict=True)
        return torch.cat([right(x, d, A, b, c, **options) for x, d, b, c in parts], 1)

    monkeypatch.setattr(ssm.ops, "ssd_chunk_scan", forgetful)
    status, found = run("--part", "long")
    assert status == 1
    assert "last quarter alone" in found["items"]["long/backward"]["fault"]


def test_time_and_memory_that_grow_are_faults(monkeypatch):
    seconds = {100: 1.0, 200: 2.5}
    monkeypatch.setattr(gpu_long, "once", lambda run, tokens, device: seconds[tokens])
    monkeypatch.setattr(gpu_long, "memory_of", lambda run, tokens, device: tokens << 20)
    with pytest.raises(AssertionError, match="time is not linear"):
        gpu_long.grows(lambda tokens: torch.zeros(tokens), 200, "cuda")
    seconds[200] = 2.1
    with pytest.raises(AssertionError, match="memory grows"):
        gpu_long.grows(lambda tokens: torch.zeros(tokens), 200, "cuda")
    monkeypatch.setattr(gpu_long, "memory_of", lambda run, tokens, device: 1 << 20)
    found = gpu_long.grows(lambda tokens: torch.zeros(tokens), 200, "cuda")
    assert found == {"ms": 2.1, "ratio": 1.05, "extra_mb": (1 << 20) / 1e6}


def test_decoding_runs(run, is_built, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(decoding_graph.RECORDERS, "cpu", recorder)
    status, found = run("--part", "decoding")
    assert status == 0
    items = found["items"]
    assert set(items["decoding/mamba2_130m/b64"]) == {"difference", "ms_per_token", "without_graph"}
    assert len(items) == 10
    # The hybrid takes two at both batch sizes, for rooms of 256 and 512 tokens, in each of 6 calls.
    assert len(recorder.replays) == 8 + 2 * 2 * 6
    assert min(recorder.replays) > 0


def test_other_scores_than_those_of_a_forward_pass_are_a_fault(run, is_built, monkeypatch):
    right = ssm.ops.selective_state_step
    monkeypatch.setattr(ssm.ops, "selective_state_step", lambda *a, **k: 2 * right(*a, **k))
    status, found = run("--part", "decoding")
    assert status == 1
    assert "of one forward pass" in found["items"]["decoding/mamba1_float32/b1"]["fault"]


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
