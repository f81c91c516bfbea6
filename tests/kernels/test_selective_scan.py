"""ssm_kernels.selective_scan_fwd and _bwd. Judges: float64 NumPy loops, and finite differences."""

import itertools
import os

import numpy as np
import pytest
import ssm_kernels

from tests import gradient_judge, judge
from tests.cases import CASES, ScanCase, make
from tests.tolerances import TOLERANCES, assert_close

OP = "selective_scan"
DTYPES = ("float64", "float32", "float16")
GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
MORE = (
    # B and C with unlike group counts, both ways round, and every pair of forms.
    ScanCase("two_groupings", 2, 24, 35, 5, "grouped", "grouped", 4),
    ScanCase("constant_shared", 2, 33, 34, 17, "constant", "shared", softplus=False),
    ScanCase("shared_constant", 2, 40, 33, 4, "shared", "constant"),
    # More channels and steps than one tile has, for every part of the work to be cut.
    ScanCase("tiles", 3, 150, 70, 16, "grouped", "shared", 2),
    ScanCase("tiles_packed", 2, 70, 130, 6, layout="cu_seqlens mask"),
    ScanCase("exact_tiles", 2, 64, 64, 16),
    # More blocks of channels in a group than there are splits.
    ScanCase("splits", 1, 660, 40, 3, "grouped", "shared", 2),
    # States of more than one line, of sequences without steps as well.
    ScanCase("wide_packed", 1, 5, 20, 67, layout="cu_seqlens"),
)
ALL = (*CASES[OP], *MORE)
LAYOUTS = tuple(case for case in ALL if case.layout)


def named(name: str) -> ScanCase:
    return next(case for case in ALL if case.name == name)


def arguments_of(case: ScanCase, dtype="float64", seed: int = 0) -> dict:
    """Return the arguments of a case with their floats in `dtype`."""
    arguments = make(case, seed)
    if case.name == "two_groupings":
        arguments["C"] = arguments["C"][:, :3].repeat(2, 1)[:, :6]
    return {
        name: value.astype(dtype)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in arguments.items()
    }


def acc(dtype) -> np.dtype:
    return np.dtype("float64" if dtype == np.float64 else "float32")


def poisoned(shape, dtype) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def kernel_inputs(arguments: dict) -> tuple[dict, int]:
    """Turn seq_meta into what the kernels take; also return S."""
    inputs = dict(arguments)
    meta, (batch, _, seqlen) = inputs.pop("seq_meta", None), inputs["u"].shape
    if meta is None:
        return inputs, batch
    ids, per_sequence, nstates = judge.positions(meta, batch, seqlen)
    return {**inputs, "seq_idx": ids, "state_per_sequence": per_sequence}, nstates


def forward(arguments: dict, num_threads: int = 1, wrap=lambda a: a) -> dict:
    """Call the forward with poisoned outputs, each passed through `wrap`; return them."""
    inputs, nstates = kernel_inputs(arguments)
    u, (dim, dstate) = inputs["u"], inputs["A"].shape
    out = {
        "y": poisoned(u.shape, u.dtype),
        "last_state": poisoned((nstates, dim, dstate), acc(u.dtype)),
        "checkpoints": poisoned((len(u), -(-u.shape[2] // 32), dstate, dim), acc(u.dtype)),
    }
    out = {name: wrap(value) for name, value in out.items()}
    ssm_kernels.selective_scan_fwd(**inputs, **out, num_threads=num_threads)
    return out


def output_gradients(arguments: dict, with_state: bool = True, seed: int = 1) -> dict:
    _, nstates = kernel_inputs(arguments)
    rng, u = np.random.default_rng(seed), arguments["u"]
    dstate = rng.standard_normal((nstates, *arguments["A"].shape)).astype(acc(u.dtype))
    dy = rng.standard_normal(u.shape).astype(u.dtype)
    return {"dy": dy, "dlast_state": dstate if with_state else None}


def backward(arguments: dict, given: dict, num_threads: int = 1, wrap=lambda a: a) -> dict:
    """Call both directions; return the gradients by input, poisoned before the call."""
    checkpoints = forward(arguments)["checkpoints"]
    inputs, nstates = kernel_inputs(arguments)
    out = {}
    for name in GRADIENTS:
        if inputs.get(name) is not None:
            out[name] = wrap(poisoned(inputs[name].shape, inputs[name].dtype))
    if "initial_state" not in out:
        shape = (nstates, *inputs["A"].shape)
        out["initial_state"] = wrap(poisoned(shape, acc(inputs["u"].dtype)))
    outputs = {f"d{name}": gradient for name, gradient in out.items()}
    ssm_kernels.selective_scan_bwd(
        **inputs, **given, **outputs, checkpoints=wrap(checkpoints), num_threads=num_threads
    )
    return out


def assert_equal(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name, strict=True)


def skipped_steps(arguments: dict) -> np.ndarray:
    batch, _, seqlen = arguments["u"].shape
    return judge.positions(arguments["seq_meta"], batch, seqlen)[0] < 0


# Values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_judge(case, dtype):
    arguments = arguments_of(case, dtype)
    got = forward(arguments)
    y, last_state = judge.selective_scan(**arguments)
    assert_close("y", got["y"], y, TOLERANCES[OP, dtype])
    assert_close("last_state", got["last_state"], last_state, TOLERANCES[OP, str(acc(dtype))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradients_match_judge(case, dtype):
    arguments = arguments_of(case, dtype)
    given = output_gradients(arguments)
    want = gradient_judge.selective_scan(**given, **arguments)
    for name, gradient in backward(arguments, given).items():
        assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", str(gradient.dtype)])


@pytest.mark.parametrize("name", ["bare", "tiny", "groups", "mixed_bc", "packed_holes", "padded"])
def test_gradient_judge_matches_finite_differences(name):
    arguments = arguments_of(named(name))
    given = output_gradients(arguments)

    def loss(**changed):
        y, state = judge.selective_scan(**{**arguments, **changed})
        return (given["dy"] * y).sum() + (given["dlast_state"] * state).sum()

    gradients = gradient_judge.selective_scan(**given, **arguments)
    rng = np.random.default_rng(2)
    for key in GRADIENTS:
        value = arguments[key]
        if value is None:
            continue
        for index in rng.integers(0, value.shape, (8, value.ndim)):
            step = np.zeros(value.shape)
            step[tuple(index)] = 1e-5
            slope = (loss(**{key: value + step}) - loss(**{key: value - step})) / 2e-5
            assert abs(slope - gradients[key][tuple(index)]) < 1e-6 * (1 + abs(slope)), key


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_state_size_and_width(dtype):
    for dstate in (1, 2, 3, 5, 7, 15, 16, 17, 20, 33):
        for dim in (1, 7, 8, 15, 16, 17, 31, 32, 33):
            arguments = arguments_of(ScanCase("any", 1, dim, 3, dstate), dtype)
            got = forward(arguments)
            y, last_state = judge.selective_scan(**arguments)
            assert_close(f"y {dim} {dstate}", got["y"], y, TOLERANCES[OP, dtype])
            assert_close("last_state", got["last_state"], last_state, TOLERANCES[OP, dtype])


def test_lengths_around_the_checkpoints():
    for seqlen in (1, 2, 31, 32, 33, 63, 64, 65):
        arguments = arguments_of(ScanCase("length", 1, 5, seqlen, 3), seed=seqlen)
        given = output_gradients(arguments)
        want = gradient_judge.selective_scan(**given, **arguments)
        for name, gradient in backward(arguments, given).items():
            assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", "float64"])


def test_mixed_dtypes():
    dtypes = {"delta": "f4", "A": "f8", "B": "f4", "C": "f2", "D": "f8", "z": "f2", "dt_bias": "f4"}
    for u_dtype in DTYPES:
        arguments = arguments_of(named("groups"), u_dtype)
        for name, dtype in {**dtypes, "initial_state": "f2"}.items():
            arguments[name] = arguments[name].astype(dtype)
        got, given = forward(arguments), output_gradients(arguments)
        y, last_state = judge.selective_scan(**arguments)
        assert_close("y", got["y"], y, TOLERANCES[OP, u_dtype])
        assert_close("state", got["last_state"], last_state, TOLERANCES[OP, str(acc(u_dtype))])
        want = gradient_judge.selective_scan(**given, **arguments)
        for name, gradient in backward(arguments, given).items():
            # A gradient is as exact as the arithmetic and its own dtype allow.
            coarsest = max(str(acc(u_dtype)), str(gradient.dtype), key=DTYPES.index)
            assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", coarsest])


def test_outputs_of_any_dtype():
    arguments = arguments_of(named("odd"), "float32")
    want = forward(arguments)
    inputs, _ = kernel_inputs(arguments)
    y, last_state = poisoned((3, 13, 37), "f2"), poisoned((3, 13, 5), "f8")
    ssm_kernels.selective_scan_fwd(**inputs, y=y, last_state=last_state)
    np.testing.assert_array_equal(y, want["y"].astype("f2"))
    np.testing.assert_array_equal(last_state, want["last_state"].astype("f8"))


def test_only_what_is_asked_for():
    arguments = arguments_of(named("tiles_packed"), "float32")
    want, (inputs, _) = forward(arguments), kernel_inputs(arguments)
    y = poisoned(arguments["u"].shape, "f4")
    ssm_kernels.selective_scan_fwd(**inputs, y=y)
    np.testing.assert_array_equal(y, want["y"])
    # Without a gradient of the last state it counts as zero.
    given = output_gradients(arguments, with_state=False)
    zero = {**given, "dlast_state": np.zeros_like(want["last_state"])}
    assert_equal(backward(arguments, given), backward(arguments, zero))


# Memory ----------------------------------------------------------------------------------------


def reversed_axes(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)


def apart(array: np.ndarray) -> np.ndarray:
    """Copy to a view with an offset and strides that leave holes along every axis."""
    buffer = np.full([2 * n + 1 for n in array.shape], np.nan, array.dtype)
    view = buffer[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def unaligned(array: np.ndarray) -> np.ndarray:
    """Copy to an address that is not a multiple of the element size."""
    memory = np.empty(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def middle_axis_last(array: np.ndarray) -> np.ndarray:
    """Copy to the layout (B, L, D) of an array (B, D, L)."""
    if array.ndim < 3:
        return array
    return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)


LAYOUT_OF_MEMORY = [reversed_axes, apart, unaligned, middle_axis_last]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUT_OF_MEMORY, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name", ["tiles", "two_groupings", "constant_bc", "tiles_packed", "wide_packed"]
)
def test_noncontiguous(name, layout, dtype):
    arguments = arguments_of(named(name), dtype)
    given = output_gradients(arguments)
    views = {n: layout(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    # The checkpoints alone must be contiguous.
    wrap = lambda a: a if a.ndim == 4 and a.shape == checkpoint_shape else layout(a)  # noqa: E731
    checkpoint_shape = forward(arguments)["checkpoints"].shape
    assert_equal(forward(views, wrap=wrap), forward(arguments))
    given_views = {n: layout(v) for n, v in given.items()}
    assert_equal(backward(views, given_views, wrap=wrap), backward(arguments, given))


def test_writes_only_the_elements_of_a_view():
    arguments = arguments_of(named("odd"), "float32")
    inputs, _ = kernel_inputs(arguments)
    y = apart(np.zeros_like(arguments["u"]))
    ssm_kernels.selective_scan_fwd(**inputs, y=y)
    assert np.isfinite(y).all()
    y[...] = np.nan
    assert np.isnan(y.base).all()


def test_stride_zero_inputs():
    arguments = arguments_of(named("tiles"), "float32")
    expanded = dict(arguments)
    shapes = {name: arguments[name].shape for name in ("u", "delta", "z", "B", "C", "A", "D")}
    for name, shape in shapes.items():
        first = arguments[name][tuple(slice(0, 1) for _ in shape[:-1])]
        expanded[name] = np.broadcast_to(first[..., :1] if name in "BD" else first, shape)
    dense = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in expanded.items()}
    given = output_gradients(arguments)
    given["dy"] = np.broadcast_to(np.float32(1.0), arguments["u"].shape)
    assert_equal(forward(expanded), forward(dense))
    assert_equal(backward(expanded, given), backward(dense, {**given, "dy": given["dy"].copy()}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["tiles", "packed", "constant_bc", "exact_tiles", "one"])
def test_reads_and_writes_in_bounds(name, dtype, guarded):
    arguments = arguments_of(named(name), dtype)
    given = output_gradients(arguments)
    walled = {n: guarded(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    inputs, _ = kernel_inputs(walled)
    if "seq_idx" in inputs:
        walled["seq_meta"] = {"seq_idx": guarded(inputs["seq_idx"])}
        arguments["seq_meta"] = {"seq_idx": inputs["seq_idx"]}
        for values in (walled, arguments):
            values["initial_state"] = values["initial_state"][: len(arguments["u"])]
        given["dlast_state"] = given["dlast_state"][: len(arguments["u"])]
    walled["initial_state"] = guarded(walled["initial_state"])
    assert_equal(forward(walled, wrap=guarded), forward(arguments))
    walls = {n: guarded(v) for n, v in given.items()}
    assert_equal(backward(walled, walls, wrap=guarded), backward(arguments, given))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_large_offsets(axis, sparse):
    """Neighbours along one axis lie more than 2^31 elements apart."""
    case = ScanCase("huge", 3, 3, 3, 2, "grouped", "grouped", 3)
    arguments = arguments_of(case, "float32")
    given = output_gradients(arguments)
    stride = 2**31 // 2 + 11  # twice that is beyond 2^31
    names = ("u", "delta", "z", "B", "C", "initial_state")
    far = {n: sparse(arguments[n], axis, stride) for n in names}
    for n in ("u", "B"):
        assert max(far[n].strides) // 4 * 2 > 2**31
    spread = {**arguments, **far}
    want, want_gradients = forward(arguments), backward(arguments, given)
    wrap = lambda a: sparse(a, axis, stride) if a.shape == (3, 3, 3) else a  # noqa: E731
    assert_equal(forward(spread, wrap=wrap), want)
    given["dy"] = sparse(given["dy"], axis, stride)
    assert_equal(backward(spread, given, wrap=wrap), want_gradients)


def test_leaves_inputs_alone():
    for case in (named("tiles_packed"), named("constant_bc")):
        arguments = arguments_of(case, "float32")
        given = output_gradients(arguments)
        read_only = {**arguments, **given}
        for value in read_only.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        before = {n: v.copy() for n, v in read_only.items() if isinstance(v, np.ndarray)}
        backward(arguments, given)
        for name, value in before.items():
            np.testing.assert_array_equal(read_only[name], value, err_msg=name)


# Independence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "name", ["splits", "tiles", "tiles_packed", "constant_bc", "two_groupings", "odd"]
)
def test_threads_agree(name, dtype):
    arguments = arguments_of(named(name), dtype)
    given = output_gradients(arguments)
    want, want_gradients = forward(arguments, 1), backward(arguments, given, 1)
    channels_last = {n: middle_axis_last(v) if n in ("u", "z") else v for n, v in arguments.items()}
    for threads in (0, 1, 2, 3, 8):
        assert_equal(forward(arguments, threads), want)
        assert_equal(backward(arguments, given, threads), want_gradients)
        assert_equal(backward(channels_last, given, threads), want_gradients)


@pytest.mark.parametrize("name", ["tiles", "seq_idx", "seq_idx_holes", "padded", "two_groupings"])
def test_rows_are_independent(name):
    arguments = arguments_of(named(name), "float32")
    given = output_gradients(arguments)
    want, want_gradients = forward(arguments), backward(arguments, given)
    per_row = {n for n, v in arguments.items() if isinstance(v, np.ndarray) and v.ndim > 2}
    # Sums over the batch have no rows.
    rows_of_gradients = {n for n in want_gradients if n in per_row}
    for row in range(len(arguments["u"])):
        here = slice(row, row + 1)
        alone = {n: v[here] if n in per_row else v for n, v in arguments.items()}
        if arguments["seq_meta"]:
            alone["seq_meta"] = {n: v[here] for n, v in arguments["seq_meta"].items()}
        got = forward(alone)
        assert_equal(got, {n: v[here] for n, v in want.items()})
        gradients = backward(alone, {n: v[here] for n, v in given.items()})
        for n in rows_of_gradients:
            np.testing.assert_array_equal(gradients[n], want_gradients[n][here], err_msg=n)


def test_bad_rows_do_not_spread():
    arguments = arguments_of(named("tiles"), "float32")
    given = output_gradients(arguments)
    want, want_gradients = forward(arguments), backward(arguments, given)
    for n in ("u", "delta", "z", "B"):
        arguments[n] = arguments[n].copy()
        arguments[n][1] = np.nan
    got, gradients = forward(arguments), backward(arguments, given)
    for row in (0, 2):
        for n, value in got.items():
            np.testing.assert_array_equal(value[row], want[n][row], err_msg=n)
        for n in ("u", "delta", "z", "B", "C", "initial_state"):
            np.testing.assert_array_equal(gradients[n][row], want_gradients[n][row], err_msg=n)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_nan_in_skipped_steps_changes_nothing(case):
    arguments = arguments_of(case, "float32")
    given, skipped = output_gradients(arguments), skipped_steps(arguments)
    assert skipped.any()
    want, want_gradients = forward(arguments), backward(arguments, given)
    bad = {**arguments, **given}
    over_time = [n for n in ("u", "delta", "z", "B", "C", "dy") if bad[n] is not None]
    over_time = [n for n in over_time if bad[n].ndim > 2]
    for n in over_time:
        value = np.moveaxis(bad[n].copy(), -1, 1)
        value[skipped] = np.nan
        bad[n] = np.moveaxis(value, 1, -1)
    given = {n: bad.pop(n) for n in given}
    got, gradients = forward(bad), backward(bad, given)
    del got["checkpoints"], want["checkpoints"]
    assert_equal(got, want)
    assert_equal(gradients, want_gradients)
    assert not np.moveaxis(got["y"], -1, 1)[skipped].any()
    for n in set(over_time) & set(gradients):
        assert not np.moveaxis(gradients[n], -1, 1)[skipped].any(), n


def test_chunked_equals_whole():
    case = ScanCase("whole", 2, 19, 70, 5)
    arguments = arguments_of(case)
    want = forward(arguments)
    for cut in (0, 1, 31, 32, 33, 69, 70):
        first, second = dict(arguments), dict(arguments)
        for n in ("u", "delta", "z", "B", "C"):
            first[n], second[n] = arguments[n][..., :cut], arguments[n][..., cut:]
        one = forward(first)
        second["initial_state"] = one["last_state"]
        two = forward(second)
        y = np.concatenate([one["y"], two["y"]], -1)
        assert_close("y", y, want["y"], TOLERANCES[OP, "float64"])
        assert_close("state", two["last_state"], want["last_state"], TOLERANCES[OP, "float64"])


def test_packed_equals_separate():
    lengths = (33, 0, 5, 1, 64, 0)
    ends = np.cumsum((0, *lengths))
    arguments = arguments_of(ScanCase("packed", 1, 20, int(ends[-1]), 6))
    rng = np.random.default_rng(3)
    arguments["initial_state"] = rng.standard_normal((len(lengths), 20, 6))
    arguments["seq_meta"] = {"cu_seqlens": ends.astype("i4")}
    got = forward(arguments)
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        alone = {**arguments, "seq_meta": None}
        for n in ("u", "delta", "z", "B", "C"):
            alone[n] = arguments[n][..., begin:end]
        alone["initial_state"] = arguments["initial_state"][i : i + 1]
        want = forward(alone)
        assert_close("y", got["y"][..., begin:end], want["y"], TOLERANCES[OP, "float64"])
        state = got["last_state"][i : i + 1]
        assert_close("state", state, want["last_state"], TOLERANCES[OP, "float64"])
        if begin == end:
            np.testing.assert_array_equal(state, alone["initial_state"])


# Adversarial values ------------------------------------------------------------------------------


def adversarial(dtype: str) -> dict:
    """Channels with hostile step sizes, decays and inputs; the judge is finite on all of them."""
    rng, seqlen, dstate = np.random.default_rng(4), 40, 5
    rates = np.array([0.0, 1e-38, 1e-3, 1.0, 30.0, 1e4])
    inputs = np.array([0.0, 1e-40, 1e-30, 1.0, 1e10, 1e30])
    pairs = [(rate, size) for rate in rates for size in inputs]
    dim = len(pairs)
    sizes = np.array([size for _, size in pairs])
    return {
        "u": (sizes[:, None] * rng.standard_normal((1, dim, seqlen))).astype(dtype),
        "delta": rng.uniform(-50.0, 50.0, (1, dim, seqlen)).astype(dtype),
        "A": -np.array([[rate] * dstate for rate, _ in pairs]).astype(dtype),
        "B": rng.standard_normal((1, dstate, seqlen)).astype(dtype),
        "C": rng.standard_normal((1, dstate, seqlen)).astype(dtype),
        "z": (20.0 * rng.standard_normal((1, dim, seqlen))).astype(dtype),
        "softplus": True,
        "seq_meta": None,
    }


def assert_close_by_channel(name: str, got, want, tolerance) -> None:
    """Compare (B, D, ...) in units of the largest value of each channel."""
    scale = np.abs(want).max((0, *range(2, want.ndim)), keepdims=True)
    scale = np.where(scale > 0.0, scale, 1.0)
    # Below the smallest normal number nothing is promised but smallness.
    keep = np.broadcast_to(scale > 1e-30, want.shape)
    assert np.isfinite(got).all()
    assert_close(
        name, np.where(keep, got / scale, 0.0), np.where(keep, want / scale, 0.0), tolerance
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adversarial_values_stay_finite(dtype):
    arguments = adversarial(dtype)
    given = {"dy": np.ones_like(arguments["u"]), "dlast_state": None}
    y, last_state = judge.selective_scan(**arguments)
    assert np.isfinite(y).all()
    got = forward(arguments)
    assert_close_by_channel("y", got["y"].astype("f8"), y, TOLERANCES[OP, dtype])
    state = got["last_state"].astype("f8")
    assert_close_by_channel("last_state", state, last_state, TOLERANCES[OP, dtype])
    want = gradient_judge.selective_scan(**given, **arguments)
    gradients = backward(arguments, given)
    for name in ("u", "delta", "z", "initial_state"):
        gradient = gradients[name].astype("f8")
        # |A| = 1e4 multiplies rounding, also the judge's: float64 cannot be told from it.
        assert_close_by_channel(name, gradient, want[name], TOLERANCES[f"{OP}_bwd", "float32"])


INFINITE = pytest.param(
    -np.inf,
    marks=pytest.mark.skipif(
        "SSM_TEST_CUDA_HOST" in os.environ, reason="the CUDA backward does not bound an infinite A"
    ),
)


@pytest.mark.parametrize("rate", [-1e10, INFINITE])
def test_decay_of_minus_infinity_forgets(rate):
    """The product dt A overflows to -inf: the state before is forgotten, nothing becomes NaN."""
    one = np.ones((1, 1, 3), "f4")
    arguments = {
        "u": one,
        "delta": np.array([[[1.0, 1e30, 1.0]]], "f4"),
        "A": np.array([[rate]], "f4"),
        "B": one,
        "C": one * np.float32(1e-30),
        "initial_state": np.full((1, 1, 1), 1e3, "f4"),
        "seq_meta": None,
    }
    given = {"dy": one, "dlast_state": None}
    np.testing.assert_allclose(forward(arguments)["y"], [[[1e-30, 1.0, 1e-30]]], rtol=1e-6)
    # A step whose product overflows is cut to one whose product does not: finite is all there is.
    for name, gradient in backward(arguments, given).items():
        assert np.isfinite(gradient).all(), name


def test_growing_states_are_followed():
    """A positive dt A is a growing state, correct up to the end of the range of float32."""
    arguments = arguments_of(ScanCase("grow", 1, 3, 1, 1, given="initial_state", softplus=False))
    arguments.update(delta=np.full((1, 3, 1), -1.0), A=np.array([[-1.0], [-40.0], [-80.0]]))
    arguments = {
        n: v.astype("f4") if isinstance(v, np.ndarray) else v for n, v in arguments.items()
    }
    got, (_, want) = forward(arguments)["last_state"], judge.selective_scan(**arguments)
    # The exponent's rounding, 2^-24 of 115, is the relative error of its exponential.
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize(
    "name", ["u", "delta", "A", "B", "C", "D", "z", "dt_bias", "initial_state"]
)
def test_nan_is_not_hidden(name):
    """A NaN anywhere shows in the output, so that a diverged training is seen."""
    for dtype in ("float64", "float32"):
        arguments = arguments_of(named("odd"), dtype)
        arguments[name][(0,) * arguments[name].ndim] = np.nan
        got = forward(arguments)
        assert np.isnan(got["y"][0, 0]).any()
        if name not in ("C", "D", "z"):
            assert np.isnan(got["last_state"][0, 0]).any()


def test_a_nan_does_not_hide_a_large_step():
    """Exponents beyond the range of exp2 are bounded in a tile in which a later step is NaN."""
    dim = 16
    one = np.ones((1, dim, 3), "f4")
    arguments = {
        "u": one,
        "delta": one * np.array([1e4, np.nan, 0.1], "f4"),
        "A": -np.linspace(1.0, 2.0, dim, dtype="f4")[:, None],
        "B": one[:, :1],
        "C": one[:, :1],
        "initial_state": np.full((1, dim, 1), 1e3, "f4"),
        "seq_meta": None,
    }
    y = forward(arguments)["y"]
    np.testing.assert_array_equal(y[0, :, 0], np.full(dim, 1e4, "f4"))
    assert np.isnan(y[0, :, 1:]).all()


def test_infinite_inputs_stay_in_their_channel():
    arguments = arguments_of(named("odd"), "float32")
    want = forward(arguments)["y"]
    arguments["u"][0, 3, 5] = np.inf
    got = forward(arguments)["y"]
    assert not np.isfinite(got[0, 3, 5])
    got[0, 3] = want[0, 3]
    np.testing.assert_array_equal(got, want)


def test_every_isa(on_other_isas):
    on_other_isas(__file__)
