"""GPUs whose blocks have little shared memory: another tile, or a sentence before anything starts.

Judge: the error of products in 16 bits that tests/kernels/test_cuda_ssd.py and its backward allow,
and the float64 loops of tests/judge.py.
"""

import ctypes
import os
import re

import numpy as np
import pytest

from tests import judge

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)

from tests.kernels import test_cuda_ssd as forward
from tests.kernels import test_cuda_ssd_bwd as backward

# Compute capability 8.6, 8.9 and 12.0; what float32 needs: the backward, and more than 128 states.
LEAST, BACKWARD, MANY_STATES = 99 << 10, 125 << 10, 162 << 10
HOPPER = 227 << 10


@pytest.fixture
def room():
    """Return a function that says how many bytes of shared memory a block has at most."""
    tell = ctypes.CDLL(os.environ["SSM_TEST_CUDA_HOST"]).ssm_cuda_host_set_shared
    tell.argtypes = (ctypes.c_int64,)
    yield tell
    tell(HOPPER)


@pytest.mark.parametrize("dtype", forward.HALF)
@pytest.mark.parametrize("dstate", [16, 64, 128, 256])
def test_least_room_is_enough_for_16_bits(room, dstate, dtype):
    room(LEAST)
    given = {**forward.inputs(1, 140, 2, 64, dstate, dtype="f4"), "seq_meta": None}
    forward.assert_as_good_as_rounding({**given, "softplus": True}, dtype)
    backward.assert_as_good_as_rounding(
        forward.inputs(1, 140, 2, 64, dstate, dtype="f4"), None, dtype
    )


@pytest.mark.parametrize(
    ("dstate", "enough"), [(16, LEAST), (64, LEAST), (128, LEAST), (256, MANY_STATES)]
)
def test_room_for_float32(room, dstate, enough):
    arguments = forward.inputs(1, 140, 1, 64, dstate, dtype="f4")
    room(enough)
    y, states = forward.run(arguments)
    want_y, want_states = judge.ssd_chunk_scan(**arguments, softplus=True)
    for got, want in ((y, want_y), (states, want_states)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    room(max(enough, BACKWARD))
    backward.assert_as_good_as_rounding(arguments, None, "float32")


def test_too_little_room_is_said_before_anything_starts(room):
    room(LEAST)
    many = forward.inputs(1, 70, 1, 8, 256, dtype="f4")
    y = np.full(many["X"].shape, np.nan, "f4")
    with pytest.raises(RuntimeError, match=r"must have \d+ bytes of shared memory.*got 101376"):
        forward.run(many, y=y)
    assert np.isnan(y).all()
    few = forward.inputs(1, 70, 1, 8, 16, dtype="f4")
    expected = r"^ssd_chunk_scan: the GPU must have (\d+) bytes .* got 101376"
    with pytest.raises(RuntimeError, match=expected) as said:
        backward.gradients(few, backward.cotangents(few), None, "f4")
    room(int(re.match(expected, str(said.value))[1]))  # what it names is enough
    backward.gradients(few, backward.cotangents(few), None, "f4")
