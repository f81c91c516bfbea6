"""How far a result may be from its judge: (operator, dtype) -> rtol, atol, each with its reason.

The judge computes in float64 from the same, already rounded, inputs. An element passes if
``|got - want| <= atol + rtol |want|``; NaN passes nowhere. A test never loosens its own tolerance.
Gradients have rows of their own, ``<op>_bwd``.
"""

from typing import NamedTuple

import numpy as np


class Tolerance(NamedTuple):
    """Relative and absolute bound, and why they are what they are."""

    rtol: float
    atol: float
    reason: str


# Operator -> bound in float32, and its reason. "Measured" is the reference over all cases of
# tests.cases: the largest |got - want| / (1 + |want|). The factor left is for kernels, whose exp,
# softplus and silu may be a few units in the last place off and whose sums have another order.
_FLOAT32 = {
    "selective_scan": (2e-5, "measured 4e-6: a decay per step, N products per output"),
    "selective_scan_bwd": (5e-5, "measured 1e-5: sums over D N or B L terms that cancel"),
    "selective_state_step": (1e-5, "measured 1.3e-6: one step, N products per output"),
    "ssd_chunk_scan": (5e-5, "measured 1e-5: Q products per output, each with a decay"),
    "ssd_chunk_scan_bwd": (1e-4, "measured 2.1e-5: sums over L P or L N terms that cancel"),
    "ssd_chunk_cumsum": (1e-6, "measured 9e-8: a softplus; the sum itself is in float64"),
    "ssd_chunk_cumsum_bwd": (2e-5, "measured 2.9e-6: sums over B L terms that cancel"),
    "ssd_chunk_state": (5e-6, "measured 2.3e-7: sums of Q products, each with a decay"),
    "ssd_chunk_state_bwd": (1e-4, "measured 2.9e-5: sums over P N terms that cancel"),
    "ssd_state_passing": (2e-6, "measured 1.2e-7: a decay per chunk"),
    "ssd_state_passing_bwd": (5e-6, "measured 9e-7: sums over P N terms that cancel"),
    "ssd_bmm_chunk": (2e-5, "measured 4.4e-6: N products per element"),
    "ssd_bmm_chunk_bwd": (2e-5, "measured 3.1e-6: sums over Q terms that cancel"),
    "ssd_chunk_output": (4e-5, "measured 8.4e-6: Q and N products per output, each with a decay"),
    "ssd_chunk_output_bwd": (5e-5, "measured 9.4e-6: sums over P N terms that cancel"),
    "dw_causal_conv": (2e-6, "measured 4.4e-7: W products and a silu"),
    "dw_causal_conv_bwd": (2e-5, "measured 3.9e-6: sums over B L terms that cancel"),
    "dw_causal_conv_step": (2e-6, "measured 2.1e-7: W products and a silu"),
    "fused_layer_norm": (2e-6, "measured 2e-7: two sums over D terms of one sign"),
    "fused_layer_norm_bwd": (1e-5, "measured 1.4e-6: sums over rows that cancel"),
    "gated_norm": (2e-6, "measured 2.7e-7: two sums over a group, and a silu"),
    "gated_norm_bwd": (1e-5, "measured 1.2e-6: sums over rows that cancel"),
    "swiglu": (2e-6, "measured 1.2e-7: a silu and a product"),
    "swiglu_bwd": (2e-6, "measured 1.7e-7: a silu and four products"),
}
# Half a unit in the last place of a number with 8 and with 11 significant bits.
_ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}

TOLERANCES: dict[tuple[str, str], Tolerance] = {}
for _op, (_bound, _reason) in _FLOAT32.items():
    TOLERANCES[_op, "float64"] = Tolerance(
        1e-12, 1e-12, "measured below 3e-13: rounding of sums in float64"
    )
    TOLERANCES[_op, "float32"] = Tolerance(_bound, _bound, _reason)
    for _dtype, _unit in _ROUNDING.items():
        TOLERANCES[_op, _dtype] = Tolerance(
            _unit + _bound, _bound, f"the output is rounded once to {_dtype}; {_reason}"
        )

# The matrix of modules and models. Errors are in units of the largest number of a tensor, since a
# GEMM rounds a sum of terms of that size. Judge: the same rounded parameters in float64.
for _name, _dtype, _bound, _reason in (
    ("matrix", "float64", 1e-10, "two ways through the same model, in another order of sums"),
    ("matrix", "float32", 2e-6, "measured 6.2e-7: a model of two blocks"),
    ("matrix", "bfloat16", 2.5e-2, "measured 8.5e-3: each tensor between operators is rounded"),
    ("matrix_bwd", "float32", 1e-5, "measured 3.7e-6: sums over tokens that cancel"),
    ("matrix_bwd", "bfloat16", 5e-2, "measured 1.8e-2: the same, over gradients that are rounded"),
    # Judge: transformers' own torch functions, in float32 as well.
    ("transformers", "float32", 2e-5, "measured 2.5e-6: up to four blocks"),
    ("transformers_bwd", "float32", 5e-5, "measured 1e-5: sums over tokens that cancel"),
    # Upstream's modules and models, made in float64 from float32 parameters.
    ("upstream", "float64", 1e-12, "measured 1.1e-15: another order of sums"),
    ("upstream", "float32", 2e-6, "measured 4.3e-7: a model of two blocks"),
    ("upstream_bwd", "float64", 1e-12, "measured 2.9e-15: another order of sums"),
    ("upstream_bwd", "float32", 1e-5, "measured 2.1e-6: sums over tokens that cancel"),
):
    TOLERANCES[_name, _dtype] = Tolerance(_bound, _bound, _reason)


def _array(values) -> np.ndarray:
    """Return an array or tensor as float64 on the host."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, np.float64)


def assert_close(name: str, got, want, tolerance: Tolerance) -> None:
    """Fail unless ``got`` is within tolerance of ``want`` everywhere.

    Args:
        name: what is compared; the first word of the message.
        got: array or tensor.
        want: array or tensor of the same shape: the judge's result.
        tolerance: a row of TOLERANCES.

    Raises:
        AssertionError: with the worst index, both values, and the ratio of error to tolerance.
    """
    got, want = _array(got), _array(want)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, want {want.shape}"
    if got.size == 0:
        return
    with np.errstate(invalid="ignore"):
        error = np.abs(got - want)
    # Infinities of one sign are equal; their difference is not a number.
    error = np.where(got == want, 0.0, np.where(np.isnan(error), np.inf, error))
    ratio = error / (
        tolerance.atol + tolerance.rtol * np.abs(np.nan_to_num(want, posinf=0.0, neginf=0.0))
    )
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    index = tuple(int(i) for i in worst)
    assert ratio[worst] <= 1.0, (
        f"{name}: worst at {index}: got {got[worst]!r}, want {want[worst]!r}, "
        f"{ratio[worst]:.3g} times the tolerance (rtol {tolerance.rtol:.3g}, "
        f"atol {tolerance.atol:.3g}: {tolerance.reason}); "
        f"{int((ratio > 1.0).sum())} of {ratio.size} elements are out"
    )
