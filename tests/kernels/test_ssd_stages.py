"""The five raw kernels of the ssd stages.  Judges: float64 loops; for all five, the whole scan."""

import types

import numpy as np
import pytest
import ssm_kernels

from tests import judge, stages_judge
from tests.cases import CASES, StageCase, make
from tests.stage_kernels import (
    BLOCKS,
    MAIN,
    STAGES,
    named,
    outputs,
    run,
    strided,
    typed,
    whole_and_composed,
)
from tests.stages import compose
from tests.tolerances import TOLERANCES, Tolerance, assert_close

CALLS = [pytest.param(s, case, id=f"{s}-{case}") for s in STAGES for case in CASES[s]]
DTYPES = ("float64", "float32", "float16")
WHOLE = Tolerance(1e-10, 1e-10, "five stages in float64: rounding of sums and of their differences")


def assert_outputs(stage: str, found: list, want, dtype: str) -> None:
    want = want if isinstance(want, tuple) else (want,)
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        assert_close(f"{stage} output {i}", a, b, TOLERANCES[stage, dtype])


def dtype_of(found: list) -> str:
    return str(found[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stage", "case"), CALLS)
def test_matches_judge(stage, case, dtype):
    arguments = typed(make(case), dtype)
    found = run(stage, arguments)
    assert_outputs(stage, found, getattr(stages_judge, stage)(**arguments), dtype_of(found))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("stage", STAGES)
def test_blocks_match_judge(stage, dtype):
    arguments = typed(make(BLOCKS[stage]), dtype)
    found = run(stage, arguments)
    assert_outputs(stage, found, getattr(stages_judge, stage)(**arguments), dtype)


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "ssd_bmm_chunk"])
def test_long_chunks_with_sequences_match_judge(stage):
    """Sequences that begin in, skip, and span blocks of one chunk."""
    case = StageCase(stage, "ids", 2, 205, 2, 3, 5, 150, layout="seq_idx")
    arguments = make(case)
    ids = np.zeros((2, 205), np.int32)
    ids[0, 70:], ids[0, 140:160], ids[0, 199:] = 1, -1, 2
    ids[1, :66], ids[1, 66:130], ids[1, 148:153] = -1, 3, -1
    arguments["seq_idx"] = ids
    found = run(stage, arguments)
    assert_outputs(stage, found, getattr(stages_judge, stage)(**arguments), "float64")


KERNELS = types.SimpleNamespace(**{name: getattr(ssm_kernels, name) for name in STAGES})


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("case", CASES["ssd_chunk_scan"], ids=str)
def test_composed_equal_the_whole(case, chunk_size):
    arguments, given = whole_and_composed(case, chunk_size)
    for limit in ((0.0, np.inf), (0.1, 0.4)):
        y, states = compose(KERNELS, **given, dt_limit=limit)
        want_y, want_states = judge.ssd_chunk_scan(**arguments, dt_limit=limit)
        assert_close("y", y, want_y, WHOLE)
        assert_close("final_states", states, want_states, WHOLE)


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


@pytest.mark.parametrize("stage", STAGES)
def test_mixed_dtypes(stage):
    """Each input alone in another dtype: its values decide, not how they are stored."""
    arguments = typed(make(named(stage, "groups")), "float32")
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and name != MAIN.get(stage, "x"):
            for dtype in ("float16", "float64"):
                changed = {**arguments, name: value.astype("float16").astype(dtype)}
                plain = {**arguments, name: value.astype("float16").astype("float32")}
                for a, b in zip(run(stage, changed), run(stage, plain), strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{name} {dtype}")


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_outputs_are_rounded_to_their_dtype(stage, dtype):
    arguments = typed(make(named(stage, "odd")), "float32")
    plain = run(stage, arguments)
    out = outputs(stage, arguments)
    out = {name: np.full(value.shape, np.nan, dtype) for name, value in out.items()}
    for a, b in zip(run(stage, arguments, out=out), plain, strict=True):
        np.testing.assert_array_equal(a, b.astype(dtype))


@pytest.mark.parametrize("name", ["groups", "seq_idx"])
@pytest.mark.parametrize("stage", STAGES)
def test_noncontiguous(stage, name):
    arguments = typed(make(named(stage, name)), "float32")
    want = run(stage, arguments)
    out = outputs(stage, arguments)
    out = {key: strided(value) for key, value in out.items()}
    inputs = {k: strided(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    for a, b in zip(run(stage, inputs, out=out), want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_repeated_elements(stage):
    """A stride of 0 on every axis of every input."""
    arguments = typed(make(named(stage, "odd")), "float32")
    one = {
        k: np.broadcast_to(v.reshape(-1)[:1].reshape((1,) * v.ndim), v.shape)
        if isinstance(v, np.ndarray)
        else v
        for k, v in arguments.items()
    }
    dense = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in one.items()}
    for a, b in zip(run(stage, one), run(stage, dense), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_reads_and_writes_in_bounds(stage, guarded):
    arguments = typed(make(named(stage, "seq_idx")), "float32")
    out = outputs(stage, arguments)
    out = {name: guarded(value) for name, value in out.items()}
    inputs = {k: guarded(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    for a, b in zip(run(stage, inputs, out=out), run(stage, arguments), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_leaves_inputs_alone(stage):
    arguments = make(named(stage, "odd"))
    before = {k: v.copy() for k, v in arguments.items() if isinstance(v, np.ndarray)}
    run(stage, arguments)
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)


@pytest.mark.parametrize("stage", STAGES)
def test_threads_agree(stage):
    for case in (named(stage, "mamba2_130m"), BLOCKS[stage]):
        arguments = typed(make(case), "float32")
        want = run(stage, arguments, num_threads=1)
        for threads in (2, 3, 8):
            for a, b in zip(run(stage, arguments, num_threads=threads), want, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stage", STAGES)
def test_rows_do_not_know_each_other(stage):
    arguments = typed(make(named(stage, "seq_idx")), "float32")
    whole = run(stage, arguments)
    batched = {"dt", "x", "B", "C", "CB", "dA_cumsum", "states", "states_in", "z"}
    batched |= {"seq_idx", "initial_states"}
    for row in (0, 1):
        part = {
            k: v[row : row + 1] if k in batched and v is not None else v
            for k, v in arguments.items()
        }
        for a, b in zip(run(stage, part), whole, strict=True):
            np.testing.assert_array_equal(a[0], b[row])


@pytest.mark.parametrize("stage", ["ssd_chunk_cumsum", "ssd_chunk_state", "ssd_chunk_output"])
def test_nan_in_skipped_steps_changes_nothing(stage):
    arguments = make(named(stage, "seq_idx"))
    ids, poisoned = arguments["seq_idx"], dict(arguments)
    skipped = ids < 0
    assert skipped.any()
    for name in ("x", "B", "C", "z") if stage != "ssd_chunk_cumsum" else ("dt",):
        if name in arguments:
            poisoned[name] = arguments[name].copy()
            poisoned[name][skipped] = np.nan
    if stage != "ssd_chunk_cumsum":
        flat = arguments["dt"].reshape(*arguments["dt"].shape[:2], -1).copy()
        steps = flat[..., : ids.shape[1]]
        steps[:] = np.where(skipped[:, None], np.nan, steps)
        poisoned["dt"] = flat.reshape(arguments["dt"].shape)
    if stage == "ssd_chunk_output":
        size = arguments["dt"].shape[3]
        lines = np.pad(skipped, ((0, 0), (0, -ids.shape[1] % size))).reshape(len(ids), -1, size)
        bad = (lines[..., None] | lines[:, :, None])[:, :, None]
        poisoned["CB"] = np.where(bad, np.nan, arguments["CB"])
    for a, b in zip(run(stage, poisoned), run(stage, arguments), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_beyond_the_end_is_not_read():
    """Steps beyond L in dt, dA_cumsum and CB; but the last sum is the decay of the whole chunk."""
    arguments = make(named("ssd_chunk_output", "odd"))
    poisoned = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    last = 29 - 3 * 8
    for name in ("dt", "dA_cumsum"):
        poisoned[name][:, :, -1, last:] = np.nan
    poisoned["CB"][:, -1, :, last:] = poisoned["CB"][:, -1, :, :, last:] = np.nan
    np.testing.assert_array_equal(
        run("ssd_chunk_output", poisoned)[0], run("ssd_chunk_output", arguments)[0]
    )


def test_what_is_after_a_step_is_not_read():
    """CB above the diagonal, and decays that would overflow there."""
    arguments = make(named("ssd_chunk_output", "odd"))
    poisoned = {**arguments, "CB": arguments["CB"].copy()}
    poisoned["CB"][..., ~np.tri(8, dtype=bool)] = np.nan
    want = run("ssd_chunk_output", arguments)[0]
    np.testing.assert_array_equal(run("ssd_chunk_output", poisoned)[0], want)
    steep = {**arguments, "dA_cumsum": arguments["dA_cumsum"] * 1e4}
    found = run("ssd_chunk_output", typed(steep, "float32"))[0]
    assert np.isfinite(found).all()


def test_what_another_sequence_leaves_does_not_enter():
    ids = np.array([[0, 0, 1, 1, 1, 1]], np.int32)
    states, decay = np.ones((1, 3, 1, 1, 1)), np.zeros((1, 1, 3, 2))
    states[0, 0] = np.nan
    states_in, final = KERNELS.ssd_state_passing(states, decay, seq_idx=ids)
    assert np.isnan(states_in[0, :, 0, 0, 0]).tolist() == [False, True, False]
    assert final.item() == 2.0
    one = np.ones((1, 6, 1, 1))
    products = KERNELS.ssd_bmm_chunk(one, one, 2)
    y = KERNELS.ssd_chunk_output(products, one, decay + 1, decay, one, states_in, seq_idx=ids)
    assert y.ravel().tolist() == [1.0, 2.0, 1.0, 2.0, 2.0, 3.0]


def test_decays_are_summed_in_float64():
    dt = np.random.default_rng(0).random((1, 4096, 1)).astype("float32")
    rate = np.array([-3.3], "float32")
    step, decay = KERNELS.ssd_chunk_cumsum(dt, rate, 4096)
    exact = (step.astype("float64") * rate.astype("float64")).cumsum(3)
    np.testing.assert_array_equal(decay, exact.astype("float32"))


def test_large_offsets(sparse):
    """Rows that lie more than 2^31 elements apart."""
    arguments = typed(make(StageCase("ssd_chunk_output", "far", 2, 5, 1, 2, 3, 4)), "float16")
    want = run("ssd_chunk_output", arguments)[0]
    far = {**arguments, "x": sparse(arguments["x"], 0, 2**31 + 8)}
    out = {"y": sparse(np.full(want.shape, np.nan, "float16"), 0, 2**31 + 8)}
    np.testing.assert_array_equal(run("ssd_chunk_output", far, out=out)[0], want)
