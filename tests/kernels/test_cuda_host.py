"""What only the CUDA sources have: work cut along the sequence, slabs of states, a checked host.

The other files of this folder run on these sources as well, where SSM_TEST_CUDA_HOST names them.
Judge: the float64 loops of tests/judge.py, and one call of the whole for parts of it.
"""

import ctypes
import os

import numpy as np
import pytest
import ssm_kernels
from ssm_kernels import _cpu

from tests import judge

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)


def scan_inputs(batch: int, dim: int, dstate: int, seqlen: int) -> dict:
    """Arguments of selective_scan in float64."""
    make = np.random.default_rng(7).standard_normal
    return {
        "u": make((batch, dim, seqlen)),
        "delta": make((batch, dim, seqlen)),
        "A": -np.exp(make((dim, dstate))),
        "B": make((batch, dstate, seqlen)),
        "C": make((batch, 1, dstate, seqlen)),
        "D": make(dim),
        "z": make((batch, seqlen, dim)).swapaxes(1, 2),  # in a layout of its own
        "dt_bias": make(dim),
    }


def meta(kind: str, batch: int, seqlen: int) -> dict | None:
    """Sequences of uneven length, one without a step, skipped steps between and inside them."""
    if kind == "none":
        return None
    mask = np.ones((batch, seqlen), bool)
    mask[:, seqlen // 2 : seqlen // 2 + 3] = False
    mask[0, :2] = False
    lengths = [1, seqlen // 3, 0, seqlen // 4]
    lengths.append(seqlen - sum(lengths))
    if kind == "packed":
        return {"cu_seqlens": np.cumsum([0, *lengths * batch]), "mask": mask}
    return {"seq_idx": np.tile(np.repeat(np.arange(5), lengths), (batch, 1)), "mask": mask}


@pytest.mark.parametrize("sequences", ["none", "rows", "packed"])
@pytest.mark.parametrize(
    ("dim", "dstate", "seqlen"),
    [(3, 5, 700), (70, 16, 515), (2, 40, 1024), (3, 200, 40), (9, 130, 520)],
)
def test_segments_and_slabs(dim, dstate, seqlen, sequences):
    batch, inputs = 2, scan_inputs(2, dim, dstate, seqlen)
    seq_meta = meta(sequences, batch, seqlen)
    seq_idx, per_sequence, num_states = judge.positions(seq_meta, batch, seqlen)
    inputs["initial_state"] = np.random.default_rng(8).standard_normal((num_states, dim, dstate))
    y, last_state = np.full_like(inputs["u"], np.nan), np.full_like(inputs["initial_state"], np.nan)
    ssm_kernels.selective_scan_fwd(
        **inputs,
        seq_idx=None if seq_meta is None else seq_idx,
        y=y,
        last_state=last_state,
        softplus=True,
        state_per_sequence=per_sequence,
    )
    want_y, want_state = judge.selective_scan(**inputs, softplus=True, seq_meta=seq_meta)
    np.testing.assert_allclose(y, want_y, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(last_state, want_state, rtol=1e-11, atol=1e-11)


def gradients(inputs: dict, meta_of_call: dict, cotangents: dict) -> dict:
    """Run both directions on whatever kernels serve; return every output."""
    (batch, dim, seqlen), dstate = inputs["u"].shape, inputs["A"].shape[1]
    found = {f"d{name}": np.full_like(value, np.nan) for name, value in inputs.items()}
    y, last_state = np.full_like(inputs["u"], np.nan), np.full_like(inputs["initial_state"], np.nan)
    checkpoints = np.full((batch, (seqlen + 31) // 32, dstate, dim), np.nan)
    ssm_kernels.selective_scan_fwd(
        **inputs, **meta_of_call, y=y, last_state=last_state, checkpoints=checkpoints
    )
    ssm_kernels.selective_scan_bwd(
        **inputs, **meta_of_call, checkpoints=checkpoints, **cotangents, **found
    )
    return found


@pytest.mark.parametrize("sequences", ["none", "rows", "packed"])
@pytest.mark.parametrize(
    ("dim", "dstate", "seqlen", "constant"),
    [
        (3, 5, 700, ""),
        (70, 16, 515, "B"),
        (2, 40, 1024, "C"),
        (3, 200, 40, "BC"),
        (9, 130, 520, ""),
    ],
)
def test_gradients_of_segments_and_slabs(dim, dstate, seqlen, constant, sequences, table):
    batch, inputs = 2, scan_inputs(2, dim, dstate, seqlen)
    make = np.random.default_rng(9).standard_normal
    inputs |= {name: make((dim, dstate)) for name in constant}
    ids, per_sequence, num_states = judge.positions(meta(sequences, batch, seqlen), batch, seqlen)
    inputs["initial_state"] = make((num_states, dim, dstate))
    called = {
        "seq_idx": None if sequences == "none" else ids,
        "softplus": True,
        "state_per_sequence": per_sequence,
    }
    cotangents = {"dy": make(inputs["u"].shape), "dlast_state": make((num_states, dim, dstate))}
    got = gradients(inputs, called, cotangents)
    _cpu._use_cuda_kernels(0)
    try:
        want = gradients(inputs, called, cotangents)
    finally:
        _cpu._use_cuda_kernels(table)
    for name, value in want.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(got[name], value, rtol=1e-10, atol=1e-12 * scale, err_msg=name)


def test_host_sees_a_race_and_a_stray_access():
    table = ctypes.CDLL(os.environ["SSM_TEST_CUDA_HOST"])
    fault = table.ssm_cuda_host_fault
    fault.restype = ctypes.c_char_p
    assert [fault(kind).decode().partition(":")[0] for kind in range(5)] == [
        "",
        "shared memory read in a race",
        "shared memory written in a race",
        "shared memory read before written",
        "shared memory out of bounds",
    ]


@pytest.mark.parametrize("right_transposed", [False, True])
@pytest.mark.parametrize("left_transposed", [False, True])
@pytest.mark.parametrize("dtype", [0, 1, 2, 3], ids=["float64", "float32", "bfloat16", "float16"])
def test_product_of_a_warp(dtype, left_transposed, right_transposed):
    """The lane maps of loads and products: a wrong one mixes up elements."""
    multiply = ctypes.CDLL(os.environ["SSM_TEST_CUDA_HOST"]).ssm_cuda_host_product
    multiply.restype = ctypes.c_char_p
    # Numbers that every type holds, of which no two are equal, and one that bfloat16 rounds.
    left = np.random.default_rng(3).permutation(256).reshape(16, 16) - 128.0
    right = np.random.default_rng(4).permutation(256).reshape(16, 16) - 128.0
    left[3, 5] = 1 + 2.0**-9
    product = np.full((16, 16), np.nan)
    stored = np.array(left.T if left_transposed else left, order="C")
    # A right operand is stored by columns, unless it is transposed.
    other = np.array(right if right_transposed else right.T, order="C")
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (stored, other, product)]
    assert multiply(dtype, *pointers, left_transposed, right_transposed) == b""
    if dtype == 2:
        left[3, 5] = 1
    np.testing.assert_allclose(product, left @ right, rtol=5e-7)


def test_host_sees_a_wrong_use_of_matrices():
    fault = ctypes.CDLL(os.environ["SSM_TEST_CUDA_HOST"]).ssm_cuda_host_matrix_fault
    fault.restype = ctypes.c_char_p
    assert [fault(kind).decode().partition(":")[0] for kind in range(7)] == [
        "",
        "matrix memory read in rows at an odd address",
        "matrix memory read in rows of one bank",
        "matrix memory read before it is copied",
        "matrix memory written while it is copied to",
        "matrix memory read before written",
        "vote with unlike results of two warps",
    ]


def test_workspace_is_the_callers():
    inputs = scan_inputs(1, 3, 5, 700)
    size = ssm_kernels.selective_scan_fwd_workspace(
        *(inputs[name] for name in ("u", "A", "B", "C", "D", "dt_bias"))
    )
    assert size > 0
    expected, y = np.empty_like(inputs["u"]), np.empty_like(inputs["u"])
    ssm_kernels.selective_scan_fwd(**inputs, y=expected)
    memory = np.full(size + 16, 0xFF, np.uint8)
    start = -memory.ctypes.data % 16
    ssm_kernels.selective_scan_fwd(**inputs, y=y, workspace=memory[start : start + size])
    np.testing.assert_array_equal(y, expected)
    assert (memory[:start] == 0xFF).all()
    assert (memory[start + size :] == 0xFF).all()
    with pytest.raises(ValueError, match=rf"workspace must have at least {size} bytes, got 16"):
        ssm_kernels.selective_scan_fwd(**inputs, y=y, workspace=memory[start : start + 16])
    with pytest.raises(ValueError, match="workspace must be aligned to 16 bytes"):
        ssm_kernels.selective_scan_fwd(**inputs, y=y, workspace=memory[start + 1 :])
    with pytest.raises(ValueError, match="workspace must be contiguous"):
        ssm_kernels.selective_scan_fwd(**inputs, y=y, workspace=np.zeros((size, 2))[:, 0])


def test_sequences_whose_states_nobody_gives_or_takes():
    inputs = scan_inputs(1, 3, 4, 12)
    seq_idx = np.repeat(np.arange(3, dtype=np.int32), 4)[None]
    found = []
    for last_state in (None, np.empty((3, 3, 4))):
        y = np.full_like(inputs["u"], np.nan)
        called = {"seq_idx": seq_idx, "state_per_sequence": True, "last_state": last_state}
        ssm_kernels.selective_scan_fwd(**inputs, **called, y=y)
        found.append(y)
    assert found[1].all()
    np.testing.assert_array_equal(*found)
