"""ssm_kernels.swiglu_fwd and _bwd.  Judge: float64 NumPy, the backward by hand."""

import os

import numpy as np
import pytest
import ssm_kernels

from tests import judge
from tests.bfloat16 import argument, assert_values_decide, stored
from tests.cases import CASES, make
from tests.guard import far_apart, guarded, in_line
from tests.tolerances import TOLERANCES, assert_close

OP = "swiglu"
DTYPES = ("float64", "float32", "float16")
BY_NAME = {case.name: case for case in CASES[OP]}


def typed(arguments: dict, dtype: str) -> dict:
    """Return the arguments with their floats in `dtype`."""
    return {n: v.astype(dtype) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}


def poisoned(like: np.ndarray) -> np.ndarray:
    return np.full(like.shape, np.nan, like.dtype)


def halves(arguments: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return gate and up in float64."""
    gate, up = arguments["gate"], arguments.get("up")
    if up is None:
        gate, up = np.split(gate, 2, axis=-1)
    return np.asarray(gate, np.float64), np.asarray(up, np.float64)


def forward(arguments: dict, num_threads: int = 0) -> np.ndarray:
    """Call the forward with a poisoned output."""
    y = np.full(halves(arguments)[0].shape, np.nan, arguments["gate"].dtype)
    ssm_kernels.swiglu_fwd(**arguments, y=y, num_threads=num_threads)
    return y


def backward(arguments: dict, dy, num_threads: int = 0) -> dict:
    """Call the backward with poisoned outputs; return them by name."""
    up = arguments.get("up")
    out = {"dgate": poisoned(arguments["gate"]), "dup": None if up is None else poisoned(up)}
    ssm_kernels.swiglu_bwd(**arguments, dy=dy, **out, num_threads=num_threads)
    return {name: value for name, value in out.items() if value is not None}


def judge_gradients(arguments: dict, dy) -> dict:
    """Differentiate by hand: docs/ops/swiglu.md#backward."""
    (gate, up), dy = halves(arguments), np.asarray(dy, np.float64)
    sigmoid = 1 / (1 + np.exp(-gate))
    dgate, dup = dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid
    if arguments.get("up") is None:
        return {"dgate": np.concatenate([dgate, dup], -1)}
    return {"dgate": dgate, "dup": dup}


def upstream(arguments: dict) -> np.ndarray:
    """Draw a gradient of y."""
    shape = halves(arguments)[0].shape
    return np.random.default_rng(1).standard_normal(shape).astype(arguments["gate"].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case, dtype):
    arguments = typed(make(case), dtype)
    assert_close("y", forward(arguments), judge.swiglu(**arguments), TOLERANCES[OP, dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_grad_matches_judge(case, dtype):
    arguments = typed(make(case), dtype)
    dy = upstream(arguments)
    got = backward(arguments, dy)
    for name, want in judge_gradients(arguments, dy).items():
        assert_close(name, got[name], want, TOLERANCES[f"{OP}_bwd", dtype])


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


@pytest.mark.parametrize("dim", [*range(1, 20), 31, 32, 33, 63, 64, 65, 79, 127, 129, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_odd_sizes(dim, dtype):
    rng = np.random.default_rng(dim)
    for shape in ((7, dim), (dim,)):
        arguments = typed({n: rng.standard_normal(shape) for n in ("gate", "up")}, dtype)
        assert_close("y", forward(arguments), judge.swiglu(**arguments), TOLERANCES[OP, dtype])
        dy = upstream(arguments)
        got = backward(arguments, dy)
        for name, want in judge_gradients(arguments, dy).items():
            assert_close(name, got[name], want, TOLERANCES[f"{OP}_bwd", dtype])


def test_error_grows_with_the_gate_only():
    """In units in the last place: 4, and a quarter more per unit of |gate|."""
    gate = np.linspace(-80, 80, 200001).astype(np.float32)
    got = forward({"gate": gate, "up": np.ones_like(gate)})
    exact = np.asarray(gate, np.float64)
    want = exact / (1 + np.exp(-exact))
    error = np.abs(got - want) / np.spacing(np.abs(want).astype(np.float32))
    assert (error <= 4 + np.abs(gate) / 4).all(), error.max()


def test_small_values_are_exact_in_float64():
    gate = np.linspace(-690, 80, 20001)
    got = forward({"gate": gate, "up": np.ones_like(gate)})
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [np.inf, 3e38, 1e4, 0.0, -0.0, -1e4, -3e38])
def test_extreme_gates(value, dtype):
    gate = np.full(37, value, dtype)
    one = np.ones_like(gate)
    y = forward({"gate": gate, "up": one})
    assert_close("y", y, np.maximum(gate, 0.0), TOLERANCES[OP, "float32"])
    got = backward({"gate": gate, "up": one}, one)
    assert_close("dup", got["dup"], np.maximum(gate, 0.0), TOLERANCES[OP, "float32"])
    if np.isfinite(value):
        want = np.full(37, 0.5 if value == 0 else float(value > 0))
        assert_close("dgate", got["dgate"], want, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 80, 120), ("float64", 700, 800)])
def test_gates_whose_exponential_overflows(dtype, least, most):
    gate = np.linspace(-most, -least, 1111).astype(dtype)
    gate[::100] = np.finfo(dtype).min / 2  # times what is left of a sigmoid it would be large
    one = np.ones_like(gate)
    got = {"y": forward({"gate": gate, "up": one}), **backward({"gate": gate, "up": one}, one)}
    for name, values in got.items():
        assert (np.abs(values) < 1e-30).all(), name


@pytest.mark.parametrize("name", ["gate", "up", "dy"])
def test_nan_stays_nan(name):
    values = {n: np.ones(37, np.float32) for n in ("gate", "up", "dy")}
    values[name][5] = np.nan
    dy = values.pop("dy")
    got = backward(values, dy)
    if name != "dy":
        got["y"] = forward(values)
    for which, value in got.items():
        wanted = not (which == "dup" and name == "up")
        assert np.isnan(value[5]) == wanted, which
        assert not np.isnan(np.delete(value, 5)).any(), which


def spread(array: np.ndarray, kind: str) -> np.ndarray:
    """Return an array of the same values in another memory layout."""
    if kind == "reversed_axes":
        return np.asfortranarray(array)
    if kind == "padded":
        wide = np.full([2 * n + 1 for n in array.shape], np.nan, array.dtype)
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in array.shape)]
    elif kind == "lines_inside":  # lines as far apart as adjacent lines, their elements farther
        size = array.shape[-1]
        wide = np.full((size, *array.shape[:-1], size), np.nan, array.dtype)
        view = np.moveaxis(wide[..., 0], 0, -1)
    elif kind == "half":
        wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
        view = wide[..., array.shape[-1] :]
    else:  # unaligned: one element beyond any vector boundary
        view = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["reversed_axes", "padded", "lines_inside", "half", "unaligned"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_noncontiguous(dtype, kind, packed):
    rng = np.random.default_rng(0)
    shape = (2, 3, 2, 5, 2, 38)  # all six axes
    plain = {n: rng.standard_normal(shape) for n in (("gate",) if packed else ("gate", "up"))}
    plain = typed(plain, dtype)
    dy = upstream(plain)
    want_y, want = forward(plain), backward(plain, dy)
    other = {name: spread(value, kind) for name, value in plain.items()}
    y = spread(poisoned(want_y), kind)
    ssm_kernels.swiglu_fwd(**other, y=y)
    np.testing.assert_array_equal(y, want_y)
    got = {name: spread(poisoned(value), kind) for name, value in want.items()}
    ssm_kernels.swiglu_bwd(**other, dy=spread(dy, kind), **got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_packed_equals_separate():
    arguments = typed(make(BY_NAME["packed_odd"]), "float32")
    dy = upstream(arguments)
    gate, up = np.split(arguments["gate"], 2, axis=-1)
    separate = {"gate": gate, "up": up}
    np.testing.assert_array_equal(forward(arguments), forward(separate))
    got = backward(separate, dy)
    want = backward(arguments, dy)["dgate"]
    np.testing.assert_array_equal(np.concatenate([got["dgate"], got["dup"]], -1), want)


def test_mixed_dtypes_and_stride_zero():
    rng = np.random.default_rng(0)
    gate = np.broadcast_to(rng.standard_normal((4, 20)).astype(np.float16), (3, 4, 20))
    arguments = {"gate": gate, "up": rng.standard_normal((4, 3, 20)).transpose(1, 0, 2)}
    assert_close("y", forward(arguments), judge.swiglu(**arguments), TOLERANCES[OP, "float16"])
    dy = rng.standard_normal((3, 4, 20)).astype(np.float32)
    got = backward(arguments, dy)
    want = judge_gradients(arguments, dy)
    assert_close("dgate", got["dgate"], want["dgate"], TOLERANCES[f"{OP}_bwd", "float16"])
    assert_close("dup", got["dup"], want["dup"], TOLERANCES[f"{OP}_bwd", "float32"])


def test_axes_of_which_some_follow_one_another():
    rng = np.random.default_rng(0)
    # The first two axes are one with a single stride, the third has one place, the fourth is apart.
    gate, up, dy, y, dgate, dup = (
        rng.standard_normal((6, 9, 20), "f4")[:, :8:2].reshape(2, 3, 1, 4, 20) for _ in range(6)
    )
    assert np.array(gate.strides)[[0, 1, 3, 4]].tolist() == [2160, 720, 160, 4]
    ssm_kernels.swiglu_fwd(gate, up, y=y)
    ssm_kernels.swiglu_bwd(gate, up, dy=dy, dgate=dgate, dup=dup)
    dense = {"gate": gate.copy(), "up": up.copy()}
    np.testing.assert_array_equal(y, forward(dense))
    for name, want in backward(dense, dy.copy()).items():
        np.testing.assert_array_equal({"dgate": dgate, "dup": dup}[name], want)


@pytest.mark.parametrize("main", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gate", "up", "y", "dy", "dgate", "dup"])
def test_each_array_alone_in_another_dtype(name, main):
    """Its values decide, not how they are stored."""
    rng = np.random.default_rng(0)
    # Numbers that every type holds.
    arrays = {n: np.float32(rng.integers(-8, 9, (3, 69)) / 4) for n in ("gate", "up", "dy")}
    arrays |= {n: np.zeros((3, 69), "f4") for n in ("y", "dgate", "dup")}

    def run(views):
        inputs = {n: views[n] for n in ("gate", "up")}
        ssm_kernels.swiglu_fwd(**inputs, y=views["y"])
        ssm_kernels.swiglu_bwd(**inputs, **{n: views[n] for n in ("dy", "dgate", "dup")})

    assert_values_decide(run, arrays, ("y", "dgate", "dup"), main, name, arithmetic="gate")


@pytest.mark.parametrize("shape", [(300, 257), (3, 40000), (1031, 64), (70001,)])
def test_threads_agree(shape):
    rng = np.random.default_rng(0)
    arguments = {n: rng.standard_normal(shape).astype(np.float32) for n in ("gate", "up")}
    dy = upstream(arguments)
    want, want_grads = forward(arguments, 1), backward(arguments, dy, 1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(forward(arguments, threads), want)
        for name, value in backward(arguments, dy, threads).items():
            np.testing.assert_array_equal(value, want_grads[name], err_msg=name)


@pytest.mark.parametrize("shape", [(2500, 20), (3, 20000)])
def test_views_of_several_tasks(shape):
    """Many short rows and a few long ones, with strides that keep them from being one row."""
    rng = np.random.default_rng(0)
    plain = {n: rng.standard_normal(shape, dtype="f4") for n in ("gate", "up")}
    dy = upstream(plain)
    other = {name: spread(value, "padded") for name, value in plain.items()}
    y, dgate, dup = (spread(poisoned(dy), "padded") for _ in range(3))
    ssm_kernels.swiglu_fwd(**other, y=y)
    ssm_kernels.swiglu_bwd(**other, dy=spread(dy, "padded"), dgate=dgate, dup=dup)
    assert_close("y", y, judge.swiglu(**plain), TOLERANCES[OP, "float32"])
    want = judge_gradients(plain, dy)
    for name, got in (("dgate", dgate), ("dup", dup)):
        assert_close(name, got, want[name], TOLERANCES[f"{OP}_bwd", "float32"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_outputs_past_the_caches(dtype):
    """Outputs that are streamed, all or some of them, hold the rows that a small call gives."""
    if "SSM_TEST_CUDA_HOST" in os.environ and dtype != "float32":
        pytest.skip("the CUDA sources have no stores past the caches")
    rng = np.random.default_rng(0)
    few = [stored(rng.standard_normal((41, 2048), dtype="f4"), dtype) for _ in range(3)]

    def both(gate, up, dy, places, gap=0):
        wide = np.zeros((len(gate), 2048 + gap), gate.dtype)
        y, dgate, dup = (in_line(wide, place)[:, :2048] for place in places)
        ssm_kernels.swiglu_fwd(argument(gate), argument(up), y=argument(y))
        out = {"dgate": argument(dgate), "dup": argument(dup)}
        ssm_kernels.swiglu_bwd(argument(gate), argument(up), dy=argument(dy), **out)
        return {"y": y, "dgate": dgate, "dup": dup}

    want = both(*few, (0, 0, 0))
    assert all(value.any() for value in want.values())
    times = 16 * 2**20 // few[0].nbytes + 1
    # The inputs lie where they could be written past the caches: what decides is the output.
    many = [in_line(np.tile(value, (times, 1))) for value in few]
    # A gap of 8 or 16 puts every second row elsewhere in its cache line, where stores of one vector
    # are aligned, but not those of two.
    cases = [((0, 0, 1), 0), ((0, 1, 0), 0), ((0, 0, 0), 8), ((0, 0, 0), 16)]
    for places, gap in (*cases, ((8, 16, 8), 0), ((16, 8, 16), 0)):
        for name, got in both(*many, places, gap).items():
            assert (got.reshape(times, 41, 2048) == want[name]).all(), name


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd", "packed_odd", "no_batch", "mamba2_130m"])
def test_stays_in_bounds(name, dtype, at_end):
    """A read or write beyond any tensor faults and ends the process."""
    plain = {n: v for n, v in typed(make(BY_NAME[name]), dtype).items() if v is not None}
    dy = upstream(plain)
    want_y, want = forward(plain), backward(plain, dy)
    fenced = {name: guarded(value, at_end) for name, value in plain.items()}
    y = guarded(poisoned(want_y), at_end)
    ssm_kernels.swiglu_fwd(**fenced, y=y)
    np.testing.assert_array_equal(y, want_y)
    got = {name: guarded(poisoned(value), at_end) for name, value in want.items()}
    ssm_kernels.swiglu_bwd(**fenced, dy=guarded(dy, at_end), **got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("axis", [0, 1])
def test_large_offsets(axis):
    rng = np.random.default_rng(0)
    plain = typed({n: rng.standard_normal((3, 4)) for n in ("gate", "up")}, "float16")
    dy = upstream(plain)
    want_y, want = forward(plain), backward(plain, dy)
    try:
        far = {name: far_apart(value, axis) for name, value in plain.items()}
        y = far_apart(poisoned(want_y), axis)
        got = {name: far_apart(poisoned(value), axis) for name, value in want.items()}
        far_dy = far_apart(dy, axis)
    except OSError as error:
        pytest.skip(f"no address space for tensors beyond 2^31 elements: {error}")
    assert far["gate"].strides[axis] > 2**31
    ssm_kernels.swiglu_fwd(**far, y=y)
    ssm_kernels.swiglu_bwd(**far, dy=far_dy, **got)
    np.testing.assert_array_equal(y, want_y)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("apart", ["gate", "up", "dy", "y", "dgate", "dup"])
def test_one_tensor_may_lie_apart(apart):
    gate, up, dy = np.random.default_rng(0).standard_normal((3, 3, 16)).astype("float32")

    def results(apart: str) -> dict:
        arrays = {"gate": gate, "up": up, "dy": dy}
        arrays |= {name: poisoned(gate) for name in ("y", "dgate", "dup")}
        if apart:
            wide = np.zeros((3, 32), "float32")
            wide[:, ::2] = arrays[apart]
            arrays[apart] = wide[:, ::2]
        y = arrays.pop("y")
        ssm_kernels.swiglu_fwd(arrays["gate"], arrays["up"], y=y)
        ssm_kernels.swiglu_bwd(**arrays)
        return {**arrays, "y": y}

    got = results(apart)
    for name, want in results("").items():
        np.testing.assert_allclose(got[name], want, 1e-6, 1e-6, err_msg=name)


def test_rows_are_independent():
    arguments = typed(make(BY_NAME["odd"]), "float32")
    want = forward(arguments)
    more = {n: np.concatenate([np.full_like(v, np.nan), v, v[:1]]) for n, v in arguments.items()}
    np.testing.assert_array_equal(forward(more)[3:6], want)


def test_leaves_inputs_alone():
    arguments = typed(make(BY_NAME["odd"]), "float16")
    before = {name: value.copy() for name, value in arguments.items()}
    forward(arguments)
    backward(arguments, upstream(arguments))
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value, err_msg=name)


def test_operator_makes_its_output():
    arguments = typed(make(BY_NAME["odd"]), "float32")
    np.testing.assert_array_equal(ssm_kernels.swiglu(**arguments), forward(arguments))
    packed = np.concatenate([arguments["gate"], arguments["up"]], -1)
    np.testing.assert_array_equal(ssm_kernels.swiglu(packed), forward(arguments))


X = np.ones((2, 3, 4), np.float32)
FLOATS = "float64, float32, bfloat16 or float16"
REJECTED = {
    "gate_rank": ({"gate": np.zeros(())}, "gate must have shape (..., D), got ()"),
    "gate_dtype": ({"gate": X.astype("i8")}, f"gate must have dtype {FLOATS}, got int64"),
    "gate_missing": ({"gate": None}, "gate must be given, got None"),
    "gate_odd": (
        {"gate": X[..., :3], "up": None},
        "gate must have an even last axis without up, got 3",
    ),
    "up_shape": ({"up": X[0]}, "up must have shape (..., D) = (2, 3, 4), got (3, 4)"),
    "up_dtype": ({"up": X.astype("i4")}, f"up must have dtype {FLOATS}, got int32"),
    "y_shape": (
        {"y": X[..., :2].copy()},
        "y must have shape (..., D) = (2, 3, 4), got (2, 3, 2)",
    ),
    "y_packed": ({"up": None}, "y must have shape (..., D) = (2, 3, 2), got (2, 3, 4)"),
    "y_missing": ({"y": None}, "y must be given, got None"),
    "y_overlap": (
        {"y": np.lib.stride_tricks.as_strided(np.zeros(12), (2, 3, 4), (0, 32, 8))},
        "y must not overlap itself, got stride 0 along axis 0",
    ),
}
REJECTED_BACKWARD = {
    "dy_missing": ({"dy": None}, "dy must be given, got None"),
    "dy_shape": ({"dy": X[:1]}, "dy must have shape (..., D) = (2, 3, 4), got (1, 3, 4)"),
    "dgate_shape": (
        {"dgate": X[..., :2].copy()},
        "dgate must have shape (..., D) = (2, 3, 4), got (2, 3, 2)",
    ),
    "dup_missing": ({"dup": None}, "dup must be given, got None"),
    "dup_packed": (
        {"up": None, "dy": X[..., :2]},
        "dup must be None without up, got an array",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_forward(name):
    change, sentence = REJECTED[name]
    with pytest.raises(ValueError) as error:
        ssm_kernels.swiglu_fwd(**{"gate": X, "up": X, "y": X.copy(), **change})
    assert str(error.value) == f"{OP}: {sentence}"


@pytest.mark.parametrize("name", REJECTED_BACKWARD)
def test_rejects_backward(name):
    change, sentence = REJECTED_BACKWARD[name]
    out = {"dgate": X.copy(), "dup": X.copy()}
    with pytest.raises(ValueError) as error:
        ssm_kernels.swiglu_bwd(**{"gate": X, "up": X, "dy": X, **out, **change})
    assert str(error.value) == f"{OP}: {sentence}"


def test_rejects_read_only_output():
    y = X.copy()
    y.flags.writeable = False
    with pytest.raises(TypeError, match=f"^{OP}: y must be"):
        ssm_kernels.swiglu_fwd(X, X, y=y)
