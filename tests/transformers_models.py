"""Tiny models of every family of transformers that ssm.integrations serves, with random weights."""

import torch

_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Model type -> what its config has besides hidden_size and vocab_size.
CONFIGS = {
    "mamba": {"state_size": 8, "num_hidden_layers": 2},
    "falcon_mamba": {"state_size": 8, "num_hidden_layers": 2},
    "jamba": {
        **_ATTENTION,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 1,
        "mamba_d_state": 8,
    },
    "mamba2": {
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "num_hidden_layers": 2,
        "chunk_size": 8,
    },
    "bamba": {
        **_ATTENTION,
        **_MAMBA2,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
    },
    "zamba2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "time_step_min": 1e-6,  # a clamp that transformers forgets in steps; out of reach here
    },
    "nemotron_h": {
        **_ATTENTION,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "time_step_min": 1e-6,
    },
    "granitemoehybrid": {
        **_ATTENTION,
        **_MAMBA2,
        "intermediate_size": 48,
        "shared_intermediate_size": 48,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    },
    "falcon_h1": {
        **_ATTENTION,
        **_MAMBA2,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "mamba_d_ssm": 64,
    },
}
# Families whose mixer is Mamba-1; all others have Mamba-2.
MAMBA1 = ("mamba", "falcon_mamba", "jamba")
WIDTH, VOCAB = 32, 64


def tiny(family: str, **changes):
    """Return a model in evaluation mode; large weights, so that differences show.

    Args:
        family: key of CONFIGS.
        **changes: fields of its config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": WIDTH, "vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1}
    config = AutoConfig.for_model(family, **sizes, **{**CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter).add(0.5).log())
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def mixers_of(model) -> list:
    """List the Mamba mixers of a model."""
    return [module for module in model.modules() if hasattr(module, "A_log")]


def tokens(rows: int = 2, length: int = 21) -> torch.Tensor:
    """Return input ids without the padding id."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def continued(model, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return the logits of a text that is read in parts, each from the cache of those before."""
    cache, logits, begin = None, [], 0
    with torch.no_grad():
        for length in lengths:
            part = ids[:, begin : begin + length]
            arguments = {} if cache is None else dict.fromkeys(_cache_names(model), cache)
            if model.config.model_type not in ("mamba", "mamba2", "falcon_mamba"):
                # Some hybrids restart their positions without it.
                arguments["position_ids"] = torch.arange(begin, begin + length)[None]
            result = model(part, use_cache=True, **arguments)
            cache = cache_of(result)
            logits.append(result.logits)
            begin += length
    return torch.cat(logits, 1)


def cache_of(result):
    """Return the cache in what a model returned, whatever it is called."""
    cache = getattr(result, "cache_params", None)
    return result.past_key_values if cache is None else cache


def _cache_names(model) -> list[str]:
    pure = model.config.model_type in ("mamba", "mamba2", "falcon_mamba")
    return ["cache_params" if pure else "past_key_values"]
