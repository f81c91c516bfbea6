"""Pure Mamba-2 models: mamba2 of transformers, and Codestral Mamba as Mistral published it."""

from __future__ import annotations

import math

from ssm.utils.dialects.mamba import ALIASES, INITIAL, ratio
from ssm.utils.dialects.table import Dialect, Field

NO_LIMIT = [0.0, math.inf]


def expand_of(values, heads: str, width: str, hidden: str):
    """Return the factor from the width of the model to that of the recurrence.

    Args:
        values: foreign config.
        heads: field with the number of heads.
        width: field with their width.
        hidden: field with the width of the model.

    Returns:
        An int where it is one.
    """
    return ratio(values[heads] * values[width], values[hidden])


def limit_of(values):
    """Return the limits of the step sizes; null stands for none.

    Args:
        values: foreign config.

    Returns:
        (low, high).
    """
    limit = values["time_step_limit"]
    return NO_LIMIT if limit is None else limit


MAMBA2 = Dialect(
    name="mamba2",
    architecture="Mamba2ForCausalLM",
    fields=(
        Field("hidden_size", "d_model", 4096),
        Field("num_hidden_layers", "n_layer", 64),
        Field("vocab_size", "vocab_size", 32768),
        Field("state_size", "ssm_cfg.d_state", 128),
        Field("head_dim", "ssm_cfg.headdim", 64),
        Field("n_groups", "ssm_cfg.ngroups", 8),
        Field("conv_kernel", "ssm_cfg.d_conv", 4),
        Field("use_bias", "ssm_cfg.bias", False),
        Field("use_conv_bias", "ssm_cfg.conv_bias", True),
        Field("residual_in_fp32", "residual_in_fp32", True),
        Field("tie_word_embeddings", "tie_embeddings", False),
    ),
    defaults={
        "num_heads": 128,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": NO_LIMIT,
        "expand": 2,
    },
    derive={
        "ssm_cfg.expand": lambda v: expand_of(v, "num_heads", "head_dim", "hidden_size"),
        "ssm_cfg.dt_limit": limit_of,
        "norm_epsilon": lambda v: v["layer_norm_epsilon"],
        "ssm_cfg.norm_eps": lambda v: v["layer_norm_epsilon"],
    },
    emit={
        "num_heads": lambda form: form["ssm_cfg"]["nheads"],
        "expand": lambda form: ratio(form["ssm_cfg"]["d_inner"], form["d_model"]),
        "layer_norm_epsilon": lambda form: form["norm_epsilon"],
        "time_step_limit": lambda form: form["ssm_cfg"]["dt_limit"],
    },
    ours={"pad_vocab_size_multiple": 1, "ssm_cfg.layer": "Mamba2"},
    fixed={"hidden_act": ("silu", "swish")},
    agree={
        "intermediate_size": lambda v: int(v["expand"] * v["hidden_size"]),
        "d_model": lambda v: v["hidden_size"],
        "n_layer": lambda v: v["num_hidden_layers"],
        "rms_norm": lambda v: True,
        "attn_layer_idx": lambda v: [],
        "d_intermediate": lambda v: 0,
    },
    # norm_before_gate was written as true by a version that never used it.
    ignored=frozenset(
        {
            *INITIAL,
            "attn_cfg",
            "chunk_size",
            "fused_add_norm",
            "norm_before_gate",
            "pad_vocab_size_multiple",
            "ssm_cfg",
            "time_step_rank",
        }
    ),
    nullable=frozenset({"time_step_limit"}),
    refused=(
        (
            lambda v: v["num_heads"] * v["head_dim"] != v["expand"] * v["hidden_size"],
            "a product num_heads head_dim that is not expand hidden_size",
        ),
    ),
    names={"backbone.embedding": "backbone.embeddings"},
    aliases=ALIASES,
)

CODESTRAL = Dialect(
    name="codestral",
    fields=(
        Field("dim", "d_model"),
        Field("n_layers", "n_layer"),
        Field("vocab_size", "vocab_size"),
        Field("n_groups", "ssm_cfg.ngroups", 1),
        Field("rms_norm", "rms_norm", True),
        Field("residual_in_fp32", "residual_in_fp32", True),
        Field("pad_vocab_size_multiple", "pad_vocab_size_multiple", 1),
        Field("tie_embeddings", "tie_embeddings", False),
    ),
    ours={"ssm_cfg.layer": "Mamba2"},
    fixed={"model_type": ("mamba",)},
    ignored=frozenset({"fused_add_norm"}),
    aliases=((r"^model\.", ""),),
)
