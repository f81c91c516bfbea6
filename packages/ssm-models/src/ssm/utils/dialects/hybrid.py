"""What the hybrid families of transformers have in common: attention, Mamba-2 under mamba_*."""

from __future__ import annotations

import math

from ssm.utils.dialects.mamba2 import NO_LIMIT, expand_of, limit_of
from ssm.utils.dialects.table import Field, Parts

LAYER_TYPES = {
    "mamba": "ssm",
    "linear_attention": "ssm",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
    "M": "ssm",
    "*": "attention",
    "-": "mlp",
    "E": "moe",
}
# Their names in the present version of transformers.
WRITTEN = {"ssm": "linear_attention", "attention": "full_attention", "mlp": "mlp"}

ATTENTION_FIELDS = (
    Field("num_attention_heads", "attn_cfg.num_heads", 32),
    # Of a config that does not say it; null is as many as there are query heads.
    Field("num_key_value_heads", "attn_cfg.num_heads_kv", 8),
)
MAMBA2_FIELDS = (
    Field("mamba_d_state", "ssm_cfg.d_state", 256),
    Field("mamba_n_groups", "ssm_cfg.ngroups", 1),
    Field("mamba_d_conv", "ssm_cfg.d_conv", 4),
    Field("mamba_proj_bias", "ssm_cfg.bias", False),
    Field("mamba_conv_bias", "ssm_cfg.conv_bias", True),
)
MAMBA2_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_expand": 2,
    "time_step_limit": NO_LIMIT,
}
MAMBA2_DERIVE = {
    "ssm_cfg.headdim": lambda v: headdim_of(v),
    "ssm_cfg.expand": lambda v: expand_of(
        {**v, "width": headdim_of(v)}, "mamba_n_heads", "width", "hidden_size"
    ),
    "ssm_cfg.dt_limit": limit_of,
}
MAMBA2_EMIT = {
    "mamba_n_heads": lambda form: form["ssm_cfg"]["nheads"],
    "mamba_d_head": lambda form: form["ssm_cfg"]["headdim"],
    "mamba_expand": lambda form: form["ssm_cfg"]["d_inner"] // form["d_model"],
    "time_step_limit": lambda form: form["ssm_cfg"]["dt_limit"],
}
MAMBA2_REFUSED = (
    (
        lambda v: v["mamba_n_heads"] * headdim_of(v) != v["mamba_expand"] * v["hidden_size"],
        "a product mamba_n_heads mamba_d_head that is not mamba_expand hidden_size",
    ),
)
NULLABLE = frozenset({"num_key_value_heads", "time_step_limit"})
# No effect on what is computed for given weights, apart from rounding.
NO_EFFECT = {
    "attention_dropout",
    "initializer_range",
    "mamba_chunk_size",
    "max_position_embeddings",
    "num_logits_to_keep",
    "output_router_logits",
    "router_aux_loss_coef",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_mambapy",
    "z_loss_coefficient",
}
QKV = Parts(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), lambda form: qkv_rows(form)
)
ATTENTION_NAMES = {"mixer.in_proj": QKV, "mixer.out_proj": "self_attn.o_proj"}
# Names of the llama kind, which most hybrids have.
NAMES = {
    "backbone.embedding": "model.embed_tokens",
    "backbone.norm_f": "model.final_layernorm",
    "backbone.layers": "model.layers.{i}.",
    "norm": "input_layernorm",
    "norm2": "pre_ff_layernorm",
    "mixer": "mamba",
    "mlp.fc1": Parts(("feed_forward.up_proj", "feed_forward.gate_proj")),
    "mlp.fc2": "feed_forward.down_proj",
}
# A model without its head has no prefix.
ALIASES = ((r"^(embed_tokens|layers|final_layernorm|norm)\.", r"model.\1."),)
# The last ones belong to scaled angles and change nothing where the type is "default".
ROPE_SETTINGS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
}
# Buffers that older versions stored.
SKIPPED = r"\.rotary_emb\.inv_freq$"


def headdim_of(values):
    """Return the width of the Mamba-2 heads.

    Args:
        values: foreign config.

    Returns:
        ``mamba_d_head``, resolved.
    """
    if values["mamba_d_head"] != "auto":
        return values["mamba_d_head"]
    inner = values.get("mamba_d_ssm") or values["mamba_expand"] * values["hidden_size"]
    return inner // values["mamba_n_heads"]


def head_dim_of(values):
    """Return the width of the attention heads.

    Args:
        values: foreign config.

    Returns:
        ``head_dim``, or what is left of the width of the model.

    Raises:
        ValueError: ``head_dim`` is no size.
    """
    found = values.get("head_dim")
    if found is not None:
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            raise ValueError(f"head_dim must be a positive int, got {found!r}")
        return found
    return values["hidden_size"] // values["num_attention_heads"]


def qkv_rows(form):
    """Return the rows of queries, keys and values.

    Args:
        form: canonical config.

    Returns:
        Three numbers.
    """
    attention = form["attn_cfg"]
    keys = attention["num_heads_kv"] * attention["head_dim"]
    return attention["num_heads"] * attention["head_dim"], keys, keys


def layers_of(names, kind: str) -> list[int]:
    """List the blocks of one kind.

    Args:
        names: of the kinds of all blocks, in any spelling, or a pattern of letters.
        kind: "ssm", "attention", "mlp" or "moe".

    Returns:
        Their numbers.

    Raises:
        ValueError: a name is not known.
    """
    unknown = [name for name in names if name not in LAYER_TYPES]
    if unknown:
        raise ValueError(f"layer types must be of {', '.join(LAYER_TYPES)}, got {unknown[0]!r}")
    return [index for index, name in enumerate(names) if LAYER_TYPES[name] == kind]


def layer_types(form) -> list[str]:
    """Return the kinds of all blocks as transformers names them.

    Args:
        form: canonical config.

    Returns:
        A name per block.
    """
    kinds = ["ssm"] * form["n_layer"]
    for name, kind in (("attn_layer_idx", "attention"), ("mlp_layer_idx", "mlp")):
        for index in form[name]:
            kinds[index] = kind
    return [WRITTEN[kind] for kind in kinds]


def rope_settings(values) -> dict:
    """Return the settings of the rotary embedding, which have stood in two places.

    Args:
        values: foreign config.

    Returns:
        ``rope_scaling`` if it says anything, as transformers chooses, else ``rope_parameters``.

    Raises:
        ValueError: the angles are scaled for long texts, or a setting is not known.
    """
    chosen = {}
    for name in ("rope_parameters", "rope_scaling"):
        found = values.get(name)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise ValueError(f"{name} must be a dict, got {found!r}")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope_type must be 'default', got {kind!r}")
        unknown = sorted(set(found) - ROPE_SETTINGS)
        if unknown:
            choice = ", ".join(sorted(ROPE_SETTINGS))
            raise ValueError(f"{name} must hold settings of {choice}, got {unknown[0]!r}")
        chosen = found or chosen
    return chosen


def turned_part(values) -> int:
    """Return how many features of each head turn with the position.

    Args:
        values: foreign config, with a ``partial_rotary_factor`` for settings that have none.

    Returns:
        The part of the head, rounded down as transformers rounds it.

    Raises:
        ValueError: the part is no number between 0 and 1.
    """
    part = rope_settings(values).get("partial_rotary_factor", values["partial_rotary_factor"])
    if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 <= part <= 1:
        raise ValueError(f"partial_rotary_factor must be a number from 0 to 1, got {part!r}")
    return int(head_dim_of(values) * part)


def rope_base(values) -> float:
    """Return the base of the rotary embedding.

    Args:
        values: foreign config.

    Returns:
        The base.

    Raises:
        ValueError: the settings are not supported, or the base is no positive number.
    """
    base = rope_settings(values).get("rope_theta", values.get("rope_theta"))
    base = 10000.0 if base is None else base
    if isinstance(base, bool) or not isinstance(base, (int, float)) or not 0 < base < math.inf:
        raise ValueError(f"rope_theta must be a positive number, got {base!r}")
    return base


def rope_fields(form) -> dict:
    """Return the settings of the rotary embedding as transformers writes them.

    Args:
        form: canonical config.

    Returns:
        ``rope_parameters``.
    """
    return {"rope_type": "default", "rope_theta": form["attn_cfg"]["rotary_emb_base"] or 10000.0}


def partial_rope_fields(form) -> dict:
    """Return the settings of a rotary embedding that turns a part of each head.

    Args:
        form: canonical config.

    Returns:
        ``rope_parameters``.
    """
    turned, width = form["attn_cfg"]["rotary_emb_dim"], form["attn_cfg"]["head_dim"]
    part = turned / width
    if int(width * part) < turned:  # what reads it rounds down
        part = math.nextafter(part, 1.0)
    return {**rope_fields(form), "partial_rotary_factor": part}


def undone(value: float, again, wanted: float) -> float:
    """Return the number that a computation was made of, as it was probably written.

    Args:
        value: the inverse computation's result, with its rounding.
        again: the computation.
        wanted: its result.

    Returns:
        value rounded to 15 digits if that gives what is wanted, else value.
    """
    short = float(f"{value:.15g}")
    return short if again(short) == wanted else value
