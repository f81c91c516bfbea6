"""ssm_kernels.gated_norm_fwd and _bwd.  Judge: float64 NumPy, the backward by hand."""

import itertools
import os

import numpy as np
import pytest
import ssm_kernels

from tests import judge
from tests.bfloat16 import argument, assert_values_decide, stored
from tests.cases import CASES, GatedNormCase, make
from tests.guard import far_apart, guarded, in_line
from tests.tolerances import TOLERANCES, assert_close

OP = "gated_norm"
DTYPES = ("float64", "float32", "float16")
BY_NAME = {case.name: case for case in CASES[OP]}
FLAGS = ("is_rms", "group_size", "norm_before_gate")
MODES = tuple(itertools.product((True, False), (None, 5), (True, False), ("", "z", "bias z")))


def typed(arguments: dict, dtype: str) -> dict:
    """Return the arguments with their floats in `dtype`, without those that are None."""
    found = {n: v.astype(dtype) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    return {n: v for n, v in found.items() if v is not None}


def acc_of(x: np.ndarray) -> str:
    return "float64" if x.dtype == np.float64 else "float32"


def poisoned(like: np.ndarray) -> np.ndarray:
    return np.full(like.shape, np.nan, like.dtype)


def forward(arguments: dict, num_threads: int = 0) -> dict:
    """Call the forward with poisoned outputs; return them by name."""
    x = arguments["x"]
    size = arguments.get("group_size")
    groups = int(np.prod(x.shape[:-1])) * (1 if size is None else x.shape[-1] // size)
    out = {"y": poisoned(x), "rstd": np.full(groups, np.nan, acc_of(x))}
    if not arguments.get("is_rms", True):
        out["mean"] = out["rstd"].copy()
    ssm_kernels.gated_norm_fwd(**arguments, **out, num_threads=num_threads)
    return out


def targets(arguments: dict) -> dict:
    """Return poisoned outputs of the backward."""
    out = {"dx": poisoned(arguments["x"]), "dweight": poisoned(arguments["weight"])}
    for name in ("z", "bias"):
        if arguments.get(name) is not None:
            out[f"d{name}"] = poisoned(arguments[name])
    return out


def backward(arguments: dict, saved: dict, dy, num_threads: int = 0) -> dict:
    """Call the backward with poisoned outputs; return them by name."""
    out = targets(arguments)
    statistics = {n: v for n, v in saved.items() if n != "y"}
    ssm_kernels.gated_norm_bwd(**arguments, **statistics, dy=dy, **out, num_threads=num_threads)
    return out


def judge_gradients(arguments: dict, dy) -> dict:
    """Differentiate by hand: docs/ops/gated_norm.md#backward."""
    x, weight, dy = (np.asarray(a, np.float64) for a in (arguments["x"], arguments["weight"], dy))
    size = arguments.get("group_size") or x.shape[-1]
    norm_first, z = arguments.get("norm_before_gate", True), arguments.get("z")
    gate = slope = 1.0
    if z is not None:
        z = np.asarray(z, np.float64)
        sigmoid = 1 / (1 + np.exp(-z))
        gate, slope = z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))

    def means(array):
        """Return the mean of each group in the place of each of its elements."""
        groups = array.reshape(*array.shape[:-1], -1, size)
        return np.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(array.shape)

    s = x if norm_first else x * gate
    if s.size == 0:
        found = {"dx": s, "dz": s, "dweight": 0 * weight, "dbias": 0 * weight}
        return {n: found[n] for n in targets(arguments)}
    is_rms = arguments.get("is_rms", True)
    centred = s if is_rms else s - means(s)
    rstd = 1 / np.sqrt(means(centred**2) + 1e-5)
    xhat = centred * rstd
    inner = dy * gate if norm_first else dy
    g = inner * weight
    ds = rstd * (g - (0 if is_rms else means(g)) - xhat * means(g * xhat))
    rows = tuple(range(x.ndim - 1))
    scaled = xhat * weight + np.asarray(arguments.get("bias", 0.0), np.float64)
    found = {
        "dx": ds if norm_first else ds * gate,
        "dz": dy * scaled * slope if norm_first else ds * x * slope,
        "dweight": (inner * xhat).sum(rows),
        "dbias": inner.sum(rows),
    }
    return {name: found[name] for name in targets(arguments)}


def upstream(arguments: dict) -> np.ndarray:
    """Draw a gradient of y."""
    x = arguments["x"]
    return np.random.default_rng(1).standard_normal(x.shape).astype(x.dtype)


def check(arguments: dict, dtype: str) -> None:
    """Compare a forward and a backward with the judge."""
    out = forward(arguments)
    assert_close("y", out["y"], judge.gated_norm(**arguments), TOLERANCES[OP, dtype])
    dy = upstream(arguments)
    got = backward(arguments, out, dy)
    for name, want in judge_gradients(arguments, dy).items():
        assert_close(name, got[name], want, TOLERANCES[f"{OP}_bwd", dtype])


def draw(shape, given="bias z", seed=0, dtype="float32", **flags) -> dict:
    return typed(make(GatedNormCase("drawn", shape, given=given, **flags), seed), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case, dtype):
    check(typed(make(case), dtype), dtype)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_option(mode):
    is_rms, group_size, norm_before_gate, given = mode
    flags = {"is_rms": is_rms, "group_size": group_size, "norm_before_gate": norm_before_gate}
    check(draw((3, 4, 35), given, **flags), "float32")


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


@pytest.mark.parametrize("dim", [*range(1, 20), 31, 32, 33, 63, 64, 65, 79, 127, 129, 1000])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_odd_sizes(dim, norm_before_gate):
    for is_rms in (False, True):
        flags = {"is_rms": is_rms, "norm_before_gate": norm_before_gate}
        arguments = draw((7, dim), seed=dim, **flags)
        if dim == 1 and not is_rms:  # one value has no deviation: 1 / sqrt(eps) times rounding
            arguments["x"][:] = 0
        elif dim < 4:  # so few may be nearly equal: their deviation would be rounding alone
            sign = np.float32(-1) ** np.arange(dim, dtype=np.float32)
            arguments["x"] = sign * (1 + np.abs(arguments["x"]))
            arguments["z"] = np.abs(arguments["z"]) + np.float32(0.5)
        check(arguments, "float32")


def test_large_mean_does_not_cancel():
    arguments = draw((5, 100), "", is_rms=False)
    arguments["x"] += np.float32(1e3)
    y, want = forward(arguments)["y"], judge.gated_norm(**arguments)
    # s - mean loses the digits of the mean: the input's own condition.
    assert_close("y", y / 1e3, want / 1e3, TOLERANCES[OP, "float32"])


def spread(array: np.ndarray, kind: str) -> np.ndarray:
    """Return an array of the same values in another memory layout."""
    if kind == "reversed_axes":
        return np.asfortranarray(array)
    if kind == "padded":
        wide = np.full([2 * n + 1 for n in array.shape], np.nan, array.dtype)
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in array.shape)]
    elif kind == "half":
        wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
        view = wide[..., array.shape[-1] :]
    else:  # unaligned: one element beyond any vector boundary
        view = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("kind", ["reversed_axes", "padded", "half", "unaligned"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_noncontiguous(dtype, kind, norm_before_gate):
    # All six axes.
    flags = {"is_rms": False, "group_size": 19, "norm_before_gate": norm_before_gate}
    plain = draw((2, 3, 2, 5, 2, 38), dtype=dtype, **flags)
    dy = upstream(plain)

    def other(arrays):
        return {n: spread(v, kind) if isinstance(v, np.ndarray) else v for n, v in arrays.items()}

    want = forward(plain)
    got = other({name: poisoned(value) for name, value in want.items()})
    ssm_kernels.gated_norm_fwd(**other(plain), **got)
    want_grads = backward(plain, want, dy)
    grads = other(targets(plain))
    statistics = {n: v for n, v in got.items() if n != "y"}
    ssm_kernels.gated_norm_bwd(**other(plain), **statistics, dy=spread(dy, kind), **grads)
    for name, value in (want | want_grads).items():
        np.testing.assert_array_equal((got | grads)[name], value, err_msg=name)


def test_mixed_dtypes_axis_orders_and_stride_zero():
    rng = np.random.default_rng(0)
    arguments = {
        "x": rng.standard_normal((4, 3, 20)).astype(np.float16).transpose(1, 0, 2),
        "z": np.broadcast_to(rng.standard_normal((4, 20)).astype(np.float32), (3, 4, 20)),
        "weight": np.broadcast_to(np.float64(0.5), (20,)),
    }
    out = forward(arguments)
    assert_close("y", out["y"], judge.gated_norm(**arguments), TOLERANCES[OP, "float16"])
    dy = rng.standard_normal((3, 4, 20))
    got = backward(arguments, out, dy)
    dtypes = {"dx": "float16", "dz": "float32", "dweight": "float32"}
    for name, want in judge_gradients(arguments, dy).items():
        assert_close(name, got[name], want, TOLERANCES[f"{OP}_bwd", dtypes[name]])


@pytest.mark.skipif(
    "SSM_TEST_PTX" in os.environ, reason="nvcc fuses products and sums in each kernel as it likes"
)
@pytest.mark.parametrize("main", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["x", "z", "weight", "bias", "y", "dy", "dx", "dz", "dweight"])
def test_each_array_alone_in_another_dtype(name, main):
    """Its values decide, not how they are stored."""
    # On a GPU the dtype decides how lanes share a row longer than a warp, and so the order of sums.
    dim = 21 if "SSM_TEST_CUDA_HOST" in os.environ else 69
    rng, shape = np.random.default_rng(0), (3, dim)
    shapes = {"x": shape, "z": shape, "weight": (dim,), "bias": (dim,), "dy": shape}
    # Numbers that every type holds.
    arrays = {n: np.float32(rng.integers(-8, 9, s) / 4) for n, s in shapes.items()}
    outputs = {"y": shape, "dx": shape, "dz": shape, "dweight": (dim,), "dbias": (dim,)}
    arrays |= {n: np.zeros(s, "f4") for n, s in outputs.items()}

    def run(views):
        inputs = {n: views[n] for n in ("x", "z", "weight", "bias")} | {"is_rms": False}
        statistics = {n: np.zeros(3, "f4") for n in ("mean", "rstd")}
        ssm_kernels.gated_norm_fwd(**inputs, **statistics, y=views["y"])
        gradients = {n: views[n] for n in ("dy", "dx", "dz", "dweight", "dbias")}
        ssm_kernels.gated_norm_bwd(**inputs, **statistics, **gradients)

    assert_values_decide(run, arrays, list(outputs), main, name, arithmetic="x")


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("shape", [(300, 257), (3, 40000), (1031, 64)])
def test_threads_agree(shape, norm_before_gate):
    arguments = draw(shape, is_rms=False, norm_before_gate=norm_before_gate)
    dy = upstream(arguments)
    want = forward(arguments, 1)
    want_grads = backward(arguments, want, dy, 1)
    for threads in (2, 3, 8):
        for name, value in forward(arguments, threads).items():
            np.testing.assert_array_equal(value, want[name], err_msg=name)
        for name, value in backward(arguments, want, dy, threads).items():
            np.testing.assert_array_equal(value, want_grads[name], err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "dim", "group_size", "norm_before_gate"),
    [
        ("float32", 2048, 512, True),
        ("float32", 2080, 26, False),  # groups that are no whole vectors
        ("float16", 2048, None, False),
        ("bfloat16", 2048, 512, True),
        # Whole vectors, but no pair of them: rows, and groups of 16 and of 8 elements.
        ("bfloat16", 2056, None, False),
        ("bfloat16", 2064, None, True),
        ("bfloat16", 2080, 80, True),
        ("bfloat16", 2080, 40, False),
    ],
)
def test_large_outputs_past_the_caches(dtype, dim, group_size, norm_before_gate):
    """Outputs that are streamed, all or some of them, hold the rows that a small call gives."""
    if "SSM_TEST_CUDA_HOST" in os.environ and (dtype, dim) != ("float32", 2048):
        pytest.skip("the CUDA sources have no stores past the caches")
    rng = np.random.default_rng(0)
    few = [stored(rng.standard_normal((41, dim), dtype="f4"), dtype) for _ in range(3)]
    weight = rng.standard_normal(dim, dtype="f4")
    flags = {"group_size": group_size, "norm_before_gate": norm_before_gate}

    def both(x, z, dy, places):
        y, dx, dz = (in_line(np.zeros_like(x), place) for place in places)
        inputs = {"x": argument(x), "z": argument(z), "weight": weight, **flags}
        rstd = np.zeros(x.size // (group_size or dim), "f4")
        ssm_kernels.gated_norm_fwd(**inputs, y=argument(y), rstd=rstd)
        out = {"dx": argument(dx), "dz": argument(dz)}
        ssm_kernels.gated_norm_bwd(**inputs, rstd=rstd, dy=argument(dy), **out)
        return {"y": y, "dx": dx, "dz": dz}

    want = both(*few, (0, 0, 0))
    assert all(value.any() for value in want.values())
    times = 16 * 2**20 // few[0].nbytes + 1
    many = [np.tile(value, (times, 1)) for value in few]
    for places in ((0, 0, 1), (0, 1, 0), (8, 16, 8), (16, 8, 16)):
        for name, got in both(*many, places).items():
            assert (got.reshape(times, 41, dim) == want[name]).all(), name


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd", "gate_first", "groups_gate_first", "bare", "wide"])
def test_stays_in_bounds(name, dtype, at_end):
    """A read or write beyond any tensor faults and ends the process."""
    plain = typed(make(BY_NAME[name]), dtype)
    dy = upstream(plain)

    def fence(arrays):
        return {
            n: guarded(v, at_end) if isinstance(v, np.ndarray) else v for n, v in arrays.items()
        }

    want = forward(plain)
    want_grads = backward(plain, want, dy)
    got = fence({name: poisoned(value) for name, value in want.items()})
    ssm_kernels.gated_norm_fwd(**fence(plain), **got)
    grads = fence(targets(plain))
    statistics = {n: v for n, v in got.items() if n != "y"}
    ssm_kernels.gated_norm_bwd(**fence(plain), **statistics, dy=guarded(dy, at_end), **grads)
    for name, value in (want | want_grads).items():
        np.testing.assert_array_equal((got | grads)[name], value, err_msg=name)


@pytest.mark.parametrize("axis", [0, 1])
def test_large_offsets(axis):
    plain = draw((3, 4), dtype="float16", is_rms=False)
    dy = upstream(plain)
    want = forward(plain)
    want_grads = backward(plain, want, dy)

    def far(arrays):
        return {
            n: far_apart(v, axis if v.ndim == 2 else 0) if isinstance(v, np.ndarray) else v
            for n, v in arrays.items()
        }

    try:
        inputs, far_dy = far(plain), far_apart(dy, axis)
        got = far({name: poisoned(value) for name, value in want.items()})
        grads = far(targets(plain))
    except OSError as error:
        pytest.skip(f"no address space for tensors beyond 2^31 elements: {error}")
    assert inputs["x"].strides[axis] > 2**31
    ssm_kernels.gated_norm_fwd(**inputs, **got)
    statistics = {n: v for n, v in got.items() if n != "y"}
    ssm_kernels.gated_norm_bwd(**inputs, **statistics, dy=far_dy, **grads)
    for name, value in (want | want_grads).items():
        np.testing.assert_array_equal((got | grads)[name], value, err_msg=name)


def test_rows_are_independent():
    arguments = typed(make(BY_NAME["groups_gate_first"]), "float32")
    want = forward(arguments)["y"]
    more = {
        n: np.concatenate([np.full_like(v, np.nan), v, v[:2]]) if np.ndim(v) == 2 else v
        for n, v in arguments.items()
    }
    np.testing.assert_array_equal(forward(more)["y"][5:10], want)


def test_nan_stays_in_its_group():
    for norm_before_gate, name in itertools.product((True, False), ("x", "z")):
        arguments = draw((2, 30), group_size=10, norm_before_gate=norm_before_gate)
        arguments[name][1, 14] = np.nan
        is_nan = np.isnan(forward(arguments)["y"])
        want = np.zeros((2, 30), bool)
        # A gate that comes last touches its own element only.
        want[1, 14 if norm_before_gate and name == "z" else slice(10, 20)] = True
        np.testing.assert_array_equal(is_nan, want)


def test_gradients_that_are_not_wanted():
    arguments = typed(make(BY_NAME["odd"]), "float32")
    saved, dy = forward(arguments), upstream(arguments)
    want = backward(arguments, saved, dy)
    out = {name: poisoned(arguments["x"]) for name in ("dx", "dz")}
    statistics = {n: v for n, v in saved.items() if n != "y"}
    ssm_kernels.gated_norm_bwd(**arguments, **statistics, dy=dy, **out)
    for name, value in out.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_leaves_inputs_alone():
    arguments = typed(make(BY_NAME["odd"]), "float16")
    before = {k: v.copy() for k, v in arguments.items() if isinstance(v, np.ndarray)}
    backward(arguments, forward(arguments), upstream(arguments))
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value, err_msg=name)


def test_operator_makes_its_output():
    arguments = typed(make(BY_NAME["groups"]), "float32")
    np.testing.assert_array_equal(ssm_kernels.gated_norm(**arguments), forward(arguments)["y"])
