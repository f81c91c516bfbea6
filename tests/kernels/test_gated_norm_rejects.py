"""What ssm_kernels.gated_norm_fwd and _bwd refuse.  Judge: the sentences, word by word."""

import numpy as np
import pytest
import ssm_kernels

OP = "gated_norm"
X = np.ones((2, 3, 6), np.float32)
W = np.ones(6, np.float32)
M = np.ones(6, np.float32)  # one statistic per row
FLOATS = "float64, float32, bfloat16 or float16"
SHARED = {
    "x_rank": ({"x": np.zeros(())}, "x must have shape (..., D), got ()"),
    "x_dtype": ({"x": X.astype("i8")}, f"x must have dtype {FLOATS}, got int64"),
    "x_missing": ({"x": None}, "x must be given, got None"),
    "weight_shape": ({"weight": W[:4]}, "weight must have shape (D,) = (6,), got (4,)"),
    "weight_missing": ({"weight": None}, "weight must be given, got None"),
    "bias_shape": ({"bias": W[:, None]}, "bias must have shape (D,) = (6,), got (6, 1)"),
    "z_shape": ({"z": X[0]}, "z must have shape (..., D) = (2, 3, 6), got (3, 6)"),
    "z_dtype": ({"z": X.astype("i4")}, f"z must have dtype {FLOATS}, got int32"),
    "group_size_divides": ({"group_size": 4}, "group_size must divide D = 6, got 4"),
    "group_size_beyond": ({"group_size": 12}, "group_size must divide D = 6, got 12"),
    "group_size_zero": ({"group_size": 0}, "group_size must be at least 1, got 0"),
    "group_size_negative": ({"group_size": -1}, "group_size must be at least 1, got -1"),
    "mean_rms": ({"is_rms": True}, "mean must be None with is_rms, got an array"),
    "mean_shape": ({"mean": M[:5]}, "mean must have shape (M,) = (6,), got (5,)"),
    "rstd_shape": ({"group_size": 3, "mean": np.ones(12, "f4")},
                   "rstd must have shape (M,) = (12,), got (6,)"),
    "rstd_dtype": ({"rstd": M.astype("f8")}, "rstd must have dtype float32, got float64"),
}  # fmt: skip
FORWARD = {
    "y_shape": (
        {"y": X[..., :4].copy()},
        "y must have shape (..., D) = (2, 3, 6), got (2, 3, 4)",
    ),
    "y_missing": ({"y": None}, "y must be given, got None"),
    "y_overlap": (
        {"y": np.lib.stride_tricks.as_strided(np.zeros(18), (2, 3, 6), (0, 48, 8))},
        "y must not overlap itself, got stride 0 along axis 0",
    ),
    "eps_zero": ({"eps": 0.0}, "eps must be positive, got 0.0"),
    "eps_negative": ({"eps": -1e-5}, "eps must be positive, got -1e-05"),
    "eps_nan": ({"eps": float("nan")}, "eps must be positive, got nan"),
}
BACKWARD = {
    "mean_missing": ({"mean": None}, "mean must be given, got None"),
    "rstd_missing": ({"rstd": None}, "rstd must be given, got None"),
    "dy_missing": ({"dy": None}, "dy must be given, got None"),
    "dy_shape": ({"dy": X[:1]}, "dy must have shape (..., D) = (2, 3, 6), got (1, 3, 6)"),
    "dx_missing": ({"dx": None}, "dx must be given, got None"),
    "dz_missing": ({"dz": None}, "dz must be given, got None"),
    "dz_overlap": (
        {"dz": np.lib.stride_tricks.as_strided(np.zeros(18), (2, 3, 6), (0, 48, 8))},
        "dz must not overlap itself, got stride 0 along axis 0",
    ),
    "dz_without_z": ({"z": None}, "dz must be None without z, got an array"),
    "dweight_shape": (
        {"dweight": np.ones(5, "f4")},
        "dweight must have shape (D,) = (6,), got (5,)",
    ),
    "dbias_shape": ({"dbias": np.ones(5, "f4")}, "dbias must have shape (D,) = (6,), got (5,)"),
}


def refuse(function, arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        function(**arguments)
    assert str(error.value) == f"{OP}: {sentence}"


def inputs() -> dict:
    statistics = {"mean": M.copy(), "rstd": M.copy()}
    return {"x": X, "weight": W, "bias": W, "z": X, "is_rms": False, **statistics}


@pytest.mark.parametrize("name", SHARED | FORWARD)
def test_rejects_forward(name):
    change, sentence = (SHARED | FORWARD)[name]
    y = np.full_like(X, 7)
    refuse(ssm_kernels.gated_norm_fwd, {**inputs(), "y": y, **change}, sentence)
    assert (y == 7).all()


@pytest.mark.parametrize("name", SHARED | BACKWARD)
def test_rejects_backward(name):
    change, sentence = (SHARED | BACKWARD)[name]
    out = {"dx": np.full_like(X, 7), "dz": X.copy(), "dweight": W.copy(), "dbias": W.copy()}
    refuse(ssm_kernels.gated_norm_bwd, {**inputs(), "dy": X, **out, **change}, sentence)
    assert (out["dx"] == 7).all()


def test_rejects_read_only_output():
    y = X.copy()
    y.flags.writeable = False
    with pytest.raises(TypeError, match=f"^{OP}: y must be"):
        ssm_kernels.gated_norm_fwd(X, W, y=y)
