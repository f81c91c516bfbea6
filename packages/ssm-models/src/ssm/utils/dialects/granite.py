"""granitemoehybrid of transformers without experts: Mamba-2 and attention, scaled everywhere."""

from __future__ import annotations

from ssm.utils.dialects import hybrid
from ssm.utils.dialects.bamba import BAMBA
from ssm.utils.dialects.table import Dialect, Field, Parts


def _turned(values) -> int:
    return hybrid.head_dim_of(values) if values["position_embedding_type"] == "rope" else 0


GRANITE = Dialect(
    name="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    fields=(
        Field("hidden_size", "d_model", 4096),
        Field("num_hidden_layers", "n_layer", 32),
        Field("vocab_size", "vocab_size", 32000),
        Field("shared_intermediate_size", "d_intermediate", 1024),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("embedding_multiplier", "embedding_multiplier", 1.0),
        Field("residual_multiplier", "residual_multiplier", 1.0),
        Field("attention_multiplier", "attn_cfg.softmax_scale", 1.0),
        Field("num_attention_heads", "attn_cfg.num_heads", 32),
        Field("num_key_value_heads", "attn_cfg.num_heads_kv", None),
        *hybrid.MAMBA2_FIELDS,
    ),
    defaults={
        **hybrid.MAMBA2_DEFAULTS,
        "layer_types": None,
        "attention_bias": False,
        "head_dim": None,
        "logits_scaling": 1.0,
        "num_local_experts": 8,
        "position_embedding_type": None,
        "rms_norm_eps": 1e-6,
        "rope_parameters": None,
        "rope_theta": None,
        "rope_scaling": None,
    },
    derive={
        **{k: v for k, v in BAMBA.derive.items() if k != "attn_cfg.rotary_emb_dim"},
        "attn_layer_idx": lambda v: hybrid.layers_of(v["layer_types"] or [], "attention"),
        "attn_cfg.rotary_emb_dim": _turned,
        "logits_multiplier": lambda v: 1 / v["logits_scaling"],
    },
    emit={
        **{k: v for k, v in BAMBA.emit.items() if k != "attn_layer_indices"},
        "layer_types": hybrid.layer_types,
        "rope_parameters": hybrid.rope_fields,
        "logits_scaling": lambda form: hybrid.undone(
            1 / form["logits_multiplier"], lambda x: 1 / x, form["logits_multiplier"]
        ),
        "num_local_experts": lambda form: 0,
        "position_embedding_type": lambda form: (
            "rope" if form["attn_cfg"]["rotary_emb_dim"] else None
        ),
    },
    ours=BAMBA.ours,
    fixed={
        "hidden_act": ("silu", "swish"),
        "position_embedding_type": (None, "nope", "rope"),
    },
    legacy={"layers_block_type": "layer_types"},
    ignored=frozenset(
        hybrid.NO_EFFECT
        | {
            "intermediate_size",
            "mlp_bias",
            "normalization_function",
            "num_experts_per_tok",
            "init_method",
        }
    ),
    nullable=hybrid.NULLABLE | {"num_local_experts"},
    refused=(
        *BAMBA.refused,
        (lambda v: (v["num_local_experts"] or 0) > 0, "experts (num_local_experts)"),
        (
            lambda v: len(v["layer_types"] or []) not in (0, v["num_hidden_layers"]),
            "layer_types of another number than num_hidden_layers",
        ),
    ),
    names={
        **hybrid.NAMES,
        "backbone.norm_f": "model.norm",
        "norm2": "post_attention_layernorm",
        "mlp.fc1": Parts(("shared_mlp.input_linear",), swapped=True),
        "mlp.fc2": "shared_mlp.output_linear",
    },
    attention_names=hybrid.ATTENTION_NAMES,
    aliases=hybrid.ALIASES,
    skipped=hybrid.SKIPPED,
)
