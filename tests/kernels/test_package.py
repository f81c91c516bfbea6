"""The package ssm_kernels: what it brings, what it leaves alone, and its process-wide choices.

Judge: a fresh process per question.
"""

import importlib.util
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ssm_kernels

from tests.judge import selective_scan as judge

PACKAGE = Path(ssm_kernels.__file__).parent
ROOT = Path(__file__).parents[2] / "packages/ssm-kernels"
OPERATORS = (
    "selective_scan",
    "selective_state_step",
    "dw_causal_conv",
    "dw_causal_conv_step",
    "fused_layer_norm",
    "ssd_stages",
    "ssd_chunk_scan",
    "gated_norm",
    "swiglu",
)


def python(program: str, **env: str) -> subprocess.CompletedProcess:
    """Run a program in a process of its own."""
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, **env}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)


def scan_arguments(dtype="f4") -> dict:
    rng = np.random.default_rng(0)
    shapes = {"u": (2, 5, 9), "delta": (2, 5, 9), "A": (5, 3), "B": (2, 3, 9), "C": (2, 3, 9)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


# What it brings ----------------------------------------------------------------------------------


def test_headers_are_where_get_include_says():
    include = Path(ssm_kernels.get_include()) / "ssm"
    for name in ("tensor", "device", *OPERATORS):
        assert (include / f"{name}.h").is_file(), name


def test_types_are_known():
    assert (PACKAGE / "py.typed").is_file()
    stub = (PACKAGE / "_cpu.pyi").read_text()
    for name in ssm_kernels.__all__:
        if getattr(ssm_kernels, name).__module__.endswith("_cpu"):
            assert f"def {name}(" in stub, name


def test_versions_agree():
    stated = re.search(r"version: '([^']+)'", (ROOT / "meson.build").read_text()).group(1)
    assert ssm_kernels.__version__ == ssm_kernels.version() == stated


def test_public_names_are_all_there_is():
    public = {n for n in vars(ssm_kernels) if not n.startswith("_")}
    modules = {n for n in public if isinstance(getattr(ssm_kernels, n), type(os))}
    assert public - modules - {"annotations"} == set(ssm_kernels.__all__)
    assert sorted(ssm_kernels.__all__) == ssm_kernels.__all__
    for name in ssm_kernels.__all__:
        assert getattr(ssm_kernels, name).__doc__, name


def test_info_is_plain_data():
    found = ssm_kernels.info()
    assert found["isa"] in found["available_isas"]
    assert set(found["operators"]) == set(OPERATORS)
    # The module is there exactly if the build says that it made it.
    is_built = importlib.util.find_spec("ssm_kernels._cuda") is not None
    assert found["cuda"].startswith("built with nvcc " if is_built else "not built: ")
    assert found["num_threads"] == ssm_kernels.get_num_threads()


def test_is_a_program():
    child = subprocess.run(
        [sys.executable, "-m", "ssm_kernels", "info"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("version")


# What it leaves alone ----------------------------------------------------------------------------


def test_import_is_silent_and_loads_no_array_library():
    program = (
        "import sys; import ssm_kernels; ssm_kernels.info(); ssm_kernels.set_num_threads(1);"
        "loaded = {'numpy', 'torch', 'jax'} & set(sys.modules);"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    child = python(program)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_import_is_quick():
    program = (
        "import time, sys; s = time.perf_counter(); import ssm_kernels;"
        "print(time.perf_counter() - s)"
    )
    # The least of a few: other processes may be at work.
    assert min(float(python(program).stdout) for _ in range(5)) < 0.05


def test_knows_no_torch():
    for path in PACKAGE.glob("*.py"):
        assert not re.search(r"^\s*(import|from) torch\b", path.read_text(), re.MULTILINE), path


# Outputs made for the caller ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
def test_outputs_are_like_the_main_input(dtype):
    arguments = scan_arguments(dtype)
    y, state = ssm_kernels.selective_scan(**arguments, softplus=True, return_last_state=True)
    want_y, want_state = judge(**arguments, softplus=True)
    acc = "f8" if dtype == "f8" else "f4"
    assert (type(y), y.dtype, state.dtype) == (np.ndarray, np.dtype(dtype), np.dtype(acc))
    tolerance = {"f8": 1e-12, "f4": 1e-5, "f2": 1e-3}[dtype]
    np.testing.assert_allclose(y, want_y, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(state, want_state, rtol=max(1e-5, tolerance), atol=1e-5)
    np.testing.assert_array_equal(ssm_kernels.selective_scan(**arguments, softplus=True), y)


def test_other_operators_make_their_outputs():
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((2, 3, 8)).astype("f4"), np.ones((3, 4), "f4")
    y, window = ssm_kernels.dw_causal_conv(x, weight, activation=None, return_final_state=True)
    np.testing.assert_allclose(y[..., 3], x[..., :4].sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(window, x[..., 5:])
    token = rng.standard_normal((2, 3)).astype("f4")
    out = ssm_kernels.dw_causal_conv_step(token, window, weight, activation="identity")
    np.testing.assert_allclose(out, x[..., 5:].sum(-1) + token, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(window[..., -1], token)

    normed, total = ssm_kernels.fused_layer_norm(token.astype("f2"), np.ones(3, "f4"))
    assert (normed.dtype, total.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(total, token.astype("f2"))
    assert ssm_kernels.fused_layer_norm(token, np.ones(3, "f4"), prenorm=False).shape == (2, 3)

    state = np.zeros((2, 3, 4), "f4")
    ones = np.ones((2, 4), "f4")
    rate = np.zeros((3, 4), "f4")
    y = ssm_kernels.selective_state_step(
        state, token, np.ones_like(token), rate, ones, ones, softplus=False
    )
    np.testing.assert_allclose(y, 4 * token, rtol=1e-6)
    np.testing.assert_allclose(state, np.repeat(token[..., None], 4, -1), rtol=1e-6)


class _Library:
    """An array library with an array API namespace and no module named like its type."""

    class Array:
        def __init__(self, data):
            self.data = data
            self.shape, self.dtype, self.device = data.shape, data.dtype, "cpu"

        def __array_namespace__(self):
            return _Library

        def __dlpack__(self, **keywords):
            return self.data.__dlpack__(**keywords)

        def __dlpack_device__(self):
            return self.data.__dlpack_device__()

    float32, float64 = np.dtype("f4"), np.dtype("f8")

    @staticmethod
    def empty(shape, *, dtype, device):
        assert device == "cpu"
        return _Library.Array(np.empty(shape, dtype))


def _is_on_huge_pages(array):
    """Read whether the middle of an array lies in a mapping that huge pages are asked for."""
    place, inside = array.ctypes.data + array.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= place < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the array")


def test_large_outputs_are_on_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this system has no transparent huge pages")
    # A mapping of its own, as an allocator makes one for so much.
    memory = mmap.mmap(-1, 1 << 25, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    y = np.frombuffer(memory, np.float32).reshape(1024, -1)
    assert not _is_on_huge_pages(y)
    zeros = np.broadcast_to(np.float32(0), y.shape)
    ssm_kernels.swiglu_fwd(zeros, zeros, y=y)
    assert _is_on_huge_pages(y)


def test_other_frameworks_are_served_through_their_namespace():
    arguments = scan_arguments()
    wrapped = {name: _Library.Array(value) for name, value in arguments.items()}
    y, state = ssm_kernels.selective_scan(**wrapped, return_last_state=True)
    want, want_state = ssm_kernels.selective_scan(**arguments, return_last_state=True)
    assert type(y) is type(state) is _Library.Array
    np.testing.assert_array_equal(y.data, want)
    np.testing.assert_array_equal(state.data, want_state)


def test_wrappers_pass_refusals_on():
    arguments = scan_arguments()
    for changed, error, sentence in (
        ({"u": [1.0]}, TypeError, "u must have shape, dtype and DLPack, got list"),
        ({"A": arguments["A"][0]}, ValueError, "A must have shape (D, N), got (3,)"),
        ({"u": arguments["u"][0]}, ValueError, "u must have shape (B, D, L), got (5, 9)"),
    ):
        with pytest.raises(error) as caught:
            ssm_kernels.selective_scan(**{**arguments, **changed}, return_last_state=True)
        assert str(caught.value) == f"selective_scan: {sentence}"
    for function in (ssm_kernels.dw_causal_conv, ssm_kernels.dw_causal_conv_step):
        with pytest.raises(ValueError) as caught:
            function(arguments["u"], arguments["A"], arguments["A"], activation="relu")
        rule = "activation must be 'silu', 'swish', 'identity' or None, got 'relu'"
        assert str(caught.value) == f"{function.__name__}: {rule}"


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_says_why_an_array_gives_no_memory(raised):
    class Silent:
        def __dlpack__(self, **_):
            raise raised("busy")

    arguments = scan_arguments()
    y = np.empty_like(arguments["u"])
    with pytest.raises(TypeError if raised is RuntimeError else raised, match="busy") as caught:
        ssm_kernels.selective_scan_fwd(**{**arguments, "u": Silent()}, y=y)
    if raised is RuntimeError:
        assert str(caught.value).endswith("got Silent: busy")


# Process-wide choices ----------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ssm_kernels.available_isas())
def test_isa_forced_is_isa_used(isa):
    child = python("import ssm_kernels; print(ssm_kernels.active_isa())", SSM_ISA=isa)
    assert (child.returncode, child.stdout) == (0, f"{isa}\n")


def takes_workspace(name: str) -> bool:
    return name.endswith(("_fwd", "_bwd")) and "workspace" in getattr(ssm_kernels, name).__doc__


@pytest.mark.parametrize("name", [n for n in ssm_kernels.__all__ if takes_workspace(n)])
def test_rejects_a_workspace_that_is_no_array(name):
    kernel = getattr(ssm_kernels, name)
    needed = re.findall(r"(\w+): object \| None \| None(?=[,)])", kernel.__doc__.split("\n")[0])
    arguments = dict.fromkeys(needed, np.zeros(1, "float32"))
    for wrong in (1, b"abc", [1.0], object()):
        with pytest.raises(TypeError, match="workspace must be a writable array or tensor"):
            kernel(**arguments, workspace=wrong)


def test_isa_left_open_is_the_best():
    for value in ("", "auto"):
        child = python("import ssm_kernels; print(ssm_kernels.active_isa())", SSM_ISA=value)
        assert child.stdout == f"{ssm_kernels.available_isas()[-1]}\n"


def test_rejects_unknown_isa():
    program = (
        "import ssm_kernels\ntry: ssm_kernels.active_isa()\nexcept RuntimeError as e: print(e)"
    )
    child = python(program, SSM_ISA="sse9")
    assert child.stdout == "SSM_ISA must be auto, baseline, avx2 or avx512, got sse9\n", (
        child.stderr
    )
    # A call says so too, and the process lives on to call again.
    program = (
        "import numpy as np, ssm_kernels\nx = np.ones((1, 1, 1))\n"
        "for _ in range(2):\n"
        "    try: ssm_kernels.selective_scan(x, x, x[0], x[0], x[0])\n"
        "    except RuntimeError as e: print(type(e).__name__)"
    )
    assert python(program, SSM_ISA="sse9").stdout == "RuntimeError\n" * 2


def test_set_num_threads():
    before = ssm_kernels.get_num_threads()
    try:
        ssm_kernels.set_num_threads(3)
        assert ssm_kernels.get_num_threads() == 3
        for count in (0, -1):
            with pytest.raises(ValueError) as caught:
                ssm_kernels.set_num_threads(count)
            assert str(caught.value) == f"set_num_threads: count must be at least 1, got {count}"
        assert ssm_kernels.get_num_threads() == 3
    finally:
        ssm_kernels.set_num_threads(before)


@pytest.mark.skipif(not ssm_kernels.info()["openmp"], reason="built without OpenMP")
def test_threads_start_as_openmp_says():
    program = "import ssm_kernels; print(ssm_kernels.get_num_threads())"
    assert python(program, OMP_NUM_THREADS="3").stdout == "3\n"


CHILD = """
import multiprocessing, sys
import numpy as np
import ssm_kernels

def call(_):
    x = np.ones((4, 64, 40), "f4")
    constant = np.ones((64, 3), "f4")
    y = ssm_kernels.selective_scan(x, x, -constant, constant, constant, num_threads=2)
    return float(y.sum())

if __name__ == "__main__":
    here = call(0)  # the parent's threads are running
    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
        assert pool.map_async(call, [0]).get(timeout=60) == [here]
    print("served")
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_child_processes_are_served(method, tmp_path):
    assert "spawn" in ssm_kernels.__doc__
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    path = os.pathsep.join(p for p in sys.path if p)
    child = subprocess.run(
        [sys.executable, program, method],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
    )
    assert child.stdout == "served\n", child.stderr


def test_calls_from_many_threads_agree():
    """The interpreter lock is released; calls share nothing but the thread count."""
    import threading

    arguments = scan_arguments()
    want = ssm_kernels.selective_scan(**arguments)
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.extend(ssm_kernels.selective_scan(**arguments) for _ in range(20))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(np.array_equal(y, want) for y in found)
