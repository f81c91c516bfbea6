"""The gradients of the five ssd stages.  Judges: float64 loops; for all five, the whole scan."""

import os

import numpy as np
import pytest

from tests import gradient_judge, stages_gradient_judge, stages_judge
from tests.cases import CASES, StageCase, make
from tests.stage_kernels import (
    BLOCKS,
    INPUTS,
    MAIN,
    STAGES,
    backward,
    forward,
    kernel_inputs,
    named,
    output_gradients,
    poisoned,
    strided,
    typed,
    whole_and_composed,
)
from tests.stages import compose
from tests.tolerances import TOLERANCES, Tolerance, assert_close

CALLS = [pytest.param(s, case, id=f"{s}-{case}") for s in STAGES for case in CASES[s]]
DTYPES = ("float64", "float32", "float16")
WHOLE = Tolerance(1e-10, 1e-10, "ten kernels in float64: sums, and differences of sums of decays")
# On the host a block of a chunk of one step takes as long as any other.
COMPOSED = (3, 64) if "SSM_TEST_CUDA_HOST" in os.environ else (1, 3, 64)
PER_ROW = {"dt", "x", "B", "C", "CB", "dA_cumsum", "states", "states_in", "z", "seq_idx"}
PER_ROW |= {"initial_states"}


def judged(stage: str, arguments: dict, given: dict) -> dict:
    return getattr(stages_gradient_judge, stage)(*given.values(), **arguments)


def assert_gradients(stage: str, found: dict, want: dict, coarsest: str = "float64") -> None:
    for name, gradient in found.items():
        dtype = max(str(gradient.dtype), coarsest, key=DTYPES.index)
        assert_close(f"{stage} d{name}", gradient, want[name], TOLERANCES[f"{stage}_bwd", dtype])


def assert_equal(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name, strict=True)


def acc_of(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


# Values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "groups", "seq_idx", "chunk_beyond"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradient_judge_matches_finite_differences(stage, name):
    arguments = make(named(stage, name))
    if stage == "ssd_chunk_cumsum":
        arguments["dt_limit"] = (0.1, 0.6)
    given = output_gradients(stage, make(named(stage, name)))

    def loss(**changed):
        found = getattr(stages_judge, stage)(**{**arguments, **changed})
        found = found if isinstance(found, tuple) else (found,)
        return sum((g * y).sum() for g, y in zip(given.values(), found, strict=True))

    gradients, rng = judged(stage, arguments, given), np.random.default_rng(2)
    for key in INPUTS[stage]:
        value = arguments[key]
        for index in rng.integers(0, value.shape, (8, value.ndim)):
            step = np.zeros(value.shape)
            step[tuple(index)] = 1e-5
            slope = (loss(**{key: value + step}) - loss(**{key: value - step})) / 2e-5
            assert abs(slope - gradients[key][tuple(index)]) < 2e-6 * (1 + abs(slope)), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stage", "case"), CALLS)
def test_gradients_match_judge(stage, case, dtype):
    arguments = typed(make(case), dtype)
    given = output_gradients(stage, arguments)
    found = backward(stage, arguments, given)
    assert_gradients(stage, found, judged(stage, arguments, given), acc_of(dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("stage", STAGES)
def test_blocks_match_judge(stage, dtype):
    arguments = typed(make(BLOCKS[stage]), dtype)
    given = output_gradients(stage, arguments)
    assert_gradients(
        stage, backward(stage, arguments, given), judged(stage, arguments, given), dtype
    )


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "ssd_bmm_chunk"])
def test_long_chunks_with_sequences_match_judge(stage):
    """Sequences that begin in, skip, and span blocks of one chunk; groups of several heads."""
    arguments = make(StageCase(stage, "ids", 2, 205, 4, 3, 5, 150, 2, 1, layout="seq_idx"))
    ids = np.zeros((2, 205), np.int32)
    ids[0, 70:], ids[0, 140:160], ids[0, 199:] = 1, -1, 2
    ids[1, :66], ids[1, 66:130], ids[1, 148:153] = -1, 3, -1
    arguments["seq_idx"] = ids
    given = output_gradients(stage, arguments)
    assert_gradients(stage, backward(stage, arguments, given), judged(stage, arguments, given))


@pytest.mark.parametrize("limit", [(0.0, np.inf), (0.05, 0.4), (0.3, np.inf)], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_dt_limit(softplus, limit):
    arguments = {**make(named("ssd_chunk_cumsum", "odd")), "softplus": softplus}
    given = output_gradients("ssd_chunk_cumsum", arguments)
    arguments["dt_limit"] = limit
    found = backward("ssd_chunk_cumsum", arguments, given)
    assert_gradients("ssd_chunk_cumsum", found, judged("ssd_chunk_cumsum", arguments, given))


def test_limits_themselves_have_gradients():
    """As torch.clamp: the gradient passes at low and high, and not beyond."""
    dt = np.array([0.25, 0.5, 0.75, 1.0, 1.25]).reshape(1, 5, 1)
    arguments = {"dt": dt, "A": -np.ones(1), "dt_limit": (0.5, 1.0)}
    given = {"dt_out": np.ones((1, 1, 1, 5)), "dA_cumsum": np.zeros((1, 1, 1, 5))}
    found = backward("ssd_chunk_cumsum", arguments, given)["dt"].ravel()
    assert list(found != 0.0) == [False, True, True, True, False]


class _Chain:
    """The five backward kernels one after the other, for ``compose`` and then back."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, stage):
        def call(*values, **options):
            names = [n for n in (*INPUTS[stage], "chunk_size") if n not in options]
            if stage == "ssd_chunk_cumsum":
                names = ["dt", "A", "chunk_size"]
            arguments = {**dict(zip(names, values, strict=False)), **options}
            if stage == "ssd_state_passing":
                arguments.setdefault("initial_states", None)
            found = forward(stage, arguments)
            self.calls.append((stage, arguments))
            found = tuple(found.values())
            return found if len(found) > 1 else found[0]

        return call

    def gradients(self, dy, dfinal_states):
        """Return the gradients of the arguments of ``compose``."""
        calls = dict(self.calls)
        output = backward("ssd_chunk_output", calls["ssd_chunk_output"], {"y": dy})
        bmm = backward("ssd_bmm_chunk", calls["ssd_bmm_chunk"], {"CB": output["CB"]})
        given = {"states_in": output["states_in"], "final_states": dfinal_states}
        passing = backward("ssd_state_passing", calls["ssd_state_passing"], given)
        state = backward("ssd_chunk_state", calls["ssd_chunk_state"], {"states": passing["states"]})
        parts = (output["dA_cumsum"], passing["dA_cumsum"], state["dA_cumsum"])
        given = {"dt_out": output["dt"] + state["dt"], "dA_cumsum": sum(parts)}
        cumsum = backward("ssd_chunk_cumsum", calls["ssd_chunk_cumsum"], given)
        return {
            **cumsum,
            "X": output["x"] + state["x"],
            "B": bmm["B"] + state["B"],
            "C": bmm["C"] + output["C"],
            "initial_states": passing["initial_states"],
            **{name: output[name] for name in ("D", "z") if name in output},
        }


@pytest.mark.parametrize("chunk_size", COMPOSED)
@pytest.mark.parametrize("case", CASES["ssd_chunk_scan"], ids=str)
def test_composed_gradients_equal_those_of_the_whole(case, chunk_size):
    arguments, given = whole_and_composed(case, chunk_size)
    for limit in ((0.0, np.inf), (0.1, 0.4)):
        chain = _Chain()
        y, states = compose(chain, **given, dt_limit=limit)
        rng = np.random.default_rng(4)
        dy, dstates = rng.standard_normal(y.shape), rng.standard_normal(states.shape)
        want = gradient_judge.ssd_chunk_scan(dy, dstates, **arguments, dt_limit=limit)
        for name, gradient in chain.gradients(dy, dstates).items():
            assert_close(f"gradient of {name}", gradient, want[name], WHOLE)


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


# Layouts and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_mixed_dtypes(stage):
    """Each array alone in another dtype: its values decide, not how they are stored."""
    arguments = typed(make(named(stage, "groups")), "float32")
    given, inputs = output_gradients(stage, arguments), kernel_inputs(stage, arguments)
    out = poisoned(stage, arguments)
    main = "states_in" if stage == "ssd_state_passing" else MAIN.get(stage, "x")
    arrays = {n: v for n, v in (inputs | given).items() if isinstance(v, np.ndarray) and n != main}

    def changed(values: dict, name: str, dtype: str) -> dict:
        if name not in values:
            return values
        return {**values, name: values[name].astype("float16").astype(dtype)}

    for name in arrays:
        # Two arrays of one name, an input and the gradient of an output, change together.
        found = [
            backward(
                stage,
                arguments,
                changed(given, name, dtype),
                inputs=changed(inputs, name, dtype),
                out={n: np.full_like(v, np.nan) for n, v in out.items()},
            )
            for dtype in ("float32", "float16", "float64")
        ]
        assert_equal(found[1], found[0])
        assert_equal(found[2], found[0])


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_rounded_to_their_dtype(stage, dtype):
    arguments = typed(make(named(stage, "odd")), "float32")
    given = output_gradients(stage, arguments)
    want, out = backward(stage, arguments, given), poisoned(stage, arguments)
    out = {name: np.full(value.shape, np.nan, dtype) for name, value in out.items()}
    for name, gradient in backward(stage, arguments, given, out=out).items():
        np.testing.assert_array_equal(gradient, want[name].astype(dtype))


def surrounded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a strided array full of NaN, and the buffer around it, full of 7."""
    view = strided(np.full_like(array, np.nan))
    return view, view.base if view.base.base is None else view.base.base


@pytest.mark.parametrize("name", ["groups", "seq_idx"])
@pytest.mark.parametrize("stage", STAGES)
def test_noncontiguous(stage, name):
    """Any strides, and nothing is written beside the gradients."""
    arguments = typed(make(named(stage, name)), "float32")
    given, inputs = output_gradients(stage, arguments), kernel_inputs(stage, arguments)
    want = backward(stage, arguments, given)
    pairs = {n: surrounded(value) for n, value in poisoned(stage, arguments).items()}
    before = {n: (buffer == 7).sum() for n, (_, buffer) in pairs.items()}
    assert all(before.values())

    def spread(values: dict) -> dict:
        return {k: strided(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    out = {n: view for n, (view, _) in pairs.items()}
    found = backward(stage, arguments, spread(given), out=out, inputs=spread(inputs))
    for n, (view, buffer) in pairs.items():
        np.testing.assert_array_equal(found[n], want[n], err_msg=n)
        view[...] = np.nan
        assert (buffer == 7).sum() == before[n], n


@pytest.mark.parametrize("stage", STAGES)
def test_repeated_elements(stage):
    """A stride of 0 on every axis of every input."""
    arguments = typed(make(named(stage, "odd")), "float32")
    given, inputs = output_gradients(stage, arguments), kernel_inputs(stage, arguments)

    def one(values: dict, dense: bool) -> dict:
        found = dict(values)
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                first = value.reshape(-1)[:1].reshape((1,) * value.ndim)
                found[name] = np.broadcast_to(first, value.shape)
                found[name] = found[name].copy() if dense else found[name]
        return found

    found, want = (
        backward(stage, arguments, one(given, dense), inputs=one(inputs, dense))
        for dense in (False, True)
    )
    assert_equal(found, want)


@pytest.mark.parametrize("stage", STAGES)
def test_reads_and_writes_in_bounds(stage, guarded):
    arguments = typed(make(named(stage, "seq_idx")), "float32")
    given, inputs = output_gradients(stage, arguments), kernel_inputs(stage, arguments)

    def moved(values: dict) -> dict:
        return {k: guarded(v) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    out = moved(poisoned(stage, arguments))
    found = backward(stage, arguments, moved(given), out=out, inputs=moved(inputs))
    assert_equal(found, backward(stage, arguments, given))


def test_large_offsets(sparse):
    """Rows that lie more than 2^31 elements apart."""
    stage = "ssd_chunk_output"
    arguments = typed(make(StageCase(stage, "far", 2, 5, 1, 2, 3, 4)), "float16")
    given, inputs = output_gradients(stage, arguments), kernel_inputs(stage, arguments)
    want, out = backward(stage, arguments, given), poisoned(stage, arguments)
    far = {"y": sparse(given["y"], 0, 2**31 + 8)}
    out["x"] = sparse(out["x"], 0, 2**31 + 8)
    assert_equal(backward(stage, arguments, far, out=out, inputs=inputs), want)


@pytest.mark.parametrize("stage", STAGES)
def test_leaves_inputs_alone(stage):
    arguments = make(named(stage, "odd"))
    given, inputs = output_gradients(stage, arguments), kernel_inputs(stage, arguments)
    arrays = [v for v in (*given.values(), *inputs.values()) if isinstance(v, np.ndarray)]
    before = [v.copy() for v in arrays]
    backward(stage, arguments, given, inputs=inputs)
    for value, kept in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(value, kept)


# Independence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_threads_agree(stage):
    for case in (named(stage, "mamba2_130m"), BLOCKS[stage]):
        arguments = typed(make(case), "float32")
        given = output_gradients(stage, arguments)
        want = backward(stage, arguments, given, num_threads=1)
        for threads in (2, 3, 8):
            assert_equal(backward(stage, arguments, given, num_threads=threads), want)


@pytest.mark.parametrize("stage", STAGES)
def test_rows_do_not_know_each_other(stage):
    arguments = typed(make(named(stage, "seq_idx")), "float32")
    given = output_gradients(stage, arguments)
    whole = backward(stage, arguments, given)
    for row in (0, 1):
        here = slice(row, row + 1)
        part = {k: v[here] if k in PER_ROW and v is not None else v for k, v in arguments.items()}
        found = backward(stage, part, {n: v[here] for n, v in given.items()})
        # Sums over the batch have no rows.
        for name in PER_ROW & set(found):
            np.testing.assert_array_equal(found[name], whole[name][here], err_msg=name)


@pytest.mark.parametrize(
    ("stage", "missing"),
    [(s, n) for s in ("ssd_chunk_cumsum", "ssd_state_passing") for n in (0, 1)],
)
def test_a_missing_gradient_counts_as_zero(stage, missing):
    arguments = typed(make(named(stage, "seq_idx")), "float32")
    given = output_gradients(stage, arguments)
    name = list(given)[missing]
    zero = {**given, name: np.zeros_like(given[name])}
    absent = {**given, name: None}
    assert_equal(backward(stage, arguments, absent), backward(stage, arguments, zero))


@pytest.mark.parametrize(("batch", "seqlen"), [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nothing_gives_gradients_of_zero(batch, seqlen, dtype):
    stage = "ssd_chunk_output"
    arguments = typed(make(BLOCKS[stage]), dtype)
    backward(stage, arguments, output_gradients(stage, arguments))  # fills the working memory
    empty = typed(make(StageCase(stage, "empty", batch, seqlen, 8, 0, 3, 4)), dtype)
    empty["D"] = np.ones(8, dtype)
    found = backward(stage, empty, output_gradients(stage, empty))
    np.testing.assert_array_equal(found["D"], np.zeros(8))


def test_initial_states_need_no_gradient():
    arguments = typed(make(named("ssd_state_passing", "odd")), "float32")
    given = output_gradients("ssd_state_passing", arguments)
    want, out = (
        f("ssd_state_passing", arguments) for f in (lambda *a: backward(*a, given), poisoned)
    )
    del want["initial_states"], out["initial_states"]
    assert_equal(backward("ssd_state_passing", arguments, given, out=out), want)


def with_skipped_steps(stage: str, layout: str) -> dict:
    """Return arguments with skipped steps, between sequences or, without a gate, inside of one.

    A gate would clear what the gradient of an output holds there.
    """
    arguments = make(named(stage, "seq_idx"))
    if layout == "holes":
        arguments["seq_idx"] = np.zeros_like(arguments["seq_idx"])
        arguments["seq_idx"][:, [0, 3, 10, 11, 17, 23, 32]] = -1
        if "z" in arguments:
            arguments["z"] = None
    return arguments


@pytest.mark.parametrize("layout", ["sequences", "holes"])
@pytest.mark.parametrize("stage", ["ssd_chunk_cumsum", "ssd_chunk_state", "ssd_chunk_output"])
def test_nan_in_skipped_steps_changes_nothing(stage, layout):
    arguments = with_skipped_steps(stage, layout)
    given, ids = output_gradients(stage, arguments), arguments["seq_idx"]
    skipped, size = ids < 0, 8
    assert skipped.any()
    lines = np.pad(skipped, ((0, 0), (0, -ids.shape[1] % size))).reshape(len(ids), -1, size)
    bad = dict.fromkeys(("x", "B", "C", "z", "y"), skipped)
    bad["dt_out"] = lines[:, None]
    bad["dt"] = skipped if stage == "ssd_chunk_cumsum" else lines[:, None]
    bad["CB"] = (lines[..., None] | lines[:, :, None])[:, :, None]

    def poison(values: dict) -> dict:
        found = dict(values)
        for name in bad.keys() & {n for n, v in values.items() if v is not None}:
            mask = bad[name]
            mask = mask.reshape(mask.shape + (1,) * (values[name].ndim - mask.ndim))
            found[name] = np.where(mask, np.nan, values[name])
        return found

    want = backward(stage, arguments, given)
    found = backward(stage, poison(arguments), poison(given))
    assert_equal(found, want)
    for name in {"x", "B", "C", "z"} & found.keys():
        assert not found[name][skipped].any(), name


@pytest.mark.parametrize("layout", ["sequences", "holes"])
@pytest.mark.parametrize("stage", ["ssd_chunk_cumsum", "ssd_chunk_state", "ssd_chunk_output"])
def test_skipped_steps_have_no_gradient_whatever_comes_back(stage, layout):
    arguments = with_skipped_steps(stage, layout)
    given = {n: np.full_like(v, np.nan) for n, v in output_gradients(stage, arguments).items()}
    found, skipped = backward(stage, arguments, given), arguments["seq_idx"] < 0
    for name in {"x", "B", "C", "z"} & found.keys():
        assert np.isnan(found[name][~skipped]).any(), name
        assert not found[name][skipped].any(), name
    lines = found["dt"]
    if stage != "ssd_chunk_cumsum":
        lines = np.moveaxis(lines.reshape(*lines.shape[:2], -1), 1, 2)[:, : skipped.shape[1]]
    assert np.isnan(lines[~skipped]).any()
    assert not lines[skipped].any()


def test_what_is_beyond_the_end_is_not_read():
    """Steps beyond L in dt, dA_cumsum, CB and dCB; but the last sum is that of a whole chunk."""
    last = 29 - 3 * 8
    for stage in ("ssd_chunk_output", "ssd_bmm_chunk"):
        arguments = make(named(stage, "odd"))
        given = output_gradients(stage, arguments)
        want = backward(stage, arguments, given)
        bad = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
        if stage == "ssd_chunk_output":
            for name in ("dt", "dA_cumsum"):
                bad[name][:, :, -1, last:] = np.nan
        for values in (bad, given):
            if "CB" in values:
                values["CB"][:, -1, :, last:] = values["CB"][:, -1, :, :, last:] = np.nan
        assert_equal(backward(stage, bad, given), want)


def test_what_is_after_a_step_is_not_read():
    """CB above the diagonal, and decays that would overflow there."""
    stage = "ssd_chunk_output"
    arguments = make(named(stage, "odd"))
    given, above = output_gradients(stage, arguments), ~np.tri(8, dtype=bool)
    poison = {**arguments, "CB": arguments["CB"].copy()}
    poison["CB"][..., above] = np.nan
    want = backward(stage, arguments, given)
    assert_equal(backward(stage, poison, given), want)
    assert not want["CB"][..., above].any()
    steep = typed({**arguments, "dA_cumsum": arguments["dA_cumsum"] * 1e4}, "float32")
    for name, gradient in backward(stage, steep, typed(given, "float32")).items():
        assert np.isfinite(gradient).all(), name


def test_what_another_sequence_leaves_does_not_come_back():
    """A gradient, a state or a decay that is not a number stays in its sequence."""
    ids, stage = np.array([[0, 0, 1, 1, 1, 1]], np.int32), "ssd_state_passing"
    states, decay = np.ones((1, 3, 1, 1, 1)), np.zeros((1, 1, 3, 2))
    decay[..., 1, 1] = np.nan  # of the chunk in which the second sequence begins
    arguments = {"states": states, "dA_cumsum": decay, "seq_idx": ids}
    arguments["initial_states"] = np.ones((1, 1, 1, 1))
    given = {"states_in": np.ones(states.shape), "final_states": np.full((1, 1, 1, 1), np.nan)}
    found = backward(stage, arguments, given)
    assert np.isnan(found["states"].ravel()).tolist() == [False, True, True]
    assert found["initial_states"].item() == 2.0
    inputs = kernel_inputs(stage, arguments)
    inputs["states_in"][0, 1] = np.nan  # enters the chunk in which the second sequence begins
    given["final_states"][...] = 1.0
    found = backward(stage, arguments, given, inputs=inputs)
    assert found["dA_cumsum"][..., -1].ravel().tolist() == [1.0, 0.0, 1.0]


def test_a_step_without_a_decay_of_its_own_has_no_gradient():
    """Exactly: a pair of a step with itself, and the last step of a chunk, do not decay."""
    arguments = make(StageCase("ssd_chunk_state", "one", 1, 1, 1, 3, 4, 1))
    given = output_gradients("ssd_chunk_state", arguments)
    assert backward("ssd_chunk_state", arguments, given)["dA_cumsum"].item() == 0.0
    arguments = make(StageCase("ssd_chunk_output", "one", 1, 1, 1, 3, 0, 1))
    given = output_gradients("ssd_chunk_output", arguments)
    assert backward("ssd_chunk_output", arguments, given)["dA_cumsum"].item() == 0.0
