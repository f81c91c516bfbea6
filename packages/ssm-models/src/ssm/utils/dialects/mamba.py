"""Mamba-1 families of transformers: mamba and falcon_mamba."""

from __future__ import annotations

import math
from dataclasses import replace

from ssm.utils.dialects.table import Dialect, Field

# Initial values, and ways of computing that transformers chooses between.
INITIAL = {
    "initializer_range",
    "rescale_prenorm_residual",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_scale",
    "use_associative_scan",
    "use_mambapy",
}

# A model without its head has no prefix; and transformers reads both spellings of the embedding.
ALIASES = (
    (r"^(embeddings?|layers|norm_f)\.", r"backbone.\1."),
    (r"^backbone\.embedding\.", "backbone.embeddings."),
)


def rank_of(hidden: str, rank: str):
    """Return a function that resolves the rank of the step sizes.

    Args:
        hidden: field with the width of the model.
        rank: field with the rank, or "auto".

    Returns:
        values -> rank.
    """

    def resolve(values):
        automatic = values[rank] == "auto"
        return math.ceil(values[hidden] / 16) if automatic else values[rank]

    return resolve


def inner_of(values) -> int:
    """Return the channels inside of a block.

    Args:
        values: foreign config.

    Returns:
        ``intermediate_size``, or what ``expand`` makes of the width of the model.
    """
    if values["intermediate_size"] is not None:
        return values["intermediate_size"]
    return int(values["expand"] * values["hidden_size"])


def ratio(inner: int, width: int) -> int | float:
    """Return inner / width.

    Args:
        inner: channels inside.
        width: of the model.

    Returns:
        An int where it is one: transformers refuses 2.0.
    """
    return inner // width if inner % width == 0 else inner / width


MAMBA = Dialect(
    name="mamba",
    architecture="MambaForCausalLM",
    fields=(
        Field("hidden_size", "d_model", 768),
        Field("num_hidden_layers", "n_layer", 32),
        Field("vocab_size", "vocab_size", 50280),
        Field("state_size", "ssm_cfg.d_state", 16),
        Field("conv_kernel", "ssm_cfg.d_conv", 4),
        Field("use_bias", "ssm_cfg.bias", False),
        Field("use_conv_bias", "ssm_cfg.conv_bias", True),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Field("residual_in_fp32", "residual_in_fp32", True),
        Field("tie_word_embeddings", "tie_embeddings", True),
    ),
    # falcon-mamba-7b says expand 16 and means the width that intermediate_size says; so do both.
    defaults={"expand": 2, "intermediate_size": None, "time_step_rank": "auto"},
    derive={
        "ssm_cfg.dt_rank": rank_of("hidden_size", "time_step_rank"),
        "ssm_cfg.expand": lambda values: ratio(inner_of(values), values["hidden_size"]),
    },
    emit={
        # intermediate_size is what counts, and transformers refuses a fraction.
        "expand": lambda form: max(1, form["ssm_cfg"]["d_inner"] // form["d_model"]),
        "intermediate_size": lambda form: form["ssm_cfg"]["d_inner"],
        "time_step_rank": lambda form: form["ssm_cfg"]["dt_rank"],
    },
    ours={"pad_vocab_size_multiple": 1, "ssm_cfg.layer": "Mamba1"},
    fixed={"hidden_act": ("silu", "swish")},
    kept=frozenset({"expand"}),
    agree={
        # Checkpoints that were converted from state-spaces carry some of its fields.
        "d_inner": lambda values: inner_of(values),
        "d_model": lambda values: values["hidden_size"],
        "n_layer": lambda values: values["num_hidden_layers"],
        "rms_norm": lambda values: True,
        "ssm_cfg": lambda values: {},
    },
    ignored=frozenset({*INITIAL, "fused_add_norm", "pad_vocab_size_multiple"}),
    names={"backbone.embedding": "backbone.embeddings"},
    aliases=ALIASES,
)

FALCON_MAMBA = replace(
    MAMBA,
    name="falcon_mamba",
    architecture="FalconMambaForCausalLM",
    fields=(*MAMBA.fields, Field("mixer_rms_eps", "ssm_cfg.bcdt_norm_eps", 1e-6)),
    ours={**MAMBA.ours, "ssm_cfg.bcdt_norm": "weightless"},
    ignored=MAMBA.ignored | {"use_falcon_mambapy"},
    # Buffers of ones, which some writers store.
    skipped=r"\.mixer\.(dt|b|c)_layernorm\.weight$",
)
