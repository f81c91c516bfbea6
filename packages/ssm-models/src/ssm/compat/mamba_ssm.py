"""The names of the ``mamba_ssm`` package, all in one place, with its signatures.

Every function takes the arguments of its namesake in the same order; one that cannot be honoured is
refused with a sentence. What they compute, they compute on any device, in any layout, and with
gradients for every tensor, final states included.
"""

from ssm.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ssm.compat.classes import (
    MHA,
    Block,
    GatedMLP,
    InferenceParams,
    Mamba,
    Mamba2,
    MambaConfig,
    MambaLMHeadModel,
)
from ssm.compat.functions import (
    mamba_chunk_scan_combined,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
    selective_scan_fn,
    selective_state_update,
)
from ssm.compat.generation import GenerationMixin, decode, sample
from ssm.compat.models import (
    MixerModel,
    _init_weights,  # noqa: F401 - people import it
    create_block,
    load_config_hf,
    load_state_dict_hf,
)
from ssm.compat.norms import (
    LayerNormGated,
    RMSNorm,
    RMSNormGated,
    layer_norm_fn,
    layernorm_fn,
    rms_norm_fn,
    rmsnorm_fn,
)
from ssm.compat.references import (
    layer_norm_ref,
    mamba_inner_ref,
    mamba_split_conv1d_scan_ref,
    rms_norm_gated_ref,
    rms_norm_ref,
    segsum,
    selective_scan_ref,
    selective_state_update_ref,
    ssd_chunk_scan_combined_ref,
    ssd_minimal_discrete,
)

__all__ = [
    "MHA",
    "Block",
    "GatedMLP",
    "GenerationMixin",
    "InferenceParams",
    "LayerNormGated",
    "Mamba",
    "Mamba2",
    "MambaConfig",
    "MambaLMHeadModel",
    "MixerModel",
    "RMSNorm",
    "RMSNormGated",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "create_block",
    "decode",
    "layer_norm_fn",
    "layer_norm_ref",
    "layernorm_fn",
    "load_config_hf",
    "load_state_dict_hf",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "mamba_split_conv1d_scan_combined",
    "mamba_split_conv1d_scan_ref",
    "rms_norm_fn",
    "rms_norm_gated_ref",
    "rms_norm_ref",
    "rmsnorm_fn",
    "sample",
    "segsum",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
    "ssd_chunk_scan_combined_ref",
    "ssd_minimal_discrete",
]
