"""Formats of checkpoints, one table each; ``find`` tells which one a config belongs to."""

from __future__ import annotations

import difflib
from typing import Any

from ssm.utils.dialects.bamba import BAMBA
from ssm.utils.dialects.falcon_h1 import FALCON_H1
from ssm.utils.dialects.granite import GRANITE
from ssm.utils.dialects.jamba import JAMBA
from ssm.utils.dialects.mamba import FALCON_MAMBA, MAMBA
from ssm.utils.dialects.mamba2 import CODESTRAL, MAMBA2
from ssm.utils.dialects.nemotron_h import NEMOTRON_H
from ssm.utils.dialects.table import Dialect

# Our own format, and that of the state-spaces checkpoints: no name differs.
STATE_SPACES = Dialect(name="state-spaces")
# model_type -> table. A model of ours is written in the first that can say what it is.
FAMILIES = {
    family.name: family
    for family in (
        MAMBA,
        MAMBA2,
        FALCON_MAMBA,
        BAMBA,
        GRANITE,
        JAMBA,
        NEMOTRON_H,
        FALCON_H1,
    )
}
# model_type -> what it would need.
REFUSED = {
    "zamba": "shared attention blocks and Mamba-1 with several heads",
    "zamba2": "shared attention blocks with adapters",
    "mamba3": "Mamba-3 blocks",
    "plamo2": "the blocks of PLaMo 2",
    "lfm2": "gated convolution blocks",
}
# Fields that transformers writes into the config of any family; none changes the logits.
GENERIC = frozenset(
    """
    add_cross_attention architectures attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type pruned_heads quantization_config remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache
    """.split()
)


def find(values: dict[str, Any]) -> Dialect:
    """Return the format of a config.json.

    Args:
        values: its content.

    Returns:
        The table; that of state-spaces if there is neither a model_type nor an architecture.

    Raises:
        ValueError: the family is not known, or needs what is not here.
    """
    architectures = values.get("architectures") or [None]
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    name = values.get("model_type")
    if name is None and isinstance(architectures, list):
        name = by_architecture.get(architectures[0])
    if name is None:
        return STATE_SPACES
    if values.get("quantization_config") is not None:
        raise ValueError(
            "from_pretrained: config must do without quantization_config (quantised weights), "
            "got one with it"
        )
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    if isinstance(name, str) and name in REFUSED:
        raise ValueError(
            f"from_pretrained: model_type must do without {REFUSED[name]}, which are not here, "
            f"got {name!r}"
        )
    near = difflib.get_close_matches(str(name), FAMILIES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"from_pretrained: model_type must be one of {', '.join(FAMILIES)}, got {name!r}{hint}"
    )


__all__ = ["CODESTRAL", "FAMILIES", "GENERIC", "STATE_SPACES", "Dialect", "find"]
