"""What only the CUDA sources of ssd_chunk_scan have: pieces, segments, slabs, 16-bit products.

Judges: the float64 loops of tests/judge.py; for products in 16 bits, twice the error of
tests/ssd_rounding.py, which rounds at the same points.
"""

import os

import numpy as np
import pytest
import ssm_kernels

from tests import judge, ssd_rounding
from tests.bfloat16 import Bfloat16
from tests.kernels import test_ssd_chunk_scan as plain

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)

HALF = ("bfloat16", "float16")


def inputs(batch, seqlen, heads, headdim, dstate, groups=(1, 1), seed=0, dtype="f8") -> dict:
    """Arguments of all kinds; states in float32 at least, as a GPU has them beside 16 bits."""
    rng = np.random.default_rng(seed)
    make = rng.standard_normal
    found = {
        "X": make((batch, seqlen, heads, headdim)),
        "dt": make((batch, seqlen, heads)) - 1,
        "A": -np.exp(make(heads)),
        "B": make((batch, seqlen, groups[0], dstate)),
        "C": make((batch, seqlen, groups[1], dstate)),
        "D": make((heads, headdim)),
        "z": make((batch, seqlen, heads, headdim)),
        "dt_bias": make(heads),
        "initial_states": make((batch, heads, headdim, dstate)),
    }
    found = {name: value.astype(dtype) for name, value in found.items()}
    states = found["initial_states"]
    return {**found, "initial_states": states.astype(np.promote_types(dtype, "f4"))}


def run(arguments: dict, seq_meta=None, y=None, **how) -> tuple[np.ndarray, np.ndarray]:
    """Call the kernel with poisoned outputs."""
    X = arguments["X"] if isinstance(arguments["X"], np.ndarray) else arguments["X"].bits
    ids, per_sequence, num_states = judge.positions(seq_meta, *X.shape[:2])
    acc = "f8" if X.dtype == np.float64 else "f4"
    states = np.full((num_states, *arguments["initial_states"].shape[1:]), np.nan, acc)
    y = np.full(X.shape, np.nan, acc) if y is None else y
    ssm_kernels.ssd_chunk_scan_fwd(
        **arguments,
        seq_idx=None if seq_meta is None else ids,
        state_per_sequence=per_sequence,
        y=y,
        final_states=states,
        softplus=True,
        **how,
    )
    return y, states


def meta(kind: str, batch: int, seqlen: int) -> dict | None:
    """Sequences of uneven length, some within one tile, one without a step, skipped steps."""
    if kind == "none":
        return None
    mask = np.ones((batch, seqlen), bool)
    mask[:, seqlen // 2 : seqlen // 2 + 3] = False
    mask[0, :2] = False
    mask[-1, seqlen // 3 - 1 :: 7] = False
    lengths = [3, seqlen // 3, 0, seqlen // 4, 1, 5]
    lengths.append(seqlen - sum(lengths))
    if kind == "packed":
        return {"cu_seqlens": np.cumsum([0, *lengths * batch]), "mask": mask}
    ids = np.repeat(np.arange(len(lengths)), lengths)
    return {"seq_idx": np.tile(ids, (batch, 1)), "mask": mask}


def with_states(arguments: dict, seq_meta) -> dict:
    """Give every sequence an initial state."""
    num_states = judge.positions(seq_meta, *arguments["X"].shape[:2])[2]
    shape = (num_states, *arguments["initial_states"].shape[1:])
    made = np.random.default_rng(5).standard_normal(shape)
    return {**arguments, "initial_states": made.astype(arguments["initial_states"].dtype)}


@pytest.mark.parametrize("sequences", ["none", "rows", "packed"])
@pytest.mark.parametrize(
    ("heads", "headdim", "dstate", "seqlen", "groups"),
    [
        (2, 64, 16, 1200, (1, 2)),  # segments
        (6, 5, 3, 700, (2, 3)),
        (1, 130, 64, 130, (1, 1)),  # slabs of channels
        (1, 66, 3, 520, (1, 1)),  # and segments
        (1, 8, 128, 65, (1, 1)),
        (1, 3, 200, 200, (1, 1)),  # slabs of states
    ],
)
def test_pieces_segments_and_slabs(heads, headdim, dstate, seqlen, groups, sequences):
    seq_meta = meta(sequences, 2, seqlen)
    arguments = with_states(inputs(2, seqlen, heads, headdim, dstate, groups), seq_meta)
    y, states = run(arguments, seq_meta)
    want_y, want_states = judge.ssd_chunk_scan(**arguments, seq_meta=seq_meta, softplus=True)
    np.testing.assert_allclose(y, want_y, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(states, want_states, rtol=1e-10, atol=1e-10)


def assert_as_good_as_rounding(arguments: dict, dtype: str) -> None:
    """Hold the kernel to twice the error of the model, in the root mean square and at worst."""
    arguments = {
        name: value.astype("f4") if getattr(value, "dtype", None) == np.float64 else value
        for name, value in arguments.items()
    }
    for name in ("X", "B", "C"):
        arguments[name] = ssd_rounding.rounded(arguments[name], dtype)
    given, num_states = plain.kernel_inputs(arguments)
    for name in ("X", "B", "C"):
        value = given[name]
        given[name] = Bfloat16(value) if dtype == "bfloat16" else value.astype(dtype)
    y = np.full(arguments["X"].shape, np.nan, "f4")
    states = np.full(plain.state_shape(arguments), np.nan, "f4")
    assert len(states) == num_states
    ssm_kernels.ssd_chunk_scan_fwd(**given, y=y, final_states=states)
    model = ssd_rounding.ssd_chunk_scan(dtype, **arguments)
    want = dict(zip(model, judge.ssd_chunk_scan(**arguments), strict=True))
    for name, got in (("y", y), ("final_states", states)):
        if not got.size:
            continue
        error, allowed = np.abs(got - want[name]), np.abs(model[name] - want[name])
        floor = 1e-5 * (1 + np.abs(want[name]).max())  # of float32 itself
        for norm in (np.max, lambda values: np.sqrt(np.mean(values**2))):
            assert norm(error) <= 2 * norm(allowed) + floor, (name, norm(error), norm(allowed))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", plain.ALL, ids=str)
def test_half_is_as_good_as_its_rounding(case, dtype):
    assert_as_good_as_rounding(plain.arguments_of(case), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dstate", [64, 128, 256])
@pytest.mark.parametrize("sequences", ["none", "packed"])
def test_half_of_real_sizes(dstate, dtype, sequences):
    seq_meta = meta(sequences, 1, 200)
    arguments = with_states(inputs(1, 200, 2, 64, dstate, dtype="f4"), seq_meta)
    assert_as_good_as_rounding({**arguments, "seq_meta": seq_meta, "softplus": True}, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sequences", ["none", "packed"])
@pytest.mark.parametrize(("headdim", "across"), [(64, 64), (40, 48), (136, 136), (5, 9)])
def test_y_in_half_is_y_rounded(headdim, across, sequences, dtype):
    """Results of the type of X, which may leave in other packs, some of them between others."""
    seq_meta = meta(sequences, 1, 150)
    arguments = with_states(inputs(1, 150, 5, headdim, 48, dtype="f4"), seq_meta)
    arguments["z"] = None
    bits = {"bfloat16": ssd_rounding.bfloat16_bits, "float16": lambda x: x.astype("f2").view("u2")}
    for name in "XBC":
        half = bits[dtype](arguments[name])
        arguments[name] = half.view("f2") if dtype == "float16" else Bfloat16(arguments[name])
    want, states = run(arguments, seq_meta)
    wide = np.full((1, 150, 5, across), 0x1234, "u2")
    y = wide[..., :headdim]
    given = y.view("f2") if dtype == "float16" else Bfloat16.of(y)
    np.testing.assert_array_equal(run(arguments, seq_meta, y=given)[1], states)
    np.testing.assert_array_equal(y, bits[dtype](want))
    assert (wide[..., headdim:] == 0x1234).all()


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_decays_of_all_sizes(dtype, strength):
    """Sums of logarithms over a tile reach thousands; those between neighbours stay exact."""
    arguments = inputs(1, 130, 2, 16, 32, dtype="f4")
    arguments["A"] = -strength * np.array([0.5, 1.5], "f4")
    arguments["dt"][:, ::9] = 4.0
    assert_as_good_as_rounding({**arguments, "softplus": True}, dtype)


def test_growing_states():
    arguments = inputs(1, 70, 1, 4, 4)
    arguments["A"] = np.array([0.3])
    y, states = run(arguments)
    want_y, want_states = judge.ssd_chunk_scan(**arguments, softplus=True)
    np.testing.assert_allclose(y, want_y, rtol=1e-10, atol=1e-10 * np.abs(want_y).max())
    np.testing.assert_allclose(states, want_states, rtol=1e-10)


def test_states_beyond_float16_stay_large():
    arguments = inputs(1, 70, 1, 4, 4, dtype="f4")
    arguments = {**arguments, "D": None, "z": None}
    arguments["initial_states"] *= 1e6
    arguments["A"] = np.array([-1e-3], "f4")
    given = {**arguments, **{n: arguments[n].astype("f2") for n in ("X", "B", "C")}}
    y, states = run(given)
    assert np.isfinite(y).all()
    want = judge.ssd_chunk_scan(**{**arguments, **given}, softplus=True)[1]
    np.testing.assert_allclose(states, want, rtol=1e-3, atol=1)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_sequences_do_not_see_each_other(dtype):
    """NaN in one sequence stays there, although one tile holds several."""
    lengths = [10, 20, 30, 60, 80]
    seq_meta = {"cu_seqlens": np.cumsum([0, *lengths])}
    arguments = with_states(inputs(1, 200, 2, 5, 4, dtype=dtype), seq_meta)
    want_y, want_states = run(arguments, seq_meta)
    for name in ("X", "dt", "B", "C", "z"):
        arguments[name][:, 10:30] = np.nan
    y, states = run(arguments, seq_meta)
    y[:, 10:30], states[1] = want_y[:, 10:30], want_states[1]
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(states, want_states)


@pytest.mark.parametrize("sequences", ["rows", "packed"])
def test_sequences_start_at_every_step_of_a_tile(sequences):
    """Row r has a sequence of one step at its step r, behind one that is skipped."""
    rows, seqlen = 64, 80
    row, step = np.arange(rows)[:, None], np.arange(seqlen)
    seq_meta = {"mask": step != row - 1}
    if sequences == "packed":
        starts = [seqlen * r + start for r in range(rows) for start in (0, r, r + 1)]
        seq_meta["cu_seqlens"] = np.array([*starts, rows * seqlen])
    else:
        seq_meta["seq_idx"] = (step >= row).astype(int) + (step > row)
    arguments = with_states(inputs(rows, seqlen, 2, 5, 3, dtype="f4"), seq_meta)
    assert_as_good_as_rounding({**arguments, "seq_meta": seq_meta, "softplus": True}, "float16")


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_states_that_are_not_there(dtype):
    """Of sequences whose numbers have no state nothing is seen, as of skipped ones."""
    seq_meta = meta("packed", 2, 150)
    arguments = with_states(inputs(2, 150, 4, 5, 4, dtype=dtype), seq_meta)
    ids, _, num_states = judge.positions(seq_meta, 2, 150)
    found = []
    for number in (-1, num_states, 2**31 - 1):
        given = {**arguments, "seq_idx": np.where(ids % 5 == 1, number, ids).astype("i4")}
        y = np.full(given["X"].shape, np.nan, dtype)
        states = np.full_like(given["initial_states"], np.nan)
        ssm_kernels.ssd_chunk_scan_fwd(
            **given, state_per_sequence=True, y=y, final_states=states, softplus=True
        )
        found.append((y, states))
    want = found[0]
    np.testing.assert_array_equal(want[1][1::5], arguments["initial_states"][1::5])
    assert not want[0][ids % 5 == 1].any()
    for got in found[1:]:
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_states_that_nobody_asks_for(dtype):
    seq_meta = meta("packed", 2, 150)
    arguments = with_states(inputs(2, 150, 4, 5, 4, dtype=dtype), seq_meta)
    arguments["initial_states"][...] = 0
    want, want_states = run(arguments, seq_meta)
    y, states = np.full_like(want, np.nan), np.full_like(want_states, np.nan)
    ids = judge.positions(seq_meta, 2, 150)[0]
    how = {"seq_idx": ids, "state_per_sequence": True, "softplus": True}
    given = {**arguments, "initial_states": None, **how}
    ssm_kernels.ssd_chunk_scan_fwd(**given, y=y)
    np.testing.assert_array_equal(y, want)
    # Also the states of sequences without steps are there: zeros.
    ssm_kernels.ssd_chunk_scan_fwd(**given, y=y, final_states=states)
    np.testing.assert_array_equal(states, want_states)


@pytest.mark.parametrize("sequences", ["rows", "packed"])
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_what_is_skipped_is_not_looked_at(sequences, dtype):
    seq_meta = meta(sequences, 2, 150)
    arguments = with_states(inputs(2, 150, 2, 5, 4, dtype=dtype), seq_meta)
    want = run(arguments, seq_meta)
    skipped = judge.positions(seq_meta, 2, 150)[0] < 0
    assert skipped.any()
    for name in ("X", "dt", "B", "C", "z"):
        arguments[name][skipped] = np.nan
    y, states = run(arguments, seq_meta)
    np.testing.assert_array_equal(y, want[0])
    np.testing.assert_array_equal(states, want[1])
    assert not y[skipped].any()


def test_layouts_agree():
    """Memory that comes in packs of 16 bytes, and the same numbers where it does not."""
    arguments = inputs(2, 100, 2, 64, 32, dtype="f4")
    want = run(arguments)
    spread = {}
    for name, value in arguments.items():
        wide = np.full((*value.shape[:-1], 2 * value.shape[-1] + 1), np.nan, "f4")
        spread[name] = wide[..., 1::2]
        spread[name][...] = value
    wide = np.full((*want[0].shape[:-1], 2 * want[0].shape[-1]), np.nan, "f4")
    y, states = run(spread, y=wide[..., ::2])
    np.testing.assert_array_equal(y, want[0])
    np.testing.assert_array_equal(states, want[1])
    assert np.isnan(wide[..., 1::2]).all()


def test_workspace_and_states_at_most():
    arguments = inputs(1, 1024, 1, 4, 4)
    size = ssm_kernels.ssd_chunk_scan_fwd_workspace(*(arguments[n] for n in "XBC"))
    assert size > 0
    short = [arguments[n][:, :100] for n in "XBC"]
    assert ssm_kernels.ssd_chunk_scan_fwd_workspace(*short) == 0
    want = run(arguments)
    memory = np.full(size + 32, 0xFF, np.uint8)
    start = -memory.ctypes.data % 16
    got = run(arguments, workspace=memory[start : start + size])
    np.testing.assert_array_equal(got[0], want[0])
    assert (memory[:start] == 0xFF).all()
    assert (memory[start + size :] == 0xFF).all()
    with pytest.raises(ValueError, match="B must have at most 256 states on a GPU, got 257"):
        run(inputs(1, 2, 1, 1, 257))
