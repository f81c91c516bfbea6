"""Arrays of bfloat16, which NumPy has not, and of mixed dtypes."""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np

from tests.ssd_rounding import bfloat16_bits


class Bfloat16:
    """An array of bfloat16, as DLPack sees it."""

    def __init__(self, values):
        """Round float32 numbers."""
        self.bits = bfloat16_bits(values)

    @classmethod
    def of(cls, bits: np.ndarray) -> "Bfloat16":
        """Return the array whose memory holds these bits."""
        made = cls.__new__(cls)
        made.bits = bits
        return made

    def __dlpack__(self, **_):
        """Return a capsule of the bits whose type code says bfloat16."""
        capsule = self.bits.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        # DLTensor: data, device (two int32), ndim (int32), then the type code. dlpack.h
        ctypes.c_uint8.from_address(pointer(capsule, b"dltensor") + 8 + 8 + 4).value = 4
        return capsule

    def __dlpack_device__(self):
        """Return that of the bits."""
        return self.bits.__dlpack_device__()

    def numpy(self) -> np.ndarray:
        """Return the numbers as float32."""
        return (self.bits.astype("u4") << 16).view("f4")


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 numbers in a dtype; of bfloat16 the bits."""
    return bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)


def argument(values: np.ndarray):
    """Return what stored() made as an argument of a kernel."""
    return Bfloat16.of(values) if values.dtype == np.uint16 else values


def assert_values_decide(
    run: Callable[[dict], None],
    arrays: dict[str, np.ndarray],
    outputs: Sequence[str],
    main: str,
    alone: str,
    arithmetic: str,
) -> None:
    """Compare what kernels write into arrays of main and one of another dtype with float32 alone.

    Args:
        run: calls the kernels with the arrays by name.
        arrays: float32, with numbers that every dtype holds; outputs included.
        outputs: names of those that are written and compared.
        main: dtype of all but one.
        alone: name of the one that is float32, float16 or float64 instead.
        arithmetic: name of the one whose dtype is that of the arithmetic; it is no float64.
    """

    def call(dtypes: dict[str, str]) -> dict:
        held = {n: stored(value, dtypes[n]) for n, value in arrays.items()}
        run({n: argument(value) for n, value in held.items()})
        return {n: held[n] for n in outputs}

    plain = call(dict.fromkeys(arrays, "float32"))
    for other in ("float32", "float16", *(["float64"] if alone != arithmetic else [])):
        dtypes = dict.fromkeys(arrays, main) | {alone: other}
        for n, got in call(dtypes).items():
            want = stored(plain[n], dtypes[n])
            np.testing.assert_array_equal(got, want, err_msg=f"{n} {other}")
