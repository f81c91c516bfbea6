"""ssm_kernels.ssd_chunk_scan_fwd and _bwd. Judges: float64 NumPy loops, and finite differences."""

import itertools
import os

import numpy as np
import pytest
import ssm_kernels

from tests import gradient_judge, judge
from tests.cases import CASES, SsdCase, make
from tests.tolerances import TOLERANCES, assert_close

OP = "ssd_chunk_scan"
DTYPES = ("float64", "float32", "float16")
# The CUDA sources take no number of threads: they run twice.
THREADS = (8,) if "SSM_TEST_CUDA_HOST" in os.environ else (0, 2, 3, 8)
# On a GPU products of 16 bits round their operands: test_cuda_ssd.py has their bound.
JUDGED = DTYPES[:2] if "SSM_TEST_CUDA_HOST" in os.environ else DTYPES
GRADIENTS = ("X", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
OVER_TIME = ("X", "dt", "B", "C", "z")
MORE = (
    # B and C with unlike group counts, both ways round.
    SsdCase("two_groupings", 2, 35, 12, 3, 5, 1, 6, 4),
    SsdCase("two_groupings_back", 1, 34, 6, 2, 3, 1, 2, 3, skip="channel"),
    # More heads than one block has, and more steps than one chunk and one checkpoint.
    SsdCase("tiles", 2, 230, 20, 5, 7, 1, 2, 2),
    SsdCase("tiles_packed", 2, 230, 3, 5, 7, 1, layout="cu_seqlens mask"),
    SsdCase("tiles_seq_idx", 2, 200, 2, 4, 3, 1, layout="seq_idx mask"),
    SsdCase("wide", 1, 97, 2, 70, 33, 1, skip="channel"),
    SsdCase("exact_tiles", 2, 192, 2, 32, 16, 1),
    # Whole vectors with something between them: skipped steps, another group.
    SsdCase("exact_holes", 2, 70, 2, 32, 16, 1, layout="cu_seqlens mask"),
    SsdCase("exact_groups", 1, 70, 4, 32, 16, 1, 2, 2),
    # The same, and a last chunk of more steps than a vector has lanes, but not of two vectors.
    SsdCase("exact_short", 1, 60, 2, 32, 16, 1),
    SsdCase("no_state", 2, 40, 2, 3, 0, 1),
    SsdCase("no_channels", 2, 40, 2, 0, 3, 1),
    SsdCase("no_heads", 2, 40, 0, 3, 4, 1),
)
ALL = (*CASES[OP], *MORE)
LAYOUTS = tuple(case for case in ALL if case.layout)
# The kernels for the warpgroups of Hopper take no other states.
IN_ACC = ("initial_states",) if "SSM_TEST_CUDA_WARPGROUPS" in os.environ else ()
LIMITS = ((0.0, np.inf), (0.05, 0.4), (0.3, np.inf), (0.2, 0.2))


def named(name: str) -> SsdCase:
    return next(case for case in ALL if case.name == name)


def arguments_of(case: SsdCase, dtype="float64", seed: int = 0) -> dict:
    """Return the arguments of a case with their floats in `dtype`."""
    arguments = make(case, seed)
    del arguments["chunk_size"]
    return {
        name: value.astype(acc(dtype) if name in IN_ACC else dtype)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in arguments.items()
    }


def acc(dtype) -> np.dtype:
    return np.dtype("float64" if np.dtype(dtype) == np.float64 else "float32")


def poisoned(shape, dtype) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def kernel_inputs(arguments: dict) -> tuple[dict, int]:
    """Turn seq_meta and dt_limit into what the kernels take; also return S."""
    inputs = dict(arguments)
    inputs["dt_low"], inputs["dt_high"] = inputs.pop("dt_limit", (0.0, np.inf))
    meta, (batch, seqlen) = inputs.pop("seq_meta", None), inputs["X"].shape[:2]
    if meta is None:
        return inputs, batch
    ids, per_sequence, nstates = judge.positions(meta, batch, seqlen)
    return {**inputs, "seq_idx": ids, "state_per_sequence": per_sequence}, nstates


def state_shape(arguments: dict) -> tuple:
    _, nstates = kernel_inputs(arguments)
    return (nstates, *arguments["X"].shape[2:], arguments["B"].shape[3])


def forward(arguments: dict, num_threads: int = 1, wrap=lambda a: a) -> dict:
    """Call the forward with poisoned outputs, each passed through `wrap`; return them."""
    inputs, _ = kernel_inputs(arguments)
    X, (_, heads, headdim, dstate) = inputs["X"], state_shape(arguments)
    saved = (len(X), -(-X.shape[1] // 96), heads, dstate, headdim)
    out = {
        "y": wrap(poisoned(X.shape, X.dtype)),
        "final_states": wrap(poisoned(state_shape(arguments), acc(X.dtype))),
        "checkpoints": poisoned(saved, acc(X.dtype)),
    }
    ssm_kernels.ssd_chunk_scan_fwd(**inputs, **out, num_threads=num_threads)
    return out


def output_gradients(arguments: dict, with_state: bool = True, seed: int = 1) -> dict:
    rng, X = np.random.default_rng(seed), arguments["X"]
    dstate = rng.standard_normal(state_shape(arguments)).astype(acc(X.dtype))
    dy = rng.standard_normal(X.shape).astype(X.dtype)
    return {"dy": dy, "dfinal_states": dstate if with_state else None}


def backward(arguments: dict, given: dict, num_threads: int = 1, wrap=lambda a: a) -> dict:
    """Call both directions; return the gradients by input, poisoned before the call."""
    checkpoints = forward(arguments)["checkpoints"]
    inputs, _ = kernel_inputs(arguments)
    out = {}
    for name in GRADIENTS:
        if inputs.get(name) is not None:
            out[name] = wrap(poisoned(inputs[name].shape, inputs[name].dtype))
    if "initial_states" not in out:
        out["initial_states"] = wrap(poisoned(state_shape(arguments), acc(inputs["X"].dtype)))
    outputs = {f"d{name}": gradient for name, gradient in out.items()}
    ssm_kernels.ssd_chunk_scan_bwd(
        **inputs, **given, **outputs, checkpoints=checkpoints, num_threads=num_threads
    )
    return out


def assert_equal(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name, strict=True)


def skipped_steps(arguments: dict) -> np.ndarray:
    return judge.positions(arguments["seq_meta"], *arguments["X"].shape[:2])[0] < 0


# Values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", JUDGED)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_judge(case, dtype):
    arguments = arguments_of(case, dtype)
    got = forward(arguments)
    y, states = judge.ssd_chunk_scan(**arguments)
    assert_close("y", got["y"], y, TOLERANCES[OP, dtype])
    assert_close("final_states", got["final_states"], states, TOLERANCES[OP, str(acc(dtype))])


@pytest.mark.parametrize("dtype", JUDGED)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_gradients_match_judge(case, dtype):
    arguments = arguments_of(case, dtype)
    given = output_gradients(arguments)
    want = gradient_judge.ssd_chunk_scan(**given, **arguments)
    for name, gradient in backward(arguments, given).items():
        assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", str(gradient.dtype)])


def test_gradients_across_a_chunk_without_steps():
    """The states of all heads of a block, here two, pass over a chunk of skipped steps."""
    arguments = arguments_of(SsdCase("hole", 1, 90, 16, 3, 4, 1))
    ids = np.zeros((1, 90), np.int32)
    ids[:, 30:66] = -1
    arguments["seq_meta"] = {"seq_idx": ids}
    given = output_gradients(arguments)
    want = gradient_judge.ssd_chunk_scan(**given, **arguments)
    for name, gradient in backward(arguments, given).items():
        assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", "float64"])


@pytest.mark.parametrize("name", ["bare", "tiny", "groups", "packed_holes", "padded", "seq_idx"])
@pytest.mark.parametrize("limit", LIMITS[:2], ids=str)
def test_gradient_judge_matches_finite_differences(name, limit):
    arguments = {**arguments_of(named(name)), "dt_limit": limit}
    given = output_gradients(arguments)

    def loss(**changed):
        y, state = judge.ssd_chunk_scan(**{**arguments, **changed})
        return (given["dy"] * y).sum() + (given["dfinal_states"] * state).sum()

    gradients = gradient_judge.ssd_chunk_scan(**given, **arguments)
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
@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_dt_limit(limit, softplus, dtype):
    arguments = {**arguments_of(named("odd"), dtype), "dt_limit": limit, "softplus": softplus}
    # A step size that lies on a limit itself has a gradient.
    if not softplus:
        arguments["dt"][0, :2] = np.float32(limit[0]) - arguments["dt_bias"]
    given = output_gradients(arguments)
    limited = {**arguments, "dt_limit": tuple(float(np.dtype(dtype).type(x)) for x in limit)}
    got = forward(arguments)
    y, states = judge.ssd_chunk_scan(**limited)
    assert_close("y", got["y"], y, TOLERANCES[OP, dtype])
    assert_close("final_states", got["final_states"], states, TOLERANCES[OP, dtype])
    if softplus:
        want = gradient_judge.ssd_chunk_scan(**given, **limited)
        for name, gradient in backward(arguments, given).items():
            assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", dtype])


def test_limits_themselves_have_gradients():
    """As torch.clamp: the gradient passes at low and high, and not beyond."""
    one = np.ones((1, 5, 1, 1))
    dt = np.array([0.25, 0.5, 0.75, 1.0, 1.25]).reshape(1, 5, 1)
    arguments = {"X": one, "dt": dt, "A": -np.ones(1), "B": one, "C": one, "seq_meta": None}
    arguments |= {"dt_limit": (0.5, 1.0), "D": None, "z": None, "dt_bias": None}
    given = {"dy": one, "dfinal_states": None}
    gradient = backward({**arguments, "initial_states": None}, given)["dt"].ravel()
    assert list(gradient != 0.0) == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_size(dtype):
    """State and channel counts around the vectors, lengths around chunks and checkpoints."""
    sizes = [(n, 3, 5) for n in (1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 17, 31)]
    sizes += [(3, p, 5) for p in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65)]
    sizes += [(2, 3, t) for t in (*range(1, 20), 31, 32, 33, 63, 64, 65, 95, 96, 97, 128)]
    for dstate, headdim, seqlen in sizes:
        arguments = arguments_of(SsdCase("any", 1, seqlen, 1, headdim, dstate, 1), dtype)
        got, given = forward(arguments), output_gradients(arguments)
        y, states = judge.ssd_chunk_scan(**arguments)
        assert_close(f"y {dstate} {headdim} {seqlen}", got["y"], y, TOLERANCES[OP, dtype])
        assert_close("final_states", got["final_states"], states, TOLERANCES[OP, dtype])
        want = gradient_judge.ssd_chunk_scan(**given, **arguments)
        for name, gradient in backward(arguments, given).items():
            assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", dtype])


def test_mixed_dtypes():
    dtypes = {"dt": "f4", "A": "f8", "B": "f4", "C": "f2", "D": "f8", "z": "f2", "dt_bias": "f4"}
    # Also where all layouts are those of packs: values of another type are still no copies.
    packs = SsdCase("packs", 1, 70, 4, 32, 16, 1, 2, 2, given="D dt_bias initial_states")
    for case, X_dtype in itertools.product((named("groups"), packs), JUDGED):
        arguments = arguments_of(case, X_dtype)
        for name, dtype in {**dtypes, "initial_states": "f2"}.items():
            if arguments[name] is not None:
                arguments[name] = arguments[name].astype(dtype)
        got, given = forward(arguments), output_gradients(arguments)
        given["dy"] = given["dy"].astype("f2")
        y, states = judge.ssd_chunk_scan(**arguments)
        assert_close("y", got["y"], y, TOLERANCES[OP, X_dtype])
        assert_close("state", got["final_states"], states, TOLERANCES[OP, str(acc(X_dtype))])
        want = gradient_judge.ssd_chunk_scan(**given, **arguments)
        for name, gradient in backward(arguments, given).items():
            # A gradient is as exact as the arithmetic and its own dtype allow.
            coarsest = max(str(acc(X_dtype)), str(gradient.dtype), key=DTYPES.index)
            assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", coarsest])


def test_outputs_of_any_dtype():
    arguments = arguments_of(named("odd"), "float32")
    want = forward(arguments)
    inputs, _ = kernel_inputs(arguments)
    y, states = poisoned(arguments["X"].shape, "f2"), poisoned(state_shape(arguments), "f8")
    ssm_kernels.ssd_chunk_scan_fwd(**inputs, y=y, final_states=states)
    np.testing.assert_array_equal(y, want["y"].astype("f2"))
    np.testing.assert_array_equal(states, want["final_states"].astype("f8"))


def test_only_what_is_asked_for():
    arguments = arguments_of(named("tiles_packed"), "float32")
    want, (inputs, _) = forward(arguments), kernel_inputs(arguments)
    y = poisoned(arguments["X"].shape, "f4")
    ssm_kernels.ssd_chunk_scan_fwd(**inputs, y=y)
    np.testing.assert_array_equal(y, want["y"])
    # Without a gradient of the final states it counts as zero.
    given = output_gradients(arguments, with_state=False)
    zero = {**given, "dfinal_states": np.zeros_like(want["final_states"])}
    assert_equal(backward(arguments, given), backward(arguments, zero))


# Independence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["tiles", "tiles_packed", "two_groupings", "wide"])
def test_threads_agree(name, dtype):
    arguments = arguments_of(named(name), dtype)
    given = output_gradients(arguments)
    want, want_gradients = forward(arguments, 1), backward(arguments, given, 1)
    for threads in THREADS:
        assert_equal(forward(arguments, threads), want)
        assert_equal(backward(arguments, given, threads), want_gradients)


@pytest.mark.parametrize("name", ["tiles", "seq_idx", "tiles_seq_idx", "padded", "two_groupings"])
def test_rows_are_independent(name):
    arguments = arguments_of(named(name), "float32")
    given = output_gradients(arguments)
    want, want_gradients = forward(arguments), backward(arguments, given)
    per_row = {n for n, v in arguments.items() if isinstance(v, np.ndarray) and v.ndim > 2}
    for row in range(len(arguments["X"])):
        here = slice(row, row + 1)
        alone = {n: v[here] if n in per_row else v for n, v in arguments.items()}
        if arguments["seq_meta"]:
            alone["seq_meta"] = {n: v[here] for n, v in arguments["seq_meta"].items()}
        assert_equal(forward(alone), {n: v[here] for n, v in want.items()})
        gradients = backward(alone, {n: v[here] for n, v in given.items()})
        # Sums over the batch have no rows.
        for n in per_row & set(want_gradients):
            np.testing.assert_array_equal(gradients[n], want_gradients[n][here], err_msg=n)


def test_bad_rows_do_not_spread():
    arguments = arguments_of(SsdCase("three_rows", 3, 70, 4, 5, 7, 1), "float32")
    given = output_gradients(arguments)
    want, want_gradients = forward(arguments), backward(arguments, given)
    for n in OVER_TIME:
        arguments[n] = arguments[n].copy()
        arguments[n][1] = np.nan
    got, gradients = forward(arguments), backward(arguments, given)
    for row in (0, 2):
        for n, value in got.items():
            np.testing.assert_array_equal(value[row], want[n][row], err_msg=n)
        for n in (*OVER_TIME, "initial_states"):
            np.testing.assert_array_equal(gradients[n][row], want_gradients[n][row], err_msg=n)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_nan_in_skipped_steps_changes_nothing(case):
    arguments = arguments_of(case, "float32")
    given, skipped = output_gradients(arguments), skipped_steps(arguments)
    assert skipped.any()
    want, want_gradients = forward(arguments), backward(arguments, given)
    bad, bad_given = dict(arguments), dict(given)
    for values, names in ((bad, OVER_TIME), (bad_given, ("dy",))):
        for n in names:
            values[n] = values[n].copy()
            values[n][skipped] = np.nan
    got, gradients = forward(bad), backward(bad, bad_given)
    assert_equal(got, want)
    assert_equal(gradients, want_gradients)
    assert not got["y"][skipped].any()
    for n in OVER_TIME:
        assert not gradients[n][skipped].any(), n
    # Nor have they a gradient where nothing else is a number.
    everywhere = {n: np.full_like(v, np.nan) for n, v in given.items()}
    bad |= {n: np.full_like(bad[n], np.nan) for n in OVER_TIME}
    gradients = backward(bad, everywhere)
    for n in OVER_TIME:
        assert not gradients[n][skipped].any(), n


def test_chunked_equals_whole():
    arguments = arguments_of(SsdCase("whole", 2, 130, 3, 4, 5, 1))
    want = forward(arguments)
    for cut in (0, 1, 31, 32, 33, 96, 129, 130):
        first, second = dict(arguments), dict(arguments)
        for n in OVER_TIME:
            first[n], second[n] = arguments[n][:, :cut], arguments[n][:, cut:]
        one = forward(first)
        second["initial_states"] = one["final_states"]
        two = forward(second)
        y = np.concatenate([one["y"], two["y"]], 1)
        assert_close("y", y, want["y"], TOLERANCES[OP, "float64"])
        state = two["final_states"]
        assert_close("state", state, want["final_states"], TOLERANCES[OP, "float64"])


def test_packed_equals_separate():
    lengths = (33, 0, 5, 1, 1, 64, 0, 100)
    ends = np.cumsum((0, *lengths))
    arguments = arguments_of(SsdCase("packed", 1, int(ends[-1]), 2, 3, 4, 1))
    rng = np.random.default_rng(3)
    arguments["initial_states"] = rng.standard_normal((len(lengths), 2, 3, 4))
    arguments["seq_meta"] = {"cu_seqlens": ends.astype("i4")}
    got = forward(arguments)
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        alone = {**arguments, "seq_meta": None}
        for n in OVER_TIME:
            alone[n] = arguments[n][:, begin:end]
        alone["initial_states"] = arguments["initial_states"][i : i + 1]
        want = forward(alone)
        assert_close("y", got["y"][:, begin:end], want["y"], TOLERANCES[OP, "float64"])
        state = got["final_states"][i : i + 1]
        assert_close("state", state, want["final_states"], TOLERANCES[OP, "float64"])
        if begin == end:
            np.testing.assert_array_equal(state, alone["initial_states"])


def test_leaves_inputs_alone():
    arguments = arguments_of(named("tiles_packed"), "float32")
    given = output_gradients(arguments)
    read_only = {**arguments, **given}
    for value in read_only.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    before = {n: v.copy() for n, v in read_only.items() if isinstance(v, np.ndarray)}
    backward(arguments, given)
    for name, value in before.items():
        np.testing.assert_array_equal(read_only[name], value, err_msg=name)


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("step", [4, 5])
def test_a_step_that_is_no_number_spoils_none_before_it(step, dtype):
    arguments = arguments_of(SsdCase("whole", 1, 20, 3, 64, 64, 1), dtype)
    want = forward(arguments)["y"]
    arguments["dt"][0, step, 1] = np.nan
    got = forward(arguments)["y"]
    np.testing.assert_array_equal(got[:, :step], want[:, :step])
    np.testing.assert_array_equal(got[:, :, ::2], want[:, :, ::2])
    assert np.isnan(got[:, step:, 1]).all()


def test_a_sequence_forgets_a_state_that_is_no_number():
    """Without a state of its own, as the second sequence of a row, in many segments."""
    rng = np.random.default_rng(0)
    X, B, C = (rng.standard_normal((1, 600, 1, 8)).astype("float32") for _ in range(3))
    ids = np.repeat([0, 1], [100, 500])[None].astype(np.int32)
    y, states = np.full_like(X, np.inf), np.full((1, 1, 8, 8), np.nan, "float32")
    dt, A = np.full((1, 600, 1), 0.1, "float32"), -np.ones(1, "float32")
    ssm_kernels.ssd_chunk_scan_fwd(
        X, dt, A, B, C, seq_idx=ids, initial_states=states, y=y, final_states=states.copy()
    )
    assert np.isnan(y[:, :100]).all()
    assert np.isfinite(y[:, 100:]).all()
