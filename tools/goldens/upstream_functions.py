"""Upstream's functions, called by our names: references on a CPU, kernels on a GPU.

``load`` imports upstream; on a CPU it also puts references where upstream's modules would call
kernels, before those modules import them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from tools.goldens import clone
from tools.goldens.files import Fault

_OPERATORS = (
    "ops.triton.layer_norm",
    "ops.triton.layernorm_gated",
    "ops.triton.selective_state_update",
    "ops.selective_scan_interface",
    "ops.triton.ssd_chunk_state",
    "ops.triton.ssd_state_passing",
    "ops.triton.ssd_chunk_scan",
    "ops.triton.ssd_combined",
)
_MODULES = (
    "modules.ssd_minimal",
    "modules.mamba_simple",
    "modules.mamba2",
    "modules.mha",
    "models.config_mamba",
    "models.mixer_seq_simple",
    "utils.generation",
)
_CONV_MODULES = ("causal_conv1d_interface",)

# Reference -> the function that runs kernels; both are in the same file. Others have no kernel.
_KERNELS = {
    "selective_scan_interface.selective_scan_ref": "selective_scan_fn",
    "selective_state_update.selective_state_update_ref": "selective_state_update",
    "ssd_combined.ssd_chunk_scan_combined_ref": "mamba_chunk_scan_combined",
    "ssd_chunk_state.chunk_state_ref": "chunk_state",
    "ssd_state_passing.state_passing_ref": "state_passing",
    "ssd_chunk_scan.chunk_scan_ref": "chunk_scan",
    "causal_conv1d_interface.causal_conv1d_ref": "causal_conv1d_fn",
    "causal_conv1d_interface.causal_conv1d_update_ref": "causal_conv1d_update",
    "layer_norm.layer_norm_ref": "layer_norm_fn",
    "layer_norm.rms_norm_ref": "rms_norm_fn",
    "layernorm_gated.rms_norm_ref": "rmsnorm_fn",
}
# Outputs through which upstream's kernels let no gradient flow.
CUT_ON_CUDA = {"selective_scan_interface.selective_scan_ref": ("last_state",)}

ARITHMETIC = {
    "cpu": "references of upstream in float64; its casts to float32 are left out",
    "cuda": "kernels of upstream in float32, as they are",
}


class KeepFloat64(TorchFunctionMode):
    """Leaves out casts from float64 to float32, so that upstream's formulas run in float64.

    Upstream widens half types with ``.float()`` here and there; on float64 that would be the one
    rounding that decides how closely its result can be held.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run a function of torch, or return a float64 tensor as it is in place of a cast."""
        kwargs = kwargs or {}
        if func in (torch.Tensor.float, torch.Tensor.to) and args[0].dtype == torch.float64:
            wanted = (*args[1:], *kwargs.values())
            if func is torch.Tensor.float or torch.float32 in wanted:
                return args[0]
        return func(*args, **kwargs)


class Upstream:
    """Upstream's code, loaded.

    Args:
        files: last part of a module's name -> module.
        device: where everything runs.
    """

    def __init__(self, files: dict, device: str) -> None:
        self.files = files
        self.device = device
        self.on_cpu = device == "cpu"

    def function(self, name: str):
        """Return the function that a golden names, `<file>.<function>`, or its kernel on a GPU."""
        file, _, reference = name.partition(".")
        return getattr(
            self.files[file], reference if self.on_cpu else _KERNELS.get(name, reference)
        )

    def has(self, name: str) -> bool:
        """Return whether the file of a function was loaded."""
        return name.partition(".")[0] in self.files

    def arithmetic(self) -> contextlib.AbstractContextManager:
        """Return the context in which upstream's code is run."""
        return KeepFloat64() if self.on_cpu else contextlib.nullcontext()

    def dtype(self) -> torch.dtype:
        """Return the element type of the computation."""
        return torch.float64 if self.on_cpu else torch.float32


def load(mamba: Path, conv: Path | None, device: str) -> Upstream:
    """Import upstream.

    Args:
        mamba: clone of state-spaces/mamba.
        conv: clone of causal-conv1d, or None. On a GPU the installed package serves.
        device: "cpu" or "cuda:N".

    Raises:
        Fault: something that upstream imports is missing.
    """
    kind = device.partition(":")[0]
    files = clone.modules(clone.MAMBA, mamba, _OPERATORS, kind)
    if kind == "cpu":
        _replace_kernels(files)
    files |= clone.modules(clone.MAMBA, mamba, _MODULES, kind)
    if conv is not None:
        files |= clone.modules(clone.CONV, conv, _CONV_MODULES, kind)
    return Upstream(files, device)


def _replace_kernels(files: dict) -> None:
    """Put references where modules of upstream call kernels."""
    layer_norm, gated = files["layer_norm"], files["layernorm_gated"]
    scan, combined = files["selective_scan_interface"], files["ssd_combined"]

    def layer_norm_fn(*args, is_rms_norm=False, residual_in_fp32=False, **kwargs):
        reference = layer_norm.rms_norm_ref if is_rms_norm else layer_norm.layer_norm_ref
        return reference(*args, **kwargs)

    def rms_norm_fn(*args, residual_in_fp32=False, **kwargs):
        return layer_norm.rms_norm_ref(*args, **kwargs)

    def chunk_scan(
        x, dt, A, B, C, chunk_size, seq_idx=None, cu_seqlens=None, return_final_states=False,
        return_varlen_states=False, **kwargs,
    ):  # fmt: skip
        if seq_idx is not None or cu_seqlens is not None:
            raise Fault("packed sequences must not be asked for on cpu, got seq_idx or cu_seqlens")
        states = []

        def scan_and_keep_state(*args, **named):
            out, last_state = scan.selective_scan_ref(*args, return_last_state=True, **named)
            states.append(last_state)
            return out

        # The one reference for any number of steps returns no state, and looks this name up when
        # it is called.
        scan.selective_scan_fn = scan_and_keep_state
        try:
            y = combined.ssd_selective_scan(x, dt, A, B, C, **kwargs)
        finally:
            scan.selective_scan_fn = scan.selective_scan_ref
        return (y, states[0].unflatten(1, x.shape[2:])) if return_final_states else y

    layer_norm.layer_norm_fn = layer_norm_fn
    layer_norm.rms_norm_fn = rms_norm_fn
    gated.rmsnorm_fn = gated.rms_norm_ref
    scan.selective_scan_fn = scan.selective_scan_ref
    combined.mamba_chunk_scan_combined = chunk_scan
    update = files["selective_state_update"]
    update.selective_state_update = update.selective_state_update_ref


def call(upstream: Upstream, golden, arguments: dict) -> dict:
    """Return the outputs of a golden's function by our names.

    Args:
        upstream: loaded code.
        golden: an entry of ``tests.golden_cases.OPERATORS``.
        arguments: tensors and flags by our names; a state that is updated in place is copied.

    Returns:
        Output name -> tensor.
    """
    with upstream.arithmetic():
        return _CONVERSIONS[golden.function](
            upstream, upstream.function(golden.function), dict(arguments)
        )


def _selective_scan(upstream, function, a):
    y, last_state = function(
        a["u"], a["delta"], a["A"], a["B"], a["C"], a["D"], a["z"], a["dt_bias"], a["softplus"],
        return_last_state=True,
    )  # fmt: skip
    return {"y": y, "last_state": last_state}


def _state_update(upstream, function, a):
    state = a["state"].clone()
    if state.dim() == 4 and a["dt"].dim() == 2:  # tied heads: expanded, as upstream's module does
        headdim, dstate = state.shape[2:]
        for name in ("dt", "D", "dt_bias"):
            if a[name] is not None:
                a[name] = a[name][..., None].expand(*a[name].shape, headdim)
        a["A"] = a["A"][:, None, None].expand(-1, headdim, dstate)
    y = function(
        state, a["x"], a["dt"], a["A"], a["B"], a["C"], a["D"], a["z"], a["dt_bias"],
        dt_softplus=a["softplus"],
    )  # fmt: skip
    return {"y": y, "state": state}


def _ssd_combined(upstream, function, a):
    y = function(
        a["X"], a["dt"], a["A"], a["B"], a["C"], a["chunk_size"], D=a["D"], z=a["z"],
        dt_bias=a["dt_bias"], dt_softplus=a["softplus"],
    )  # fmt: skip
    return {"y": y}


def _ssd_selective_scan(upstream, function, a):
    limit = {"dt_limit": a["dt_limit"]} if "dt_limit" in a else {}
    y = function(
        a["X"], a["dt"], a["A"], a["B"], a["C"], D=a["D"], z=a["z"], dt_bias=a["dt_bias"],
        dt_softplus=a["softplus"], **limit,
    )  # fmt: skip
    return {"y": y}


def _ssd_minimal(upstream, function, a):
    heads = a["X"].shape[2]
    B, C = (a[n].repeat_interleave(heads // a[n].shape[2], 2) for n in ("B", "C"))
    dt, initial = a["dt"], a["initial_states"]
    y, final_states = function(
        a["X"] * dt[..., None], a["A"] * dt, B, C, a["chunk_size"], initial[:, None]
    )
    return {"y": y, "final_states": final_states}


def _chunk_state(upstream, function, a):
    return {"states": function(a["B"], a["x"], a["dt"], a["dA_cumsum"])}


def _state_passing(upstream, function, a):
    # Upstream has one axis for the elements of a state, and takes the last decay of each chunk.
    shape = a["states"].shape[3:]
    initial = a["initial_states"].flatten(2)
    states_in, final = function(a["states"].flatten(3), a["dA_cumsum"][..., -1], initial)
    return {"states_in": states_in.unflatten(3, shape), "final_states": final.unflatten(2, shape)}


def _chunk_scan(upstream, function, a):
    y = function(
        a["B"], a["C"], a["x"], a["dt"], a["dA_cumsum"], a["states_in"], D=a["D"], z=a["z"]
    )
    return {"y": y}


def _causal_conv1d(upstream, function, a):
    x, initial = a["x"], a["initial_state"]
    if not upstream.on_cpu and initial is not None:
        # The kernel takes and gives states in the layout of channels last.
        x, initial = (t.mT.contiguous().mT for t in (x, initial))
    y = function(
        x, a["weight"], a["bias"], initial_states=initial,
        return_final_states=initial is not None, activation=a["activation"],
    )  # fmt: skip
    return {"y": y} if initial is None else dict(zip(("y", "final_state"), y, strict=True))


def _causal_conv1d_update(upstream, function, a):
    state = a["conv_state"].clone()
    y = function(
        a["x"], state, a["weight"], a["bias"], a["activation"], cache_seqlens=a["cache_seqlens"]
    )
    return {"y": y, "conv_state": state}


def _layer_norm(upstream, function, a):
    y, total = function(a["x"], a["weight"], a["bias"], a["residual"], eps=1e-5, prenorm=True)
    return {"y": y, "sum": total}


def _gated_norm(upstream, function, a):
    y = function(
        a["x"], a["weight"], a["bias"], z=a["z"], eps=1e-5, group_size=a["group_size"],
        norm_before_gate=a["norm_before_gate"],
    )  # fmt: skip
    return {"y": y}


# Function -> how it is called with our arguments.
_CONVERSIONS = {
    "selective_scan_interface.selective_scan_ref": _selective_scan,
    "selective_state_update.selective_state_update_ref": _state_update,
    "ssd_combined.ssd_chunk_scan_combined_ref": _ssd_combined,
    "ssd_combined.ssd_selective_scan": _ssd_selective_scan,
    "ssd_minimal.ssd_minimal_discrete": _ssd_minimal,
    "ssd_chunk_state.chunk_state_ref": _chunk_state,
    "ssd_state_passing.state_passing_ref": _state_passing,
    "ssd_chunk_scan.chunk_scan_ref": _chunk_scan,
    "causal_conv1d_interface.causal_conv1d_ref": _causal_conv1d,
    "causal_conv1d_interface.causal_conv1d_update_ref": _causal_conv1d_update,
    "layer_norm.layer_norm_ref": _layer_norm,
    "layer_norm.rms_norm_ref": _layer_norm,
    "layernorm_gated.rms_norm_ref": _gated_norm,
}
