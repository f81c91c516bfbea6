"""What only the CUDA sources of the norms have: packs, warps per row, slabs, rows summed in chunks.

Judge: float64 NumPy as in the files of the operators; between layouts, the same bits.
"""

import os

import numpy as np
import pytest
import ssm_kernels

from tests import judge
from tests.guard import in_line
from tests.kernels import test_fused_layer_norm as fused
from tests.kernels import test_gated_norm as gated
from tests.tolerances import TOLERANCES, assert_close

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)

# A warp per row, several, a row of all registers, slabs: one that is full, and a part of a second.
COLUMNS = (8, 16, 504, 520, 2560, 5120, 8192, 8200, 16400)
# Types of x and of the residual side: one type in packs, two, a mix without.
TYPES = (
    ("float32", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("float32", "float16"),
)


def draw(rows: int, dim: int, dtype: str, side: str, is_rms: bool = False) -> tuple:
    """Return arguments of the fused norm, and gradients of y and of the sum."""
    make = np.random.default_rng(dim).standard_normal
    arguments = {
        "x": make((rows, dim)).astype(dtype),
        "weight": make(dim).astype(dtype),
        "bias": make(dim).astype("float32"),
        "residual": make((rows, dim)).astype(side),
        "is_rms": is_rms,
    }
    return arguments, make((rows, dim)).astype(dtype), make((rows, dim)).astype(side)


def apart(array: np.ndarray) -> np.ndarray:
    """Return an array of the same values whose columns do not touch: no packs."""
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def run_fused(arguments: dict, dy, ds, place=lambda array: array, **more) -> dict:
    """Return the outputs of both directions, with every array laid out by `place`."""

    def placed(arrays: dict) -> dict:
        return {n: place(v) if isinstance(v, np.ndarray) else v for n, v in arrays.items()}

    x, side = arguments["x"], arguments["residual"].dtype
    rows = np.full(len(x), np.nan, "f")
    out = {
        "y": np.full_like(x, np.nan),
        "residual_out": np.full(x.shape, np.nan, side),
        "mean": None if arguments["is_rms"] else rows,
        "rstd": rows.copy(),
    }
    out = placed(out)
    ssm_kernels.fused_layer_norm_fwd(**placed(arguments), **out)
    grads = {
        "dx": np.full_like(x, np.nan),
        "dresidual": np.full(x.shape, np.nan, side),
        "dweight": np.full(x.shape[1], np.nan, "f"),
        "dbias": np.full(x.shape[1], np.nan, "f"),
    }
    grads = placed(grads)
    inputs = {n: v for n, v in placed(arguments).items() if n != "bias"}
    ssm_kernels.fused_layer_norm_bwd(
        **inputs,
        mean=out["mean"],
        rstd=out["rstd"],
        dy=place(dy),
        dresidual_out=place(ds),
        **grads,
        **more,
    )
    return {n: v for n, v in (out | grads).items() if v is not None}


@pytest.mark.parametrize(("dtype", "side"), TYPES)
@pytest.mark.parametrize("dim", COLUMNS)
def test_fused_layouts_give_the_same_bits(dim, dtype, side):
    arguments, dy, ds = draw(3, dim, dtype, side)
    want = run_fused(arguments, dy, ds)
    for name, value in run_fused(arguments, dy, ds, apart).items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_packs_along_another_axis_are_not_of_columns():
    arguments, _, _ = draw(32, 64, "float32", "float32")
    want = fused.forward(arguments)

    def across(array: np.ndarray) -> np.ndarray:
        cube = array.reshape(4, 8, 64)
        return np.ascontiguousarray(cube.swapaxes(1, 2)).swapaxes(1, 2)

    out = {n: across(np.full_like(want[n], np.nan)) for n in ("y", "residual_out")}
    placed = {n: across(arguments[n]) for n in ("x", "residual")}
    ssm_kernels.fused_layer_norm_fwd(**{**arguments, **placed}, **out)
    for name, value in out.items():
        np.testing.assert_array_equal(value.reshape(32, 64), want[name], err_msg=name)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_vector_may_begin_anywhere(name):
    arguments, dy, ds = draw(5, 64, "float16", "float32")
    want = run_fused(arguments, dy, ds)
    arguments[name] = in_line(arguments[name], 1)
    for which, value in run_fused(arguments, dy, ds).items():
        np.testing.assert_array_equal(value, want[which], err_msg=which)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_vector_may_lie_apart_beside_packs(name):
    arguments, dy, ds = draw(3, 520, "float16", "float32")
    want = run_fused(arguments, dy, ds)
    for which, value in run_fused({**arguments, name: apart(arguments[name])}, dy, ds).items():
        np.testing.assert_array_equal(value, want[which], err_msg=which)
    arguments = gated.draw((3, 48), dtype="float16", norm_before_gate=True)
    dy, saved = gated.upstream(arguments), gated.forward(arguments)
    want = saved | gated.backward(arguments, saved, dy)
    arguments[name] = apart(arguments[name])
    found = gated.forward(arguments)
    for which, value in (found | gated.backward(arguments, found, dy)).items():
        np.testing.assert_array_equal(value, want[which], err_msg=which)


@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize(("dtype", "side"), TYPES)
@pytest.mark.parametrize(
    ("rows", "dim"),
    # One row; more rows than the blocks of one step hold, the last block not full; slabs.
    [(1, 2560), (4301, 8), (2200, 520), (270, 8192), (270, 8200)],
)
def test_fused_matches_judge(rows, dim, dtype, side, is_rms):
    arguments, dy, ds = draw(rows, dim, dtype, side, is_rms)
    got = run_fused(arguments, dy, ds)
    want_y, want_s = judge.fused_layer_norm(**arguments)
    assert_close("y", got["y"], want_y, TOLERANCES[fused.OP, dtype])
    assert_close("s", got["residual_out"], want_s, TOLERANCES[fused.OP, side])
    rounded = {"dx": dtype, "dresidual": side}
    for name, want in fused.judge_gradients(arguments, dy, ds).items():
        row = f"{fused.OP}_bwd", rounded.get(name, "float32")
        # A sum over rows in units of its usual size: the rounding is that of its terms.
        unit = 1 if name in rounded else rows**0.5
        assert_close(name, got[name] / unit, want / unit, TOLERANCES[row])


@pytest.mark.parametrize("dim", [520, 8200])
def test_fused_sum_may_take_the_place_of_the_residual(dim):
    arguments, _, _ = draw(5, dim, "float32", "float32")
    want = fused.forward(arguments)
    residual, y = arguments["residual"].copy(), np.empty_like(arguments["x"])
    ssm_kernels.fused_layer_norm_fwd(
        **{**arguments, "residual": residual}, y=y, residual_out=residual
    )
    np.testing.assert_array_equal(residual, want["residual_out"])
    np.testing.assert_array_equal(y, want["y"])


@pytest.mark.parametrize("dim", [520, 8200])
def test_fused_takes_the_working_memory_of_the_caller(dim):
    arguments, dy, ds = draw(5, dim, "float32", "float32")
    want = run_fused(arguments, dy, ds)
    size = ssm_kernels.fused_layer_norm_bwd_workspace(arguments["x"])
    memory = np.full(size // 4 + 4, np.nan, "f")
    memory = memory[-memory.ctypes.data // 4 % 4 :]
    got = run_fused(arguments, dy, ds, workspace=memory)
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    assert np.isfinite(memory[: size // 4]).all()
    assert np.isnan(memory[size // 4 :]).all()
    with pytest.raises(ValueError) as caught:
        run_fused(arguments, dy, ds, workspace=memory[: size // 4 - 1])
    sentence = f"workspace must have at least {size} bytes, got {size - 4}"
    assert str(caught.value) == f"{fused.OP}: {sentence}"


# Rows, columns and the size of a group: as above, in groups of rows and in chunks of them. Rows of
# whole packs whose groups are none: of 4 elements, of 8.
GATED = (
    (5, 24, 6),
    (5, 24, 12),
    (3, 48, 16),
    (3, 1560, 520),
    (3, 5120, None),
    (2, 16400, 8200),
    (1101, 64, 16),
    (540, 1040, 520),
    (271, 8200, None),
)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("rows", "dim", "group_size"), GATED)
def test_gated_layouts_give_the_same_bits(rows, dim, group_size, dtype, norm_before_gate):
    flags = {"is_rms": False, "group_size": group_size, "norm_before_gate": norm_before_gate}
    arguments = gated.draw((rows, dim), dtype=dtype, **flags)
    dy = gated.upstream(arguments)
    saved = gated.forward(arguments)
    want = saved | gated.backward(arguments, saved, dy)
    placed = {n: apart(v) if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
    out = {n: apart(np.full_like(v, np.nan)) for n, v in saved.items()}
    ssm_kernels.gated_norm_fwd(**placed, **out)
    grads = {n: apart(v) for n, v in gated.targets(arguments).items()}
    statistics = {n: v for n, v in out.items() if n != "y"}
    ssm_kernels.gated_norm_bwd(**placed, **statistics, dy=apart(dy), **grads)
    for name, value in (out | grads).items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize(("rows", "dim", "group_size"), GATED)
def test_gated_matches_judge(rows, dim, group_size, norm_before_gate, is_rms):
    flags = {"is_rms": is_rms, "group_size": group_size, "norm_before_gate": norm_before_gate}
    arguments = gated.draw((rows, dim), **flags)
    dy = gated.upstream(arguments)
    out = gated.forward(arguments)
    want_y = judge.gated_norm(**arguments)
    assert_close("y", out["y"], want_y, TOLERANCES[gated.OP, "float32"])
    got = gated.backward(arguments, out, dy)
    for name, want in gated.judge_gradients(arguments, dy).items():
        unit = 1 if name in ("dx", "dz") else rows**0.5
        row = f"{gated.OP}_bwd", "float32"
        assert_close(name, got[name] / unit, want / unit, TOLERANCES[row])


def test_gated_says_how_much_working_memory_it_takes():
    x = np.zeros((3, 48), "f")
    # Two sums of 48 columns for each chunk of rows; 16 rows of a group make one.
    assert ssm_kernels.gated_norm_bwd_workspace(x, 16) == 2 * 48 * 4
    with pytest.raises(ValueError) as caught:
        ssm_kernels.gated_norm_bwd_workspace(x, 7)
    assert str(caught.value) == f"{gated.OP}: group_size must divide D = 48, got 7"
