"""Upstream's functions, called with our arguments."""

from __future__ import annotations

from tools.goldens.upstream_loading import Upstream

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


def call(upstream: Upstream, golden, arguments: dict) -> dict:
    """Return the outputs of a golden's function by our names.

    Args:
        upstream: loaded code.
        golden: an entry of ``tests.golden_cases.OPERATORS``.
        arguments: tensors and flags by our names; a state that is updated in place is copied.

    Returns:
        Output name -> tensor.
    """
    file, _, name = golden.function.partition(".")
    if not upstream.on_cpu:
        name = _KERNELS.get(golden.function, name)
    function = getattr(upstream.files[file], name)
    with upstream.arithmetic():
        return _CONVERSIONS[golden.function](upstream, function, dict(arguments))


def call_compat(upstream: Upstream, golden, arguments: dict) -> dict:
    """Return the outputs of a golden of ``tests.golden_cases.COMPAT`` by their number."""
    file, _, name = golden.function.partition(".")
    if not upstream.on_cpu:
        name = golden.ours.partition(".")[2]
    with upstream.arithmetic():
        found = getattr(upstream.files[file], name)(**arguments)
    return {str(i): t for i, t in enumerate(found if isinstance(found, tuple) else (found,))}


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
