"""One form for all configs that mean the same model: every default written out, nothing unused."""

from __future__ import annotations

import inspect
import math

from ssm.models.build import MIXERS, MLPS, OURS
from ssm.models.config import MambaConfig
from ssm.modules.attention import MHA
from ssm.modules.parallel import ParallelMixer

# Arguments that choose initial values or a way of computing: no function of a trained model.
NO_EFFECT = {
    "A_init_range",
    "causal",
    "chunk_size",
    "conv_init",
    "dt_init",
    "dt_init_floor",
    "dt_max",
    "dt_min",
    "dt_scale",
    "layer",
    "sequence_parallel",
    "use_fast_path",
    "use_mem_eff_path",
}


def canonical(config: MambaConfig, *, used: bool = True) -> dict:
    """Return what a config says about the function that the model computes.

    Args:
        config: of a model that can be built.
        used: False keeps arguments without effect, and those of parts that no block has.

    Returns:
        Fields of ``MambaConfig``; ``vocab_size`` is padded, the dicts have every argument of their
        class, and those of a part that no block has are empty.
    """
    d_model = config.d_model
    found = {
        "d_model": d_model,
        "n_layer": config.n_layer,
        "vocab_size": config.padded_vocab_size,
        "d_intermediate": config.d_intermediate,
        "attn_layer_idx": sorted(set(config.attn_layer_idx)),
        "mlp_layer_idx": sorted(set(config.mlp_layer_idx)),
        "ssm_cfg": {},
        "attn_cfg": {},
        "mlp_cfg": {},
        "parallel_cfg": None,
        "rms_norm": config.rms_norm,
        "residual_in_fp32": config.residual_in_fp32,
        "tie_embeddings": config.tie_embeddings,
        "norm_epsilon": config.norm_epsilon,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_multiplier": config.logits_multiplier,
    }
    attention = set(config.attn_layer_idx)
    if attention and config.parallel_cfg is not None:
        found["parallel_cfg"] = _complete(ParallelMixer, config.parallel_cfg)
    if attention or (not used and config.attn_cfg):
        found["attn_cfg"] = _attention(config.attn_cfg, d_model, used)
    alone = set(range(config.n_layer)) - set(config.mlp_layer_idx)
    if not used or alone - attention or found["parallel_cfg"] is not None:
        found["ssm_cfg"] = _ssm(config.ssm_cfg, d_model, used)
    if config.d_intermediate or not used:
        layer = config.mlp_cfg.get("layer", "GatedMLP")
        arguments = _complete(MLPS[layer], config.mlp_cfg)
        multiple = arguments.pop("multiple_of", 1)
        found["d_intermediate"] = -(-config.d_intermediate // multiple) * multiple
        found["mlp_cfg"] = {"layer": layer, **arguments}
        if layer == "GatedMLP":
            del found["mlp_cfg"]["activation"]
    return found


def difference(a, b, path: str = "") -> list[str]:
    """List the paths at which two canonical configs differ.

    Numbers that differ by rounding are equal: a product may have been written as its factors.

    Args:
        a: the one.
        b: the other.
        path: of both, for the list.

    Returns:
        Paths like "ssm_cfg.d_state".
    """
    if isinstance(a, dict) and isinstance(b, dict):
        inner = [
            difference(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            for key in sorted({*a, *b})
        ]
        return [name for names in inner for name in names]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        inner = [difference(x, y, path) for x, y in zip(a, b, strict=True)]
        return sorted({name for names in inner for name in names})
    if isinstance(a, float) and isinstance(b, (int, float)) and not isinstance(b, bool):
        return [] if a == b or math.isclose(a, b, rel_tol=1e-12) else [path]
    return [] if a == b and isinstance(a, bool) == isinstance(b, bool) else [path]


def _complete(cls, arguments: dict) -> dict:
    """Return every argument of a class that a config may set and that has an effect."""
    parameters = list(inspect.signature(cls).parameters.values())[1:]  # the first is the width
    return {
        p.name: arguments.get(p.name, p.default)
        for p in parameters
        if p.name not in OURS | NO_EFFECT
    }


def _ssm(values: dict, d_model: int, used: bool) -> dict:
    layer = values.get("layer", "Mamba1")
    found = {"layer": layer, **_complete(MIXERS[layer], values)}
    if layer == "Mamba1":
        if found["dt_rank"] == "auto":
            found["dt_rank"] = math.ceil(d_model / 16)
        found["d_inner"] = int(found.pop("expand") * d_model)
        if used and found["bcdt_norm"] is None:
            found["bcdt_norm_eps"] = None
        return found
    found["d_inner"] = round(found.pop("expand") * d_model)
    if found["d_ssm"] is None:
        found["d_ssm"] = found["d_inner"]
    found["nheads"] = found["d_ssm"] // found["headdim"]
    found["dt_limit"] = [float(value) for value in found["dt_limit"]]
    found["multipliers"] = [float(m) for m in found["multipliers"] or (1.0,) * 5]
    if used and not found["rmsnorm"]:
        found["norm_before_gate"] = found["norm_eps"] = None
    return found


def _attention(values: dict, d_model: int, used: bool) -> dict:
    found = _complete(MHA, values)
    if found["num_heads_kv"] is None:
        found["num_heads_kv"] = found["num_heads"]
    if found["head_dim"] is None:
        found["head_dim"] = d_model // found["num_heads"]
    if found["softmax_scale"] is None:
        found["softmax_scale"] = found["head_dim"] ** -0.5
    if used and not found["rotary_emb_dim"]:
        found["rotary_emb_base"] = found["rotary_emb_interleaved"] = None
    return found
