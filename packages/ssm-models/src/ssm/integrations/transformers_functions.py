"""The kernel functions of transformers' Mamba modules, with its parameter names, on our operators.

Each maker takes the function that it replaces. What we do not serve (a device without kernels, an
activation that is not SiLU) goes to that function, so nothing is ever slower or refused for us.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from ssm import ops
from ssm.seq_meta import SeqMeta
from ssm.utils import dispatch

NO_LIMIT = (0.0, float("inf"))
_SILU = (None, "silu", "swish")
# What models call. A device without kernels for one of them is left to transformers.
OPERATORS = {
    "dw_causal_conv",
    "dw_causal_conv_step",
    "fused_layer_norm",
    "gated_norm",
    "selective_scan",
    "selective_state_step",
    "ssd_chunk_scan",
}
_devices: dict[str, bool] = {}  # device type -> whether its kernels of these load


def serves(tensor, activation: str | None = None) -> bool:
    """Return whether our kernels take a call.

    Args:
        tensor: its main input, any shape and dtype.
        activation: of its convolution.

    Returns:
        True if there are kernels for the device of the tensor and for the activation.
    """
    return serves_device(tensor.device.type) and activation in _SILU


def serves_device(kind: str) -> bool:
    """Return whether the kernels that models call load for a device; the first call loads them.

    Args:
        kind: device type.
    """
    if kind not in _devices:
        _devices[kind] = dispatch.has_kernels(kind, OPERATORS)
    return _devices[kind]


def missing_kernels() -> str:
    """Return why an operator that models call is not compiled for the CPU."""
    return next(dispatch.why(op) for op in OPERATORS if not dispatch.has_kernels("cpu", (op,)))


def layout(seq_idx, cu_seqlens, wants_state: bool) -> SeqMeta | None:
    """Return which steps belong together, from what transformers hands down for packed batches.

    Args:
        seq_idx: (B, L) int, sequence of each step, or None.
        cu_seqlens: (S + 1,) int, boundaries over the flattened steps, or None.
        wants_state: a state is read or written, which holds one row per row of the batch.

    Returns:
        The layout, None without packing.

    Raises:
        ValueError: ``cu_seqlens`` alone with a state.
    """
    if seq_idx is not None:
        return SeqMeta(seq_idx=seq_idx)
    if cu_seqlens is None:
        return None
    if wants_state:
        raise ValueError(
            "ssm.integrations.transformers: seq_idx must be given for packed sequences with a "
            "cache, got cu_seqlens alone"
        )
    return SeqMeta(cu_seqlens=cu_seqlens)


def _causal_conv1d_update(original: Callable) -> Callable:
    @functools.wraps(original)
    def causal_conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
        if not serves(hidden_states, activation):
            return original(hidden_states, conv_state, weight, bias, activation=activation)
        return ops.dw_causal_conv_step(hidden_states, conv_state, weight, bias, activation)

    return causal_conv1d_update


def _causal_conv1d_fn(original: Callable) -> Callable:
    @functools.wraps(original)
    def causal_conv1d_fn(
        hidden_states, weight, bias=None, activation=None, seq_idx=None, cu_seqlens=None, **kwargs
    ):
        if not serves(hidden_states, activation):
            kwargs |= {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        meta = layout(seq_idx, cu_seqlens, False)
        return ops.dw_causal_conv(hidden_states, weight, bias, activation, seq_meta=meta)

    return causal_conv1d_fn


def _causal_conv1d_fn_unpacked(original: Callable) -> Callable:
    """In front of a scan that gets no sequence ids: these must be refused here, not half obeyed."""
    served = _causal_conv1d_fn(original)

    @functools.wraps(original)
    def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
        packed = kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None
        function = original if packed else served
        return function(hidden_states, weight, bias, activation=activation, **kwargs)

    return causal_conv1d_fn


def _declined(original: Callable) -> Callable:
    """The fused training functions: None makes transformers take the path of evaluation.

    What upstream fuses norms the step sizes of Falcon Mamba behind their projection, and those of
    Falcon H1 on the wrong side of the gate; the path of evaluation is right in both.
    """

    @functools.wraps(original)
    def declined(tensor, *args, **kwargs):
        return None if serves(tensor) else original(tensor, *args, **kwargs)

    return declined


def _selective_scan(original: Callable) -> Callable:
    @functools.wraps(original)
    def mamba_selective_scan(
        hidden_states,
        dt,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        **kwargs,
    ):
        if not serves(hidden_states):
            kwargs |= {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
            kwargs["return_last_state"] = return_last_state
            return original(hidden_states, dt, A, B, C, **kwargs)
        return ops.selective_scan(
            hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )

    return mamba_selective_scan


def _chunk_scan(original: Callable) -> Callable:
    @functools.wraps(original)
    def mamba2_chunk_scan(
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=None,
        dt_bias=None,
        initial_states=None,
        dt_softplus=False,
        dt_limit=NO_LIMIT,
        return_final_states=False,
        z=None,
        seq_idx=None,
        cu_seqlens=None,
        **kwargs,
    ):
        if not serves(hidden_states):
            kwargs |= {"D": D, "dt_bias": dt_bias, "initial_states": initial_states}
            kwargs |= {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "z": z}
            kwargs |= {"return_final_states": return_final_states, "seq_idx": seq_idx}
            kwargs["cu_seqlens"] = cu_seqlens
            return original(hidden_states, dt, A, B, C, chunk_size, **kwargs)
        return ops.ssd_chunk_scan(
            hidden_states,
            dt,
            A,
            B,
            C,
            chunk_size,
            D,
            z,
            layout(seq_idx, cu_seqlens, return_final_states or initial_states is not None),
            initial_states,
            dt_bias=dt_bias,
            softplus=dt_softplus,
            dt_limit=NO_LIMIT if dt_limit is None else dt_limit,
            return_final_states=return_final_states,
        )

    return mamba2_chunk_scan


def _selective_state_update(original: Callable) -> Callable:
    @functools.wraps(original)
    def selective_state_update(
        state,
        hidden_states,
        dt,
        A,
        B,
        C,
        D=None,
        dt_bias=None,
        dt_softplus=False,
        z=None,
        **kwargs,
    ):
        if not serves(hidden_states):
            kwargs |= {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "z": z}
            return original(state, hidden_states, dt, A, B, C, **kwargs)
        return ops.selective_state_step(
            state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus
        )

    return selective_state_update


MAMBA1 = {
    "causal_conv1d_fn": _causal_conv1d_fn_unpacked,
    "causal_conv1d_update": _causal_conv1d_update,
    "mamba_inner_fn": _declined,
    "mamba_selective_scan": _selective_scan,
    "mamba_selective_state_update": _selective_state_update,
}
MAMBA2 = {
    "causal_conv1d_fn": _causal_conv1d_fn,
    "causal_conv1d_update": _causal_conv1d_update,
    "mamba2_split_conv1d_scan_combined": _declined,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _selective_state_update,
}
