"""Tiny configs of the families of transformers that are loaded, one table for all tests of them."""

from __future__ import annotations

import importlib.util
import math

import pytest

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
GRANITE = {
    **SMALL,
    **ATTENTION,
    **MAMBA2,
    "shared_intermediate_size": 48,
    "num_local_experts": 0,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 49.0,
}
FALCON_H1 = {
    **SMALL,
    **ATTENTION,
    **MAMBA2,
    "mamba_d_ssm": 64,
    "intermediate_size": 48,
    "embedding_multiplier": 5.65,
    "lm_head_multiplier": 0.039,
    "key_multiplier": 0.39,
    "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.93,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.23,
    "ssm_multipliers": [0.35, 0.25, 0.17, 0.5, 0.35],
    "mlp_multipliers": [0.88, 0.58],
}

# Case -> (model_type, fields of its config).
FAMILIES = {
    "mamba": ("mamba", {**SMALL, "state_size": 8}),
    "mamba-untied": (
        "mamba",
        {**SMALL, "tie_word_embeddings": False, "use_bias": True, "time_step_rank": 5},
    ),
    "mamba-wide": ("mamba", {**SMALL, "state_size": 8, "intermediate_size": 40}),
    "mamba2": (
        "mamba2",
        {
            **SMALL,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 16,
            "layer_norm_epsilon": 1e-6,
            "time_step_limit": [0.01, 0.5],
        },
    ),
    "falcon_mamba": ("falcon_mamba", {**SMALL, "state_size": 8, "mixer_rms_eps": 1e-4}),
    "bamba": (
        "bamba",
        {**SMALL, **ATTENTION, **MAMBA2, "intermediate_size": 48, "attn_layer_indices": [1]},
    ),
    "bamba-biased": (
        "bamba",
        {
            **SMALL,
            **ATTENTION,
            **MAMBA2,
            "intermediate_size": 48,
            "attn_layer_indices": [0, 2],
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "bamba-turned": (
        "bamba",
        {
            **SMALL,
            **ATTENTION,
            **MAMBA2,
            "intermediate_size": 48,
            "attn_layer_indices": [1],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "granitemoehybrid": ("granitemoehybrid", GRANITE),
    "granitemoehybrid-rope": (
        "granitemoehybrid",
        {**GRANITE, "position_embedding_type": "rope", "tie_word_embeddings": True},
    ),
    "granitemoehybrid-attention": (
        "granitemoehybrid",
        {**GRANITE, "position_embedding_type": "rope", "layer_types": ["full_attention"] * 3},
    ),
    "bamba-recurrent": (
        "bamba",
        {**SMALL, **ATTENTION, **MAMBA2, "intermediate_size": 48},
    ),
    "jamba": (
        "jamba",
        {
            **SMALL,
            **ATTENTION,
            "intermediate_size": 48,
            "num_experts": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
        },
    ),
    "jamba-narrow": (
        "jamba",
        {
            **SMALL,
            **ATTENTION,
            "head_dim": 6,
            "intermediate_size": 48,
            "num_experts": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "hybrid_override_pattern": "M-M*-",
            **ATTENTION,
            "head_dim": 12,
            "intermediate_size": 48,
            "mamba_num_heads": 8,
            "mamba_head_dim": 6,
            "n_groups": 2,
            "ssm_state_size": 16,
            "chunk_size": 16,
        },
    ),
    "nemotron_h-recurrent": (
        "nemotron_h",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "layers_block_type": ["linear_attention", "mlp", "linear_attention"],
            **ATTENTION,
            "intermediate_size": 48,
            "mlp_bias": True,
            "use_bias": True,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 16,
            "time_step_min": 0.01,
        },
    ),
    "nemotron_h-mixers": (
        "nemotron_h",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "layers_block_type": ["linear_attention", "full_attention", "linear_attention"],
            **ATTENTION,
            "head_dim": 8,
            "intermediate_size": 48,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 16,
        },
    ),
    "falcon_h1": ("falcon_h1", FALCON_H1),
    "falcon_h1-normed": (
        "falcon_h1",
        {**FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "falcon_h1-gated-last": (
        "falcon_h1",
        {**FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": True},
    ),
}

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: nothing to compare with",
)


def build(case: str):
    """Return a random float32 model of transformers, every parameter away from its default."""
    import torch
    import transformers

    family, fields = FAMILIES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter) * 2)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.copy_(torch.rand_like(parameter) * 3 - 4)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            else:
                spread = 1 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.5
                parameter.copy_(torch.randn_like(parameter) * spread)
    return model
