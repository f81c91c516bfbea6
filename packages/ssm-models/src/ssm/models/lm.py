"""The causal language model: embedding, blocks, final norm and head."""

from __future__ import annotations

import difflib
import inspect
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm.models.config import MambaConfig
from ssm.modules.block import Block
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.modules.memory import check_model_memory
from ssm.modules.mlp import GatedMLP
from ssm.modules.norm import RMSNorm, add_norm
from ssm.modules.sequence import sequence_meta
from ssm.seq_meta import SeqMeta
from ssm.state import State

if TYPE_CHECKING:
    from ssm.utils.verification import Verification


class CausalLMOutput(NamedTuple):
    """What a language model returns.

    Args:
        logits: (B, L, V), unnormalised log probabilities of the token after each position.
    """

    logits: Tensor


MIXERS = {"Mamba1": Mamba1, "Mamba2": Mamba2}


class MixerModel(nn.Module):
    """Backbone: token embedding, ``n_layer`` blocks, final norm.

    Args:
        config: shape of the model.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        input_ids (B, L) -> (B, L, d_model).
    """

    def __init__(self, config: MambaConfig, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.residual_in_fp32 = config.residual_in_fp32
        self.fused_add_norm = config.fused_add_norm
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(config, index, **factory) for index in range(config.n_layer)
        )
        self.norm_f = norm_class(config, **factory)(config.d_model)

    def forward(
        self, input_ids: Tensor, inference_params=None, seq_meta: SeqMeta | None = None, **kwargs
    ) -> Tensor:
        """Run all blocks.

        Args:
            input_ids: (B, L) int, tokens.
            inference_params: state in the protocol of mamba_ssm.
            seq_meta: packing and padding.
            **kwargs: handed to every mixer.

        Returns:
            (B, L, d_model), behind the final norm.
        """
        hidden_states = self.embedding(input_ids)
        if seq_meta is not None:
            keep = seq_meta.positions(*input_ids.shape, input_ids.device) >= 0
            # A NaN in padding would reach the gradients of the norms as 0 * NaN.
            hidden_states = hidden_states.masked_fill(~keep[..., None], 0)
        residual = None
        arguments = {"inference_params": inference_params, "seq_meta": seq_meta, **kwargs}
        stateless = inference_params is None and kwargs.get("state") is None
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and stateless:
                hidden_states, residual = checkpoint(
                    layer, hidden_states, residual, use_reentrant=False, **arguments
                )
            else:
                hidden_states, residual = layer(hidden_states, residual, **arguments)
        return add_norm(
            self.norm_f,
            hidden_states,
            residual,
            fused=self.fused_add_norm,
            residual_in_fp32=self.residual_in_fp32,
            prenorm=False,
        )


class MambaLMHeadModel(nn.Module):
    """Causal language model in the key layout of the state-spaces checkpoints.

    Args:
        config: shape of the model.
        initializer_cfg: arguments of ``init_weights``, for instance {"initializer_range": 0.02}.
        device: where the parameters live.
        dtype: of the parameters; A_log, D and the bias of the step sizes are float32 or better.

    Shape:
        input_ids (B, L) -> logits (B, L, V), V = ``config.padded_vocab_size``.

    State:
        ``allocate_state(B)`` returns one State for all layers; ``model(x, state=state)`` continues
        it.

    Raises:
        ValueError: the config asks for what this version cannot build.
    """

    def __init__(
        self, config: MambaConfig, initializer_cfg: dict | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = MixerModel(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(
            config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype
        )
        per_layer = 2 if config.d_intermediate else 1
        settings = {"n_residuals_per_layer": per_layer, **(initializer_cfg or {})}
        self.apply(partial(init_weights, n_layer=config.n_layer, **settings))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make lm_head share the weight of the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params=None,
        num_last_tokens: int = 0,
        *,
        state: State | None = None,
        seq_meta: SeqMeta | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **mixer_kwargs,
    ) -> CausalLMOutput:
        """Predict the token after every position.

        Args:
            input_ids: (B, L) int, tokens.
            position_ids: accepted and unused, as in mamba_ssm.
            inference_params: state in the protocol of mamba_ssm; the caller advances seqlen_offset.
            num_last_tokens: compute logits for that many last positions only; 0 means all.
            state: continued by this call and left behind its last token. Excludes inference_params.
            seq_meta: packing and padding in one object; excludes the next three.
            seq_idx: (B, L) int, sequence id per step, -1 = padding.
            cu_seqlens: (S + 1,) int, boundaries over the flattened B L steps.
            attention_mask: (B, L or more), nonzero = real token. Padding may lie anywhere.
            **mixer_kwargs: handed to every mixer.

        Returns:
            A named tuple with ``logits`` (B, L or num_last_tokens, V), model dtype.

        Raises:
            ValueError: a shape or a combination of arguments does not fit, or the state is that of
                another model or batch; nothing is changed then.
            TypeError: an argument that no mixer knows, or state is no State.
        """
        if input_ids.dim() != 2:
            raise ValueError(
                f"MambaLMHeadModel: input_ids must have shape (B, L), got {tuple(input_ids.shape)}"
            )
        if num_last_tokens < 0:
            raise ValueError(
                f"MambaLMHeadModel: num_last_tokens must not be negative, got {num_last_tokens}"
            )
        if state is not None:
            if inference_params is not None:
                raise ValueError(
                    "MambaLMHeadModel: state must not be given beside inference_params"
                )
            mixer_kwargs["state"] = state
        batch, seqlen = input_ids.shape
        seq_meta = sequence_meta(
            "MambaLMHeadModel", batch, seqlen, seq_meta, seq_idx, cu_seqlens, attention_mask
        )
        if state is not None or inference_params is not None:
            per_sequence = seq_meta is not None and seq_meta.state_per_sequence
            rows = seq_meta.num_sequences if per_sequence else batch
            mixers = (layer.mixer for layer in self.backbone.layers)
            check_model_memory("MambaLMHeadModel", mixers, inference_params, state, rows)
        hidden_states = self.backbone(
            input_ids, inference_params=inference_params, seq_meta=seq_meta, **mixer_kwargs
        )
        if state is not None:
            state.seqlen_offset += seqlen
        if num_last_tokens:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    def allocate_state(self, batch: int, dtype: torch.dtype | None = None) -> State:
        """Return the state before the first token.

        Args:
            batch: B, rows; with cu_seqlens the number of sequences.
            dtype: of the convolution states; None takes the model dtype.
        """
        return State(self.allocate_inference_cache(batch, 0, dtype), batch)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return layer index -> zero state of that layer, as mamba_ssm does."""
        return {
            index: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for index, layer in enumerate(self.backbone.layers)
        }

    def verify(self, draft: Tensor, state: State) -> Verification:
        """Read a draft without moving the state; see ``ssm.utils.verification.verify``.

        Args:
            draft: (B, T) int, tokens that may follow what the state has seen.
            state: left as it is until ``keep`` of the result moves it.

        Returns:
            A Verification: ``logits`` (B, T, V), and ``keep(k)``.
        """
        from ssm.utils.verification import verify

        return verify(self, draft, state)

    def gradient_checkpointing_enable(self) -> None:
        """In training, recompute each block in the backward pass instead of keeping activations."""
        self.backbone.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.backbone.gradient_checkpointing = False

    def generate(
        self,
        input_ids: Tensor,
        max_length: int | None = None,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs,
    ):
        """Continue token sequences; see ``ssm.utils.generation.generate`` for every argument.

        Args:
            input_ids: (B, L) int, prompts.
            max_length: length of the result, prompt included; or give ``max_new_tokens``.
            top_k: sample among that many; 1 is greedy, 0 is no limit.
            top_p: sample within that probability mass; 0 or 1 is no limit.
            min_p: sample among tokens at least that likely relative to the likeliest.
            temperature: divides the logits.
            return_dict_in_generate: return an object with ``sequences`` and ``scores``.
            output_scores: keep the logits of every step.
            **kwargs: max_new_tokens, eos_token_id, pad_token_id, repetition_penalty,
                attention_mask, seed, generator, streamer, state, teacher_outputs, vocab_size,
                do_sample, cg.

        Returns:
            (B, length) int64, or a GenerateOutput.
        """
        from ssm.utils.generation import generate

        return generate(
            self,
            input_ids,
            max_length=max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            return_dict_in_generate=return_dict_in_generate,
            output_scores=output_scores,
            **kwargs,
        )

    def stream(self, input_ids: Tensor, max_length: int | None = None, **kwargs):
        """Yield the new tokens (B,) one step at a time; arguments of ``generate``."""
        from ssm.utils.generation import stream

        return stream(self, input_ids, max_length=max_length, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | Path, device=None, dtype=None, **kwargs
    ) -> MambaLMHeadModel:
        """Load a checkpoint as an ``eval()`` model; see ``ssm.utils.weights.from_pretrained``."""
        from ssm.utils.weights import from_pretrained

        return from_pretrained(cls, pretrained_model_name, device=device, dtype=dtype, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Write config.json and the weights; see ``ssm.utils.weights.save_pretrained``."""
        from ssm.utils.weights import save_pretrained

        save_pretrained(self, save_directory, **kwargs)


def create_block(config: MambaConfig, layer_idx: int, device=None, dtype=None) -> Block:
    """Build one block of a model.

    Args:
        config: shape of the model.
        layer_idx: which block; the mixer keeps its state under this key.
        device: where the parameters live.
        dtype: of the parameters.

    Returns:
        The block.

    Raises:
        ValueError: the config names a mixer or an argument that does not exist here.
    """
    factory = {"device": device, "dtype": dtype}
    if config.attn_layer_idx:
        raise ValueError(
            "MambaLMHeadModel: attn_layer_idx must be empty, this version has no attention, "
            f"got {config.attn_layer_idx}"
        )
    arguments = dict(config.ssm_cfg)
    layer = arguments.pop("layer", "Mamba1")
    if layer not in MIXERS:
        raise ValueError(
            f"MambaLMHeadModel: ssm_cfg['layer'] must be one of {', '.join(MIXERS)}, got {layer!r}"
        )
    known = set(inspect.signature(MIXERS[layer]).parameters)
    known -= {"d_model", "layer_idx", "device", "dtype"}
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"MambaLMHeadModel: ssm_cfg must hold arguments of {layer}, got {name!r}{hint}"
            )
    mlp_cls = nn.Identity
    if config.d_intermediate:
        mlp_cls = partial(GatedMLP, hidden_features=config.d_intermediate, **factory)
    return Block(
        config.d_model,
        partial(MIXERS[layer], layer_idx=layer_idx, **arguments, **factory),
        mlp_cls=mlp_cls,
        norm_cls=norm_class(config, **factory),
        fused_add_norm=config.fused_add_norm,
        residual_in_fp32=config.residual_in_fp32,
    )


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
                nn.init.kaiming_uniform_(child.weight, a=math.sqrt(5))
                with torch.no_grad():
                    child.weight /= math.sqrt(n_residuals_per_layer * n_layer)
