"""Modules and language models of upstream: the part of tests.golden_cases about them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleGolden:
    """A module of upstream: whole passes with gradients, and the same tokens from a state.

    Args:
        name: of the file.
        kind: upstream's class; Block is a block of a language model around one of the others.
        config: its arguments; for Block those of a MambaConfig.
        batch: rows.
        seqlen: tokens in a row.
        prompt: tokens that a pass with a state reads at once; those behind it are read one by one.
            0 leaves the state out.
    """

    name: str
    kind: str
    config: dict
    batch: int = 2
    seqlen: int = 11
    prompt: int = 0

    def __str__(self) -> str:
        return f"modules/{self.name}"


@dataclass(frozen=True)
class ModelGolden:
    """A language model: logits with gradients, and greedy tokens behind a prompt.

    Args:
        name: of the file.
        config: of a MambaConfig.
        stepwise: decode from a state; else by a pass over the whole text for every token.
        batch: prompts.
        prompt: tokens in a prompt.
        new_tokens: that are decoded.
    """

    name: str
    config: dict
    stepwise: bool = True
    batch: int = 2
    prompt: int = 5
    new_tokens: int = 12

    def __str__(self) -> str:
        return f"models/{self.name}"


_MAMBA2 = {"d_model": 16, "d_state": 8, "headdim": 8, "chunk_size": 4}
_LAYER2 = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 8}
_ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 6, "causal": True}
_BLOCK = {"d_model": 16, "n_layer": 2, "vocab_size": 24, "attn_layer_idx": [0]}

# States of attention are compared behind the prompt alone: without flash-attn upstream masks a
# single query as if it stood at position 0. With d_conv they are not compared at all: upstream
# keeps outputs of the convolution where its inputs are needed.
MODULES = (
    ModuleGolden("mamba", "Mamba", {"d_model": 12, "d_state": 8}, prompt=6),
    ModuleGolden(
        "mamba_options",
        "Mamba",
        {
            "d_model": 8,
            "d_state": 5,
            "d_conv": 3,
            "expand": 3,
            "dt_rank": 2,
            "bias": True,
            "conv_bias": False,
        },
        batch=3,
        prompt=1,
    ),
    ModuleGolden("mamba2", "Mamba2", _MAMBA2, prompt=6),
    ModuleGolden("mamba2_groups", "Mamba2", {**_MAMBA2, "ngroups": 2, "bias": True}, prompt=2),
    ModuleGolden(
        "mamba2_mlp", "Mamba2", {**_MAMBA2, "d_ssm": 16, "norm_before_gate": True}, prompt=7
    ),
    ModuleGolden(
        "mamba2_no_norm", "Mamba2", {**_MAMBA2, "rmsnorm": False, "conv_bias": False}, prompt=6
    ),
    # Upstream's step knows neither.
    ModuleGolden(
        "mamba2_channels", "Mamba2", {**_MAMBA2, "D_has_hdim": True, "dt_limit": (0.02, 0.09)}
    ),
    ModuleGolden("mha", "MHA", {"embed_dim": 16, **_ATTENTION}, prompt=11),
    ModuleGolden(
        "mha_rotary", "MHA", {"embed_dim": 16, **_ATTENTION, "rotary_emb_dim": 4}, prompt=11
    ),
    ModuleGolden(
        "mha_rotary_interleaved",
        "MHA",
        {
            "embed_dim": 8,
            "num_heads": 2,
            "causal": True,
            "rotary_emb_dim": 4,
            "rotary_emb_base": 50.0,
            "rotary_emb_interleaved": True,
        },
        prompt=11,
    ),
    ModuleGolden(
        "mha_conv_mlp", "MHA", {"embed_dim": 8, **_ATTENTION, "d_conv": 4, "mlp_dim": 100}
    ),
    ModuleGolden(
        "mha_not_causal",
        "MHA",
        {"embed_dim": 16, "num_heads": 2, "softmax_scale": 0.3, "qkv_proj_bias": False},
    ),
    ModuleGolden(
        "block_attention_mlp", "Block", {**_BLOCK, "attn_cfg": _ATTENTION, "d_intermediate": 100}
    ),
    ModuleGolden(
        "block_mamba2",
        "Block",
        {
            **_BLOCK,
            "attn_layer_idx": [],
            "ssm_cfg": _LAYER2,
            "rms_norm": False,
            "fused_add_norm": False,
            "residual_in_fp32": False,
        },
    ),
    ModuleGolden(
        "block_mamba",
        "Block",
        {**_BLOCK, "attn_layer_idx": [], "ssm_cfg": {"d_state": 4}, "fused_add_norm": False},
    ),
)

MODELS = (
    ModelGolden(
        "mamba",
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 29,
            "ssm_cfg": {"d_state": 6},
            "tie_embeddings": False,
        },
    ),
    ModelGolden(
        "mamba2",
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 32,
            "rms_norm": False,
            "tie_embeddings": False,
            "ssm_cfg": _LAYER2,
        },
    ),
    ModelGolden(
        "hybrid",
        {
            "d_model": 16,
            "n_layer": 2,
            "vocab_size": 31,
            "d_intermediate": 40,
            "attn_layer_idx": [1],
            "attn_cfg": {**_ATTENTION, "d_conv": 4, "rotary_emb_dim": 6},
            "residual_in_fp32": False,
            "ssm_cfg": {**_LAYER2, "ngroups": 2},
        },
        stepwise=False,
    ),
)
