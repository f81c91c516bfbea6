"""What only the CUDA sources of the steps have: packs and single elements, teams, states in turn.

Judge: the float64 loops of tests/judge.py, and the same numbers in another layout or batch.
"""

import os

import numpy as np
import pytest
import ssm_kernels

from tests import judge

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)


def apart(array: np.ndarray) -> np.ndarray:
    """Return a copy that begins one element beyond any boundary of 16 bytes."""
    wide = np.empty(array.size + 32, array.dtype)
    first = -(wide.ctypes.data // array.itemsize) % (16 // array.itemsize) + 1
    view = wide[first : first + array.size].reshape(array.shape)
    view[...] = array
    return view


def state_inputs(batch: int, tokens: int, dim: int, dstate: int) -> dict:
    """Arguments of selective_state_step in float64, Mamba-1 shapes with tokens."""
    make = np.random.default_rng(dstate).standard_normal
    return {
        "state": make((batch, dim, dstate)),
        "x": make((batch, tokens, dim)),
        "dt": make((batch, tokens, dim)),
        "A": -np.exp(make((dim, dstate))),
        "B": make((batch, tokens, dstate)),
        "C": make((batch, tokens, dstate)),
        "D": make(dim),
        "z": make((batch, tokens, dim)),
        "dt_bias": make(dim),
    }


def step(inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return y and the new state, which is kept in the layout of the given one."""
    state = apart(inputs["state"]) if inputs["state"].base is not None else inputs["state"].copy()
    y = np.full_like(inputs["x"], np.nan)
    ssm_kernels.selective_state_step_fwd(**{**inputs, "state": state}, y=y)
    return y, state


@pytest.mark.parametrize("state_dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("dstate", [1, 4, 16, 24, 33, 64, 100, 128, 200, 512, 513, 1100])
def test_states_of_teams_and_in_turn(dstate, state_dtype):
    inputs = state_inputs(2, 3, 5, dstate)
    inputs["state"] = inputs["state"].astype(state_dtype)
    y, state = step(inputs)
    want_y, want_state = judge.selective_state_step(**inputs)
    np.testing.assert_allclose(y, want_y, rtol=1e-11, atol=1e-11 * dstate)
    # Between the tokens nothing is rounded, whatever the dtype of the state.
    bound = {"float64": 1e-11, "float32": 1e-7, "float16": 6e-4}[state_dtype]
    np.testing.assert_allclose(state, want_state, rtol=bound, atol=1e-7)


@pytest.mark.parametrize("state_dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("dstate", [8, 16, 128])
def test_packs_and_elements_agree(dstate, state_dtype):
    inputs = state_inputs(2, 2, 40, dstate)
    inputs = {k: v.astype("float32") for k, v in inputs.items()}
    inputs["state"] = inputs["state"].astype(state_dtype)
    want_y, want_state = step(inputs)
    for name in ("state", "A"):
        y, state = step({**inputs, name: apart(inputs[name])})
        np.testing.assert_array_equal(y, want_y, err_msg=name)
        np.testing.assert_array_equal(state, want_state, err_msg=name)


@pytest.mark.parametrize("dstate", [16, 64])
def test_few_and_many_blocks_agree(dstate):
    many = {k: v.astype("float32") for k, v in state_inputs(300, 1, 130, dstate).items()}
    y, state = step(many)
    rows = {k: v[7:8] if k in ("state", "x", "dt", "z", "B", "C") else v for k, v in many.items()}
    rows["state"] = rows["state"].copy()
    for got, want in zip(step(rows), (y[7:8], state[7:8]), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
@pytest.mark.parametrize("dstate", [1, 5, 13, 37])
def test_an_infinite_input_is_infinite_in_y(dstate, state_dtype):
    """States that only fill a pack up add nothing: infinity times their 0 is no number."""
    inputs = {k: np.abs(v).astype("float32") for k, v in state_inputs(1, 2, 3, dstate).items()}
    inputs.update(state=inputs["state"].astype(state_dtype), A=-inputs["A"])
    inputs["x"][0, 0, 1] = np.inf
    y, state = step(inputs)
    assert np.isposinf(y[0, :, 1]).all()
    assert np.isposinf(state[0, 1]).all()
    assert np.isfinite(y[0, :, [0, 2]]).all()


def test_rates_end_inside_a_pack_of_the_state(guarded):
    inputs = {k: v.astype("float32") for k, v in state_inputs(1, 1, 5, 12).items()}
    inputs["state"] = inputs["state"].astype("float16")  # eight to a pack, of A there are four
    for got, want in zip(step({**inputs, "A": guarded(inputs["A"])}), step(inputs), strict=True):
        np.testing.assert_array_equal(got, want)


def window_inputs(tokens: int, dtype: str) -> dict:
    """Arguments of dw_causal_conv_step with a window of four inputs, the usual one."""
    make = np.random.default_rng(tokens).standard_normal
    return {
        "x": make((3, 150, tokens)).astype(dtype),
        "conv_state": make((3, 150, 4)).astype(dtype),
        "bias": make(150).astype(dtype),
    }


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_windows_moved_as_one_and_by_elements_agree(tokens, width, dtype):
    inputs = window_inputs(tokens, dtype)
    inputs["conv_state"][..., : 5 - width] = np.nan  # no tap meets these
    weight = np.random.default_rng(width).standard_normal((150, width)).astype(dtype)
    found = []
    for state in (inputs["conv_state"].copy(), apart(inputs["conv_state"])):
        y = np.full_like(inputs["x"], np.nan)
        given = {**inputs, "conv_state": state, "weight": weight}
        ssm_kernels.dw_causal_conv_step_fwd(**given, y=y, silu=True)
        assert np.isfinite(y).all()
        found.append((y, state))
    for packed, strided in zip(*found, strict=True):
        np.testing.assert_array_equal(packed, strided)
