"""ssm_kernels.dw_causal_conv_fwd and _bwd.

Judge: the float64 NumPy loop of tests.judge; for gradients an analytic float64 loop, itself judged
by finite differences.
"""

import ctypes
import mmap
import sys

import numpy as np
import pytest
import ssm_kernels

from tests import judge
from tests.cases import CASES, ConvCase, make
from tests.tolerances import TOLERANCES, assert_close

OP = "dw_causal_conv"
DTYPES = ("float64", "float32", "float16")
LAYOUTS = ("time_last", "channel_last", "spread")
# Long enough for several tiles and tasks, with runs that cross them.
LONG = (
    ConvCase("long_time", 1, 3, 4600, layout="cu_seqlens mask"),
    ConvCase("long_channels", 2, 70, 1200, layout="seq_idx mask"),
    ConvCase("long_plain", 1, 20, 2100, 5),
    ConvCase("long_wide", 1, 2, 2100, 300, layout="seq_idx"),
    # States of more than one line, of sequences without steps as well.
    ConvCase("wide_packed", 1, 300, 20, layout="cu_seqlens"),
)
ALL = (*CASES[OP], *LONG)


def case_named(name: str) -> ConvCase:
    return next(c for c in ALL if c.name == name)


def typed(arguments: dict, dtype: str) -> dict:
    """Return the arguments with their floats in `dtype`."""
    is_float = {n: isinstance(v, np.ndarray) and v.dtype.kind == "f" for n, v in arguments.items()}
    return {n: v.astype(dtype) if is_float[n] else v for n, v in arguments.items()}


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """Return a copy of (B, D, L) in another memory layout."""
    if layout == "time_last":
        return array.copy()
    if layout == "channel_last":
        return np.ascontiguousarray(array.transpose(0, 2, 1)).transpose(0, 2, 1)
    gap = np.nan if array.dtype.kind == "f" else 7
    wide = np.full([2 * n + 1 for n in array.shape], gap, array.dtype)
    view = wide[tuple(slice(1, 2 * n + 1, 2) for n in array.shape)]
    view[...] = array
    return view


def kernel_arguments(arguments: dict) -> dict:
    """Turn arguments of the operator into those of the kernel."""
    batch, _, seqlen = arguments["x"].shape
    ids, per_sequence, _ = judge.positions(arguments["seq_meta"], batch, seqlen)
    return {
        "x": arguments["x"],
        "weight": arguments["weight"],
        "bias": arguments["bias"],
        "initial_state": arguments["initial_state"],
        "seq_idx": None if arguments["seq_meta"] is None else ids,
        "silu": arguments["activation"] in ("silu", "swish"),
        "state_per_sequence": per_sequence,
    }


def state_shape(arguments: dict) -> tuple[int, int, int]:
    batch, dim, seqlen = arguments["x"].shape
    count = judge.positions(arguments["seq_meta"], batch, seqlen)[2]
    return count, dim, arguments["weight"].shape[-1] - 1


def poisoned(array: np.ndarray) -> np.ndarray:
    """Return NaN in the memory layout of an array."""
    return np.full_like(array, np.nan, subok=False)


def run(arguments: dict, layout: str = "time_last", num_threads: int = 0) -> tuple:
    """Call the forward with poisoned outputs; return y and final_state."""
    given = kernel_arguments(arguments)
    given["x"] = laid_out(given["x"], layout)
    y = poisoned(given["x"])
    final_state = np.full(state_shape(arguments), np.nan, given["x"].dtype)
    ssm_kernels.dw_causal_conv_fwd(**given, y=y, final_state=final_state, num_threads=num_threads)
    return y, final_state


def with_gradients(arguments: dict, seed: int = 0) -> dict:
    """Draw the gradients of the outputs."""
    rng = np.random.default_rng(seed)
    dtype = arguments["x"].dtype
    return {
        "dy": rng.standard_normal(arguments["x"].shape).astype(dtype),
        "dfinal_state": rng.standard_normal(state_shape(arguments)).astype(dtype),
    }


def run_backward(
    arguments: dict, given: dict, layout: str = "time_last", num_threads: int = 0
) -> dict:
    """Call the backward with poisoned outputs; return the gradients by argument."""
    inputs = kernel_arguments(arguments)
    inputs["x"] = laid_out(inputs["x"], layout)
    found = {n: poisoned(inputs[n]) for n in ("x", "weight", "bias") if inputs[n] is not None}
    found["initial_state"] = np.full(state_shape(arguments), np.nan, inputs["x"].dtype)
    ssm_kernels.dw_causal_conv_bwd(
        **inputs,
        dy=laid_out(given["dy"], layout),
        dfinal_state=given["dfinal_state"],
        num_threads=num_threads,
        **{f"d{name}": gradient for name, gradient in found.items()},
    )
    return found


def judge_gradients(arguments: dict, given: dict) -> dict:
    """Return the gradients by an analytic float64 loop over sequences and steps."""
    x, weight = (np.asarray(arguments[n], np.float64) for n in ("x", "weight"))
    batch, dim, seqlen = x.shape
    width = weight.shape[-1]
    taps = weight.reshape(dim, width)
    bias, initial = arguments["bias"], arguments["initial_state"]
    dy, dfinal = (np.asarray(given[n], np.float64) for n in ("dy", "dfinal_state"))
    found = {
        "x": np.zeros(x.shape),
        "weight": np.zeros(taps.shape),
        "bias": np.zeros(dim),
        "initial_state": dfinal.copy(),  # a sequence without steps hands its state on
    }
    for row, steps, start, end in judge.runs(arguments["seq_meta"], batch, seqlen):
        line = np.zeros((dim, width - 1 + len(steps)))
        if start is not None and initial is not None:
            line[:, : width - 1] = initial[start]
        line[:, width - 1 :] = x[row][:, steps]
        dline = np.zeros(line.shape)
        for i, t in enumerate(steps):
            window = line[:, i : i + width]
            a = (window * taps).sum(1) + (0.0 if bias is None else np.asarray(bias, np.float64))
            slope = 1.0
            if arguments["activation"] in ("silu", "swish"):
                s = 0.5 * (1.0 + np.tanh(0.5 * a))
                slope = s * (1.0 + a * (1.0 - s))
            g = dy[row, :, t] * slope
            found["weight"] += g[:, None] * window
            found["bias"] += g
            dline[:, i : i + width] += g[:, None] * taps
        if end is not None:
            dline[:, len(steps) :] += dfinal[end]
        found["x"][row][:, steps] = dline[:, width - 1 :]
        if start is not None:
            found["initial_state"][start] = dline[:, : width - 1]
    found["weight"] = found["weight"].reshape(weight.shape)
    return {n: g for n, g in found.items() if n != "bias" or bias is not None}


def skipped(arguments: dict) -> np.ndarray:
    """Return (B, D, L): the step is skipped."""
    batch, dim, seqlen = arguments["x"].shape
    ids = judge.positions(arguments["seq_meta"], batch, seqlen)[0]
    return np.broadcast_to((ids < 0)[:, None], (batch, dim, seqlen))


@pytest.mark.parametrize(("given", "wanted"), [LAYOUTS[:2], LAYOUTS[1::-1]])
def test_results_may_lie_otherwise(given, wanted):
    x, dy = np.random.default_rng(0).standard_normal((2, 2, 16, 24)).astype("float32")
    weight = np.random.default_rng(1).standard_normal((16, 4)).astype("float32")
    found = []
    for layout in (given, wanted):
        y, dx = (poisoned(laid_out(x, layout)) for _ in range(2))
        inputs = laid_out(x, given), weight
        ssm_kernels.dw_causal_conv_fwd(*inputs, y=y)
        ssm_kernels.dw_causal_conv_bwd(
            *inputs, dy=laid_out(dy, given), dx=dx, dweight=np.empty_like(weight)
        )
        found.append((y, dx))
    for want, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, 1e-5, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_judge(case, dtype, layout):
    arguments = typed(make(case), dtype)
    y, final_state = run(arguments, layout)
    want_y, want_state = judge.dw_causal_conv(**arguments)
    bound = TOLERANCES[OP, dtype]
    # Three hundred products instead of a few: the sum's rounding grows with their number.
    scale = max(1, case.width // 30)
    assert_close("y", y.astype("float64") / scale, want_y / scale, bound)
    assert_close("final_state", final_state, want_state, bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradients_match_judge(case, dtype, layout):
    arguments = typed(make(case), dtype)
    given = with_gradients(arguments)
    found, want = run_backward(arguments, given, layout), judge_gradients(arguments, given)
    scale = {"x": 1, "initial_state": 1, "weight": max(1, case.seqlen // 500)}
    if case.width > 30:
        scale = dict.fromkeys(scale, case.width // 30)
    for name, gradient in found.items():
        # Sums over many steps: their error grows with the root of the number, their size too.
        by = scale.get(name, scale["weight"])
        gradient = gradient.astype("float64") / by
        assert_close(f"d{name}", gradient, want[name] / by, TOLERANCES[f"{OP}_bwd", dtype])


# Tasks of either layout begin at step 2048: a hole around it, the end of the last sequence behind
# it with a hole between, and a sequence that begins one step before it.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("hole", "second"), [((2045, 2050), 0), ((2049, 2051), 0), ((0, 1), 2047)])
def test_gradients_around_a_cut(hole, second, layout):
    arguments = typed(make(ConvCase("cut", 1, 20, 2053, 8)), "float32")
    ids = np.zeros((1, 2053), np.int32)
    ids[:, second:] += 1
    ids[:, slice(*hole)] = -1
    arguments["seq_meta"] = {"seq_idx": ids}
    given = with_gradients(arguments)
    want = judge_gradients(arguments, given)
    found = run_backward(arguments, given, layout)
    for name in ("x", "initial_state"):
        assert_close(f"d{name}", found[name], want[name], TOLERANCES[f"{OP}_bwd", "float32"])


@pytest.mark.parametrize(
    "case",
    [
        ConvCase("options", 1, 2, 4, 3),
        ConvCase("shorter_than_width", 2, 2, 2, 4),
        ConvCase("packed_holes", 2, 1, 7, 4, layout="cu_seqlens mask"),
        ConvCase("seq_idx", 2, 2, 8, 3, layout="seq_idx"),
    ],
    ids=str,
)
def test_gradient_judge_matches_finite_differences(case):
    arguments = make(case)
    given = with_gradients(arguments)

    def value(**changed):
        y, state = judge.dw_causal_conv(**{**arguments, **changed})
        return (y * given["dy"]).sum() + (state * given["dfinal_state"]).sum()

    for name, gradient in judge_gradients(arguments, given).items():
        numeric = np.zeros(gradient.shape)
        for index in np.ndindex(gradient.shape):
            step = np.zeros(gradient.shape)
            step[index] = 1e-6
            up, down = (value(**{name: arguments[name] + s}) for s in (step, -step))
            numeric[index] = (up - down) / 2e-6
        np.testing.assert_allclose(numeric, gradient, rtol=1e-7, atol=1e-8, err_msg=name)


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_odd_sizes(width):
    for dim in (1, 3, 8, 15, 17, 65):
        for seqlen in (1, 2, 7, 16, 17, 33):
            case = ConvCase("odd", 2, dim, seqlen, width)
            arguments = typed(make(case, dim + seqlen), "float32")
            given = with_gradients(arguments)
            want_y, want_state = judge.dw_causal_conv(**arguments)
            want = judge_gradients(arguments, given)
            for layout in LAYOUTS[:2]:
                where = f"{dim} {seqlen} {layout}"
                y, state = run(arguments, layout)
                # Up to nine products: half the tolerance of four is not enough for some.
                assert_close(f"y {where}", y / 2, want_y / 2, TOLERANCES[OP, "float32"])
                np.testing.assert_array_equal(state, want_state, err_msg=where)
                for name, gradient in run_backward(arguments, given, layout).items():
                    assert_close(
                        f"d{name} {where}", gradient, want[name], TOLERANCES[f"{OP}_bwd", "float32"]
                    )


@pytest.mark.parametrize("name", ["odd", "mamba130m", "packed_holes", "long_channels", "width_8"])
def test_layouts_agree(name):
    arguments = typed(make(case_named(name)), "float32")
    want_y, want_state = run(arguments)
    want_dx = run_backward(arguments, with_gradients(arguments))["x"]
    for layout in LAYOUTS[1:]:
        y, state = run(arguments, layout)
        np.testing.assert_array_equal(y, want_y)
        np.testing.assert_array_equal(state, want_state)
        dx = run_backward(arguments, with_gradients(arguments), layout)["x"]
        np.testing.assert_array_equal(dx, want_dx)


def spread(array: np.ndarray, kind: str) -> np.ndarray:
    """Return an array of the same values in another memory layout."""
    if kind == "reversed_axes":
        return np.asfortranarray(array)
    if kind == "padded":
        return laid_out(array, "spread")
    wide = np.empty(array.size + 1, array.dtype)  # one element beyond any vector boundary
    view = wide[1:].reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("kind", ["reversed_axes", "padded", "unaligned"])
@pytest.mark.parametrize("name", ["odd", "packed", "padded", "width_8", "long_channels"])
def test_noncontiguous(name, kind):
    arguments = typed(make(case_named(name)), "float32")
    given = with_gradients(arguments)
    want, want_gradients = run(arguments), run_backward(arguments, given)
    inputs = kernel_arguments(arguments)
    inputs = {n: spread(v, kind) if isinstance(v, np.ndarray) else v for n, v in inputs.items()}
    outputs = [spread(np.full_like(v, np.nan), kind) for v in want]
    ssm_kernels.dw_causal_conv_fwd(**inputs, y=outputs[0], final_state=outputs[1])
    for got, value in zip(outputs, want, strict=True):
        np.testing.assert_array_equal(got, value)
    found = {n: spread(np.full_like(v, np.nan), kind) for n, v in want_gradients.items()}
    ssm_kernels.dw_causal_conv_bwd(
        **inputs,
        **{n: spread(v, kind) for n, v in given.items()},
        **{f"d{n}": v for n, v in found.items()},
    )
    for n, gradient in found.items():
        np.testing.assert_allclose(gradient, want_gradients[n], rtol=1e-5, atol=1e-5, err_msg=n)
    if kind == "padded":  # nothing between the elements was touched
        for array in (*outputs, *found.values()):
            array[...] = np.nan
            assert np.isnan(array.base).all()


@pytest.mark.parametrize("y_dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_mixed_dtypes(x_dtype, y_dtype):
    arguments = typed(make(case_named("packed_holes")), x_dtype)
    for name, dtype in (("weight", "float32"), ("bias", "float16"), ("initial_state", "float64")):
        arguments[name] = arguments[name].astype(dtype)
    y = np.full(arguments["x"].shape, np.nan, y_dtype)
    final_state = np.full(state_shape(arguments), np.nan, "float32")
    inputs = kernel_arguments(arguments)
    ssm_kernels.dw_causal_conv_fwd(**inputs, y=y, final_state=final_state)
    want_y, want_state = judge.dw_causal_conv(**arguments)
    coarsest = max("float32" if x_dtype != "float64" else x_dtype, y_dtype, key=DTYPES.index)
    assert_close("y", y, want_y, TOLERANCES[OP, coarsest])
    assert_close("final_state", final_state, want_state, TOLERANCES[OP, "float32"])
    given = with_gradients(arguments)
    given["dy"] = given["dy"].astype(y_dtype)
    found = {n: np.full(arguments[n].shape, np.nan) for n in ("x", "weight", "bias")}
    ssm_kernels.dw_causal_conv_bwd(**inputs, **given, **{f"d{n}": v for n, v in found.items()})
    want = judge_gradients(arguments, given)
    for name, gradient in found.items():
        bound = TOLERANCES[f"{OP}_bwd", "float64" if x_dtype == "float64" else "float32"]
        assert_close(f"d{name}", gradient, want[name], bound)


def test_weight_with_a_middle_axis():
    arguments = typed(make(case_named("odd")), "float32")
    given = with_gradients(arguments)
    want, want_gradients = run(arguments), run_backward(arguments, given)
    arguments["weight"] = arguments["weight"].repeat(2, 1)[:, None, ::2]
    for got, value in zip(run(arguments), want, strict=True):
        np.testing.assert_array_equal(got, value)
    dweight = run_backward(arguments, given)["weight"]
    np.testing.assert_array_equal(dweight, want_gradients["weight"][:, None])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["padded", "packed_holes", "seq_idx_holes", "long_channels"])
def test_nan_in_padding_changes_nothing(name, layout):
    arguments = typed(make(case_named(name)), "float32")
    given = with_gradients(arguments)
    holes = skipped(arguments)
    assert holes.any()
    dirty = {**arguments, "x": np.where(holes, np.nan, arguments["x"])}
    dirty_given = {**given, "dy": np.where(holes, np.nan, given["dy"])}
    y, state = run(dirty, layout)
    for got, want in zip((y, state), run(arguments, layout), strict=True):
        np.testing.assert_array_equal(got, want)
    assert not y[holes].any()
    want = run_backward(arguments, given, layout)
    for n, gradient in run_backward(dirty, dirty_given, layout).items():
        np.testing.assert_array_equal(gradient, want[n], err_msg=n)
    assert not want["x"][holes].any()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("name", ["mamba130m", "long_time", "long_channels"])
def test_threads_agree(name, layout):
    arguments = typed(make(case_named(name)), "float32")
    given = with_gradients(arguments)
    want, want_gradients = run(arguments, layout, 1), run_backward(arguments, given, layout, 1)
    for threads in (2, 3, 8):
        for got, value in zip(run(arguments, layout, threads), want, strict=True):
            np.testing.assert_array_equal(got, value)
        for n, gradient in run_backward(arguments, given, layout, threads).items():
            np.testing.assert_array_equal(gradient, want_gradients[n], err_msg=n)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_rows_are_independent(layout):
    one = typed(make(ConvCase("row", 1, 19, 40)), "float32")
    many = typed(make(ConvCase("rows", 5, 19, 40), 1), "float32")
    many["x"][0] = np.nan
    for name in ("weight", "bias"):
        many[name] = one[name]
    for name in ("x", "initial_state"):
        many[name][3] = one[name][0]
    given, given_many = with_gradients(one), with_gradients(many, 1)
    for name, value in given.items():
        given_many[name][3] = value[0]
    for got, want in zip(run(many, layout), run(one, layout), strict=True):
        np.testing.assert_array_equal(got[3], want[0])
    found, want = run_backward(many, given_many, layout), run_backward(one, given, layout)
    for name in ("x", "initial_state"):
        np.testing.assert_array_equal(found[name][3], want[name][0])


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_last_state_resumes(layout):
    arguments = typed(make(ConvCase("split", 2, 18, 50, 5)), "float32")
    want_y, want_state = run(arguments, layout)
    for cut in (0, 1, 2, 3, 4, 5, 17, 46, 49, 50):
        first, state = run({**arguments, "x": arguments["x"][..., :cut]}, layout)
        rest = {**arguments, "x": arguments["x"][..., cut:], "initial_state": state}
        second, state = run(rest, layout)
        np.testing.assert_array_equal(np.concatenate([first, second], 2), want_y)
        np.testing.assert_array_equal(state, want_state)


def test_packed_equals_separate():
    lengths = [3, 0, 50, 1, 4]
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    arguments = typed(make(ConvCase("packed", 1, 20, int(ends[-1]) + 2)), "float32")
    arguments["initial_state"] = np.random.randn(5, 20, 3).astype("float32")
    y, state = run({**arguments, "seq_meta": {"cu_seqlens": ends}})
    for s in range(len(lengths)):
        piece = dict(arguments)
        piece["x"] = arguments["x"][..., ends[s] : ends[s + 1]]
        piece["initial_state"] = arguments["initial_state"][s : s + 1]
        want_y, want_state = run(piece)
        np.testing.assert_array_equal(y[..., ends[s] : ends[s + 1]], want_y)
        np.testing.assert_array_equal(state[s], want_state[0])


def test_optional_outputs_may_be_left_out():
    arguments = typed(make(case_named("packed_holes")), "float32")
    inputs, given = kernel_arguments(arguments), with_gradients(arguments)
    y = poisoned(arguments["x"])
    ssm_kernels.dw_causal_conv_fwd(**inputs, y=y)
    np.testing.assert_array_equal(y, run(arguments)[0])
    found = {n: poisoned(arguments[n]) for n in ("x", "weight", "bias")}
    gradients = {f"d{n}": v for n, v in found.items()}
    ssm_kernels.dw_causal_conv_bwd(**inputs, dy=given["dy"], **gradients)
    given["dfinal_state"][...] = 0.0
    want = run_backward(arguments, given)
    for name, gradient in found.items():
        np.testing.assert_array_equal(gradient, want[name])


def test_leaves_inputs_alone():
    arguments = typed(make(case_named("packed")), "float32")
    given = with_gradients(arguments)
    arrays = {n: v for n, v in {**arguments, **given}.items() if isinstance(v, np.ndarray)}
    before = {n: v.copy() for n, v in arrays.items()}
    run(arguments)
    run_backward(arguments, given)
    for name, value in before.items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_extreme_values(dtype):
    """SiLU far on either side of zero, up to the infinities."""
    large = [1e-30, 1e-3, 1.0, 20.0, 87.0, 88.7, 89.0, 104.0, 200.0, 1e4, 1e30, np.inf]
    x = np.array([large, [-v for v in large]], dtype)[None]
    arguments = {"x": x, "weight": np.ones((2, 1)), "bias": None, "activation": "silu"}
    arguments |= {"initial_state": None, "seq_meta": None}
    y, _ = run(typed(arguments, dtype))
    finite = {**arguments, "x": x[..., :-1]}
    assert_close("y", y[..., :-1], judge.dw_causal_conv(**finite)[0], TOLERANCES[OP, dtype])
    assert y[0, 0, -1] == np.inf
    assert np.isnan(y[0, 1, -1])  # -inf times 0, as torch has it
    x[0, :, 0] = np.nan
    assert np.isnan(run(typed(arguments, dtype))[0][0, :, 0]).all()


class Guarded:
    """Memory that ends, or begins, at a page that may not be touched."""

    def __init__(self, size: int, at_end: bool):
        page = mmap.PAGESIZE
        pages = -(-max(size, 1) // page)
        self.memory = mmap.mmap(-1, (pages + 2) * page)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect
        for guard in (0, pages + 1):
            assert self.protect(ctypes.c_void_p(self.address + guard * page), page, 0) == 0
        self.offset = (pages + 1) * page - size if at_end else page

    def array(self, like: np.ndarray) -> np.ndarray:
        """Return a copy of a contiguous array in this memory."""
        # np.frombuffer keeps the mapping alive as long as the array.
        flat = np.frombuffer(self.memory, like.dtype, like.size, self.offset)
        flat.flags.writeable = True
        flat[:] = like.reshape(-1)
        return flat.reshape(like.shape)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_reads_and_writes_in_bounds(layout, at_end):
    def guarded(array):
        if array is None or (array.ndim == 2 and array.dtype == np.int32):
            return array
        flat = array.transpose(0, 2, 1) if layout == "channel_last" and array.ndim == 3 else array
        moved = Guarded(array.nbytes, at_end).array(np.ascontiguousarray(flat))
        return moved.transpose(0, 2, 1) if flat is not array else moved

    for width, dim, seqlen in ((4, 17, 33), (3, 16, 64), (2, 5, 31), (4, 40, 3), (7, 33, 18)):
        for dtype in ("float32", "float16"):
            case = ConvCase("guarded", 1, dim, seqlen, width, layout="mask")
            arguments = typed(make(case), dtype)
            given = with_gradients(arguments)
            want_y, want_state = run(arguments, layout)
            want = run_backward(arguments, given, layout)
            inputs = kernel_arguments(arguments)
            inputs = {n: guarded(v) if isinstance(v, np.ndarray) else v for n, v in inputs.items()}
            y, state = guarded(np.zeros_like(want_y)), guarded(np.zeros_like(want_state))
            ssm_kernels.dw_causal_conv_fwd(**inputs, y=y, final_state=state)
            np.testing.assert_array_equal(y, want_y)
            np.testing.assert_array_equal(state, want_state)
            found = {n: guarded(np.zeros_like(v)) for n, v in want.items()}
            ssm_kernels.dw_causal_conv_bwd(
                **inputs,
                **{n: guarded(v) for n, v in given.items()},
                **{f"d{n}": v for n, v in found.items()},
            )
            for name, gradient in found.items():
                np.testing.assert_array_equal(gradient, want[name], err_msg=name)


def far_apart(shape: tuple, axis: int, dtype: str) -> np.ndarray:
    """Return zeros whose neighbours along one axis are more than 2**31 elements apart."""
    gap = 2**31 + 7
    near = [n for i, n in enumerate(shape) if i != axis]
    strides, step = [0] * len(shape), np.dtype(dtype).itemsize
    for i in reversed(range(len(shape))):
        if i != axis:
            strides[i], step = step, step * shape[i]
    strides[axis] = gap * np.dtype(dtype).itemsize
    size = strides[axis] * (shape[axis] - 1) + int(np.prod(near)) * np.dtype(dtype).itemsize
    no_reserve = 0x4000  # MAP_NORESERVE of Linux: only the pages that are touched exist
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space of {size} bytes: {error}")
    return np.ndarray(shape, dtype, memory, 0, strides)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not reserved")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_large_offsets(axis):
    arguments = typed(make(ConvCase("far", 2, 3, 5, 4)), "float16")
    given = with_gradients(arguments)
    want_y, want_state = run(arguments)
    want = run_backward(arguments, given)
    inputs = kernel_arguments(arguments)
    shape = arguments["x"].shape
    inputs["x"], y, dy, dx = (far_apart(shape, axis, "float16") for _ in range(4))
    inputs["x"][...], dy[...] = arguments["x"], given["dy"]
    state = np.zeros_like(want_state)
    ssm_kernels.dw_causal_conv_fwd(**inputs, y=y, final_state=state)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(state, want_state)
    found = {n: np.zeros_like(want[n]) for n in ("weight", "bias", "initial_state")}
    ssm_kernels.dw_causal_conv_bwd(
        **inputs,
        dy=dy,
        dfinal_state=given["dfinal_state"],
        dx=dx,
        **{f"d{n}": v for n, v in found.items()},
    )
    np.testing.assert_array_equal(dx, want["x"])
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, want[name], rtol=2e-3, err_msg=name)
