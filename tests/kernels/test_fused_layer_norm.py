"""ssm_kernels.fused_layer_norm_fwd and _bwd.  Judge: float64 NumPy, the backward by hand."""

import os

import numpy as np
import pytest
import ssm_kernels

from tests import judge
from tests.bfloat16 import argument, assert_values_decide, stored
from tests.cases import CASES, make
from tests.guard import far_apart, guarded, in_line
from tests.tolerances import TOLERANCES, assert_close

OP = "fused_layer_norm"
DTYPES = ("float64", "float32", "float16")
BY_NAME = {case.name: case for case in CASES[OP]}
WEIGHTS = ("weight", "bias")


def typed(arguments: dict, dtype: str) -> dict:
    """Return the arguments with their floats in `dtype`."""
    return {
        name: value.astype(dtype) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }


def acc_of(x: np.ndarray) -> str:
    return "float64" if x.dtype == np.float64 else "float32"


def poisoned(shape, dtype) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def forward(arguments: dict, num_threads: int = 0, sum_dtype: str | None = None) -> dict:
    """Call the forward with poisoned outputs; return them by name."""
    x = arguments["x"]
    acc = acc_of(x)
    rows = int(np.prod(x.shape[:-1]))
    out = {
        "y": poisoned(x.shape, x.dtype),
        "residual_out": poisoned(x.shape, sum_dtype or acc),
        "mean": None if arguments["is_rms"] else poisoned(rows, acc),
        "rstd": poisoned(rows, acc),
    }
    ssm_kernels.fused_layer_norm_fwd(**arguments, **out, num_threads=num_threads)
    return out


def backward(arguments: dict, saved: dict, dy, ds, num_threads: int = 0) -> dict:
    """Call the backward with poisoned outputs; return them by name."""
    x, weight = arguments["x"], arguments["weight"]
    out = {
        "dx": poisoned(x.shape, x.dtype),
        "dresidual": poisoned(x.shape, acc_of(x)),
        "dweight": poisoned(weight.shape, weight.dtype),
        "dbias": poisoned(weight.shape, weight.dtype),
    }
    ssm_kernels.fused_layer_norm_bwd(
        x,
        weight,
        arguments.get("residual"),
        mean=saved["mean"],
        rstd=saved["rstd"],
        dy=dy,
        dresidual_out=ds,
        **out,
        is_rms=arguments["is_rms"],
        num_threads=num_threads,
    )
    return out


def judge_gradients(arguments: dict, dy, ds) -> dict:
    """Differentiate the norm by hand: docs/ops/fused_layer_norm.md#backward."""
    s = np.asarray(arguments["x"], np.float64)
    if arguments.get("residual") is not None:
        s = s + arguments["residual"]
    dy, weight = (np.asarray(a, np.float64) for a in (dy, arguments["weight"]))
    rows = tuple(range(s.ndim - 1))
    if s.shape[-1] == 0:
        return {"dx": s, "dresidual": s, "dweight": weight, "dbias": weight}
    centred = s if arguments["is_rms"] else s - s.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    xhat, g = centred * rstd, dy * weight
    d = g - xhat * (g * xhat).mean(-1, keepdims=True)
    if not arguments["is_rms"]:
        d = d - g.mean(-1, keepdims=True)
    d = d * rstd + (0 if ds is None else np.asarray(ds, np.float64))
    return {
        "dx": d,
        "dresidual": d,
        "dweight": (dy * xhat).sum(rows),
        "dbias": dy.sum(rows),
    }


def upstream(arguments: dict, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draw gradients of both outputs."""
    rng, x = np.random.default_rng(seed), arguments["x"]
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    return dy, rng.standard_normal(x.shape).astype(acc_of(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case, dtype):
    arguments = typed(make(case), dtype)
    out = forward(arguments)
    want_y, want_s = judge.fused_layer_norm(**arguments)
    assert_close("y", out["y"], want_y, TOLERANCES[OP, dtype])
    assert_close("s", out["residual_out"], want_s, TOLERANCES[OP, acc_of(arguments["x"])])


@pytest.mark.parametrize("with_ds", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_grad_matches_judge(case, dtype, with_ds):
    arguments = typed(make(case), dtype)
    dy, ds = upstream(arguments)
    ds = ds if with_ds else None
    got = backward(arguments, forward(arguments), dy, ds)
    for name, want in judge_gradients(arguments, dy, ds).items():
        exact = name == "dresidual" and dtype == "float16"
        row = f"{OP}_bwd", "float32" if exact else dtype
        assert_close(name, got[name], want, TOLERANCES[row])


def test_grad_from_the_sum_equals_grad_from_its_terms():
    arguments = typed(make(BY_NAME["odd"]), "float32")
    saved = forward(arguments)
    dy, ds = upstream(arguments)
    want = backward(arguments, saved, dy, ds)
    from_sum = {**arguments, "x": saved["residual_out"], "residual": None}
    for name, got in backward(from_sum, saved, dy, ds).items():
        np.testing.assert_array_equal(got, want[name], err_msg=name)


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


@pytest.mark.parametrize("dim", [*range(1, 20), 31, 32, 33, 63, 64, 65, 79, 80, 127, 129, 1000])
def test_odd_sizes(dim):
    rng = np.random.default_rng(dim)
    for is_rms in (False, True):
        # A mean far from zero: the naive E[s^2] - E[s]^2 would lose all digits.
        x = (rng.standard_normal((7, dim)) + (0 if dim < 2 else 1e3)).astype(np.float32)
        arguments = {
            "x": x,
            "weight": rng.standard_normal(dim).astype(np.float32),
            "bias": None,
            "residual": None,
            "is_rms": is_rms,
        }
        out = forward(arguments)
        want_y, want_s = judge.fused_layer_norm(**arguments)
        if is_rms or dim > 4:  # for fewer the cancellation in s - mean is the input's own
            scale = 1 if is_rms else 1e3  # s - mean loses the digits of the mean: condition
            assert_close("y", out["y"] / scale, want_y / scale, TOLERANCES[OP, "float32"])
        np.testing.assert_array_equal(out["residual_out"], want_s)


def spread(array: np.ndarray, kind: str) -> np.ndarray:
    """Return an array of the same values in another memory layout."""
    if kind == "reversed_axes":
        return np.asfortranarray(array)
    if kind == "padded":
        wide = np.full([2 * n + 1 for n in array.shape], np.nan, array.dtype)
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in array.shape)]
    else:  # unaligned: one element beyond any vector boundary
        view = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("kind", ["reversed_axes", "padded", "unaligned"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_noncontiguous(dtype, kind):
    rng = np.random.default_rng(0)
    shape = (2, 3, 2, 5, 2, 37)  # all six axes
    plain = {
        "x": rng.standard_normal(shape),
        "weight": rng.standard_normal(37),
        "bias": rng.standard_normal(37),
        "residual": rng.standard_normal(shape),
    }
    plain = {**typed(plain, dtype), "is_rms": False}
    other = {k: spread(v, kind) if isinstance(v, np.ndarray) else v for k, v in plain.items()}
    dy, ds = upstream(plain)
    want = forward(plain)
    got = {k: None if v is None else spread(np.full_like(v, np.nan), kind) for k, v in want.items()}
    ssm_kernels.fused_layer_norm_fwd(**other, **got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    want_grads = backward(plain, want, dy, ds)
    grads = {k: spread(np.full_like(v, np.nan), kind) for k, v in want_grads.items()}
    ssm_kernels.fused_layer_norm_bwd(
        other["x"],
        other["weight"],
        other["residual"],
        mean=got["mean"],
        rstd=got["rstd"],
        dy=spread(dy, kind),
        dresidual_out=spread(ds, kind),
        **grads,
    )
    for name, value in want_grads.items():
        np.testing.assert_array_equal(grads[name], value, err_msg=name)


def test_mixed_axis_orders_and_stride_zero():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 3, 20)).astype(np.float32).transpose(1, 0, 2)
    residual = np.broadcast_to(rng.standard_normal((4, 20)).astype(np.float32), (3, 4, 20))
    weight = np.broadcast_to(np.float32(0.5), (20,))
    arguments = {"x": x, "weight": weight, "bias": None, "residual": residual, "is_rms": True}
    dense = {
        k: np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()
    }
    got, want = forward(arguments), forward(dense)
    np.testing.assert_array_equal(got["y"], want["y"])
    np.testing.assert_array_equal(got["residual_out"], want["residual_out"])


def test_statistics_of_equal_rows_may_be_one():
    arguments = typed(make(BY_NAME["odd"]), "float32")
    for name in ("x", "residual"):
        arguments[name][...] = arguments[name][(0,) * (arguments[name].ndim - 1)]
    saved, (dy, ds) = forward(arguments), upstream(arguments)
    want = backward(arguments, saved, dy, ds)
    for name in ("mean", "rstd"):
        saved[name] = np.broadcast_to(saved[name].reshape(-1)[0], saved[name].shape)
    for name, got in backward(arguments, saved, dy, ds).items():
        np.testing.assert_array_equal(got, want[name], err_msg=name)


@pytest.mark.parametrize("main", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["x", "residual", "weight", "y", "residual_out", "dy", "dresidual_out", "dx", "dresidual"],
)
def test_each_array_alone_in_another_dtype(name, main):
    """Its values decide, not how they are stored."""
    rng, shape = np.random.default_rng(0), (3, 69)
    drawn = ("x", "residual", "weight", "bias", "dy", "dresidual_out")
    outputs = ("y", "residual_out", "dx", "dresidual", "dweight", "dbias")
    # Numbers that every type holds.
    arrays = {n: np.float32(rng.integers(-8, 9, shape) / 4) for n in drawn}
    arrays |= {n: np.zeros(shape, "f4") for n in outputs}
    arrays |= {n: arrays[n][0] for n in ("weight", "bias", "dweight", "dbias")}

    def run(views):
        inputs = {n: views[n] for n in ("x", "weight", "residual")}
        statistics = {n: np.zeros(3, "f4") for n in ("mean", "rstd")}
        sums = {n: views[n] for n in ("bias", "y", "residual_out")}
        ssm_kernels.fused_layer_norm_fwd(**inputs, **sums, **statistics)
        gradients = {n: views[n] for n in ("dy", "dresidual_out", *outputs[2:])}
        ssm_kernels.fused_layer_norm_bwd(**inputs, **statistics, **gradients)

    assert_values_decide(run, arrays, outputs, main, name, arithmetic="x")


def test_eps_of_float64():
    """It is not rounded: next to a small x it is all there is."""
    arguments = {"x": np.full((1, 4), 1e-9), "weight": np.ones(4), "eps": 1e-5, "is_rms": True}
    y = np.zeros((1, 4))
    ssm_kernels.fused_layer_norm_fwd(**arguments, y=y)
    np.testing.assert_allclose(y, 1e-9 / np.sqrt(1e-5), rtol=1e-12)


def test_strided_gradients_of_many_columns():
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((3, 1030), dtype="f4") for _ in range(2))
    arguments = {"x": x, "weight": x[0], "bias": None, "residual": None, "is_rms": False}
    saved = forward(arguments)
    want = backward(arguments, saved, dy, None)
    statistics = {name: saved[name] for name in ("mean", "rstd")}
    out = {
        name: spread(np.full_like(want[name], np.nan), "padded") for name in ("dweight", "dbias")
    }
    ssm_kernels.fused_layer_norm_bwd(x, x[0], **statistics, dy=dy, dx=np.empty_like(x), **out)
    for name, got in out.items():
        np.testing.assert_array_equal(got, want[name], err_msg=name)


@pytest.mark.parametrize("shape", [(300, 257), (3, 40000), (1031, 64)])
def test_threads_agree(shape):
    rng = np.random.default_rng(0)
    arguments = {
        "x": rng.standard_normal(shape).astype(np.float32),
        "weight": rng.standard_normal(shape[-1]).astype(np.float32),
        "bias": rng.standard_normal(shape[-1]).astype(np.float32),
        "residual": rng.standard_normal(shape).astype(np.float32),
        "is_rms": False,
    }
    dy, ds = upstream(arguments)
    want = forward(arguments, 1)
    want_grads = backward(arguments, want, dy, ds, 1)
    for threads in (2, 3, 8):
        for name, value in forward(arguments, threads).items():
            np.testing.assert_array_equal(value, want[name], err_msg=name)
        for name, value in backward(arguments, want, dy, ds, threads).items():
            np.testing.assert_array_equal(value, want_grads[name], err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "sum_dtype"),
    [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")],
)
def test_large_outputs_past_the_caches(dtype, sum_dtype):
    """Outputs that are streamed, all or some of them, hold the rows that a small call gives."""
    if "SSM_TEST_CUDA_HOST" in os.environ and dtype != "float32":
        pytest.skip("the CUDA sources have no stores past the caches")
    rng = np.random.default_rng(0)
    dtypes = (dtype, sum_dtype, dtype, sum_dtype)
    few = [stored(rng.standard_normal((41, 2048), dtype="f4"), kind) for kind in dtypes]
    weight = rng.standard_normal(2048, dtype="f4")

    def both(x, residual, dy, ds, places):
        y, s, dx = (in_line(np.zeros_like(a), p) for a, p in zip((x, ds, x), places, strict=True))
        terms = {"residual": argument(residual)}
        statistics = {name: np.zeros(len(x), "f4") for name in ("mean", "rstd")}
        out = {"y": argument(y), "residual_out": argument(s)}
        ssm_kernels.fused_layer_norm_fwd(argument(x), weight, **terms, **statistics, **out)
        given = {"dy": argument(dy), "dresidual_out": argument(ds)}
        if dtype == sum_dtype:
            start = argument(x), weight, argument(residual)
        else:
            start = argument(s), weight
        ssm_kernels.fused_layer_norm_bwd(*start, **statistics, **given, dx=argument(dx))
        return {"y": y, "residual_out": s, "dx": dx}

    want = both(*few, (0, 0, 0))
    assert all(value.any() for value in want.values())
    times = 16 * 2**20 // few[0].nbytes + 1
    # The inputs lie where they could be written past the caches: what decides is the output.
    many = [in_line(np.tile(value, (times, 1))) for value in few]
    for places in ((0, 1, 0), (1, 0, 0), (8, 16, 8), (16, 8, 16)):
        for name, got in both(*many, places).items():
            assert (got.reshape(times, 41, 2048) == want[name]).all(), name


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd", "layer_norm_bare", "mamba130m", "wide"])
def test_stays_in_bounds(name, dtype, at_end):
    """A read or write beyond any tensor faults and ends the process."""
    plain = typed(make(BY_NAME[name]), dtype)
    dy, ds = upstream(plain)
    want = forward(plain)
    want_grads = backward(plain, want, dy, ds)
    fenced = {k: guarded(v, at_end) if isinstance(v, np.ndarray) else v for k, v in plain.items()}
    got = {
        k: None if v is None else guarded(np.full_like(v, np.nan), at_end) for k, v in want.items()
    }
    ssm_kernels.fused_layer_norm_fwd(**fenced, **got)
    grads = {k: guarded(np.full_like(v, np.nan), at_end) for k, v in want_grads.items()}
    ssm_kernels.fused_layer_norm_bwd(
        fenced["x"],
        fenced["weight"],
        fenced["residual"],
        mean=got["mean"],
        rstd=got["rstd"],
        dy=guarded(dy, at_end),
        dresidual_out=guarded(ds, at_end),
        **grads,
        is_rms=plain["is_rms"],
    )
    for name, value in (want | want_grads).items():
        np.testing.assert_array_equal((got | grads)[name], value, err_msg=name)


@pytest.mark.parametrize("axis", [0, 1])
def test_large_offsets(axis):
    rng = np.random.default_rng(0)
    plain = {
        "x": rng.standard_normal((3, 4)),
        "weight": rng.standard_normal(4),
        "bias": rng.standard_normal(4),
        "residual": rng.standard_normal((3, 4)),
    }
    plain = {**typed(plain, "float16"), "is_rms": False}
    dy, ds = upstream(plain)
    want = forward(plain)
    want_grads = backward(plain, want, dy, ds)
    try:
        far = {k: far_apart(plain[k], axis) for k in ("x", "residual")}
        far |= {k: far_apart(plain[k]) for k in WEIGHTS}
        got = {
            k: far_apart(np.full_like(v, np.nan), axis if v.ndim == 2 else 0)
            for k, v in want.items()
        }
        grads = {
            k: far_apart(np.full_like(v, np.nan), axis if v.ndim == 2 else 0)
            for k, v in want_grads.items()
        }
        far_dy, far_ds = far_apart(dy, axis), far_apart(ds, axis)
    except OSError as error:
        pytest.skip(f"no address space for tensors beyond 2^31 elements: {error}")
    assert far["x"].strides[axis] > 2**31
    ssm_kernels.fused_layer_norm_fwd(**far, **got)
    ssm_kernels.fused_layer_norm_bwd(
        far["x"],
        far["weight"],
        far["residual"],
        mean=got["mean"],
        rstd=got["rstd"],
        dy=far_dy,
        dresidual_out=far_ds,
        **grads,
    )
    for name, value in (want | want_grads).items():
        np.testing.assert_array_equal((got | grads)[name], value, err_msg=name)


def test_rows_are_independent():
    arguments = typed(make(BY_NAME["layer_norm_bare"]), "float32")
    want = forward(arguments)["y"]
    x = np.concatenate(
        [np.full((5, 17), np.nan, np.float32), arguments["x"], np.ones((9, 17), "f")]
    )
    got = forward({**arguments, "x": x})["y"]
    np.testing.assert_array_equal(got[5:9], want)


def test_leaves_inputs_alone():
    arguments = typed(make(BY_NAME["odd"]), "float16")
    before = {k: v.copy() for k, v in arguments.items() if isinstance(v, np.ndarray)}
    dy, ds = upstream(arguments)
    backward(arguments, forward(arguments), dy, ds)
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value, err_msg=name)


def small() -> dict:
    """Arguments that pass: (..., D) = (2, 3, 5)."""
    x, weight = np.ones((2, 3, 5), np.float32), np.ones(5, np.float32)
    return {"x": x, "weight": weight, "bias": weight, "residual": x, "y": x.copy()}


ZEROS = np.zeros
REJECTED = {
    "x_rank": ({"x": ZEROS(())}, "x must have shape (..., D), got ()"),
    "x_dtype": (
        {"x": ZEROS((2, 3, 5), np.int64)},
        "x must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    "x_missing": ({"x": None}, "x must be given, got None"),
    "weight_shape": ({"weight": ZEROS(4)}, "weight must have shape (D,) = (5,), got (4,)"),
    "weight_missing": ({"weight": None}, "weight must be given, got None"),
    "bias_shape": ({"bias": ZEROS((5, 1))}, "bias must have shape (D,) = (5,), got (5, 1)"),
    "residual_shape": (
        {"residual": ZEROS((3, 2, 5))},
        "residual must have shape (..., D) = (2, 3, 5), got (3, 2, 5)",
    ),
    "y_shape": (
        {"y": ZEROS((2, 3, 4))},
        "y must have shape (..., D) = (2, 3, 5), got (2, 3, 4)",
    ),
    "y_overlap": (
        {"y": np.lib.stride_tricks.as_strided(ZEROS(15), (2, 3, 5), (0, 40, 8))},
        "y must not overlap itself, got stride 0 along axis 0",
    ),
    "residual_out_overlap": (
        {"residual_out": np.lib.stride_tricks.as_strided(ZEROS(15), (2, 3, 5), (0, 40, 8))},
        "residual_out must not overlap itself, got stride 0 along axis 0",
    ),
    "mean_shape": ({"mean": ZEROS(5, "f")}, "mean must have shape (M,) = (6,), got (5,)"),
    "mean_rms": (
        {"mean": ZEROS(6, "f"), "is_rms": True},
        "mean must be None with is_rms, got an array",
    ),
    "rstd_dtype": ({"rstd": ZEROS(6)}, "rstd must have dtype float32, got float64"),
    "eps_zero": ({"eps": 0.0}, "eps must be positive, got 0.0"),
    "eps_negative": ({"eps": -1e-5}, "eps must be positive, got -1e-05"),
    "eps_nan": ({"eps": float("nan")}, "eps must be positive, got nan"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    change, sentence = REJECTED[name]
    arguments = {**small(), **change}
    with pytest.raises(ValueError) as caught:
        ssm_kernels.fused_layer_norm_fwd(**arguments)
    assert str(caught.value) == f"{OP}: {sentence}"


def test_rejects_in_backward():
    x, weight = np.ones((2, 3, 5), np.float32), np.ones(5, np.float32)
    rows = np.ones(6, np.float32)
    good = {"x": x, "weight": weight, "mean": rows, "rstd": rows, "dy": x, "dx": x.copy()}
    ssm_kernels.fused_layer_norm_bwd(**good)
    for change, sentence in (
        ({"mean": None}, "mean must be given, got None"),
        ({"rstd": None}, "rstd must be given, got None"),
        ({"is_rms": True}, "mean must be None with is_rms, got an array"),
        ({"dy": x[:1]}, "dy must have shape (..., D) = (2, 3, 5), got (1, 3, 5)"),
        ({"dx": x[0]}, "dx must have shape (..., D) = (2, 3, 5), got (3, 5)"),
        (
            {"dresidual": np.lib.stride_tricks.as_strided(x.copy(), x.shape, (0, 20, 4))},
            "dresidual must not overlap itself, got stride 0 along axis 0",
        ),
        ({"dweight": rows}, "dweight must have shape (D,) = (5,), got (6,)"),
    ):
        with pytest.raises(ValueError) as caught:
            ssm_kernels.fused_layer_norm_bwd(**{**good, **change})
        assert str(caught.value) == f"{OP}: {sentence}"


def test_rejects_what_is_not_an_array():
    with pytest.raises(TypeError, match=f"{OP}: weight must be an array or tensor"):
        ssm_kernels.fused_layer_norm_fwd(**{**small(), "weight": [1.0]})
