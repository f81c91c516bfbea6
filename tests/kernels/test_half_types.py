"""How elements of 16 bits become float32 and back, on every instruction set: bit for bit.

Judge: NumPy for float16, the definition for bfloat16. A convolution with one tap of weight 1 only
converts; its layout decides whether rows or squares of vectors are converted.
"""

import numpy as np
import pytest
import ssm_kernels

from tests.bfloat16 import Bfloat16, argument, stored
from tests.ssd_rounding import bfloat16_bits

EVERY_WORD = np.arange(1 << 16, dtype=np.uint16)
CHANNELS = 67  # whole vectors, and some elements more

# NumPy's casts of infinite results and of signalling NaN.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast")


def rows(values: np.ndarray) -> np.ndarray:
    """Return values as (1, CHANNELS, steps), repeated to fill it."""
    steps = -(-values.size // CHANNELS)
    return np.resize(values, (1, CHANNELS, steps))


def as_laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """Return the array with its channels or its steps adjacent."""
    return array if layout == "steps" else np.asfortranarray(array)


def converted(x, y) -> None:
    """Write x to y, in the dtype of y."""
    ssm_kernels.dw_causal_conv_fwd(x, np.ones((CHANNELS, 1), "f4"), y=y)


def floats() -> np.ndarray:
    """Return float32 numbers: of any bits, and on and beside the ties of both types."""
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint64)
    half = EVERY_WORD[(EVERY_WORD & 0x7C00) != 0x7C00].view(np.float16).astype(np.float32)
    ties = half.view(np.uint32).astype(np.int64) + rng.choice([-1, 0, 1, 0xFFF, 0x1000], half.size)
    brain = EVERY_WORD.astype(np.int64) << 16
    brain += rng.choice([0, 0x7FFF, 0x8000, 0x8001], brain.size)
    bits = np.concatenate([any_bits.astype(np.int64), ties, brain]) & 0xFFFFFFFF
    return rows(bits.astype(np.uint32).view(np.float32))


@pytest.mark.parametrize("layout", ["steps", "channels"])
def test_every_float16_is_read(layout):
    x = rows(EVERY_WORD.view(np.float16))
    y = as_laid_out(np.full(x.shape, 7, "f4"), layout)
    converted(as_laid_out(x, layout), y)
    np.testing.assert_array_equal(y, x.astype("f4"))


@pytest.mark.parametrize("layout", ["steps", "channels"])
def test_every_bfloat16_is_read(layout):
    bits = rows(EVERY_WORD)
    y = as_laid_out(np.full(bits.shape, 7, "f4"), layout)
    converted(Bfloat16.of(as_laid_out(bits, layout)), y)
    np.testing.assert_array_equal(y, (bits.astype("u4") << 16).view("f4"))


@pytest.mark.parametrize("layout", ["steps", "channels"])
def test_float16_is_rounded_to_nearest_even(layout):
    x = floats()
    y = as_laid_out(np.full(x.shape, 7, "f2"), layout)
    converted(as_laid_out(x, layout), y)
    np.testing.assert_array_equal(y, x.astype("f2"))


@pytest.mark.parametrize("layout", ["steps", "channels"])
def test_bfloat16_is_rounded_to_nearest_even(layout):
    x = floats()
    y = Bfloat16.of(as_laid_out(np.full(x.shape, 7, "u2"), layout))
    converted(as_laid_out(x, layout), y)
    want = (bfloat16_bits(x).astype("u4") << 16).view("f4")
    np.testing.assert_array_equal(y.numpy(), np.where(np.isnan(x), x, want))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_round_to_nearest_even(dtype):
    """A norm of ones writes its weights, two vectors of bfloat16 in one store."""
    weight = floats().reshape(-1)
    x, y = (stored(np.full((1, weight.size), value, "f4"), dtype) for value in (1, 7))
    ssm_kernels.fused_layer_norm_fwd(argument(x), weight, y=argument(y), eps=1e-30, is_rms=True)
    if dtype == "float16":
        np.testing.assert_array_equal(y[0], weight.astype("f2"))
        return
    got, want = ((bits.astype("u4") << 16).view("f4") for bits in (y[0], bfloat16_bits(weight)))
    np.testing.assert_array_equal(got, np.where(np.isnan(weight), weight, want))


def test_every_isa(on_other_isas):
    on_other_isas(__file__)
