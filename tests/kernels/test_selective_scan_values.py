"""ssm_kernels.selective_scan_fwd where exponents of decays leave the range of float32.

Each in a call of its own: instruction sets look at all exponents of a tile and choose by them.
Judge: the float64 loop, rounded to float32.
"""

import numpy as np
import pytest

from tests import judge
from tests.cases import ScanCase
from tests.kernels.test_selective_scan import arguments_of, forward


@pytest.mark.parametrize("rate", [-1.0, 1.0])
@pytest.mark.parametrize("exponent", [80, 88, 92, 96, 110, 200, 1e30])
@pytest.mark.parametrize("sign", [-1, 1])
def test_last_state_up_to_infinity(sign, exponent, rate):
    """Beyond the range a growing state is infinite, and one that decays has forgotten."""
    case = ScanCase("edge", 1, 3, 1, 2, given="initial_state", softplus=False)
    arguments = arguments_of(case, "float32")
    arguments["delta"] = np.full((1, 3, 1), sign * exponent, "f4")
    arguments["A"] = np.full((3, 2), rate if exponent < 1e3 else rate * 1e10, "f4")
    arguments["u"][...] = 0.0
    got = forward(arguments)["last_state"]
    with np.errstate(over="ignore", invalid="ignore"):
        want = judge.selective_scan(**arguments)[1].astype("f4")
    # The rounding of an exponent, 2^-24 of 128, is the relative error of its exponential. Below the
    # smallest normal number, 2^-126, instruction sets differ.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-37)


def test_every_isa(on_other_isas):
    on_other_isas(__file__)
