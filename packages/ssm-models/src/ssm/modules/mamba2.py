"""The Mamba-2 block: projections around a convolution and the state-space dual scan."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ssm import ops
from ssm.distributed.collectives import check_group, same_random_state
from ssm.distributed.context import operators
from ssm.distributed.layout import Section, Shard, keep_part
from ssm.modules.arguments import check_dtype, check_int
from ssm.modules.mamba2_sizes import check_arguments
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
from ssm.modules.norm import RMSNormGated
from ssm.modules.precision import at_least_fp32, project
from ssm.modules.sequence import batch_and_seqlen, check_input, sequence_meta
from ssm.modules.tensor_parallel import (
    SharedRMSNormGated,
    check_split,
    column_linear,
    conv_parameters,
    keep_channels,
    own_skipped,
    row_linear,
)
from ssm.seq_meta import SeqMeta
from ssm.state import State
from ssm.utils import dispatch

NO_LIMIT = (0.0, math.inf)


class Mamba2(nn.Module):
    """Mamba-2 block (Dao & Gu 2024, arXiv:2405.21060, section 7).

    Inside, d_ssm = H P of the d_inner = expand * d_model channels go through the recurrence, in H
    heads of width P that each have one decay; the rest, if any, is a gated MLP beside it. The rows
    of in_proj are, in this order, [z0, x0] of the MLP, z, x, B, C and dt.

    Args:
        d_model: width of input and output.
        d_state: N, states per channel.
        d_conv: W, taps of the causal convolution over x, B and C.
        headdim: P, channels per head.
        expand: d_inner = expand * d_model, rounded.
        ngroups: G, groups of heads that share B and C; the norm has one group for each.
        d_ssm: channels of the recurrence; None takes all d_inner.
        chunk_size: hint for the scan; the result does not depend on it but for rounding.
        bias: whether in_proj and out_proj have a bias.
        conv_bias: whether the convolution has a bias.
        layer_idx: key of this layer in a state; needed for more than one layer.
        device: where the parameters live.
        dtype: of the parameters. dt_bias, A_log and D are float32 or better.
        conv_init: initial weights of the convolution are uniform in [-conv_init, conv_init]; None
            takes those of nn.Conv1d.
        A_init_range: initial decay rates are uniform in this range.
        D_has_hdim: D has a weight per channel (d_ssm,), else per head (H,).
        rmsnorm: gate and normalise the output of the scan, else only gate it.
        norm_before_gate: normalise first, then gate; else the other way round.
        norm_eps: eps of that norm.
        multipliers: five factors, of z, x, B, C and dt behind in_proj (the muP multipliers of
            Falcon-H1); None for none.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: initial step sizes are raised to this.
        dt_limit: (low, high), to which step sizes are clamped behind softplus, in a scan and in
            single steps alike.
        use_mem_eff_path: False forces the reference operators in place of the compiled ones.
        process_group: ranks among which the heads are split, and the groups as far as there are
            enough of them; one rank is as None. Sizes above are those of all ranks together, the
            attributes of the module (nheads, d_ssm, ...) those of its rank.
        sequence_parallel: with several ranks, whether hidden_states and the result hold only this
            rank's part of the tokens, along axis 0; else they are whole on every rank.

    Shape:
        (B, L, d_model) -> (B, L, d_model), dtype of the input. Any B and L, 0 included. With
        several ranks and sequence_parallel (B L / ranks, d_model) and seqlen, or whole rows,
        (B / ranks, L, d_model); B below, and all arguments about sequences, are of all ranks.

    State:
        conv_state (B, d_ssm + 2 G N, W): the last W inputs of the convolution, oldest first. Column
        0 is never read; behind a call with packing or padding it is 0. Model dtype.
        ssm_state (B, H, P, N): h after the last step, float32 (float64 in a float64 model).

    Raises:
        ValueError: an argument is out of its range, or sizes do not divide each other.
        TypeError: an argument has the wrong Python type.
    """

    # Weight decay would pull the decay rates to 1 and the skip to 0, which no loss asks for.
    no_weight_decay = ("dt_bias", "A_log", "D")

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        headdim: int = 64,
        expand: int = 2,
        ngroups: int = 1,
        d_ssm: int | None = None,
        chunk_size: int = 256,
        bias: bool = False,
        conv_bias: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        conv_init: float | None = None,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        multipliers: tuple[float, ...] | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        use_mem_eff_path: bool = True,
        process_group=None,
        sequence_parallel: bool = True,
    ) -> None:
        super().__init__()
        check_dtype("Mamba2", dtype)
        d_inner = check_arguments(
            d_model=d_model,
            d_state=d_state,
            d_conv=d_conv,
            headdim=headdim,
            expand=expand,
            ngroups=ngroups,
            d_ssm=d_ssm,
            chunk_size=chunk_size,
            conv_init=conv_init,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            norm_eps=norm_eps,
            multipliers=multipliers,
        )
        self.ranks = check_group("Mamba2", "process_group", process_group)
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.headdim = headdim
        self.expand = expand
        self.ngroups = ngroups
        self.d_inner = d_inner
        self.d_ssm = d_inner if d_ssm is None else d_ssm
        self.d_mlp = self.d_inner - self.d_ssm
        self.nheads = self.d_ssm // headdim
        self.conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.chunk_size = chunk_size
        self.D_has_hdim = D_has_hdim
        self.rmsnorm = rmsnorm
        self.norm_before_gate = norm_before_gate
        self.multipliers = None if multipliers is None else tuple(multipliers)
        self.dt_limit = tuple(dt_limit)
        self.use_mem_eff_path = use_mem_eff_path
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.layer_idx = layer_idx

        factory = {"device": device, "dtype": dtype}
        stable = {"device": device, "dtype": at_least_fp32(dtype)}
        split = sections = None
        if self.ranks > 1:
            sections = self._sections()
            split = (process_group, sequence_parallel)
            same_random_state(process_group, device)
        self.in_proj = column_linear(d_model, sum(self._widths()), bias, split, sections, **factory)
        self.conv1d = nn.Conv1d(
            self.conv_dim,
            self.conv_dim,
            d_conv,
            groups=self.conv_dim,
            padding=d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand(self.nheads, **stable) * (high - low) + low)
        dt = dt.clamp(min=dt_init_floor)
        # The inverse of softplus, in the form that does not overflow.
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        decay_rates = torch.empty(self.nheads, **stable).uniform_(*A_init_range)
        self.A_log = nn.Parameter(torch.log(decay_rates))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, **stable))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True
        if rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm,
                norm_eps,
                group_size=self.d_ssm // ngroups,
                norm_before_gate=norm_before_gate,
                **factory,
            )
        if split is not None:
            # x0 and x: the columns of out_proj are what goes through the MLP and the recurrence.
            outputs = (sections[1], sections[3])
        self.out_proj = row_linear(
            self.d_inner, d_model, bias, split, outputs if split else None, **factory
        )
        if split is not None:
            self._keep_own_heads(sections)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params=None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        state: State | None = None,
        seq_meta: SeqMeta | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seqlen: int | None = None,
        context_group=None,
        **kwargs,
    ) -> Tensor:
        """Mix over time, from and into a state if one is given.

        Args:
            hidden_states: (B, L, d_model), or (B L, d_model) with ``seqlen``. Without gradients and
                with L = 1 the states are stepped in place; else a scan runs from them and they are
                written at its end.
            inference_params: state in the protocol of mamba_ssm. ``seqlen_offset`` 0 starts from
                nothing, any other continues; the caller advances it.
            seq_idx: (B, L) int, sequence id per step, -1 = padding.
            cu_seqlens: (S + 1,) int, boundaries over the flattened B L steps. States have S rows
                then.
            state: state that is continued, always. Excludes inference_params.
            seq_meta: packing and padding in one object; excludes seq_idx, cu_seqlens and
                attention_mask.
            attention_mask: (B, L or more), nonzero = real token.
            position_ids: accepted and unused, a recurrence knows where it is.
            seqlen: L of hidden_states that have batch and time in one axis.
            context_group: ranks that hold consecutive parts of the steps; L, seq_idx and masks are
                those of this rank, a state is that of the whole sequence on all of them.
            **kwargs: refused; named in the API for subclasses.

        Returns:
            Shape and dtype of hidden_states; skipped steps give 0 (or the bias of out_proj).

        Raises:
            ValueError: a shape does not fit, or two arguments exclude each other.
            TypeError: an argument that nobody knows.
        """
        if kwargs:
            raise TypeError(f"Mamba2: got an unexpected keyword argument {next(iter(kwargs))!r}")
        batch, seqlen = batch_and_seqlen(
            "Mamba2", "hidden_states", hidden_states, self.d_model, seqlen, self._token_parts()
        )
        seq_meta = sequence_meta(
            "Mamba2", batch, seqlen, seq_meta, seq_idx, cu_seqlens, attention_mask
        )
        rows = batch
        if seq_meta is not None and seq_meta.state_per_sequence:
            rows = seq_meta.num_sequences
        memory = memory_of(self, inference_params, state, rows)
        layer_state = None if memory is None else memory[key_of(self)]
        y, new_state = self._mix(hidden_states, layer_state, seq_meta, batch, seqlen, context_group)
        if new_state is not None:
            memory[key_of(self)] = new_state
        return y

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode one token and change both states in place (signature of mamba_ssm).

        Args:
            hidden_states: (B, 1, d_model).
            conv_state: (B, d_ssm + 2 G N, W).
            ssm_state: (B, H, P, N).

        Returns:
            (output (B, 1, d_model), conv_state, ssm_state), the states being the tensors given.

        Raises:
            ValueError: hidden_states holds more or less than one token, or a state has another
                shape.
        """
        check_input("Mamba2", "hidden_states", hidden_states)
        if hidden_states.dim() != 3 or hidden_states.shape[1:] != (1, self.d_model):
            raise ValueError(
                f"Mamba2: hidden_states must have shape (B, 1, {self.d_model}) in step, "
                f"got {tuple(hidden_states.shape)}"
            )
        check_shapes(self, (conv_state, ssm_state), hidden_states.shape[0] * self._token_parts())
        y = step_in_place(self._mix, hidden_states, (conv_state, ssm_state))
        return y, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Return the state before the first token, all zero.

        Args:
            batch_size: B.
            max_seqlen: accepted and unused, the state does not grow.
            dtype: of conv_state; None takes the model dtype.
            **kwargs: accepted and unused, as in mamba_ssm.

        Returns:
            conv_state: (B, d_ssm + 2 G N, W).
            ssm_state: (B, H, P, N), float32, or float64 in a float64 model.
        """
        check_int("Mamba2", "batch_size", batch_size, 0)
        if max_seqlen is not None:
            check_int("Mamba2", "max_seqlen", max_seqlen, 0)
        check_dtype("Mamba2", dtype)
        weight = self.conv1d.weight
        dtype = weight.dtype if dtype is None else dtype
        conv_shape, ssm_shape = self.state_shapes(batch_size)
        ssm_dtype = at_least_fp32(torch.promote_types(dtype, weight.dtype))
        conv_state = torch.zeros(conv_shape, device=weight.device, dtype=dtype)
        ssm_state = torch.zeros(ssm_shape, device=weight.device, dtype=ssm_dtype)
        return conv_state, ssm_state

    def allocate_state(self, batch: int, dtype: torch.dtype | None = None) -> State:
        """Return a State that holds this layer alone, for a block used outside a language model."""
        return State({key_of(self): self.allocate_inference_cache(batch, 0, dtype)}, batch)

    def state_shapes(self, rows: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of conv_state and ssm_state for a number of rows."""
        conv_shape = (rows, self.conv_dim, self.d_conv)
        return conv_shape, (rows, self.nheads, self.headdim, self.d_state)

    def _sections(self) -> tuple[Section, ...]:
        """How the ranks share the rows of in_proj, as in ``_widths`` with x, B and C apart."""
        ranks, channels = self.ranks, self.d_ssm
        heads = "d_ssm / headdim"
        check_split("Mamba2", heads, self.nheads, ranks)
        check_split("Mamba2", "ngroups", self.ngroups, ranks, shared=True)
        check_split("Mamba2", "d_inner - d_ssm", self.d_mlp, ranks)
        groups = Section(self.ngroups * self.d_state, min(self.ngroups, ranks))
        beside, inner = Section(self.d_mlp, ranks), Section(channels, ranks)
        return (beside, beside, inner, inner, groups, groups, Section(self.nheads, ranks))

    def _keep_own_heads(self, sections: tuple[Section, ...]) -> None:
        """Keep this rank's part of all parameters but the projections, and its sizes."""
        inner, heads = Shard(0, sections[3:4], self.process_group), sections[6:]
        keep_channels(self.conv1d, sections[3:6], self.process_group)
        for name in ("dt_bias", "A_log"):
            keep_part(self, name, Shard(0, heads, self.process_group))
        keep_part(self, "D", inner if self.D_has_hdim else Shard(0, heads, self.process_group))
        if self.rmsnorm:
            if self.ngroups < self.ranks:
                self.norm = SharedRMSNormGated(
                    self.norm, self.d_ssm // self.ngroups, self.ngroups, self.process_group
                )
            keep_part(self.norm, "weight", inner)
        self.ngroups = max(1, self.ngroups // self.ranks)
        for name in ("d_inner", "d_ssm", "d_mlp", "nheads"):
            setattr(self, name, getattr(self, name) // self.ranks)
        self.conv_dim = self.d_ssm + 2 * self.ngroups * self.d_state

    def _widths(self) -> list[int]:
        """Rows of in_proj: the MLP's gate and input, z, what is convolved, dt."""
        return [self.d_mlp, self.d_mlp, self.d_ssm, self.conv_dim, self.nheads]

    def _token_parts(self) -> int:
        """Into how many parts the tokens outside are cut."""
        return self.ranks if self.sequence_parallel else 1

    def _mix(
        self,
        hidden_states,
        layer_state,
        seq_meta=None,
        batch=None,
        seqlen=None,
        context_group=None,
    ):
        """The one path of forward and step: returns (y like hidden_states, state after it or None).

        Without batch and seqlen, hidden_states are (B, L, d_model).
        """
        if batch is None:
            batch, seqlen = len(hidden_states) * self._token_parts(), hidden_states.shape[1]
        keep = None
        if seq_meta is not None:
            keep = seq_meta.positions(batch, seqlen, hidden_states.device) >= 0
            # A NaN in padding would reach the weight gradient of in_proj as 0 * NaN.
            skipped = own_skipped(keep, hidden_states, self.process_group, self._token_parts())
            hidden_states = hidden_states.masked_fill(skipped, 0)
        projected = project(self.in_proj, hidden_states)
        widths = self._widths()
        z0, x0, z, xBC, dt = projected.reshape(batch, seqlen, sum(widths)).split(widths, dim=-1)
        if self.multipliers is not None:
            z, xBC, dt = self._multiply(z, xBC, dt)
        with nullcontext() if self.use_mem_eff_path else dispatch.use_backend("python"):
            if context_group is None and can_step(seqlen, layer_state, seq_meta):
                y = self._step(z[:, 0], xBC[:, 0], dt[:, 0], layer_state, keep)[:, None]
            else:
                y, layer_state = self._scan(z, xBC, dt, layer_state, seq_meta, context_group)
            y = y.flatten(2)  # (B, L, H P)
            if self.rmsnorm:
                y = self.norm(y, z)
            beside = ops.swiglu(z0, x0) if self.d_mlp else None
        if self.d_mlp:
            if keep is not None:
                # The bias of in_proj alone would make an output where there is no input.
                beside = beside.masked_fill(~keep[..., None], 0)
            y = torch.cat([beside, y.to(beside.dtype)], dim=-1)
        y = y.reshape(*projected.shape[:-1], self.d_inner)
        return project(self.out_proj, y).to(hidden_states.dtype), layer_state

    def _multiply(self, z, xBC, dt):
        """Scale z, the sections x, B and C of xBC, and dt, each (B, L, ...)."""
        of_z, *of_xBC, of_dt = self.multipliers
        width = self.ngroups * self.d_state
        parts = xBC.split([self.d_ssm, width, width], dim=-1)
        scaled = [part * factor for part, factor in zip(parts, of_xBC, strict=True)]
        return z * of_z, torch.cat(scaled, dim=-1), dt * of_dt

    def _step(self, z, xBC, dt, layer_state, keep):
        """One token: z (B, d_ssm), xBC (B, d_ssm + 2 G N), dt (B, H); returns y (B, H, P)."""
        conv_state, ssm_state = layer_state
        rows = stepped_rows(keep)
        weight, bias = conv_parameters(self.conv1d)
        xBC = ops.dw_causal_conv_step(xBC, conv_state, weight, bias, "silu", state_indices=rows)
        x, B, C = self._heads_and_groups(xBC)
        dt_bias, softplus = self.dt_bias, True
        if self.dt_limit != NO_LIMIT:
            # The operator knows no limit, so it gets finished step sizes.
            dt = dt.to(at_least_fp32(dt.dtype)) + dt_bias
            dt = torch.logaddexp(dt, torch.zeros_like(dt)).clamp(*self.dt_limit)
            dt_bias, softplus = None, False
        gate = None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim))
        A, D = self._decay_rates(x.dtype), self._skip()
        return ops.selective_state_step(
            ssm_state, x, dt, A, B, C, D, gate, dt_bias, softplus, state_indices=rows
        )

    def _scan(self, z, xBC, dt, layer_state, seq_meta, context_group):
        """Any number of tokens, as in ``_step`` with L after B; returns (y, new state or None)."""
        over_time = operators("Mamba2", context_group, self.process_group)
        conv_inputs = xBC.transpose(1, 2)  # a view: the operators take any strides
        arguments = (conv_inputs, *conv_parameters(self.conv1d), "silu")
        conv_state = ssm_state = conv_last = None
        if layer_state is None:
            xBC = over_time.dw_causal_conv(*arguments, seq_meta=seq_meta)
        else:
            conv_state, ssm_state = layer_state
            xBC, conv_last = over_time.dw_causal_conv(
                *arguments,
                initial_state=conv_state[..., 1:],
                return_final_state=True,
                seq_meta=seq_meta,
            )
        x, B, C = self._heads_and_groups(xBC.transpose(1, 2))
        scanned = over_time.ssd_chunk_scan(
            x,
            dt,
            self._decay_rates(x.dtype),
            B,
            C,
            self.chunk_size,
            self._skip(),
            None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)),
            seq_meta,
            ssm_state,
            dt_bias=self.dt_bias,
            softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=layer_state is not None,
        )
        if layer_state is None:
            return scanned, None
        y, ssm_last = scanned
        oldest = oldest_input(conv_state, conv_inputs, seq_meta, context_group)
        conv_last = torch.cat([oldest.to(conv_last.dtype), conv_last], dim=-1)
        return y, replaced(layer_state, (conv_last, ssm_last))

    def _heads_and_groups(self, xBC):
        """From (..., d_ssm + 2 G N) the input (..., H, P), and B and C (..., G, N)."""
        width = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, width, width], dim=-1)
        groups = (self.ngroups, self.d_state)
        x = x.unflatten(-1, (self.nheads, self.headdim))
        return x, B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _skip(self):
        """D, (H,) or (H, P)."""
        return self.D.view(self.nheads, self.headdim) if self.D_has_hdim else self.D

    def _decay_rates(self, dtype):
        """A = -exp(A_log) (H,), in float32 or better also after ``model.to(torch.bfloat16)``."""
        return -torch.exp(
            self.A_log.to(at_least_fp32(torch.promote_types(dtype, self.A_log.dtype)))
        )
