"""What only the CUDA sources of the backward of ssd_chunk_scan have.

Windows, slices of heads, slabs, pieces of tiles, and products in 16 bits. Judges: the CPU kernels
in float64, which tests/kernels/test_ssd_chunk_scan.py holds to the loops; for products in 16 bits,
twice the error of tests/ssd_rounding_bwd.py, which rounds at the same points.
"""

import os

import numpy as np
import pytest
import ssm_kernels
from ssm_kernels import _cpu

from tests import gradient_judge, judge, ssd_rounding, ssd_rounding_bwd
from tests.kernels import test_ssd_chunk_scan as plain

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)

from tests.kernels import test_cuda_ssd as forward

HALF = forward.HALF


def gradients(arguments: dict, given: dict, seq_meta, dtype="f8", **how) -> dict:
    """Run the backward of whatever kernels serve, with poisoned outputs, by name of the input."""
    X = arguments["X"] if isinstance(arguments["X"], np.ndarray) else arguments["X"].bits
    ids, per_sequence, _ = judge.positions(seq_meta, *X.shape[:2])
    called = {"softplus": True, "state_per_sequence": per_sequence} | how
    called["seq_idx"] = None if seq_meta is None else ids
    found = {
        name: np.full(getattr(value, "bits", value).shape, np.nan, dtype)
        for name, value in arguments.items()
        if value is not None
    }
    found.setdefault("initial_states", np.full(given["dfinal_states"].shape, np.nan, dtype))
    ssm_kernels.ssd_chunk_scan_bwd(
        **arguments, **called, **given, **{f"d{name}": value for name, value in found.items()}
    )
    return found


def judged(arguments: dict, given: dict, seq_meta, table) -> dict:
    """Run the CPU kernels instead."""
    batch, seqlen, heads, headdim = arguments["X"].shape
    saved = np.empty((batch, -(-seqlen // 96), heads, arguments["B"].shape[3], headdim))
    ids, per_sequence, _ = judge.positions(seq_meta, batch, seqlen)
    _cpu._use_cuda_kernels(0)
    try:
        ssm_kernels.ssd_chunk_scan_fwd(
            **arguments,
            seq_idx=None if seq_meta is None else ids,
            state_per_sequence=per_sequence,
            softplus=True,
            y=np.empty_like(arguments["X"]),
            checkpoints=saved,
        )
        return gradients(arguments, given, seq_meta, checkpoints=saved)
    finally:
        _cpu._use_cuda_kernels(table)


def cotangents(arguments: dict, seed: int = 9) -> dict:
    make, states = np.random.default_rng(seed).standard_normal, arguments["initial_states"]
    dtype = arguments["X"].dtype
    return {
        "dy": make(arguments["X"].shape).astype(dtype),
        "dfinal_states": make(states.shape).astype(dtype),
    }


def assert_same(got: dict, want: dict, bound: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = np.abs(value).max() if value.size else 1
        np.testing.assert_allclose(got[name], value, rtol=bound, atol=bound * scale, err_msg=name)


@pytest.mark.parametrize("sequences", ["none", "rows", "packed"])
@pytest.mark.parametrize(
    ("heads", "headdim", "dstate", "seqlen", "groups"),
    [
        (2, 64, 16, 300, (1, 2)),
        (12, 5, 3, 150, (6, 4)),  # B and C shared by unlike neighbours
        (38, 3, 4, 70, (1, 2)),  # slices of the heads that share them, not all as large
        (1, 130, 64, 130, (1, 1)),  # slabs of channels
        (2, 8, 200, 140, (1, 1)),  # slabs of states
        (1, 70, 130, 70, (1, 1)),  # both
    ],
)
def test_pieces_slices_and_slabs(heads, headdim, dstate, seqlen, groups, sequences, table):
    seq_meta = forward.meta(sequences, 2, seqlen)
    arguments = forward.with_states(
        forward.inputs(2, seqlen, heads, headdim, dstate, groups), seq_meta
    )
    given = cotangents(arguments)
    got = gradients(arguments, given, seq_meta)
    assert_same(got, judged(arguments, given, seq_meta, table), 1e-10)


@pytest.mark.parametrize("sequences", ["none", "packed"])
def test_windows(sequences, table):
    """More steps than one window has: 256 tiles of 64."""
    seqlen = 256 * 64 + 70
    seq_meta = forward.meta(sequences, 1, seqlen)
    arguments = forward.with_states(forward.inputs(1, seqlen, 1, 2, 3), seq_meta)
    # States last: what enters a window is seen to its end.
    arguments["A"][:] = -1e-4
    given = cotangents(arguments)
    got = gradients(arguments, given, seq_meta)
    assert_same(got, judged(arguments, given, seq_meta, table), 1e-9)


def assert_as_good_as_rounding(arguments: dict, seq_meta, dtype: str, **how) -> None:
    """Hold the gradients to twice the error of the model, in the root mean square and at worst."""
    how = {"softplus": True, "dt_limit": (0.0, np.inf)} | how
    arguments = {n: None if v is None else v.astype("f4") for n, v in arguments.items()}
    for name in ("X", "B", "C"):
        arguments[name] = ssd_rounding.rounded(arguments[name], dtype)
    num_states = judge.positions(seq_meta, *arguments["X"].shape[:2])[2]
    shape = (num_states, *arguments["X"].shape[2:], arguments["B"].shape[3])
    make = np.random.default_rng(3).standard_normal
    given = {
        "dy": ssd_rounding.rounded(make(arguments["X"].shape).astype("f4"), dtype),
        "dfinal_states": make(shape).astype("f4"),
    }
    judged_of = {**given, **arguments, "seq_meta": seq_meta, **how}
    want = gradient_judge.ssd_chunk_scan(**judged_of)
    model = ssd_rounding_bwd.ssd_chunk_scan(dtype, **judged_of)
    packed = {}
    for name in ("X", "B", "C"):
        value = arguments[name]
        packed[name] = forward.Bfloat16(value) if dtype == "bfloat16" else value.astype(dtype)
    dy = forward.Bfloat16(given["dy"]) if dtype == "bfloat16" else given["dy"].astype(dtype)
    limits = dict(zip(("dt_low", "dt_high"), how.pop("dt_limit"), strict=True))
    got = gradients({**arguments, **packed}, {**given, "dy": dy}, seq_meta, "f4", **how, **limits)
    for name, found in got.items():
        if not found.size:
            continue
        error, allowed = np.abs(found - want[name]), np.abs(model[name] - want[name])
        floor = 1e-4 * (1 + np.abs(want[name]).max())  # of float32 itself: sums that cancel
        for norm in (np.max, lambda values: np.sqrt(np.mean(values**2))):
            assert norm(error) <= 2 * norm(allowed) + floor, (name, norm(error), norm(allowed))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", plain.ALL, ids=str)
def test_half_is_as_good_as_its_rounding(case, dtype):
    arguments = plain.arguments_of(case)
    how = {name: arguments.pop(name) for name in ("softplus", "dt_limit") if name in arguments}
    seq_meta = arguments.pop("seq_meta")
    assert_as_good_as_rounding(arguments, seq_meta, dtype, **how)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dstate", [64, 128, 256])
@pytest.mark.parametrize("sequences", ["none", "packed"])
def test_half_of_real_sizes(dstate, dtype, sequences):
    seq_meta = forward.meta(sequences, 1, 140)
    arguments = forward.inputs(1, 140, 2, 64, dstate, dtype="f4")
    assert_as_good_as_rounding(forward.with_states(arguments, seq_meta), seq_meta, dtype)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_decays_of_all_sizes(dtype, strength):
    """Nothing is found as the difference of sums: small gradients survive behind large ones."""
    arguments = forward.inputs(1, 130, 2, 16, 32, dtype="f4")
    arguments["A"] = -strength * np.array([0.5, 1.5], "f4")
    arguments["dt"][:, ::9] = 4.0
    assert_as_good_as_rounding(arguments, None, dtype)


@pytest.mark.parametrize("sequences", ["rows", "packed"])
def test_what_is_skipped_is_not_looked_at(sequences):
    seq_meta = forward.meta(sequences, 2, 150)
    arguments = forward.with_states(forward.inputs(2, 150, 2, 5, 4, dtype="f2"), seq_meta)
    given = cotangents(arguments)
    want = gradients(arguments, given, seq_meta, "f4")
    skipped = judge.positions(seq_meta, 2, 150)[0] < 0
    assert skipped.any()
    for values, names in ((arguments, ("X", "dt", "B", "C", "z")), (given, ("dy",))):
        for name in names:
            values[name][skipped] = np.nan
    got = gradients(arguments, given, seq_meta, "f4")
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        if name in ("X", "dt", "B", "C", "z"):
            assert not value[skipped].any(), name


def test_workspace_is_the_callers():
    arguments = forward.inputs(1, 200, 3, 4, 5)
    given = cotangents(arguments)
    size = ssm_kernels.ssd_chunk_scan_bwd_workspace(
        *(arguments[name] for name in ("X", "B", "C", "D", "dt_bias"))
    )
    want = gradients(arguments, given, None)
    memory = np.full(size + 32, 0xFF, np.uint8)
    start = -memory.ctypes.data % 16
    got = gradients(arguments, given, None, workspace=memory[start : start + size])
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert (memory[:start] == 0xFF).all()
    assert (memory[start + size :] == 0xFF).all()
    with pytest.raises(ValueError, match=rf"workspace must have at least {size} bytes, got 16"):
        gradients(arguments, given, None, workspace=memory[start : start + 16])
