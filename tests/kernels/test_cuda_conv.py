"""What only the CUDA sources of dw_causal_conv have: packs of channels or steps, and their cuts.

Judge: the float64 loops of tests.judge and test_dw_causal_conv, and another layout or batch.
"""

import os

import numpy as np
import pytest
import ssm_kernels

from tests import judge
from tests.cases import ConvCase, make
from tests.kernels.test_dw_causal_conv import (
    judge_gradients,
    run,
    run_backward,
    typed,
    with_gradients,
)
from tests.tolerances import TOLERANCES, assert_close

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)

OP = "dw_causal_conv"
# Several blocks along channels, along steps, and rows that share a block.
SIZES = {"channels": (1, 1040, 24), "steps": (2, 16, 304), "short_rows": (70, 8, 8)}
SEQUENCES = ("", "seq_idx", "seq_idx mask", "cu_seqlens mask")


def case_of(size: str, width: int, sequences: str) -> ConvCase:
    return ConvCase(size, *SIZES[size], width, layout=sequences)


@pytest.mark.parametrize("layout", ["channel_last", "time_last"])
@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_packs_match_judge(size, width, sequences, layout):
    arguments = typed(make(case_of(size, width, sequences)), "float64")
    y, state = run(arguments, layout)
    want_y, want_state = judge.dw_causal_conv(**arguments)
    assert_close("y", y, want_y, TOLERANCES[OP, "float64"])
    assert_close("final_state", state, want_state, TOLERANCES[OP, "float64"])
    given = with_gradients(arguments)
    want = judge_gradients(arguments, given)
    for name, gradient in run_backward(arguments, given, layout).items():
        assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", "float64"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("size", SIZES)
def test_packs_and_elements_agree(size, sequences, dtype):
    arguments = typed(make(case_of(size, 4, sequences)), dtype)
    given = with_gradients(arguments)
    want, want_gradients = run(arguments, "spread"), run_backward(arguments, given, "spread")
    for layout in ("channel_last", "time_last"):
        for got, value in zip(run(arguments, layout), want, strict=True):
            np.testing.assert_array_equal(got, value)
        found = run_backward(arguments, given, layout)
        for name in ("x", "initial_state"):
            np.testing.assert_array_equal(found[name], want_gradients[name], err_msg=name)


@pytest.mark.parametrize("layout", ["channel_last", "time_last", "spread"])
def test_few_and_many_blocks_agree(layout):
    many = typed(make(ConvCase("many", 600, 8, 72)), "float32")
    one = {**many, "x": many["x"][5:6], "initial_state": many["initial_state"][5:6]}
    given = with_gradients(many)
    given_one = {name: value[5:6] for name, value in given.items()}
    for got, want in zip(run(one, layout), run(many, layout), strict=True):
        np.testing.assert_array_equal(got[0], want[5])
    found, want = run_backward(one, given_one, layout), run_backward(many, given, layout)
    for name in ("x", "initial_state"):
        np.testing.assert_array_equal(found[name][0], want[name][5], err_msg=name)


def test_lanes_take_several_packs():
    """Enough blocks for a GPU even if each lane walks two packs of steps."""
    arguments = typed(make(ConvCase("many_rows", 1056, 16, 16)), "float64")
    given = with_gradients(arguments)
    want = run_backward(arguments, given, "spread")
    for name, found in run_backward(arguments, given, "time_last").items():
        if name in ("x", "initial_state"):
            np.testing.assert_array_equal(found, want[name], err_msg=name)
        else:
            assert_close(f"d{name}", found, want[name], TOLERANCES[f"{OP}_bwd", "float64"])


@pytest.mark.parametrize("layout", ["channel_last", "time_last", "spread"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_nan_reaches_the_steps_that_see_it(width, layout):
    """The taps that a short filter lacks are not taps of 0, which would hand a NaN on."""
    arguments = typed(make(ConvCase("short", 1, 8, 24, width)), "float32")
    given = with_gradients(arguments)
    seen, seeing = np.zeros((2, *arguments["x"].shape), bool)
    seeing[0, 3, 10 : 10 + width] = seen[0, 3, 11 - width : 11] = True
    given["dy"][0, 3, 10] = np.nan
    np.testing.assert_array_equal(np.isnan(run_backward(arguments, given, layout)["x"]), seen)
    arguments["x"][0, 3, 10] = np.nan
    np.testing.assert_array_equal(np.isnan(run(arguments, layout)[0]), seeing)


@pytest.mark.parametrize("is_time_last", [False, True])
def test_packs_need_little_working_memory(is_time_last):
    x = np.zeros((2, 512, 64), "float32").transpose(0, 2, 1)  # (B, D, L), channels adjacent
    x = x.copy() if is_time_last else x
    other = x.transpose(0, 2, 1).copy().transpose(0, 2, 1) if is_time_last else x.copy()
    weight = np.zeros((64, 4), "float32")
    needs = ssm_kernels.dw_causal_conv_bwd_workspace
    assert needs(x, weight, dy=x, dx=x) <= x.nbytes / 4
    assert needs(x, weight, dy=other, dx=x) > x.nbytes
    with pytest.raises(ValueError, match="dw_causal_conv: workspace must have at least"):
        ssm_kernels.dw_causal_conv_bwd(
            x,
            weight,
            dy=x,
            dx=np.empty_like(x),
            dweight=weight.copy(),
            workspace=np.empty(1, "float32"),
        )
