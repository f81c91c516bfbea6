"""Multi-head attention for hybrid models: grouped keys, partial rotary, convolution, gated MLP."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from ssm import ops
from ssm.distributed.collectives import check_group, same_random_state
from ssm.distributed.context import operators
from ssm.distributed.layout import Section
from ssm.modules.arguments import check_dtype, check_int, check_positive
from ssm.modules.attend import attend_onto, attend_within, positions_of
from ssm.modules.attend_ranks import attend_across, parts_of, positions_in
from ssm.modules.kv_cache import layout_of, plan_write
from ssm.modules.memory import (
    can_step,
    check_shapes,
    key_of,
    memory_of,
    oldest_input,
    replaced,
    step_in_place,
    stepped_rows,
)
from ssm.modules.precision import project
from ssm.modules.rotary import Rotary
from ssm.modules.sequence import (
    batch_and_seqlen,
    check_input,
    check_positions,
    sequence_meta,
)
from ssm.modules.tensor_parallel import (
    check_split,
    column_linear,
    conv_parameters,
    keep_channels,
    own_skipped,
    row_linear,
)
from ssm.seq_meta import SeqMeta
from ssm.state import State

# The released code rounds mlp_dim up, and checkpoints have that size.
MLP_MULTIPLE = 256


class MHA(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2).

    Key heads may be shared by groups of query heads (Ainslie et al. 2023, arXiv:2305.13245). With
    ``mlp_dim`` a gated MLP runs beside the attention and shares its two projections. Parameters and
    their layout are those of the state-spaces checkpoints: the rows of in_proj are queries, keys,
    values, up, gate; the columns of out_proj are heads, MLP.

    Args:
        embed_dim: width of input and output.
        num_heads: H, query heads.
        num_heads_kv: Hkv, key and value heads, a divisor of H; None takes H.
        head_dim: P; None takes embed_dim // num_heads.
        mlp_dim: rows of in_proj for the MLP, twice its width, rounded up to a multiple of 256; 0
            for none.
        qkv_proj_bias: whether in_proj has a bias.
        out_proj_bias: whether out_proj has a bias.
        softmax_scale: of the scores; None takes head_dim^-0.5.
        causal: a step sees itself and the past only. False has no state.
        layer_idx: key of this layer in a state; needed for more than one layer.
        d_conv: W, taps of a causal convolution over queries, keys and values, without activation; 0
            for none.
        rotary_emb_dim: features per head that turn with the position, even; 0 for none.
        rotary_emb_base: base of their wave lengths.
        rotary_emb_interleaved: features turn in pairs (0, 1), (2, 3), ..., else with the one half
            of rotary_emb_dim further.
        device: where the parameters live.
        dtype: of the parameters.
        process_group: ranks among which the heads are split, and the key heads as far as there are
            enough of them; one rank is as None. Sizes above are those of all ranks together, the
            attributes of the module those of its rank.
        sequence_parallel: with several ranks, whether x and the result hold only this rank's part
            of the tokens, along axis 0; else they are whole on every rank.

    Shape:
        (B, L, embed_dim) -> (B, L, embed_dim), dtype of the input. Any B and L, 0 included. With
        several ranks and sequence_parallel (B L / ranks, embed_dim) and seqlen, or whole rows,
        (B / ranks, L, embed_dim).

    State:
        kv_cache (B, T, 2, Hkv, P): keys, already turned, and values of the tokens seen, from slot 0
        on in every row; padding never enters. Model dtype.
        conv_state (B, (H + 2 Hkv) P, W), only with d_conv: the last W inputs of the convolution,
        oldest first. Column 0 is never read; behind a call with packing or padding it is 0.
        lengths (B,) int64: tokens in each row of the cache, and the position of the next one.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: a size is no int.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device=None,
        dtype=None,
        *,
        process_group=None,
        sequence_parallel: bool = True,
    ) -> None:
        super().__init__()
        check_dtype("MHA", dtype)
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_heads_kv": num_heads_kv}
        optional = {"mlp_dim": mlp_dim, "d_conv": d_conv, "rotary_emb_dim": rotary_emb_dim}
        if head_dim is not None:
            sizes["head_dim"] = head_dim
        for name, value in {**sizes, **optional}.items():
            check_int("MHA", name, value, int(name in sizes))
        if num_heads % num_heads_kv:
            raise ValueError(
                f"MHA: num_heads_kv must divide num_heads = {num_heads}, got {num_heads_kv}"
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"MHA: num_heads must divide embed_dim = {embed_dim} without head_dim, "
                    f"got {num_heads}"
                )
            head_dim = embed_dim // num_heads
        if rotary_emb_dim > head_dim or rotary_emb_dim % 2:
            raise ValueError(
                f"MHA: rotary_emb_dim must be even and at most head_dim = {head_dim}, "
                f"got {rotary_emb_dim}"
            )
        if softmax_scale is not None:
            check_positive("MHA", "softmax_scale", softmax_scale)
        check_positive("MHA", "rotary_emb_base", rotary_emb_base)

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv
        self.head_dim = head_dim
        self.mlp_dim = -(-mlp_dim // MLP_MULTIPLE) * MLP_MULTIPLE
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.layer_idx = layer_idx
        self.d_conv = d_conv
        self.rotary_emb_dim = rotary_emb_dim
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.ranks = check_group("MHA", "process_group", process_group)
        split = sections = None
        if self.ranks > 1:
            sections = self._sections()
            split = (process_group, sequence_parallel)
            same_random_state(process_group, device)

        factory = {"device": device, "dtype": dtype}
        qkv_dim = head_dim * (num_heads + 2 * num_heads_kv)
        self.in_proj = column_linear(
            embed_dim, qkv_dim + self.mlp_dim, qkv_proj_bias, split, sections, **factory
        )
        if d_conv:
            self.conv1d = nn.Conv1d(
                qkv_dim, qkv_dim, d_conv, groups=qkv_dim, padding=d_conv - 1, **factory
            )
        if rotary_emb_dim:
            self.rotary_emb = Rotary(rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved)
        self.out_proj = row_linear(
            head_dim * num_heads + self.mlp_dim // 2,
            embed_dim,
            out_proj_bias,
            split,
            # The columns are what leaves the queries' heads and the MLP.
            sections and (sections[0], sections[3]),
            **factory,
        )
        if split is not None:
            if d_conv:
                keep_channels(self.conv1d, sections[:3], process_group)
            self.num_heads = num_heads // self.ranks
            self.num_heads_kv = max(1, num_heads_kv // self.ranks)
            self.mlp_dim //= self.ranks

    def _sections(self) -> tuple[Section, ...]:
        """How the ranks share the rows of in_proj: queries, keys, values, up, gate."""
        ranks, width = self.ranks, self.head_dim
        check_split("MHA", "num_heads", self.num_heads, ranks)
        check_split("MHA", "num_heads_kv", self.num_heads_kv, ranks, shared=True)
        check_split("MHA", "mlp_dim / 2", self.mlp_dim // 2, ranks)
        keys = Section(self.num_heads_kv * width, min(self.num_heads_kv, ranks))
        beside = Section(self.mlp_dim // 2, ranks)
        return (Section(self.num_heads * width, ranks), keys, keys, beside, beside)

    def forward(
        self,
        x: Tensor,
        inference_params=None,
        *,
        state: State | None = None,
        seq_meta: SeqMeta | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seqlen: int | None = None,
        context_group=None,
        **kwargs,
    ) -> Tensor:
        """Attend over the steps given and those in a state, which then holds all of them.

        Args:
            x: (B, L, embed_dim).
            inference_params: state in the protocol of mamba_ssm. ``seqlen_offset`` 0 starts from
                nothing; a smaller one than the tokens held forgets the last of them;
                ``lengths_per_sample`` (B,), if set, says how many tokens each row holds.
                ``max_seqlen``, if set, limits the cache.
            state: state that is continued, always. Excludes inference_params. Its cache grows as
                needed, up to ``max_seqlen`` if that is set.
            seq_meta: packing and padding in one object; excludes the next three.
            seq_idx: (B, L) int, sequence id per step, -1 = padding.
            cu_seqlens: (S + 1,) int, boundaries over the flattened B L steps. States have S rows
                then.
            attention_mask: (B, L or more), nonzero = real token.
            position_ids: (B, L) int, positions for the rotary embedding; None counts the tokens of
                each sequence.
            seqlen: L of an x that has batch and time in one axis.
            context_group: ranks that hold consecutive parts of the steps; L, seq_idx, masks and
                position_ids are those of this rank. Excludes a state.
            **kwargs: refused; named in the API for subclasses.

        Returns:
            (B, L, embed_dim), dtype of x; skipped steps give 0 (or the bias of out_proj).

        Raises:
            ValueError: a shape does not fit, two arguments exclude each other, or the state has no
                room; nothing is changed then.
            TypeError: an argument that nobody knows.
        """
        if kwargs:
            raise TypeError(f"MHA: got an unexpected keyword argument {next(iter(kwargs))!r}")
        batch, seqlen = batch_and_seqlen("MHA", "x", x, self.embed_dim, seqlen, self._token_parts())
        check_positions("MHA", position_ids, batch, seqlen, x.device)
        seq_meta = sequence_meta(
            "MHA", batch, seqlen, seq_meta, seq_idx, cu_seqlens, attention_mask
        )
        rows = batch
        if seq_meta is not None and seq_meta.state_per_sequence:
            rows = seq_meta.num_sequences
        source = inference_params if state is None else state
        if source is not None and not self.causal:
            raise ValueError("MHA: causal must be True for a state, got False")
        if source is not None and context_group is not None:
            raise ValueError("MHA: state must be None with context_group, got one")
        memory = memory_of(self, inference_params, state, rows)
        if memory is None:
            return self._mix(
                x, None, seq_meta, position_ids, seqlen=seqlen, context_group=context_group
            )[0]
        lengths = None
        if inference_params is not None:
            lengths = self._lengths(inference_params, memory[key_of(self)][-1])
        # Whoever wrote the object for mamba_ssm always set it; other objects may know no limit.
        limit = getattr(source, "max_seqlen", None)
        y, memory[key_of(self)] = self._mix(
            x, memory[key_of(self)], seq_meta, position_ids, limit, lengths, seqlen
        )
        return y

    def step(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Decode one token and change the states in place; the cache given is the limit.

        Args:
            x: (B, 1, embed_dim).
            *states: what ``allocate_inference_cache`` returns.

        Returns:
            (output (B, 1, embed_dim), *states), the states being the tensors given.

        Raises:
            ValueError: x holds more or less than one token, a state has another shape, the cache is
                full, or the attention is not causal.
        """
        check_input("MHA", "x", x)
        if x.dim() != 3 or x.shape[1:] != (1, self.embed_dim):
            raise ValueError(
                f"MHA: x must have shape (B, 1, {self.embed_dim}) in step, got {tuple(x.shape)}"
            )
        if not self.causal:
            raise ValueError("MHA: causal must be True for a state, got False")
        check_shapes(self, states, x.shape[0] * self._token_parts())
        limit = states[0].shape[1]

        def mix(x, states):
            return self._mix(x, states, None, None, limit)

        return step_in_place(mix, x, states), *states

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[Tensor, ...]:
        """Return the state before the first token, all zero.

        Args:
            batch_size: B.
            max_seqlen: T; 0 or None starts without slots, for a cache that grows.
            dtype: of kv_cache and conv_state; None takes the model dtype, torch's default where no
                parameter is floating point.
            **kwargs: accepted and unused, as in mamba_ssm.

        Returns:
            kv_cache: (B, T, 2, Hkv, P).
            conv_state: (B, (H + 2 Hkv) P, W), only with d_conv.
            lengths: (B,) int64.
        """
        check_dtype("MHA", dtype)
        # What replaced a projection may hold integers, or no parameter at all.
        parameters = [*self.out_proj.parameters(), *self.parameters()]
        if dtype is None:
            found = (p.dtype for p in parameters if p.is_floating_point())
            dtype = next(chain(found, [torch.get_default_dtype()]))  # as in check_shapes
        device = parameters[0].device if parameters else None
        check_int("MHA", "batch_size", batch_size, 0)
        if max_seqlen is not None:
            check_int("MHA", "max_seqlen", max_seqlen, 0)
        cache, *conv, lengths = self.state_shapes(batch_size)
        cache = (batch_size, max_seqlen or 0, *cache[2:])
        return (
            *(torch.zeros(shape, device=device, dtype=dtype) for shape in (cache, *conv)),
            torch.zeros(lengths, device=device, dtype=torch.int64),
        )

    def state_shapes(self, rows: int) -> tuple[tuple[int | None, ...], ...]:
        """Return the shape of each state for a number of rows; None stands for any size."""
        cache = (rows, None, 2, self.num_heads_kv, self.head_dim)
        if not self.d_conv:
            return cache, (rows,)
        return cache, (rows, self.conv1d.in_channels, self.d_conv), (rows,)

    def allocate_state(
        self, batch: int, dtype: torch.dtype | None = None, max_seqlen: int | None = None
    ) -> State:
        """Return a State that holds this layer alone, for a block used outside a language model.

        Args:
            batch: B.
            dtype: of kv_cache and conv_state; None takes the model dtype.
            max_seqlen: tokens that each row can take, allocated at once; None for a cache that
                grows.
        """
        cache = self.allocate_inference_cache(batch, max_seqlen, dtype)
        return State({key_of(self): cache}, batch, max_seqlen)

    def check_room(
        self,
        inference_params,
        state: State | None,
        batch: int,
        seqlen: int,
        seq_meta: SeqMeta | None,
    ) -> None:
        """Refuse a call whose tokens the cache may not take; nothing is changed.

        A model asks this of all its attentions before the first layer writes.

        Args:
            inference_params: as in ``forward``.
            state: as in ``forward``; one of the two is given.
            batch: B.
            seqlen: L.
            seq_meta: packing and padding.

        Raises:
            ValueError: the state has no room, or lengths_per_sample are none of its rows.
            TypeError: lengths_per_sample are no tensor.
        """
        source = inference_params if state is None else state
        limit = getattr(source, "max_seqlen", None)
        if torch.compiler.is_compiling():
            return
        given = None if state is not None else getattr(source, "lengths_per_sample", None)
        if given is None and (limit is None or source.seqlen_offset + seqlen <= limit):
            return  # the offset counts padding too, so this is the usual end
        rows = batch
        if seq_meta is not None and seq_meta.state_per_sequence:
            rows = seq_meta.num_sequences
        held = source.key_value_memory_dict.get(key_of(self))
        if held is None or (state is None and source.seqlen_offset == 0):
            lengths = torch.zeros(rows, dtype=torch.int64)
        else:
            lengths = held[-1] if state is not None else self._lengths(source, held[-1])
        layout = None
        if seq_meta is not None:
            layout = layout_of(seq_meta, batch, seqlen, lengths.device)
        plan_write("MHA", 0, lengths, layout, seq_meta, batch, seqlen, limit)

    def _lengths(self, inference_params, held: Tensor) -> Tensor:
        """Return the lengths that a caller of mamba_ssm's protocol means, a tensor of its own."""
        if inference_params.seqlen_offset == 0:
            return held
        given = getattr(inference_params, "lengths_per_sample", None)
        if given is None:
            return held.clamp(max=inference_params.seqlen_offset)
        if not isinstance(given, Tensor):
            got = type(given).__name__
            raise TypeError(f"MHA: lengths_per_sample must be a torch.Tensor, got {got}")
        if given.shape != held.shape:
            raise ValueError(
                f"MHA: lengths_per_sample must have shape {tuple(held.shape)}, "
                f"got {tuple(given.shape)}"
            )
        if given.is_floating_point() or given.is_complex():
            raise ValueError(f"MHA: lengths_per_sample must hold integers, got {given.dtype}")
        return given.to(held.device, held.dtype, copy=True)

    def _mix(
        self,
        x,
        layer_state,
        seq_meta,
        position_ids,
        limit=None,
        lengths=None,
        seqlen=None,
        context_group=None,
    ):
        """The one path of forward and step: returns (y like x, state after it).

        Without seqlen, x is (B, L, embed_dim).
        """
        parts_outside = self._token_parts()
        seqlen = x.shape[1] if seqlen is None else seqlen
        batch = x[..., 0].numel() * parts_outside // seqlen if seqlen else len(x) * parts_outside
        layout = plan = keep = parts = None
        if seq_meta is not None:
            layout = layout_of(seq_meta, batch, seqlen, x.device)
            keep = layout.sequence > 0
            # A NaN in padding would reach the weight gradient of in_proj as 0 * NaN.
            x = x.masked_fill(own_skipped(keep, x, self.process_group, parts_outside), 0)
        if context_group is not None:
            over_time = operators("MHA", context_group, self.process_group)
            parts = parts_of(batch, seqlen, x.device, seq_meta, context_group)
        else:
            over_time = ops
        if layer_state is not None:
            cache, *conv_states, held = layer_state
            lengths = held if lengths is None else lengths
            # Refuses before anything is written.
            slots = cache.shape[1]
            plan = plan_write("MHA", slots, lengths, layout, seq_meta, batch, seqlen, limit)
        mlp_dim = self.mlp_dim
        projected = project(self.in_proj, x)
        outside = projected.shape[:-1]
        projected = projected.reshape(batch, seqlen, projected.shape[-1])
        qkv, up_gate = projected.split([projected.shape[-1] - mlp_dim, mlp_dim], dim=-1)
        if self.d_conv:
            conv_state = None if layer_state is None else conv_states[0]
            qkv, conv_state = self._convolve(qkv, conv_state, seq_meta, keep, over_time)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))  # (B, L, H + 2 Hkv, P)
        if self.rotary_emb_dim:
            turning = self.num_heads + self.num_heads_kv
            if position_ids is None:
                if parts is None:
                    position_ids = positions_of(qkv, layout, plan, seq_meta)
                else:
                    position_ids = positions_in(qkv, parts)
            turned = self.rotary_emb(qkv[:, :, :turning], position_ids)
            qkv = torch.cat([turned, qkv[:, :, turning:]], dim=2)
        q, kv = qkv.split([self.num_heads, 2 * self.num_heads_kv], dim=2)
        kv = kv.unflatten(2, (2, -1))  # (B, L, 2, Hkv, P)
        if parts is not None:
            y = attend_across(q, kv, parts, self.causal, self.softmax_scale, context_group)
        elif plan is None:
            y = attend_within(q, kv, layout, self.causal, self.softmax_scale)
        else:
            y, cache = attend_onto(q, kv, cache, plan, layout, seq_meta, self.softmax_scale)
            held = replaced((held,), (plan.start + plan.count,))[0]
            layer_state = (cache, conv_state, held) if self.d_conv else (cache, held)
        y = y.flatten(2)
        if mlp_dim:
            up, gate = up_gate.chunk(2, dim=-1)
            y = torch.cat([y, ops.swiglu(gate, up)], dim=-1)
        if keep is not None:
            y = y.masked_fill(~keep[..., None], 0)
        y = y.reshape(*outside, y.shape[-1])
        return project(self.out_proj, y).to(x.dtype), layer_state

    def _token_parts(self) -> int:
        """Into how many parts the tokens outside are cut."""
        return self.ranks if self.sequence_parallel else 1

    def _convolve(self, qkv, conv_state, seq_meta, keep, over_time):
        """Convolve qkv (B, L, C) over time; returns (same shape, conv_state after it or None)."""
        weight, bias = conv_parameters(self.conv1d)
        if can_step(qkv.shape[1], None if conv_state is None else (conv_state,), seq_meta):
            rows = stepped_rows(keep)
            y = ops.dw_causal_conv_step(
                qkv[:, 0], conv_state, weight, bias, None, state_indices=rows
            )
            return y[:, None], conv_state
        inputs = qkv.transpose(1, 2)  # (B, C, L), a view: the operator takes any strides
        if conv_state is None:
            y = over_time.dw_causal_conv(inputs, weight, bias, None, seq_meta=seq_meta)
            return y.transpose(1, 2), None
        y, last = ops.dw_causal_conv(
            inputs,
            weight,
            bias,
            None,
            initial_state=conv_state[..., 1:],
            return_final_state=True,
            seq_meta=seq_meta,
        )
        # What decoding needs are the inputs, not the outputs that mamba_ssm keeps.
        oldest = oldest_input(conv_state, inputs, seq_meta).to(last.dtype)
        (conv_state,) = replaced((conv_state,), (torch.cat([oldest, last], dim=-1),))
        return y.transpose(1, 2), conv_state
