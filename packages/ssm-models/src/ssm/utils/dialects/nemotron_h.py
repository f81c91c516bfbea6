"""nemotron_h of transformers without experts: every block is Mamba-2, attention or an MLP."""

from __future__ import annotations

import math

from ssm.utils.dialects import hybrid
from ssm.utils.dialects.mamba import ALIASES
from ssm.utils.dialects.mamba2 import expand_of
from ssm.utils.dialects.table import Dialect, Field, Parts


def _kinds(values):
    kinds = values["layers_block_type"]
    return values["hybrid_override_pattern"] or [] if kinds is None else kinds


def _blocks(kind: str):
    return lambda values: hybrid.layers_of(_kinds(values), kind)


NEMOTRON_H = Dialect(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    fields=(
        Field("hidden_size", "d_model", 4096),
        Field("vocab_size", "vocab_size", 131072),
        Field("mlp_bias", "mlp_cfg.bias", False),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("ssm_state_size", "ssm_cfg.d_state", 128),
        Field("mamba_head_dim", "ssm_cfg.headdim", 64),
        Field("n_groups", "ssm_cfg.ngroups", 8),
        Field("conv_kernel", "ssm_cfg.d_conv", 4),
        Field("use_bias", "ssm_cfg.bias", False),
        Field("use_conv_bias", "ssm_cfg.conv_bias", True),
        Field("num_attention_heads", "attn_cfg.num_heads", 32),
        Field("num_key_value_heads", "attn_cfg.num_heads_kv", 8),
        Field("head_dim", "attn_cfg.head_dim", 128),
    ),
    defaults={
        "hybrid_override_pattern": None,
        "intermediate_size": 21504,
        "layer_norm_epsilon": 1e-5,
        "layers_block_type": None,
        "mamba_num_heads": 128,
        # transformers clamps the step sizes to this, and not to time_step_limit.
        "time_step_min": 1e-3,
    },
    derive={
        "n_layer": lambda v: len(_kinds(v)),
        "attn_layer_idx": _blocks("attention"),
        "mlp_layer_idx": _blocks("mlp"),
        # With no block that is an MLP alone, ours would have one in every block.
        "d_intermediate": lambda v: v["intermediate_size"] if _blocks("mlp")(v) else 0,
        "norm_epsilon": lambda v: v["layer_norm_epsilon"],
        "ssm_cfg.norm_eps": lambda v: v["layer_norm_epsilon"],
        "ssm_cfg.expand": lambda v: expand_of(
            v, "mamba_num_heads", "mamba_head_dim", "hidden_size"
        ),
        "ssm_cfg.dt_limit": lambda v: [v["time_step_min"], math.inf],
    },
    emit={
        "layers_block_type": hybrid.layer_types,
        "intermediate_size": lambda form: form["d_intermediate"],
        "layer_norm_epsilon": lambda form: form["norm_epsilon"],
        "mamba_num_heads": lambda form: form["ssm_cfg"]["nheads"],
        "time_step_min": lambda form: form["ssm_cfg"]["dt_limit"][0],
    },
    ours={
        "pad_vocab_size_multiple": 1,
        "residual_in_fp32": False,
        "ssm_cfg.layer": "Mamba2",
        "mlp_cfg.layer": "MLP",
        "attn_cfg.qkv_proj_bias": False,
        "attn_cfg.out_proj_bias": False,
    },
    fixed={
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "sliding_window": (None,),
    },
    agree={
        "num_hidden_layers": lambda v: len(_kinds(v)),
        "num_query_groups": lambda v: v["num_key_value_heads"],
        "mamba_state_dim": lambda v: v["ssm_state_size"],
    },
    kept=frozenset({"intermediate_size"}),
    legacy={
        "layer_types": "layers_block_type",
        "mamba_n_groups": "n_groups",
        "mamba_d_conv": "conv_kernel",
        "mamba_dt_min": "time_step_min",
        "mamba_dt_max": "time_step_max",
        "mamba_dt_limit": "time_step_limit",
        "mamba_dt_init_floor": "time_step_floor",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_chunk_size": "chunk_size",
        "mamba_expand": "expand",
        "rms_norm_eps": "layer_norm_epsilon",
        "attention_head_dim": "head_dim",
    },
    ignored=frozenset(
        hybrid.NO_EFFECT
        | {
            "chunk_size",
            "expand",
            "hidden_act",
            "hidden_dropout",
            "mamba_proj_bias",
            "mamba_ssm_cache_dtype",
            "n_group",
            "n_routed_experts",
            "n_shared_experts",
            "moe_intermediate_size",
            "moe_latent_size",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_overlap",
            "mtp_hybrid_override_pattern",
            "mtp_layers_block_type",
            "norm_topk_prob",
            "num_experts_per_tok",
            "num_nextn_predict_layers",
            "rescale_prenorm_residual",
            "residual_in_fp32",
            "routed_scaling_factor",
            "time_step_floor",
            "time_step_limit",
            "time_step_max",
            "time_step_rank",
            "topk_group",
        }
    ),
    nullable=frozenset({"num_key_value_heads"}),
    refused=((lambda v: bool(_blocks("moe")(v)), "experts (blocks of type moe)"),),
    names={
        "backbone.embedding": "backbone.embeddings",
        "norm2": "norm",
        "mlp.fc1": "mixer.up_proj",
        "mlp.fc2": "mixer.down_proj",
    },
    attention_names={
        "mixer.in_proj": Parts(("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), hybrid.qkv_rows),
        "mixer.out_proj": "mixer.o_proj",
    },
    aliases=((r"^model\.", "backbone."), *ALIASES, (r"\.mixer\._fp32_params\.", ".mixer.")),
    # Layers for the prediction of several tokens.
    skipped=r"^mtp\.",
)
