"""Arrays in the framework of another array: what the operators write into."""

from __future__ import annotations

import sys


class Maker:
    """Makes output arrays of the kind of one array, without importing its framework."""

    def __init__(self, op: str, name: str, array):
        if not all(hasattr(array, need) for need in ("shape", "dtype", "__dlpack__")):
            raise TypeError(
                f"{op}: {name} must have shape, dtype and DLPack, got {type(array).__name__}"
            )
        if hasattr(array, "__array_namespace__"):
            home = array.__array_namespace__()
        else:  # torch, NumPy 1: the module that defined the array is loaded
            home = sys.modules[type(array).__module__.partition(".")[0]]
        self.array, self.home, self.finish = array, home, lambda out: out
        if home.__name__.startswith("jax"):
            # JAX arrays are immutable: arrays of NumPy, which JAX loads, are written and converted.
            self.home, self.finish = sys.modules["numpy"], home.asarray

    def empty(self, shape, dtype=None):
        """Return an array to write into; its dtype is the main input's unless given."""
        dtype = self.array.dtype if dtype is None else dtype
        if self.home.__name__ == "numpy":
            return self.home.empty(shape, dtype)
        return self.home.empty(shape, dtype=dtype, device=self.array.device)

    def acc_dtype(self):
        """Return the dtype of states and sums: float64 if the main input's is, else float32."""
        float64 = self.home.float64
        return float64 if self.array.dtype == float64 else self.home.float32
