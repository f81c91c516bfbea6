"""bamba of transformers: Mamba-2 and attention with a part of each head turned."""

from __future__ import annotations

from ssm.utils.dialects import hybrid
from ssm.utils.dialects.table import Dialect, Field

BAMBA = Dialect(
    name="bamba",
    architecture="BambaForCausalLM",
    fields=(
        Field("hidden_size", "d_model", 4096),
        Field("num_hidden_layers", "n_layer", 32),
        Field("vocab_size", "vocab_size", 128000),
        Field("intermediate_size", "d_intermediate", 14336),
        Field("mlp_bias", "mlp_cfg.bias", False),
        Field("tie_word_embeddings", "tie_embeddings", False),
        *hybrid.ATTENTION_FIELDS,
        *hybrid.MAMBA2_FIELDS,
    ),
    defaults={
        **hybrid.MAMBA2_DEFAULTS,
        "attn_layer_indices": None,
        "attention_bias": False,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "rope_parameters": None,
        "rope_theta": None,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
    },
    derive={
        **hybrid.MAMBA2_DERIVE,
        "attn_layer_idx": lambda v: v["attn_layer_indices"] or [],
        "attn_cfg.head_dim": hybrid.head_dim_of,
        "attn_cfg.qkv_proj_bias": lambda v: v["attention_bias"],
        "attn_cfg.out_proj_bias": lambda v: v["attention_bias"],
        "attn_cfg.rotary_emb_dim": hybrid.turned_part,
        "attn_cfg.rotary_emb_base": hybrid.rope_base,
        "norm_epsilon": lambda v: v["rms_norm_eps"],
        "ssm_cfg.norm_eps": lambda v: v["rms_norm_eps"],
    },
    emit={
        **hybrid.MAMBA2_EMIT,
        "attn_layer_indices": lambda form: form["attn_layer_idx"],
        "attention_bias": lambda form: form["attn_cfg"]["qkv_proj_bias"],
        "head_dim": lambda form: form["attn_cfg"]["head_dim"],
        "rms_norm_eps": lambda form: form["norm_epsilon"],
        "rope_parameters": hybrid.partial_rope_fields,
        # Where versions before 5 look.
        "rope_theta": lambda form: hybrid.rope_fields(form)["rope_theta"],
    },
    ours={
        "pad_vocab_size_multiple": 1,
        "residual_in_fp32": False,
        "ssm_cfg.layer": "Mamba2",
        "mlp_cfg.multiple_of": 1,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        # transformers takes half whatever stands here; rope_parameters may say another part.
        "partial_rotary_factor": (0.5,),
        "sliding_window": (None,),
    },
    agree={"attn_rotary_emb": hybrid.turned_part},
    ignored=frozenset(hybrid.NO_EFFECT | {"layer_types", "layers_block_type"}),
    nullable=hybrid.NULLABLE,
    refused=hybrid.MAMBA2_REFUSED,
    names=hybrid.NAMES,
    attention_names=hybrid.ATTENTION_NAMES,
    aliases=hybrid.ALIASES,
    skipped=hybrid.SKIPPED,
)
