"""Upstream's code, imported and made ready: references on a CPU, kernels on a GPU.

On a CPU references also take the places of kernels that upstream's modules would call, before those
modules import them.
"""

from __future__ import annotations

import contextlib
import inspect

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
    "modules.mlp",
    "modules.block",
    "models.config_mamba",
    "models.mixer_seq_simple",
    "utils.generation",
)
_CONV_MODULES = ("causal_conv1d_interface", "causal_conv1d_varlen")
_ROTARY_MODULES = ("layers.rotary",)

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
            wanted = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, torch.dtype)]
            if func is torch.Tensor.float or torch.float32 in wanted:
                return args[0]
        if func is torch.arange and kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}  # positions and frequencies to turn by
        return func(*args, **kwargs)


class Upstream:
    """Upstream's code, loaded.

    Args:
        files: last part of a module's name -> module.
        device: where everything runs.
        signatures: of the functions and classes in ``tests.golden_cases.SIGNATURES``.
    """

    def __init__(self, files: dict, device: str, signatures: dict) -> None:
        self.files = files
        self.device = device
        self.on_cpu = device == "cpu"
        self.signatures = signatures

    def arithmetic(self) -> contextlib.AbstractContextManager:
        """Return the context in which upstream's code is run."""
        return KeepFloat64() if self.on_cpu else contextlib.nullcontext()

    def dtype(self) -> torch.dtype:
        """Return the element type of the computation."""
        return torch.float64 if self.on_cpu else torch.float32


def load(clones: dict, device: str) -> Upstream:
    """Import upstream.

    Args:
        clones: Repository -> folder. Those beside MAMBA may be left out on a CPU; on a GPU the
            installed packages serve.
        device: "cpu" or "cuda:N".

    Raises:
        Fault: something that upstream imports is missing.
    """
    mamba = (clone.MAMBA, clones[clone.MAMBA])
    if device != "cpu":
        files = clone.modules(*mamba, (*_OPERATORS, *_MODULES), device)
        files |= clone.installed(clone.CONV, _CONV_MODULES, device)
        files |= clone.installed(clone.ROTARY, _ROTARY_MODULES, device)
        return Upstream(files, device, _signatures(files))
    files = {}
    if clone.ROTARY in clones:  # before the attention, which looks for it
        files = clone.modules(clone.ROTARY, clones[clone.ROTARY], _ROTARY_MODULES, device)
        _replace_rotary(files["rotary"])
    files |= clone.modules(*mamba, _OPERATORS, device)
    signatures = _signatures(files)
    _replace_kernels(files)
    files |= clone.modules(*mamba, _MODULES, device)
    if clone.CONV in clones:  # behind the modules, which have fallbacks without it
        files |= clone.modules(clone.CONV, clones[clone.CONV], _CONV_MODULES, device)
        for file in ("selective_scan_interface", "ssd_combined"):
            files[file].causal_conv1d_fn = files["causal_conv1d_interface"].causal_conv1d_ref
    return Upstream(files, device, {**_signatures(files), **signatures})


def _signatures(files: dict) -> dict:
    """Return `<package>.<name>` -> parameters with defaults, of what has been loaded."""
    from tests.golden_cases import SIGNATURES

    return {
        f"{package}.{name}": signature(getattr(files[file], name))
        for package, names in SIGNATURES.items()
        for name, file in names.items()
        if file in files
    }


def signature(function) -> list[str]:
    """Return the parameters of a function or class as text, without annotations."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        if default is parameter.empty:
            text = str(parameter.replace(annotation=parameter.empty))
        else:  # the text of a function would hold its address
            text = f"{parameter.name}={getattr(default, '__name__', repr(default))}"
        found.append(text)
    return found


def _replace_rotary(rotary) -> None:
    """Let rotary embeddings turn by flash-attn's reference in place of its kernel."""

    def apply_rotary(
        x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False,
        inplace=False, conjugate=False,
    ):  # fmt: skip
        if cu_seqlens is not None:
            raise Fault("packed sequences must not be asked for on cpu, got cu_seqlens")
        cos, sin = (t[seqlen_offsets : seqlen_offsets + x.shape[1]] for t in (cos, sin))
        turned = rotary.apply_rotary_emb_torch(x, cos, -sin if conjugate else sin, interleaved)
        if not inplace:
            return turned
        x.data.copy_(turned)  # as a kernel writes: autograd takes no notice
        return x

    rotary.apply_rotary = apply_rotary


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
    gated.rmsnorm_fn = combined.rmsnorm_fn = gated.rms_norm_ref
    scan.selective_scan_fn = scan.selective_scan_ref
    combined.mamba_chunk_scan_combined = chunk_scan
    update = files["selective_state_update"]
    update.selective_state_update = update.selective_state_update_ref
