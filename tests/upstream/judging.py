"""On which backends upstream's goldens are compared, and how closely."""

import importlib.util

import pytest
import torch

from tests.tolerances import TOLERANCES, assert_close

BACKENDS = {"python": (torch.float64, torch.float32), "cpu": (torch.float64, torch.float32)}
if torch.cuda.is_available():
    BACKENDS["cuda"] = (torch.float32,)  # its kernels take no float64
RUNS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend, dtypes in BACKENDS.items()
    for dtype in dtypes
]


def device_of(backend: str) -> str:
    """Return where the tensors of a backend live; skip the test if this machine lacks it."""
    if backend == "cpu" and importlib.util.find_spec("ssm_kernels") is None:
        pytest.skip("ssm_kernels is not built")
    return "cuda" if backend == "cuda" else "cpu"


def tolerance_of(kind: str, row: str, dtype: torch.dtype):
    """Return the row of TOLERANCES for goldens that upstream made on a kind of device."""
    # Upstream's kernels have an error of their own, so their goldens have rows of their own.
    row = row if kind == "cpu" else f"{row}_by_{kind}"
    key = (row, str(dtype).removeprefix("torch."))
    assert key in TOLERANCES, f"tests/tolerances.py must have a row {key}: measure it"
    return TOLERANCES[key]


def placed(arrays: dict, dtype: torch.dtype, device: str) -> dict:
    """Return arrays as tensors on a device, floats in ``dtype``; flags as they are."""
    found = {}
    for name, value in arrays.items():
        if hasattr(value, "shape"):
            value = torch.from_numpy(value).to(device)
            value = value.to(dtype) if value.is_floating_point() else value
        found[name] = value
    return found


def compare(name: str, found: dict, wanted: dict, tolerance, scaled: bool = False) -> None:
    """Compare tensors by name.

    Args:
        name: what they belong to.
        found: name -> tensor.
        wanted: name -> array; all of these must be found.
        tolerance: a row of TOLERANCES.
        scaled: errors are in units of the largest number of each tensor, as for whole modules.
    """
    assert wanted, f"{name}: the golden holds nothing to compare"
    for part, want in wanted.items():
        scale = abs(want).max() if scaled and want.size else 1.0
        scale = scale or 1.0
        assert_close(f"{name} {part}", found[part].detach().cpu() / scale, want / scale, tolerance)
