"""The causal language model: embedding, blocks, final norm and head."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssm.distributed.collectives import (
    check_apart,
    check_group,
    join_tokens,
    same_random_state,
    summed,
    take_tokens,
)
from ssm.models.build import create_block, init_weights, norm_class
from ssm.models.config import MambaConfig
from ssm.modules.arguments import check_dtype, check_int
from ssm.modules.attention import MHA
from ssm.modules.memory import check_model_memory, key_of
from ssm.modules.norm import add_norm
from ssm.modules.sequence import check_positions, sequence_meta
from ssm.ops.projection import project
from ssm.seq_meta import SeqMeta
from ssm.state import State
from ssm.utils.dispatch import backends_of_checkpoint

if TYPE_CHECKING:
    from ssm.utils.verification import Verification


class CausalLMOutput(NamedTuple):
    """What a language model returns.

    Args:
        logits: (B, L, V), unnormalised log probabilities of the token after each position.
    """

    logits: Tensor


class MixerModel(nn.Module):
    """Backbone: token embedding, ``n_layer`` blocks, final norm.

    Args:
        config: shape of the model.
        device: where the parameters live.
        dtype: of the parameters.
        process_group: ranks among which mixers and MLPs are split, or None.
        sequence_parallel: whether each rank holds a part of the tokens between those.

    Shape:
        input_ids (B, L) -> (B, L, d_model), whole on every rank.
    """

    def __init__(
        self,
        config: MambaConfig,
        device=None,
        dtype=None,
        *,
        process_group=None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        ranks = check_group("MambaLMHeadModel", "process_group", process_group)
        self.process_group = process_group if ranks > 1 else None
        self.sequence_parallel = sequence_parallel and ranks > 1
        same_random_state(self.process_group, device)
        self.residual_in_fp32 = config.residual_in_fp32
        self.fused_add_norm = config.fused_add_norm
        self.embedding_multiplier = config.embedding_multiplier
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **factory)
        self.layers = nn.ModuleList(
            create_block(
                config,
                index,
                **factory,
                process_group=self.process_group,
                sequence_parallel=self.sequence_parallel,
            )
            for index in range(config.n_layer)
        )
        self.norm_f = norm_class(config, **factory)(config.d_model)
        if self.sequence_parallel:
            self._sum_gradients_of_norms()

    def _sum_gradients_of_norms(self) -> None:
        """The norms see this rank's tokens only, so their gradients are parts of a sum."""
        for norm in [self.norm_f, *(norm for layer in self.layers for norm in layer.norms())]:
            for parameter in norm.parameters():
                if parameter.requires_grad and not hasattr(parameter, "_sums_gradient"):
                    parameter.register_hook(partial(summed, group=self.process_group))
                    parameter._sums_gradient = True

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
        try:
            hidden_states = self.embedding(input_ids)
        except IndexError:  # looked at afterwards: in decoding, a look costs as much as the rows
            rows = self.embedding.num_embeddings
            wrong = input_ids[(input_ids < 0) | (input_ids >= rows)][0].item()
            raise ValueError(
                f"MambaLMHeadModel: input_ids must lie in [0, {rows}), got {wrong}"
            ) from None
        if seq_meta is not None:
            keep = seq_meta.positions(*input_ids.shape, input_ids.device) >= 0
            # A NaN in padding would reach the gradients of the norms as 0 * NaN.
            hidden_states = hidden_states.masked_fill(~keep[..., None], 0)
        if self.embedding_multiplier != 1:
            hidden_states = hidden_states * self.embedding_multiplier
        if self.sequence_parallel:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._sum_gradients_of_norms()  # loading may have put others in their place
            ranks = self.process_group.size()
            if input_ids.numel() % ranks:
                raise ValueError(
                    f"MambaLMHeadModel: B L must be a multiple of the {ranks} ranks with "
                    f"sequence_parallel, got {tuple(input_ids.shape)}"
                )
            kwargs["seqlen"] = input_ids.shape[1]
            hidden_states = take_tokens(hidden_states.flatten(0, 1), self.process_group)
        residual = None
        arguments = {"inference_params": inference_params, "seq_meta": seq_meta, **kwargs}
        stateless = inference_params is None and kwargs.get("state") is None
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and stateless:
                # Traced code keeps the backend it was traced under.
                traced = torch.compiler.is_compiling()
                again = {} if traced else {"context_fn": backends_of_checkpoint}
                hidden_states, residual = checkpoint(
                    layer, hidden_states, residual, use_reentrant=False, **again, **arguments
                )
            else:
                hidden_states, residual = layer(hidden_states, residual, **arguments)
        hidden_states = add_norm(
            self.norm_f,
            hidden_states,
            residual,
            fused=self.fused_add_norm,
            residual_in_fp32=self.residual_in_fp32,
            prenorm=False,
        )
        if self.sequence_parallel:
            hidden_states = join_tokens(hidden_states, self.process_group)
            hidden_states = hidden_states.unflatten(0, input_ids.shape)
        return hidden_states

    def mixers(self) -> list[nn.Module]:
        """Return the modules that have a state, in order; see ``Block.mixers``."""
        return [mixer for layer in self.layers for mixer in layer.mixers()]


class MambaLMHeadModel(nn.Module):
    """Causal language model in the key layout of the state-spaces checkpoints.

    Args:
        config: shape of the model.
        initializer_cfg: arguments of ``init_weights``, for instance {"initializer_range": 0.02}.
        device: where the parameters live.
        dtype: of the parameters; A_log, D and the bias of the step sizes are float32 or better.
        process_group: ranks among which mixers and MLPs are split (see docs/distributed.md); input
            and logits are whole on every rank, and so are embedding, norms and lm_head.
        sequence_parallel: whether each rank holds a part of the tokens between the layers.

    Shape:
        input_ids (B, L) -> logits (B, L, V), V = ``config.padded_vocab_size``.

    State:
        ``allocate_state(B)`` returns one State for all layers; ``model(x, state=state)`` continues
        it.

    Raises:
        ValueError: the config asks for what this version cannot build.
    """

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict | None = None,
        device=None,
        dtype=None,
        *,
        process_group=None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        for name, value, kind in (
            ("config", config, MambaConfig),
            ("initializer_cfg", initializer_cfg or {}, dict),
        ):
            if not isinstance(value, kind):
                got = type(value).__name__
                raise TypeError(f"MambaLMHeadModel: {name} must be a {kind.__name__}, got {got}")
        check_dtype("MambaLMHeadModel", dtype)
        self.config = config
        self.backbone = MixerModel(
            config,
            device=device,
            dtype=dtype,
            process_group=process_group,
            sequence_parallel=sequence_parallel,
        )
        self.lm_head = nn.Linear(
            config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype
        )
        per_layer = 2 if config.d_intermediate else 1
        settings = {"n_residuals_per_layer": per_layer, **(initializer_cfg or {})}
        self.apply(partial(init_weights, n_layer=config.n_layer, **settings))
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_loaded)

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
        context_group=None,
        **mixer_kwargs,
    ) -> CausalLMOutput:
        """Predict the token after every position.

        Args:
            input_ids: (B, L) int, tokens.
            position_ids: (B, L) int, positions for rotary embeddings; None counts the tokens of
                each sequence, padding not included.
            inference_params: state in the protocol of mamba_ssm; the caller advances seqlen_offset.
            num_last_tokens: compute logits for that many last positions only; 0 means all.
            state: continued by this call and left behind its last token. Excludes inference_params.
            seq_meta: packing and padding in one object; excludes the next three.
            seq_idx: (B, L) int, sequence id per step, -1 = padding.
            cu_seqlens: (S + 1,) int, boundaries over the flattened B L steps.
            attention_mask: (B, L or more), nonzero = real token. Padding may lie anywhere.
            context_group: ranks that hold consecutive parts of the steps (see
                docs/distributed.md). Everything with an axis L is of this rank, num_last_tokens
                counts its steps, and a state is that of the whole sequence on all ranks; a model
                with attention takes no state then.
            **mixer_kwargs: handed to every mixer.

        Returns:
            A named tuple with ``logits`` (B, L or num_last_tokens, V), model dtype.

        Raises:
            ValueError: a shape, a token or a combination of arguments does not fit, or the state
                is that of another model or batch; nothing is changed then.
            TypeError: input_ids are no tensor, an argument that no mixer knows, or state is no
                State.
        """
        if not isinstance(input_ids, Tensor):
            got = type(input_ids).__name__
            raise TypeError(f"MambaLMHeadModel: input_ids must be a torch.Tensor, got {got}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            dtype = str(input_ids.dtype).removeprefix("torch.")
            raise ValueError(
                f"MambaLMHeadModel: input_ids must have dtype int64 or int32, got {dtype}"
            )
        if input_ids.dim() != 2:
            raise ValueError(
                f"MambaLMHeadModel: input_ids must have shape (B, L), got {tuple(input_ids.shape)}"
            )
        check_int("MambaLMHeadModel", "num_last_tokens", num_last_tokens, 0)
        if mixer_kwargs and not self.backbone.mixers():
            name = next(iter(mixer_kwargs))
            raise TypeError(f"MambaLMHeadModel: got an unexpected keyword argument {name!r}")
        if state is not None:
            if inference_params is not None:
                raise ValueError(
                    "MambaLMHeadModel: state must not be given beside inference_params"
                )
            mixer_kwargs["state"] = state
        batch, seqlen = input_ids.shape
        if position_ids is not None:
            check_positions("MambaLMHeadModel", position_ids, batch, seqlen, input_ids.device)
            mixer_kwargs["position_ids"] = position_ids
        seq_meta = sequence_meta(
            "MambaLMHeadModel", batch, seqlen, seq_meta, seq_idx, cu_seqlens, attention_mask
        )
        if context_group is not None:
            check_group("MambaLMHeadModel", "context_group", context_group)
            check_apart("MambaLMHeadModel", context_group, self.backbone.process_group)
            mixer_kwargs["context_group"] = context_group
            if seq_meta is not None and seq_meta.state_per_sequence:
                raise ValueError(
                    "MambaLMHeadModel: cu_seqlens must be None with context_group, which takes "
                    "seq_idx, got one"
                )
        if state is not None or inference_params is not None:
            per_sequence = seq_meta is not None and seq_meta.state_per_sequence
            rows = seq_meta.num_sequences if per_sequence else batch
            mixers = self.backbone.mixers()
            check_model_memory("MambaLMHeadModel", mixers, inference_params, state, rows)
            for mixer in mixers:
                if isinstance(mixer, MHA):
                    if context_group is not None:
                        raise ValueError(
                            "MambaLMHeadModel: state must be None with context_group in a model "
                            "with attention, got one"
                        )
                    mixer.check_room(inference_params, state, batch, seqlen, seq_meta)
        hidden_states = self.backbone(
            input_ids, inference_params=inference_params, seq_meta=seq_meta, **mixer_kwargs
        )
        if state is not None:
            if context_group is not None:
                seqlen = int(summed(torch.tensor(seqlen, device=input_ids.device), context_group))
            state.seqlen_offset += seqlen
        if num_last_tokens:
            hidden_states = hidden_states[:, -num_last_tokens:]
        logits = project(self.lm_head, hidden_states)
        if self.config.logits_multiplier != 1:
            logits = logits * self.config.logits_multiplier
        return CausalLMOutput(logits=logits)

    def allocate_state(
        self, batch: int, dtype: torch.dtype | None = None, max_seqlen: int | None = None
    ) -> State:
        """Return the state before the first token.

        Args:
            batch: B, rows; with cu_seqlens the number of sequences.
            dtype: of convolution states and attention caches; None takes the model dtype.
            max_seqlen: tokens per row that attention can take, allocated at once; None for caches
                that grow as needed. A model without attention has no limit.
        """
        return State(self.allocate_inference_cache(batch, max_seqlen, dtype), batch, max_seqlen)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return layer index -> zero state of that layer, as mamba_ssm does.

        The attention of a parallel pair has an index of its own, n_layer higher.
        """
        return {
            key_of(mixer): mixer.allocate_inference_cache(batch_size, max_seqlen, dtype, **kwargs)
            for mixer in self.backbone.mixers()
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
                do_sample, enable_timing, cg.

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


def _tie_loaded(model: MambaLMHeadModel, keys) -> None:
    """Tie again what ``to_empty``, or loading with ``assign=True``, has made two parameters."""
    if not model.config.tie_embeddings:
        return
    head, embedding = (
        module._parameters.get("weight") for module in (model.lm_head, model.backbone.embedding)
    )
    # A head that was replaced, sharded or parametrised is not ours to tie.
    if type(head) is not nn.Parameter or type(embedding) is not nn.Parameter:
        return
    head_missing, embedding_missing = (
        any(name.endswith(ending) for name in keys.missing_keys)
        for ending in ("lm_head.weight", "backbone.embedding.weight")
    )
    only_embedding = head_missing and not embedding_missing
    # Two weights that differ stay, so that none is lost without a word; saving refuses them.
    if head.shape == embedding.shape and (only_embedding or same_values(head, embedding)):
        model.tie_weights()


def same_values(first: Tensor, second: Tensor) -> bool:
    """Compare two tensors that should be one.

    Args:
        first: on any device.
        second: likewise; it may be the same storage.

    Returns:
        Whether shapes, dtypes and values are the same; on "meta" no values differ.
    """
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.is_meta or second.is_meta:
        return first.is_meta and second.is_meta
    shared = first.device == second.device and first.data_ptr() == second.data_ptr()
    return shared or torch.equal(first, second.to(first.device))
