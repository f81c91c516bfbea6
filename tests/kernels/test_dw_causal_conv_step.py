"""ssm_kernels.dw_causal_conv_step_fwd. Judge: the float64 NumPy loop of tests.judge."""

import math
import mmap
import sys

import numpy as np
import pytest
import ssm_kernels

from tests import judge
from tests.cases import CASES, ConvCase, ConvStepCase, make
from tests.tolerances import TOLERANCES, assert_close

OP = "dw_causal_conv_step"
DTYPES = ("float64", "float32", "float16")
# Several blocks of channels, and several passes over the tokens.
MORE = (
    ConvStepCase("blocks", 2, 1030, 5, ntokens=2),
    ConvStepCase("many_tokens", 2, 20, 4, ntokens=37),
    ConvStepCase("many_tokens_circular", 2, 20, 7, 5, ntokens=37, circular=True),
    ConvStepCase("long_memory", 1, 9, 40, ntokens=11),
)
ALL = (*CASES[OP], *MORE)
LAYOUTS = ("as_is", "reversed_axes", "padded", "apart", "lines_inside", "backwards", "unaligned")


def case_named(name: str) -> ConvStepCase:
    return next(c for c in ALL if c.name == name)


def typed(arguments: dict, dtype: str) -> dict:
    """Return the arguments with their floats in `dtype`."""
    is_float = {n: isinstance(v, np.ndarray) and v.dtype.kind == "f" for n, v in arguments.items()}
    return {n: v.astype(dtype) if is_float[n] else v for n, v in arguments.items()}


def spread(array: np.ndarray | None, kind: str) -> np.ndarray | None:
    """Return a copy of an array in another memory layout."""
    if array is None or kind == "as_is":
        return None if array is None else array.copy()
    if kind == "reversed_axes":
        return np.array(array, order="F")
    if kind == "backwards":  # every stride negative
        return np.flip(np.flip(array).copy())
    gap = np.nan if array.dtype.kind == "f" else -7
    if kind == "apart":  # elements of the last axis adjacent, lines apart
        wide = np.full((*array.shape[:-1], array.shape[-1] + 1), gap, array.dtype)
        view = wide[..., :-1]
    elif kind == "lines_inside":  # lines as far apart as adjacent lines, their elements farther
        size = max(array.shape[-1], 1) if array.ndim > 1 else 1
        wide = np.full((array.shape[-1], *array.shape[:-1], size), gap, array.dtype)
        view = np.moveaxis(wide[..., 0], 0, -1)
    elif kind == "padded":
        wide = np.full([2 * n + 1 for n in array.shape], gap, array.dtype)
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in array.shape)]
    else:  # one element beyond any vector boundary
        wide = np.empty(array.size + 1, array.dtype)
        view = wide[1:].reshape(array.shape)
    view[...] = array
    return view


def run(arguments: dict, layout: str = "as_is", num_threads: int = 0) -> tuple:
    """Call the kernel on copies and a poisoned y; return y and the new state."""
    names = ("x", "conv_state", "weight", "bias", "cache_seqlens", "state_indices")
    given = {n: spread(arguments[n], layout) for n in names}
    y = spread(np.full_like(arguments["x"], np.nan), layout)
    silu = arguments["activation"] in ("silu", "swish")
    ssm_kernels.dw_causal_conv_step_fwd(**given, y=y, silu=silu, num_threads=num_threads)
    return y, given["conv_state"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_judge(case, dtype, layout):
    arguments = typed(make(case), dtype)
    y, state = run(arguments, layout)
    want_y, want_state = judge.dw_causal_conv_step(**arguments)
    assert_close("y", y, want_y, TOLERANCES[OP, dtype])
    np.testing.assert_array_equal(state, want_state.astype(dtype))
    if layout == "padded":  # nothing between the elements was touched
        for array in (y, state):
            array[...] = np.nan
            assert np.isnan(array.base).all()


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8])
def test_odd_sizes(width):
    for dim in (1, 3, 15, 16, 17, 33, 130):
        for memory in (width - 1, width, width + 3):
            case = ConvStepCase("odd", 2, dim, memory, width)
            for circular in (False, True):
                arguments = typed(make(case, dim), "float32")
                if circular:
                    arguments["cache_seqlens"] = np.array([dim, 2**31 - 1], np.int32)
                y, state = run(arguments)
                want_y, want_state = judge.dw_causal_conv_step(**arguments)
                # Twice the four products of the tolerance.
                assert_close(f"y {dim}", y / 2, want_y / 2, TOLERANCES[OP, "float32"])
                np.testing.assert_array_equal(state, want_state)


def test_weight_with_a_middle_axis():
    arguments = typed(make(case_named("tokens")), "float32")
    want = run(arguments)
    arguments["weight"] = arguments["weight"][:, None]
    for layout in ("as_is", "padded"):
        for got, value in zip(run(arguments, layout), want, strict=True):
            np.testing.assert_array_equal(got, value)


def test_positions_beyond_int32():
    arguments = typed(make(ConvStepCase("late", 2, 9, 6, ntokens=11, circular=True)), "float32")
    arguments["cache_seqlens"] = np.array([2**31 - 1, 2**31 - 4], np.int32)
    y, state = run(arguments)
    want_y, want_state = judge.dw_causal_conv_step(**arguments)
    assert_close("y", y, want_y, TOLERANCES[OP, "float32"])
    np.testing.assert_array_equal(state, want_state)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_mixed_dtypes(x_dtype, state_dtype):
    arguments = typed(make(case_named("tokens")), x_dtype)
    arguments["conv_state"] = arguments["conv_state"].astype(state_dtype)
    arguments["weight"] = arguments["weight"].astype("float32")
    arguments["bias"] = arguments["bias"].astype("float64")
    y, state = run(arguments)
    want_y, want_state = judge.dw_causal_conv_step(**arguments)
    assert_close("y", y, want_y, TOLERANCES[OP, x_dtype])
    coarsest = max("float64" if x_dtype == "float64" else "float32", state_dtype, key=DTYPES.index)
    assert_close("state", state, want_state, TOLERANCES[OP, coarsest])


@pytest.mark.parametrize("name", ["tokens", "tokens_beyond_memory", "circular_tokens", "blocks"])
def test_tokens_equal_steps_one_by_one(name):
    arguments = typed(make(case_named(name)), "float32")
    y, state = run(arguments)
    one = dict(arguments)
    for t in range(y.shape[2]):
        one["x"] = np.ascontiguousarray(arguments["x"][:, :, t])
        if arguments["cache_seqlens"] is not None:
            one["cache_seqlens"] = arguments["cache_seqlens"] + np.int32(t)
        y_t, one["conv_state"] = run(one)
        np.testing.assert_array_equal(y_t, y[:, :, t])
    np.testing.assert_array_equal(one["conv_state"], state)


@pytest.mark.parametrize("memory", [3, 4, 6])
@pytest.mark.parametrize("circular", [False, True])
def test_step_equals_whole(memory, circular):
    whole = typed(make(ConvCase("whole", 2, 19, 30)), "float32")
    want = np.empty_like(whole["x"])
    ssm_kernels.dw_causal_conv_fwd(whole["x"], whole["weight"], whole["bias"], y=want, silu=True)
    state = np.zeros((2, 19, memory), "float32")
    for t in range(30):
        seen = np.full(2, t, np.int32) if circular else None
        y = np.full((2, 19), np.nan, "float32")
        ssm_kernels.dw_causal_conv_step_fwd(
            np.ascontiguousarray(whole["x"][:, :, t]),
            state,
            whole["weight"],
            whole["bias"],
            seen,
            y=y,
            silu=True,
        )
        np.testing.assert_array_equal(y, want[:, :, t])


def test_threads_agree():
    arguments = typed(make(ConvStepCase("wide", 9, 1536, 4, ntokens=3)), "float32")
    want_y, want_state = run(arguments, num_threads=1)
    for threads in (2, 3, 8):
        y, state = run(arguments, num_threads=threads)
        np.testing.assert_array_equal(y, want_y)
        np.testing.assert_array_equal(state, want_state)


def test_rows_are_independent():
    many = typed(make(ConvStepCase("rows", 5, 19, 4, ntokens=2)), "float32")
    many["x"][0] = many["conv_state"][1] = np.nan
    one = {**many, "x": many["x"][3:4], "conv_state": many["conv_state"][3:4]}
    for got, want in zip(run(many), run(one), strict=True):
        np.testing.assert_array_equal(got[3], want[0])


@pytest.mark.parametrize("name", ["indices", "circular_indices"])
def test_skipped_rows_change_nothing(name):
    arguments = typed(make(case_named(name)), "float32")
    indices = arguments["state_indices"]
    assert (indices == -1).any()
    arguments["x"][indices == -1] = np.nan  # content of a skipped row must not matter
    y, state = run(arguments)
    assert (y[indices == -1] == 0).all()
    untouched = np.setdiff1d(np.arange(len(state)), indices)
    assert len(untouched)
    np.testing.assert_array_equal(state[untouched], arguments["conv_state"][untouched])


def test_leaves_inputs_alone():
    for name in ("tokens", "circular_indices"):
        arguments = typed(make(case_named(name)), "float32")
        arrays = {n: v for n, v in arguments.items() if isinstance(v, np.ndarray)}
        before = {n: v.copy() for n, v in arrays.items()}
        names = set(arrays) - {"conv_state"}
        y = np.empty_like(arguments["x"])
        ssm_kernels.dw_causal_conv_step_fwd(**arrays, y=y)
        for n in names:
            np.testing.assert_array_equal(arrays[n], before[n], err_msg=n)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not reserved")
def test_large_offsets():
    arguments = typed(make(ConvStepCase("far", 2, 3, 4)), "float16")
    want_y, want_state = run(arguments)
    gap = 2**31 + 7
    size = 2 * gap + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE of Linux
    try:
        memory = [mmap.mmap(-1, size, flags=flags) for _ in range(3)]
    except OSError as error:
        pytest.skip(f"no address space of {size} bytes: {error}")
    x, y = (np.ndarray((2, 3), "float16", m, 0, (2 * gap, 2)) for m in memory[:2])
    state = np.ndarray((2, 3, 4), "float16", memory[2], 0, (2 * gap, 8, 2))
    x[...], state[...] = arguments["x"], arguments["conv_state"]
    weight, bias = arguments["weight"], arguments["bias"]
    ssm_kernels.dw_causal_conv_step_fwd(x, state, weight, bias, y=y, silu=True)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(state, want_state)


def small() -> dict:
    """Arguments that pass: B = 2, D = 3, K = 4, W = 4."""
    arguments = typed(make(ConvStepCase("small", 2, 3, 4)), "float32")
    del arguments["activation"]
    return {**arguments, "y": np.zeros((2, 3), "float32")}


ZEROS = np.zeros
REJECTED = {
    "x_missing": ({"x": None}, "x must be given, got None"),
    "x_rank": ({"x": ZEROS(3)}, "x must have shape (B, D) or (B, D, T), got"),
    "x_dtype": (
        {"x": ZEROS((2, 3), np.int32)},
        "x must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "state_rank": ({"conv_state": ZEROS((2, 3))}, "conv_state must have shape (R, D, K), got"),
    "state_shape": (
        {"conv_state": ZEROS((2, 2, 4))},
        "conv_state must have shape (R, D, K) = (2, 3, 4), got (2, 2, 4)",
    ),
    "state_memory": (
        {"conv_state": ZEROS((2, 3, 2))},
        "conv_state must hold at least W - 1 = 3 inputs, got 2",
    ),
    "state_rows": (
        {"conv_state": ZEROS((3, 3, 4))},
        "conv_state must have B = 2 rows without state_indices, got 3",
    ),
    "state_overlap": (
        {"conv_state": np.lib.stride_tricks.as_strided(ZEROS(12), (2, 3, 4), (0, 32, 8))},
        "conv_state must not overlap itself, got stride 0 along axis 0",
    ),
    "weight_rank": ({"weight": ZEROS(3)}, "weight must have shape (D, W) or (D, 1, W), got"),
    "weight_shape": (
        {"weight": ZEROS((2, 4))},
        "weight must have shape (D, W) = (3, 4), got (2, 4)",
    ),
    "weight_width": ({"weight": ZEROS((3, 0))}, "weight must have a width of at least 1, got 0"),
    "bias_shape": ({"bias": ZEROS(2)}, "bias must have shape (D,) = (3,), got (2,)"),
    "seqlens_shape": (
        {"cache_seqlens": ZEROS(3, np.int32)},
        "cache_seqlens must have shape (B,) = (2,), got (3,)",
    ),
    "seqlens_dtype": (
        {"cache_seqlens": ZEROS(2, np.int64)},
        "cache_seqlens must have dtype int32, got int64",
    ),
    "seqlens_negative": (
        {"cache_seqlens": np.array([0, -1], np.int32)},
        "cache_seqlens must not be negative, got -1",
    ),
    "indices_shape": (
        {"state_indices": ZEROS(3, np.int32)},
        "state_indices must have shape (B,) = (2,), got (3,)",
    ),
    "indices_dtype": (
        {"state_indices": ZEROS(2, np.int64)},
        "state_indices must have dtype int32, got int64",
    ),
    "indices_low": (
        {"state_indices": np.array([0, -2], np.int32)},
        "state_indices must lie in -1..1, got -2",
    ),
    "indices_high": (
        {"state_indices": np.array([0, 2], np.int32)},
        "state_indices must lie in -1..1, got 2",
    ),
    "indices_twice": (
        {"state_indices": np.array([1, 1], np.int32)},
        "state_indices must not name a row twice, got 1",
    ),
    "y_shape": ({"y": ZEROS((2, 4))}, "y must have shape (B, D) = (2, 3), got (2, 4)"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    change, sentence = REJECTED[name]
    arguments = {**small(), **change}
    state, y = arguments["conv_state"], arguments["y"]
    before = state.copy()
    with pytest.raises(ValueError) as caught:
        ssm_kernels.dw_causal_conv_step_fwd(**arguments)
    assert str(caught.value).startswith(f"{OP}: {sentence}")
    np.testing.assert_array_equal(state, before)
    assert not y.any()


@pytest.mark.parametrize("name", ["x", "weight", "y"])
def test_rejects_a_state_in_the_place_of_another_argument(name):
    arguments = small()
    shape = arguments[name].shape
    memory = arguments["conv_state"].reshape(-1)
    arguments[name] = memory[: math.prod(shape)].reshape(shape)
    with pytest.raises(ValueError, match=f"conv_state must not share memory with {name}, got"):
        ssm_kernels.dw_causal_conv_step_fwd(**arguments)


def test_rejects_what_is_not_an_array():
    arguments = small()
    with pytest.raises(TypeError, match="dw_causal_conv_step: weight must be an array or tensor"):
        ssm_kernels.dw_causal_conv_step_fwd(**{**arguments, "weight": [1.0]})
    arguments["conv_state"].flags.writeable = False
    with pytest.raises(TypeError, match="dw_causal_conv_step: conv_state must be a writable array"):
        ssm_kernels.dw_causal_conv_step_fwd(**arguments)
