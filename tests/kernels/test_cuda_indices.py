"""Indices that name nothing: on a GPU nobody looks at them before the launch.

The front refuses them on the CPU, so these tests call the launchers themselves. Judge: the same
call with -1, a skipped row or step, in their place.
"""

import ctypes
import os
import re
from pathlib import Path

import numpy as np
import pytest

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)

KERNELS = Path(__file__).parents[2] / "packages/ssm-kernels/src/cuda/kernels.h"
DTYPES = {"float64": 0, "float32": 1, "float16": 3, "int32": 5}  # of ssm::DType


class Device(ctypes.Structure):
    """ssm::Device: of type 0, the CPU."""

    _fields_ = (("type", ctypes.c_uint8), ("index", ctypes.c_int32))


class View(ctypes.Structure):
    """ssm::TensorView of a NumPy array; without one, an argument that is not given."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_uint8),
        ("device", Device),
        ("ndim", ctypes.c_int),
        ("shape", ctypes.c_int64 * 6),
        ("stride", ctypes.c_int64 * 6),
    )

    def __init__(self, array: np.ndarray | None = None):
        super().__init__(ndim=-1)
        if array is None:
            return
        self.data, self.dtype, self.ndim = array.ctypes.data, DTYPES[array.dtype.name], array.ndim
        self.shape[: array.ndim] = array.shape
        self.stride[: array.ndim] = [n // array.itemsize for n in array.strides]


class Exec(ctypes.Structure):
    """ssm::Exec of a call without working memory."""

    _fields_ = (
        ("num_threads", ctypes.c_int),
        ("stream", ctypes.c_ssize_t),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    )


def launch(table: int, name: str, arrays: tuple, flags: tuple = (), *numbers: int) -> None:
    """Call a launcher of the table with the members of its arguments in their order."""
    names = re.findall(r"^ +X\((\w+),", KERNELS.read_text(encoding="utf-8"), re.MULTILINE)
    address = ctypes.c_void_p.from_address(table + 8 * (1 + names.index(name))).value

    class Arguments(ctypes.Structure):
        _fields_ = (
            ("views", View * len(arrays)),
            ("flags", ctypes.c_bool * max(len(flags), 1)),
        )

    arguments = Arguments()
    for i, array in enumerate(arrays):
        arguments.views[i] = View(array)
    arguments.flags[: len(flags)] = flags
    types = [ctypes.c_void_p, *[ctypes.c_int64] * len(numbers), ctypes.c_void_p]
    ctypes.CFUNCTYPE(None, *types)(address)(
        ctypes.addressof(arguments), *numbers, ctypes.addressof(Exec())
    )


BAD = np.array([2, 7, -1, -9, 0, 3], np.int32)  # of 3 states
SKIPS = np.array([2, -1, -1, -1, 0, -1], np.int32)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype("float32")


def test_state_rows_that_do_not_exist(table):
    found = []
    for indices in (BAD, SKIPS):
        state, y = random(3, 1, 5, 8), np.full((6, 1, 1, 5), np.nan, "float32")
        x, matrix, A = random(6, 1, 1, 5), random(6, 1, 1, 8), -np.exp(random(1, 5, 8))
        arrays = (state, x, x, A, matrix, matrix, None, None, None, indices, y)
        launch(table, "selective_state_step_fwd", arrays, (True,))
        found.append((state, y))
    for got, want in zip(*found, strict=True):
        np.testing.assert_array_equal(got, want)
    y = found[0][1]
    assert not y[SKIPS < 0].any()
    assert y[SKIPS >= 0].all()


@pytest.mark.parametrize("memory", [3, 4])
def test_windows_that_do_not_exist(memory, table):
    found = []
    for indices in (BAD, SKIPS):
        state, y = random(3, 5, memory), np.full((6, 5, 1), np.nan, "float32")
        arrays = (random(6, 5, 1), state, random(5, 4), None, None, indices, y)
        launch(table, "dw_causal_conv_step_fwd", arrays, (False,))
        found.append((state, y))
    for got, want in zip(*found, strict=True):
        np.testing.assert_array_equal(got, want)
    y = found[0][1]
    assert not y[SKIPS < 0].any()
    assert y[SKIPS >= 0].all()


def test_a_negative_number_of_tokens_seen_counts_backwards(table):
    found = []
    for seen in (-6, 2):
        state, y = random(1, 5, 4), np.full((1, 5, 1), np.nan, "float32")
        seen = np.array([seen], np.int32)
        arrays = (random(1, 5, 1), state, random(5, 4), None, seen, None, y)
        launch(table, "dw_causal_conv_step_fwd", arrays, (False,))
        found.append((state, y))
    for got, want in zip(*found, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dim", [5, 8])
def test_sequences_without_a_state(dim, table):
    found = []
    for wrong in (9, 2, -7, -1):
        ids = np.array([[0, 0, wrong, 0, 1, 1, wrong, wrong]], np.int32)
        x = np.ascontiguousarray(random(1, 8, dim)).transpose(0, 2, 1)
        y = np.full_like(x, np.nan)
        initial, final = random(2, dim, 3), np.full((2, dim, 3), np.nan, "float32")
        arrays = (x, random(dim, 4), None, initial, ids, y, final)
        launch(table, "dw_causal_conv_fwd", arrays, (True, True), 2)
        found.append((y, final))
    for result in found[:-1]:
        for got, want in zip(result, found[-1], strict=True):
            np.testing.assert_array_equal(got, want)
    y = found[-1][0]
    assert not y[:, :, ids[0] < 0].any()
    assert y[:, :, ids[0] >= 0].all()


@pytest.mark.parametrize("dim", [5, 8])
def test_a_sequence_where_there_are_no_states(dim, table):
    x = np.ascontiguousarray(random(1, 8, dim)).transpose(0, 2, 1)
    y, states = np.full_like(x, np.nan), np.full((2, dim, 3), 7, "float32")
    arrays = (x, random(dim, 4), None, states[:0], np.zeros((1, 8), np.int32), y, states[:0])
    launch(table, "dw_causal_conv_fwd", arrays, (True, True), 0)
    assert not y.any()
    assert (states == 7).all()
