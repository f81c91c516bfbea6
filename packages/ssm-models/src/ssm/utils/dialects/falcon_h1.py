"""falcon_h1 of transformers: Mamba-2 and attention side by side in every block, muP factors."""

from __future__ import annotations

import math

from ssm.utils.dialects import hybrid
from ssm.utils.dialects.bamba import BAMBA
from ssm.utils.dialects.mamba import ratio
from ssm.utils.dialects.table import Dialect, Field


def _inner(values) -> int:
    return values["mamba_d_ssm"] or values["mamba_expand"] * values["hidden_size"]


def _multiplier(name: str, index: int):
    return lambda values: (values[name] or [1.0] * 5)[index]


def _key_multiplier(attention) -> float:
    root, scale = math.sqrt(attention["head_dim"]), attention["softmax_scale"]
    return hybrid.undone(scale * root, lambda x: x / root, scale)


FALCON_H1 = Dialect(
    name="falcon_h1",
    architecture="FalconH1ForCausalLM",
    fields=(
        Field("hidden_size", "d_model", 4096),
        Field("num_hidden_layers", "n_layer", 32),
        Field("vocab_size", "vocab_size", 128000),
        Field("intermediate_size", "d_intermediate", 14336),
        Field("mlp_bias", "mlp_cfg.bias", False),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("embedding_multiplier", "embedding_multiplier", 1.0),
        Field("lm_head_multiplier", "logits_multiplier", 1.0),
        Field("ssm_in_multiplier", "parallel_cfg.ssm_in_multiplier", 1.0),
        Field("ssm_out_multiplier", "parallel_cfg.ssm_out_multiplier", 1.0),
        Field("attention_in_multiplier", "parallel_cfg.attention_in_multiplier", 1.0),
        Field("attention_out_multiplier", "parallel_cfg.attention_out_multiplier", 1.0),
        *hybrid.ATTENTION_FIELDS,
        *hybrid.MAMBA2_FIELDS,
    ),
    defaults={
        **hybrid.MAMBA2_DEFAULTS,
        "attention_bias": False,
        "head_dim": None,
        "key_multiplier": 1.0,
        "mamba_d_ssm": 1024,
        "mamba_norm_before_gate": True,
        "mamba_rms_norm": False,
        "mlp_multipliers": None,
        "projectors_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": None,
        "rope_theta": None,
        "rope_scaling": None,
        "ssm_multipliers": None,
    },
    derive={
        **BAMBA.derive,
        "attn_layer_idx": lambda v: list(range(v["num_hidden_layers"])),
        "attn_cfg.rotary_emb_dim": hybrid.head_dim_of,
        # (q, m k) = m (q, k): the factor of the keys is one of the scores.
        "attn_cfg.softmax_scale": lambda v: v["key_multiplier"] / math.sqrt(hybrid.head_dim_of(v)),
        "ssm_cfg.expand": lambda v: ratio(_inner(v), v["hidden_size"]),
        "ssm_cfg.rmsnorm": lambda v: v["mamba_rms_norm"],
        "ssm_cfg.norm_before_gate": lambda v: v["mamba_norm_before_gate"],
        "ssm_cfg.multipliers": lambda v: v["ssm_multipliers"] or [1.0] * 5,
        "mlp_cfg.gate_multiplier": _multiplier("mlp_multipliers", 0),
        "mlp_cfg.out_multiplier": _multiplier("mlp_multipliers", 1),
    },
    emit={
        **{k: v for k, v in BAMBA.emit.items() if k not in ("attn_layer_indices", "mamba_expand")},
        "key_multiplier": lambda form: _key_multiplier(form["attn_cfg"]),
        "mamba_d_ssm": lambda form: form["ssm_cfg"]["d_inner"],
        "mamba_norm_before_gate": lambda form: bool(form["ssm_cfg"]["norm_before_gate"]),
        "mamba_rms_norm": lambda form: form["ssm_cfg"]["rmsnorm"],
        "mlp_multipliers": lambda form: [
            form["mlp_cfg"]["gate_multiplier"],
            form["mlp_cfg"]["out_multiplier"],
        ],
        "projectors_bias": lambda form: form["ssm_cfg"]["bias"],
        "rope_parameters": hybrid.rope_fields,
        "ssm_multipliers": lambda form: form["ssm_cfg"]["multipliers"],
    },
    ours=BAMBA.ours,
    fixed={"hidden_act": ("silu", "swish"), "attn_layer_indices": (None,)},
    ignored=frozenset(
        hybrid.NO_EFFECT
        | {"layer_types", "layers_block_type", "mamba_use_mlp", "mlp_expansion_factor"}
    ),
    nullable=hybrid.NULLABLE | {"mamba_d_ssm"},
    refused=(
        (
            lambda v: v["mamba_n_heads"] * hybrid.headdim_of(v) != _inner(v),
            "a product mamba_n_heads mamba_d_head that is not mamba_d_ssm",
        ),
        (
            lambda v: v["projectors_bias"] != v["mamba_proj_bias"],
            "a bias in one of the two projections of Mamba-2 alone (projectors_bias)",
        ),
    ),
    names={
        **{k: v for k, v in hybrid.NAMES.items() if k != "mixer"},
        "mixer.ssm": "mamba",
        "mixer.attention.in_proj": hybrid.QKV,
        "mixer.attention.out_proj": "self_attn.o_proj",
    },
    aliases=hybrid.ALIASES,
    skipped=hybrid.SKIPPED,
)
