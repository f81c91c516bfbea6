"""Small problems with known answers, one per operator: for `ssm-kernels selftest` and `bench`.

Judge: float64 NumPy loops over time, written from the definition of each operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import ssm_kernels

# Relative to the largest value; float32 results of sums of some ten terms.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One operator's problem.

    Args:
        inputs: makes the arguments from (random generator, batch, channels, length).
        call: runs the kernel on them; returns what it wrote.
        judge: computes the same in float64.
        size: batch, channels and length that `bench` uses.
    """

    inputs: Callable[[np.random.Generator, int, int, int], dict[str, np.ndarray]]
    call: Callable[[dict[str, np.ndarray]], list[np.ndarray]]
    judge: Callable[[dict[str, np.ndarray]], list[np.ndarray]]
    size: tuple[int, int, int]


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def _scan_inputs(random, batch, dim, seqlen):
    dstate = 16
    return {
        "u": _normal(random, batch, dim, seqlen),
        "delta": _normal(random, batch, dim, seqlen),
        "A": -np.exp(_normal(random, dim, dstate)),
        "B": _normal(random, batch, dstate, seqlen),
        "C": _normal(random, batch, dstate, seqlen),
        "D": _normal(random, dim),
        "z": _normal(random, batch, dim, seqlen),
        "dt_bias": _normal(random, dim),
    }


def _scan_call(arrays):
    y = np.empty_like(arrays["u"])
    ssm_kernels.selective_scan_fwd(**arrays, y=y, softplus=True)
    return [y]


def _scan_judge(a):
    dt = np.logaddexp(0, a["delta"] + a["dt_bias"][:, None])
    state = np.zeros((*a["u"].shape[:2], a["A"].shape[1]))
    y = np.empty_like(a["u"])
    for t in range(y.shape[2]):
        step = dt[:, :, t, None]
        drive = step * a["B"][:, None, :, t] * a["u"][:, :, t, None]
        state = np.exp(step * a["A"]) * state + drive
        y[:, :, t] = (state * a["C"][:, None, :, t]).sum(-1)
    return [(y + a["D"][:, None] * a["u"]) * _silu(a["z"])]


def _norm_inputs(random, batch, dim, seqlen):
    return {
        "x": _normal(random, batch, seqlen, dim),
        "weight": _normal(random, dim),
        "bias": _normal(random, dim),
        "residual": _normal(random, batch, seqlen, dim),
    }


def _norm_call(arrays):
    y, residual_out = np.empty_like(arrays["x"]), np.empty_like(arrays["x"])
    rows = arrays["x"].shape[0] * arrays["x"].shape[1]
    statistics = {"mean": np.empty(rows, np.float32), "rstd": np.empty(rows, np.float32)}
    ssm_kernels.fused_layer_norm_fwd(**arrays, y=y, residual_out=residual_out, **statistics)
    return [y, residual_out]


def _norm_judge(a):
    total = a["x"] + a["residual"]
    centred = total - total.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return [centred / scale * a["weight"] + a["bias"], total]


def _conv_inputs(random, batch, dim, seqlen):
    return {
        "x": _normal(random, batch, dim, seqlen),
        "weight": _normal(random, dim, 4),
        "bias": _normal(random, dim),
    }


def _conv_call(arrays):
    y = np.empty_like(arrays["x"])
    ssm_kernels.dw_causal_conv_fwd(**arrays, y=y, silu=True)
    return [y]


def _conv_judge(a):
    width, seqlen = a["weight"].shape[1], a["x"].shape[2]
    padded = np.pad(a["x"], ((0, 0), (0, 0), (width - 1, 0)))
    taps = [padded[:, :, k : k + seqlen] * a["weight"][:, k, None] for k in range(width)]
    return [_silu(sum(taps) + a["bias"][:, None])]


def _conv_step_inputs(random, batch, dim, seqlen):
    return {
        "x": _normal(random, batch, dim),
        "conv_state": _normal(random, batch, dim, 3),
        "weight": _normal(random, dim, 4),
        "bias": _normal(random, dim),
    }


def _conv_step_call(arrays):
    state, y = arrays["conv_state"].copy(), np.empty_like(arrays["x"])
    ssm_kernels.dw_causal_conv_step_fwd(**{**arrays, "conv_state": state}, y=y, silu=True)
    return [y, state]


def _conv_step_judge(a):
    window = np.concatenate([a["conv_state"], a["x"][:, :, None]], axis=2)
    return [_silu((window * a["weight"]).sum(-1) + a["bias"]), window[:, :, 1:]]


def _state_step_inputs(random, batch, dim, seqlen):
    dstate = 16
    return {
        "state": _normal(random, batch, dim, dstate),
        "x": _normal(random, batch, dim),
        "dt": _normal(random, batch, dim),
        "A": -np.exp(_normal(random, dim, dstate)),
        "B": _normal(random, batch, dstate),
        "C": _normal(random, batch, dstate),
        "D": _normal(random, dim),
        "z": _normal(random, batch, dim),
        "dt_bias": _normal(random, dim),
    }


def _state_step_call(arrays):
    state, y = arrays["state"].copy(), np.empty_like(arrays["x"])
    ssm_kernels.selective_state_step_fwd(**{**arrays, "state": state}, y=y, softplus=True)
    return [y, state]


def _state_step_judge(a):
    dt = np.logaddexp(0, a["dt"] + a["dt_bias"])[:, :, None]
    state = np.exp(dt * a["A"]) * a["state"] + dt * a["B"][:, None] * a["x"][:, :, None]
    y = (state * a["C"][:, None]).sum(-1) + a["D"] * a["x"]
    return [y * _silu(a["z"]), state]


def _ssd_inputs(random, batch, dim, seqlen):
    nheads, dstate = max(1, dim // 64), 128
    return {
        "X": _normal(random, batch, seqlen, nheads, dim // nheads),
        "dt": _normal(random, batch, seqlen, nheads),
        "A": -np.exp(_normal(random, nheads)),
        "B": _normal(random, batch, seqlen, 1, dstate),
        "C": _normal(random, batch, seqlen, 1, dstate),
        "D": _normal(random, nheads),
        "z": _normal(random, batch, seqlen, nheads, dim // nheads),
        "dt_bias": _normal(random, nheads),
    }


def _ssd_call(arrays):
    y = np.empty_like(arrays["X"])
    ssm_kernels.ssd_chunk_scan_fwd(**arrays, y=y, softplus=True)
    return [y]


def _ssd_judge(a):
    dt = np.logaddexp(0, a["dt"] + a["dt_bias"])
    state = np.zeros((*a["X"][:, 0].shape, a["B"].shape[3]))
    y = np.empty_like(a["X"])
    for t in range(y.shape[1]):
        drive = (dt[:, t, :, None] * a["X"][:, t])[..., None] * a["B"][:, t, :, None]
        state = np.exp(dt[:, t] * a["A"])[..., None, None] * state + drive
        y[:, t] = (state * a["C"][:, t, :, None]).sum(-1) + a["D"][:, None] * a["X"][:, t]
    return [y * _silu(a["z"])]


def _stages_inputs(random, batch, dim, seqlen):
    headdim, dstate = 8, 16
    heads = max(1, dim // headdim)
    return {
        "x": _normal(random, batch, seqlen, heads, headdim),
        "dt": _normal(random, batch, seqlen, heads),
        "A": -np.exp(_normal(random, heads)),
        "B": _normal(random, batch, seqlen, 1, dstate),
        "C": _normal(random, batch, seqlen, 1, dstate),
    }


def _stages_call(a):
    chunk = 16
    step, decay = ssm_kernels.ssd_chunk_cumsum(a["dt"], a["A"], chunk, softplus=True)
    states = ssm_kernels.ssd_chunk_state(a["x"], a["B"], step, decay)
    states_in, final_states = ssm_kernels.ssd_state_passing(states, decay)
    products = ssm_kernels.ssd_bmm_chunk(a["C"], a["B"], chunk)
    y = ssm_kernels.ssd_chunk_output(products, a["x"], step, decay, a["C"], states_in)
    return [y, final_states]


def _stages_judge(a):
    step = np.logaddexp(0, a["dt"])
    state = np.zeros((a["x"].shape[0], *a["x"].shape[2:], a["B"].shape[3]))
    y = np.empty_like(a["x"])
    for t in range(y.shape[1]):
        drive = (step[:, t, :, None] * a["x"][:, t])[..., None] * a["B"][:, t, :, None]
        state = np.exp(step[:, t] * a["A"])[:, :, None, None] * state + drive
        y[:, t] = (state * a["C"][:, t, :, None]).sum(-1)
    return [y, state]


def _gated_norm_inputs(random, batch, dim, seqlen):
    return {
        "x": _normal(random, batch, seqlen, dim),
        "weight": _normal(random, dim),
        "z": _normal(random, batch, seqlen, dim),
    }


def _gated_norm_call(arrays):
    y = np.empty_like(arrays["x"])
    ssm_kernels.gated_norm_fwd(**arrays, y=y)
    return [y]


def _gated_norm_judge(a):
    rms = np.sqrt((a["x"] ** 2).mean(-1, keepdims=True) + 1e-5)
    return [a["x"] / rms * a["weight"] * _silu(a["z"])]


def _swiglu_inputs(random, batch, dim, seqlen):
    shape = batch, seqlen, dim
    return {"gate": _normal(random, *shape), "up": _normal(random, *shape)}


def _swiglu_call(arrays):
    y = np.empty_like(arrays["gate"])
    ssm_kernels.swiglu_fwd(**arrays, y=y)
    return [y]


def _swiglu_judge(a):
    return [_silu(a["gate"]) * a["up"]]


CASES = {
    "selective_scan": Case(_scan_inputs, _scan_call, _scan_judge, (1, 512, 2048)),
    "selective_state_step": Case(
        _state_step_inputs, _state_step_call, _state_step_judge, (1, 1536, 1)
    ),
    "dw_causal_conv": Case(_conv_inputs, _conv_call, _conv_judge, (1, 1536, 2048)),
    "dw_causal_conv_step": Case(_conv_step_inputs, _conv_step_call, _conv_step_judge, (1, 1536, 1)),
    "ssd_chunk_scan": Case(_ssd_inputs, _ssd_call, _ssd_judge, (1, 1536, 2048)),
    "fused_layer_norm": Case(_norm_inputs, _norm_call, _norm_judge, (1, 1024, 2048)),
    "gated_norm": Case(_gated_norm_inputs, _gated_norm_call, _gated_norm_judge, (1, 1536, 2048)),
    "swiglu": Case(_swiglu_inputs, _swiglu_call, _swiglu_judge, (1, 1536, 2048)),
    "ssd_stages": Case(_stages_inputs, _stages_call, _stages_judge, (1, 1536, 512)),
}


def error_of(op: str) -> float:
    """Run one operator's problem.

    Args:
        op: name of the operator.

    Returns:
        The largest difference from the judge, relative to the largest value; inf for a NaN.
    """
    case = CASES[op]
    # Odd sizes, so that the ends of vectors and tiles are reached.
    arrays = case.inputs(np.random.default_rng(0), 2, 19, 37)
    got = case.call(arrays)
    wanted = case.judge({name: array.astype(np.float64) for name, array in arrays.items()})
    errors = [np.abs(g - w).max() / np.abs(w).max() for g, w in zip(got, wanted, strict=True)]
    return float(np.nan_to_num(max(errors), nan=np.inf))
