"""From a config to the parts of a model: blocks, norms, initial values."""

from __future__ import annotations

import difflib
import inspect
import math
from functools import partial

import torch
from torch import nn

from ssm.distributed.layout import initialise
from ssm.models.config import MambaConfig
from ssm.modules.attention import MHA
from ssm.modules.block import Block
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.modules.mlp import MLP, GatedMLP
from ssm.modules.norm import RMSNorm
from ssm.modules.parallel import ParallelMixer

MIXERS = {"Mamba1": Mamba1, "Mamba2": Mamba2}
MLPS = {"GatedMLP": GatedMLP, "MLP": MLP}
# What the model gives to its parts; a config may not.
OURS = {
    "layer_idx",
    "device",
    "dtype",
    "process_group",
    "sequence_parallel",
    "hidden_features",
    "out_features",
    "ssm_cls",
    "attention_cls",
}


def create_block(
    config: MambaConfig,
    layer_idx: int,
    device=None,
    dtype=None,
    *,
    process_group=None,
    sequence_parallel: bool = False,
) -> Block:
    """Build one block of a model.

    Args:
        config: shape of the model.
        layer_idx: which block; the mixer keeps its state under this key.
        device: where the parameters live.
        dtype: of the parameters.
        process_group: ranks among which the mixer and the MLP are split, or None.
        sequence_parallel: whether the ranks hold a part of the tokens each outside of those.

    Returns:
        The block.

    Raises:
        ValueError: the config names a mixer or an argument that does not exist here.
    """
    factory = {"device": device, "dtype": dtype}
    split = {}
    if process_group is not None:
        split = {"process_group": process_group, "sequence_parallel": sequence_parallel}
    has_attention = layer_idx in config.attn_layer_idx
    is_parallel = has_attention and config.parallel_cfg is not None
    mixer_cls = mlp_cls = nn.Identity
    if layer_idx not in config.mlp_layer_idx:
        # Two states need two keys.
        beside = layer_idx + config.n_layer if is_parallel else layer_idx
        if has_attention:
            mixer_cls = _attention_class(config, layer_idx=beside, **split, **factory)
        if not has_attention or is_parallel:
            attention_cls = mixer_cls
            mixer_cls = _ssm_class(config, layer_idx=layer_idx, **split, **factory)
        if is_parallel:
            _check_arguments("parallel_cfg", ParallelMixer, config.parallel_cfg)
            mixer_cls = partial(
                ParallelMixer,
                ssm_cls=mixer_cls,
                attention_cls=attention_cls,
                **config.parallel_cfg,
            )
    if config.d_intermediate and (not config.mlp_layer_idx or layer_idx in config.mlp_layer_idx):
        mlp, arguments = _layer_of("mlp_cfg", config.mlp_cfg, MLPS, "GatedMLP")
        sizes = {"hidden_features": config.d_intermediate}
        mlp_cls = partial(mlp, **arguments, **sizes, **split, **factory)
    return Block(
        config.d_model,
        mixer_cls,
        mlp_cls=mlp_cls,
        norm_cls=norm_class(config, **factory),
        fused_add_norm=config.fused_add_norm,
        residual_in_fp32=config.residual_in_fp32,
        residual_multiplier=config.residual_multiplier,
    )


def _attention_class(config: MambaConfig, **own):
    arguments = {"causal": True, **config.attn_cfg}
    _check_arguments("attn_cfg", MHA, arguments)
    if not arguments["causal"]:
        raise ValueError("MambaLMHeadModel: attn_cfg['causal'] must be True, got False")
    return partial(MHA, **arguments, **own)


def _ssm_class(config: MambaConfig, **own):
    mixer, arguments = _layer_of("ssm_cfg", config.ssm_cfg, MIXERS, "Mamba1")
    if "process_group" in own and mixer is Mamba1:
        raise ValueError(
            "MambaLMHeadModel: ssm_cfg['layer'] must be 'Mamba2' with process_group, got 'Mamba1'"
        )
    return partial(mixer, **arguments, **own)


def _layer_of(field: str, values: dict, classes: dict, usual: str):
    """Return the class that a field of the config names, and the other arguments in it."""
    arguments = dict(values)
    layer = arguments.pop("layer", usual)
    if not isinstance(layer, str) or layer not in classes:
        names = ", ".join(classes)
        raise ValueError(
            f"MambaLMHeadModel: {field}['layer'] must be one of {names}, got {layer!r}"
        )
    _check_arguments(field, classes[layer], arguments)
    return classes[layer], arguments


def norm_class(config: MambaConfig, device=None, dtype=None):
    """Choose the norm that a config asks for.

    Args:
        config: rms_norm and norm_epsilon are read.
        device: where the weight lives.
        dtype: of the weight.

    Returns:
        A callable, width -> norm.
    """
    norm = RMSNorm if config.rms_norm else nn.LayerNorm
    return partial(norm, eps=config.norm_epsilon, device=device, dtype=dtype)


def init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Initialise one module as the released Mamba code does; for ``model.apply``.

    Args:
        module: any module of the model.
        n_layer: number of blocks.
        initializer_range: standard deviation of the embedding.
        rescale_prenorm_residual: divide the last projection of every residual branch by
            sqrt(n_residuals_per_layer n_layer), so that the stream does not grow with depth
            (GPT-2).
        n_residuals_per_layer: 2 with an MLP in each block.
    """
    if isinstance(module, nn.Linear):
        if module.bias is not None and not getattr(module.bias, "_no_reinit", False):
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, child in module.named_children():
            if name in ("out_proj", "fc2"):
                # Drawn whole also where ranks hold parts: the bounds depend on the width.
                initialise(child, "weight", partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
                with torch.no_grad():
                    child.weight /= math.sqrt(n_residuals_per_layer * n_layer)


def _check_arguments(field: str, mixer: type[nn.Module], arguments: dict) -> None:
    """Refuse what the mixer does not take from a config, and tell of what it needs."""
    parameters = list(inspect.signature(mixer).parameters.values())[1:]  # the first is the width
    known = {p.name for p in parameters} - OURS
    if mixer is GatedMLP:
        known -= {"activation"}  # a function, which no file can hold
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"MambaLMHeadModel: {field} must hold arguments of {mixer.__name__}, "
                f"got {name!r}{hint}"
            )
    for parameter in parameters:
        value = arguments.get(parameter.name, parameter.default)
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            raise ValueError(
                f"MambaLMHeadModel: {field}[{parameter.name!r}] must be a bool, got {value!r}"
            )
        needed = parameter.default is parameter.empty and parameter.name not in OURS
        if needed and parameter.name not in arguments:
            raise ValueError(
                f"MambaLMHeadModel: {field} must hold {parameter.name!r}, got {sorted(arguments)}"
            )
