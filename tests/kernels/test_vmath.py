"""The vector functions of the active instruction set.

Judge: NumPy, in float64 for float32 and in long double for float64. docs/numerics.md quotes BOUNDS.
"""

import numpy as np
import pytest
import ssm_kernels
from ssm_kernels import _cpu

ISA = ssm_kernels.active_isa()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


JUDGES = {
    "exp2": np.exp2,
    "exp_bounded": np.exp,
    "log1p_unit": np.log1p,
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
}
# Where the functions promise a relative error. Below, softplus and sigmoid stay at e^-87, and the
# error of silu grows.
RANGES = {
    "exp2": (-125.0, 128.0),
    "exp_bounded": (-87.0, 88.0),
    "log1p_unit": (0.0, 1.0),
    "softplus": (-87.0, 1e4),
    "sigmoid": (-87.0, 1e4),
    "silu": (-3.0, 1e4),
}
# The largest error found, in units in the last place of the exact result, rounded up:
# (function, dtype) -> instruction set -> bound.
BOUNDS = {
    ("exp2", "float32"): {"baseline": 2.5, "avx2": 2.1, "avx512": 1.8},
    ("exp_bounded", "float32"): {"baseline": 2.5, "avx2": 2.3, "avx512": 1.8},
    ("log1p_unit", "float32"): {"baseline": 3.5, "avx2": 3.5, "avx512": 3.5},
    ("softplus", "float32"): {"baseline": 4.5, "avx2": 4.5, "avx512": 4.5},
    ("sigmoid", "float32"): {"baseline": 3.5, "avx2": 3.5, "avx512": 3.5},
    ("silu", "float32"): {"baseline": 3.5, "avx2": 3.5, "avx512": 3.5},
    # libm, and what is added to it.
    ("exp2", "float64"): {"baseline": 0.6, "avx2": 0.6, "avx512": 0.6},
    ("exp_bounded", "float64"): {"baseline": 0.6, "avx2": 0.6, "avx512": 0.6},
    ("log1p_unit", "float64"): {"baseline": 1.0, "avx2": 1.0, "avx512": 1.0},
    ("softplus", "float64"): {"baseline": 2.0, "avx2": 2.0, "avx512": 2.0},
    ("sigmoid", "float64"): {"baseline": 2.5, "avx2": 2.5, "avx512": 2.5},
    ("silu", "float64"): {"baseline": 2.5, "avx2": 2.5, "avx512": 2.5},
}
TINY = 2.0**-125


def apply(function: str, x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, np.nan)
    _cpu._vmath(function, x, y)
    return y


def samples(function: str, dtype: str) -> np.ndarray:
    """Return points over the range, many of them near zero, with both of its ends."""
    low, high = RANGES[function]
    rng, near = np.random.default_rng(0), min(high, 100.0)
    spread = [np.linspace(low, near, 150_001), rng.uniform(low, near, 150_000)]
    small = rng.uniform(max(low, -4.0), min(near, 4.0), 150_000)
    scales = 2.0 ** rng.uniform(-120.0, np.log2(min(near, 80.0)), 50_000)
    signs = rng.choice([1.0, -1.0] if low < 0.0 else [1.0], 50_000)
    x = np.concatenate([*spread, small, signs * scales, np.geomspace(1e-30, high, 1001)])
    x = np.append(x, [0.0, low, high]).astype(dtype)
    return x[(x >= low) & (x <= high)]


def worst_ulp(function: str, dtype: str) -> tuple[float, float]:
    """Return the largest error in units in the last place, and where it is."""
    x = samples(function, dtype)
    if function == "exp2":
        x = x[x < 128.0]
    wide = np.float64 if dtype == "float32" else np.longdouble
    got = apply(function, x)
    assert np.isfinite(got).all()
    want = JUDGES[function](x.astype(wide))
    unit = np.spacing(np.abs(want).astype(dtype)).astype(wide)
    error = np.abs(got.astype(wide) - want) / unit
    worst = int(np.argmax(error))
    return float(error[worst]), float(x[worst])


@pytest.mark.parametrize(("function", "dtype"), BOUNDS)
def test_error_is_bounded(function, dtype):
    error, where = worst_ulp(function, dtype)
    bound = BOUNDS[function, dtype][ISA]
    assert error <= bound, f"{error:.3f} ulp at {where!r}"


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_special_values(dtype):
    x = np.array([0.0, -0.0, np.inf, 1000.0, -1000.0, 1e-310, 1e-40, -1e-40], dtype)
    big, small = (2.0**1000, 1e-300) if dtype == "float64" else (np.inf, TINY)
    for function, wanted in {
        "exp2": (1.0, 1.0, np.inf, big, 0.0, 1.0, 1.0, 1.0),
        "softplus": (np.log(2),) * 2 + (np.inf, 1000.0, 0.0) + (np.log(2),) * 3,
        "sigmoid": (0.5, 0.5, 1.0, 1.0, 0.0, 0.5, 0.5, 0.5),
    }.items():
        got = apply(function, x)
        want = np.array(wanted, dtype)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=function)
        close = np.abs(got[finite] - want[finite]) <= small + 3e-7 * np.abs(want[finite])
        assert close.all(), (function, got, want)


def test_error_of_a_gate_grows_slowly():
    x = np.linspace(-88.0, -3.0, 500_001).astype("f4")
    want = JUDGES["silu"](x.astype("f8"))
    error = np.abs(apply("silu", x) - want) / np.spacing(np.abs(want).astype("f4"))
    assert (error <= 4.0 + np.abs(x) / 4).all()


def test_values_below_the_range_stay_small_and_finite():
    for function in ("exp2", "softplus", "sigmoid", "silu"):
        x = -np.geomspace(125.0, 3e38, 10_000).astype("f4")
        exact = JUDGES[function](np.maximum(x.astype("f8"), -700.0))
        assert (np.abs(apply(function, x) - exact) <= TINY).all(), function


def test_zero_keeps_its_sign():
    got = apply("silu", np.array([0.0, -0.0], "f4"))
    assert (got == 0.0).all()
    assert np.signbit(got).tolist() == [False, True]


def test_decay_of_nothing_is_exactly_one():
    for dtype in ("float32", "float64"):
        assert (apply("exp2", np.array([0.0, -0.0, 1e-30, -1e-30], dtype)) == 1.0).all()


@pytest.mark.parametrize("function", ["exp2", "softplus", "sigmoid", "silu"])
def test_nan_stays_nan(function):
    for dtype in ("float32", "float64"):
        assert np.isnan(apply(function, np.array([np.nan, -np.nan], dtype))).all(), dtype


@pytest.mark.parametrize("function", JUDGES)
def test_nan_stays_nan_whatever_its_bits(function):
    """A power of two is made from the bits of a number: those of a NaN must not become one."""
    low_bits = np.arange(1, 512, dtype=np.uint32)
    for sign_and_quiet in (0x7F800000, 0x7FC00000, 0xFF800000, 0xFFC00000):
        x = (low_bits | np.uint32(sign_and_quiet)).view(np.float32)
        assert np.isnan(apply(function, x)).all()


def test_is_the_same_in_every_lane():
    """Values at every place of a vector, and of a last vector that is not full."""
    for function in JUDGES:
        low, high = RANGES[function]
        x = np.random.default_rng(1).uniform(low, min(high, 80.0), 67).astype("f4")
        want = apply(function, x)
        for shift in range(1, 17):
            np.testing.assert_array_equal(apply(function, x[shift:].copy()), want[shift:])


def test_rejects():
    x = np.zeros(3, "f4")
    for arguments, sentence in (
        (("tan", x, x.copy()), "function must be one of the vector functions, got tan"),
        (("silu", x[None], x.copy()), "x must have shape (n,), got (1, 3)"),
        (("silu", x, np.zeros(4, "f4")), "y must have shape (n,) = (3,), got (4,)"),
        (("silu", x, np.zeros(3)), "y must have dtype float32, got float64"),
        (("silu", x.astype("f2"), x), "x must have dtype float32 or float64, got float16"),
    ):
        with pytest.raises(ValueError) as caught:
            _cpu._vmath(*arguments)
        assert str(caught.value) == f"vmath: {sentence}"


def test_every_isa(on_other_isas):
    on_other_isas(__file__)
