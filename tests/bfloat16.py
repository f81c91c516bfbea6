"""Arrays of bfloat16, which NumPy has not."""

import ctypes

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
