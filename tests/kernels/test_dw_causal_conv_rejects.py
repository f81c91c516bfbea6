"""What ssm_kernels.dw_causal_conv_fwd and _bwd refuse, and how they say it."""

import numpy as np
import pytest
import ssm_kernels

OP = "dw_causal_conv"


def small() -> dict:
    """Arguments that pass: B = 2, D = 3, L = 5, W = 4."""
    shapes = {"x": (2, 3, 5), "weight": (3, 4), "bias": (3,), "initial_state": (2, 3, 3)}
    arguments = {name: np.ones(shape, "float32") for name, shape in shapes.items()}
    return {**arguments, "y": np.zeros((2, 3, 5), "float32")}


ZEROS = np.zeros
IDS = np.array([[0, 0, 1, 1, 1], [2, 2, 2, 2, -1]], np.int32)
REJECTED = {
    "x_missing": ({"x": None}, "x must be given, got None"),
    "x_rank": ({"x": ZEROS((2, 3))}, "x must have shape (B, D, L), got"),
    "x_dtype": (
        {"x": ZEROS((2, 3, 5), np.int32)},
        "x must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "weight_missing": ({"weight": None}, "weight must be given, got None"),
    "weight_rank": ({"weight": ZEROS(3)}, "weight must have shape (D, W) or (D, 1, W), got"),
    "weight_shape": (
        {"weight": ZEROS((2, 4))},
        "weight must have shape (D, W) = (3, 4), got (2, 4)",
    ),
    "weight_middle": (
        {"weight": ZEROS((3, 2, 4))},
        "weight must have shape (D, 1, W) = (3, 1, 4), got (3, 2, 4)",
    ),
    "weight_width": ({"weight": ZEROS((3, 0))}, "weight must have a width of at least 1, got 0"),
    "bias_shape": ({"bias": ZEROS(2)}, "bias must have shape (D,) = (3,), got (2,)"),
    "initial_state_shape": (
        {"initial_state": ZEROS((2, 3, 4))},
        "initial_state must have shape (S, D, W - 1) = (2, 3, 3), got (2, 3, 4)",
    ),
    "seq_idx_shape": (
        {"seq_idx": ZEROS((2, 4), np.int32)},
        "seq_idx must have shape (B, L) = (2, 5), got (2, 4)",
    ),
    "seq_idx_dtype": (
        {"seq_idx": ZEROS((2, 5), np.int64)},
        "seq_idx must have dtype int32, got int64",
    ),
    "seq_idx_value": (
        {"seq_idx": np.full((2, 5), -2, np.int32)},
        "seq_idx must be -1 or a sequence number, got -2",
    ),
    "seq_idx_missing": ({"state_per_sequence": True}, "seq_idx must be given, got None"),
    "seq_idx_high": (
        {"state_per_sequence": True, "seq_idx": IDS},
        "seq_idx must be below the number of states 2, got 2",
    ),
    "seq_idx_without_states": (
        {"state_per_sequence": True, "seq_idx": IDS, "initial_state": ZEROS((0, 3, 3))},
        "seq_idx must be below the number of states 0, got 0",
    ),
    "y_missing": ({"y": None}, "y must be given, got None"),
    "y_shape": ({"y": ZEROS((2, 3, 4))}, "y must have shape (B, D, L) = (2, 3, 5), got (2, 3, 4)"),
    "y_overlap": (
        {"y": np.lib.stride_tricks.as_strided(ZEROS(15), (2, 3, 5), (0, 40, 8))},
        "y must not overlap itself, got stride 0 along axis 0",
    ),
    "final_state_shape": (
        {"final_state": ZEROS((1, 3, 3))},
        "final_state must have shape (S, D, W - 1) = (2, 3, 3), got (1, 3, 3)",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    change, sentence = REJECTED[name]
    arguments = {**small(), **change}
    y = arguments["y"]
    with pytest.raises(ValueError) as caught:
        ssm_kernels.dw_causal_conv_fwd(**arguments)
    assert str(caught.value).startswith(f"{OP}: {sentence}")
    assert y is None or not y.any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dy": ZEROS((2, 3, 4))}, "dy must have shape (B, D, L) = (2, 3, 5), got (2, 3, 4)"),
        ({"dx": None}, "dx must be given, got None"),
        ({"dweight": ZEROS((3, 3))}, "dweight must have shape (3, 4), got (3, 3)"),
        ({"dbias": None}, "dbias must be given, got None"),
        (
            {"dinitial_state": ZEROS((2, 3, 2))},
            "dinitial_state must have shape (S, D, W - 1) = (2, 3, 3), got (2, 3, 2)",
        ),
    ],
    ids=["dy_shape", "dx_missing", "dweight_shape", "dbias_missing", "dinitial_state_shape"],
)
def test_rejects_gradients(change, sentence):
    arguments = small()
    x = arguments["x"]
    arguments["dy"] = arguments.pop("y")
    arguments |= {"dx": ZEROS(x.shape), "dweight": ZEROS((3, 4)), "dbias": ZEROS(3), **change}
    with pytest.raises(ValueError) as caught:
        ssm_kernels.dw_causal_conv_bwd(**arguments)
    assert str(caught.value) == f"{OP}: {sentence}"


def test_rejects_outputs_in_the_place_of_inputs():
    arguments = small()
    before = arguments["x"].copy()
    with pytest.raises(ValueError, match="y must not share memory with x, got the same address"):
        ssm_kernels.dw_causal_conv_fwd(**{**arguments, "y": arguments["x"]})
    arguments["dy"] = arguments.pop("y")
    arguments |= {"dweight": ZEROS((3, 4)), "dbias": ZEROS(3), "dinitial_state": ZEROS((2, 3, 3))}
    for name in ("x", "dy"):
        with pytest.raises(ValueError, match=f"dx must not share memory with {name}, got"):
            ssm_kernels.dw_causal_conv_bwd(**arguments, dx=arguments[name])
    np.testing.assert_array_equal(arguments["x"], before)


def test_rejects_what_is_not_an_array():
    arguments = small()
    with pytest.raises(TypeError, match="dw_causal_conv: bias must be an array or tensor"):
        ssm_kernels.dw_causal_conv_fwd(**{**arguments, "bias": [1.0]})
    arguments["y"].flags.writeable = False
    with pytest.raises(TypeError, match="dw_causal_conv: y must be a writable array"):
        ssm_kernels.dw_causal_conv_fwd(**arguments)
