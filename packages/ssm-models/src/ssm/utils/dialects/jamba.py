"""jamba of transformers without experts: Mamba-1 with norms inside, and attention."""

from __future__ import annotations

from ssm.utils.dialects import hybrid
from ssm.utils.dialects.mamba import rank_of, ratio
from ssm.utils.dialects.table import Dialect, Field


def _attention_layers(values) -> list[int]:
    period, offset = values["attn_layer_period"], values["attn_layer_offset"]
    return [i for i in range(values["num_hidden_layers"]) if i % period == offset]


def _has_experts(values) -> bool:
    period, offset = values["expert_layer_period"], values["expert_layer_offset"]
    layers = range(values["num_hidden_layers"])
    return values["num_experts"] > 1 and any(i % period == offset for i in layers)


def _period(form) -> int:
    """A period that, with the first index as offset, gives the blocks with attention."""
    indices = form["attn_layer_idx"]
    return indices[1] - indices[0] if len(indices) > 1 else form["n_layer"] + 1


JAMBA = Dialect(
    name="jamba",
    architecture="JambaForCausalLM",
    fields=(
        Field("hidden_size", "d_model", 4096),
        Field("num_hidden_layers", "n_layer", 32),
        Field("vocab_size", "vocab_size", 65536),
        Field("intermediate_size", "d_intermediate", 14336),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("mamba_d_state", "ssm_cfg.d_state", 16),
        Field("mamba_d_conv", "ssm_cfg.d_conv", 4),
        Field("mamba_proj_bias", "ssm_cfg.bias", False),
        Field("mamba_conv_bias", "ssm_cfg.conv_bias", True),
        *hybrid.ATTENTION_FIELDS,
    ),
    defaults={
        "attn_layer_offset": 4,
        "attn_layer_period": 8,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "head_dim": None,
        "mamba_dt_rank": "auto",
        "mamba_expand": 2,
        "num_experts": 16,
        "rms_norm_eps": 1e-6,
    },
    derive={
        "attn_layer_idx": _attention_layers,
        "attn_cfg.head_dim": hybrid.head_dim_of,
        "norm_epsilon": lambda v: v["rms_norm_eps"],
        "ssm_cfg.bcdt_norm_eps": lambda v: v["rms_norm_eps"],
        "ssm_cfg.dt_rank": rank_of("hidden_size", "mamba_dt_rank"),
        "ssm_cfg.expand": lambda v: v["mamba_expand"],
    },
    emit={
        "attn_layer_offset": lambda form: [*form["attn_layer_idx"], form["n_layer"]][0],
        "attn_layer_period": _period,
        "head_dim": lambda form: form["attn_cfg"]["head_dim"],
        "mamba_dt_rank": lambda form: form["ssm_cfg"]["dt_rank"],
        "mamba_expand": lambda form: ratio(form["ssm_cfg"]["d_inner"], form["d_model"]),
        "num_experts": lambda form: 1,
        "rms_norm_eps": lambda form: form["norm_epsilon"],
    },
    ours={
        "pad_vocab_size_multiple": 1,
        "residual_in_fp32": False,
        "ssm_cfg.layer": "Mamba1",
        "ssm_cfg.bcdt_norm": "learned",
        "attn_cfg.qkv_proj_bias": False,
        "attn_cfg.out_proj_bias": False,
        "mlp_cfg.multiple_of": 1,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "mamba_inner_layernorms": (True,),
        "sliding_window": (None,),
    },
    ignored=frozenset(
        hybrid.NO_EFFECT
        | {
            "expert_layer_offset",
            "expert_layer_period",
            "layers_block_type",
            "layer_types",
            "num_experts_per_tok",
            "n_ctx",
            "calc_logits_for_entire_prompt",
        }
    ),
    nullable=hybrid.NULLABLE,
    refused=((_has_experts, "experts (num_experts)"),),
    names={
        **hybrid.NAMES,
        "mixer.dt_norm": "mamba.dt_layernorm",
        "mixer.B_norm": "mamba.b_layernorm",
        "mixer.C_norm": "mamba.c_layernorm",
    },
    attention_names=hybrid.ATTENTION_NAMES,
    aliases=hybrid.ALIASES,
)
