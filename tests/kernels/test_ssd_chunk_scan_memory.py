"""ssm_kernels.ssd_chunk_scan in unusual memory and with hostile values.

Judges: the same call on plain arrays, bit for bit; for values the float64 loops.
"""

import os

import numpy as np
import pytest
import ssm_kernels

from tests import gradient_judge, judge
from tests.cases import SsdCase
from tests.kernels.test_ssd_chunk_scan import (
    DTYPES,
    OP,
    arguments_of,
    assert_equal,
    backward,
    forward,
    kernel_inputs,
    named,
    output_gradients,
)
from tests.tolerances import TOLERANCES, assert_close


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


def heads_before_steps(array: np.ndarray) -> np.ndarray:
    """Copy to the layout (B, H, L, P) of an array (B, L, H, P)."""
    if array.ndim < 3:
        return array
    return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout", [reversed_axes, apart, unaligned, heads_before_steps], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", ["two_groupings", "packed_holes", "wide"])
def test_noncontiguous(name, layout, dtype):
    arguments = arguments_of(named(name), dtype)
    given = output_gradients(arguments)
    views = {n: layout(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    assert_equal(forward(views, wrap=layout), forward(arguments))
    given_views = {n: layout(v) for n, v in given.items()}
    assert_equal(backward(views, given_views, wrap=layout), backward(arguments, given))


@pytest.mark.skipif("SSM_TEST_CUDA_HOST" in os.environ, reason="a GPU takes 256 states at most")
def test_strides_of_many_states():
    arguments = arguments_of(SsdCase("many_states", 1, 34, 2, 3, 260, 1), "float32")
    given = output_gradients(arguments)
    assert_equal(forward(arguments, wrap=apart), forward(arguments))
    assert_equal(backward(arguments, given, wrap=apart), backward(arguments, given))


def test_writes_only_the_elements_of_a_view():
    arguments = arguments_of(named("odd"), "float32")
    inputs, _ = kernel_inputs(arguments)
    y = apart(np.zeros_like(arguments["X"]))
    ssm_kernels.ssd_chunk_scan_fwd(**inputs, y=y)
    assert np.isfinite(y).all()
    y[...] = np.nan
    assert np.isnan(y.base).all()


def test_stride_zero_inputs():
    arguments = arguments_of(named("tiles"), "float32")
    expanded = dict(arguments)
    for name in ("X", "dt", "z", "B", "C", "D", "A"):
        value = arguments[name]
        first = value[tuple(slice(0, 1) for _ in value.shape)]
        expanded[name] = np.broadcast_to(first, value.shape)
    dense = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in expanded.items()}
    given = output_gradients(arguments)
    given["dy"] = np.broadcast_to(np.float32(1.0), arguments["X"].shape)
    assert_equal(forward(expanded), forward(dense))
    assert_equal(backward(expanded, given), backward(dense, {**given, "dy": given["dy"].copy()}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "name", "two_groupings seq_idx_holes packed_holes exact_tiles exact_short wide one".split()
)
def test_reads_and_writes_in_bounds(name, dtype, guarded):
    arguments = arguments_of(named(name), dtype)
    given = output_gradients(arguments)
    walled = {n: guarded(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    if "seq_idx" in (arguments["seq_meta"] or {}):
        inputs, _ = kernel_inputs(arguments)
        walled["seq_meta"] = {"seq_idx": guarded(inputs["seq_idx"])}
    assert_equal(forward(walled, wrap=guarded), forward(arguments))
    walls = {n: guarded(v) for n, v in given.items()}
    assert_equal(backward(walled, walls, wrap=guarded), backward(arguments, given))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_large_offsets(axis, sparse):
    """Neighbours along one axis lie more than 2^30 elements apart, the outer ones beyond 2^31."""
    case = SsdCase("huge", 3, 3, 3, 3, 3, 1, 3, 3)
    arguments = arguments_of(case, "float32")
    given = output_gradients(arguments)
    stride = 2**31 // 2 + 11
    names = ("X", "z", "B", "C", "initial_states", *(["dt"] if axis < 3 else []))
    far = (3,) * 4, (3,) * (4 if axis == 3 else 3)  # shapes of the tensors that have this axis
    spread = {**arguments, **{n: sparse(arguments[n], axis, stride) for n in names}}
    assert max(spread["X"].strides) // 4 * 2 > 2**31
    want, want_gradients = forward(arguments), backward(arguments, given)
    wrap = lambda a: sparse(a, axis, stride) if a.shape in far else a  # noqa: E731
    assert_equal(forward(spread, wrap=wrap), want)
    given["dy"] = sparse(given["dy"], axis, stride)
    assert_equal(backward(spread, given, wrap=wrap), want_gradients)


# Values ----------------------------------------------------------------------------------------


def plain(seqlen: int, dtype="float32", **changed) -> dict:
    """One head, one channel, one state, everything 1 unless `changed`."""
    one = np.ones((1, seqlen, 1, 1), dtype)
    arguments = {"X": one, "dt": one[..., 0], "A": -np.ones(1, dtype), "B": one, "C": one}
    arguments |= dict.fromkeys(("D", "z", "dt_bias", "initial_states", "seq_meta"))
    return arguments | {n: np.asarray(v, dtype) for n, v in changed.items()}


@pytest.mark.parametrize("brought", [1.0, 0.0])
@pytest.mark.parametrize("large", [1e3, 1e6])
def test_small_decays_behind_a_large_one(large, brought):
    """A difference of cumulative sums would lose the small decays behind a large one."""
    random = np.random.default_rng(0)
    dt = np.full((1, 64, 1), 1e-3, "f4")
    dt[0, ::20] = large
    arguments = plain(64, dt=dt, X=random.standard_normal((1, 64, 1, 1)))
    # What the large steps bring would hide most of what comes of the small ones.
    arguments["X"][0, ::20] *= brought
    y, states = judge.ssd_chunk_scan(**arguments)
    got = forward(arguments)
    assert_close("y", got["y"], y, TOLERANCES["selective_scan", "float32"])
    assert_close("states", got["final_states"], states, TOLERANCES["selective_scan", "float32"])
    given = {"dy": np.ones_like(arguments["X"]), "dfinal_states": np.ones_like(states, "f4")}
    want = gradient_judge.ssd_chunk_scan(**given, **arguments)
    gradients = backward(arguments, given)
    for name in ("X", "B", "C"):
        bound = TOLERANCES["selective_scan_bwd", "float32"]
        assert_close(name, gradients[name] / large, want[name] / large, bound)
    # Where the steps are small their gradients do not see the large ones.
    small = dt.ravel() < 1
    bound = TOLERANCES[f"{OP}_bwd", "float32"]
    assert_close("dt", gradients["dt"].ravel()[small], want["dt"].ravel()[small], bound)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_adversarial_values_stay_finite(dtype):
    """Heads with hostile step sizes, decays and inputs; the judge is finite on all of them."""
    if "SSM_TEST_CUDA_HOST" in os.environ and dtype == "float64":
        pytest.skip("decays in sums of |A| = 1e4 lose digits of float64, which no GPU computes in")
    rng, seqlen = np.random.default_rng(4), 40
    rates = np.array([0.0, 1e-38, 1e-3, 1.0, 30.0, 1e4])
    inputs = np.array([0.0, 1e-40, 1e-30, 1.0, 1e10, 1e30])
    pairs = np.array([(rate, size) for rate in rates for size in inputs])
    heads = len(pairs)
    arguments = {
        "X": pairs[:, 1, None] * rng.standard_normal((1, seqlen, heads, 2)),
        "dt": rng.uniform(-50.0, 50.0, (1, seqlen, heads)),
        "A": -pairs[:, 0],
        "B": rng.standard_normal((1, seqlen, 1, 5)),
        "C": rng.standard_normal((1, seqlen, 1, 5)),
        "z": 20.0 * rng.standard_normal((1, seqlen, heads, 2)),
    }
    arguments = {n: v.astype(dtype) for n, v in arguments.items()}
    arguments |= {"softplus": True, "seq_meta": None, "D": None, "dt_bias": None}
    arguments["initial_states"] = None
    y, states = judge.ssd_chunk_scan(**arguments)
    got = forward(arguments)
    given = {"dy": np.ones_like(arguments["X"]), "dfinal_states": None}
    want = gradient_judge.ssd_chunk_scan(**given, **arguments)
    gradients = backward(arguments, given)
    checked = [("y", got["y"], y, 2, TOLERANCES[OP, dtype])]
    checked += [("final_states", got["final_states"], states, 1, TOLERANCES[OP, dtype])]
    # |A| = 1e4 multiplies rounding, also the judge's: float64 cannot be told from it.
    for name, axis in (("X", 2), ("dt", 2), ("z", 2), ("initial_states", 1)):
        bound = TOLERANCES[f"{OP}_bwd", "float32"]
        checked.append((f"d{name}", gradients[name], want[name], axis, bound))
    for name, value, judged, axis, bound in checked:
        assert np.isfinite(value).all(), name
        # In units of the largest value of each head.
        value, judged = (np.moveaxis(a.astype("f8"), axis, 0).reshape(heads, -1)
                         for a in (value, judged))  # fmt: skip
        scale = np.abs(judged).max(1, keepdims=True)
        # Below the smallest normal number nothing is promised but smallness.
        keep = np.broadcast_to(scale > 1e-30, judged.shape)
        scale = np.where(scale > 0.0, scale, 1.0)
        assert_close(
            name, np.where(keep, value / scale, 0), np.where(keep, judged / scale, 0), bound
        )


@pytest.mark.parametrize("A", [-1e10, -np.inf])
def test_decay_of_minus_infinity_forgets(A):
    """The product dt A is -inf: the state before is forgotten, nothing becomes NaN."""
    arguments = plain(3, dt=[[[1.0], [1e30], [1.0]]], A=[A], C=np.full((1, 3, 1, 1), 1e-30))
    arguments["initial_states"] = np.full((1, 1, 1, 1), 1e3, "f4")
    got = forward(arguments)
    np.testing.assert_allclose(got["y"].ravel(), [1e-30, 1.0, 1e-30], rtol=1e-6)
    assert got["final_states"] == 1.0


def test_growing_states_are_followed():
    """A positive dt A is a growing state, correct up to the end of the range of float32."""
    arguments = plain(1, dt=[[[-1.0]]], A=[-80.0], initial_states=np.ones((1, 1, 1, 1)))
    arguments["dt_limit"] = (-np.inf, np.inf)
    got, (_, want) = forward(arguments)["final_states"], judge.ssd_chunk_scan(**arguments)
    # The exponent's rounding, 2^-24 of 115, is the relative error of its exponential.
    np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("name", ["X", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"])
def test_nan_is_not_hidden(name):
    """A NaN anywhere shows in the output, so that a diverged training is seen."""
    for dtype in ("float64", "float32"):
        arguments = arguments_of(named("odd"), dtype)
        arguments[name][(0,) * arguments[name].ndim] = np.nan
        got = forward(arguments)
        assert np.isnan(got["y"][0, :, 0]).any()
        if name not in ("C", "D", "z"):
            assert np.isnan(got["final_states"][0, 0]).any()


def test_infinite_inputs_stay_in_their_channel():
    arguments = arguments_of(named("odd"), "float32")
    want = forward(arguments)["y"]
    arguments["X"][0, 5, 1, 3] = np.inf
    got = forward(arguments)["y"]
    assert not np.isfinite(got[0, 5, 1, 3])
    # The tiles of a GPU hand it to earlier steps as well: docs/ops/ssd_chunk_scan.md#limits.
    first = 0 if "SSM_TEST_CUDA_HOST" in os.environ else 5
    got[0, first:, 1, 3] = want[0, first:, 1, 3]
    np.testing.assert_array_equal(got, want)


def test_every_isa(on_other_isas):
    on_other_isas(__file__)
