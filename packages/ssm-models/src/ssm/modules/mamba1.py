"""The Mamba block of the first paper: projections around a convolution and a selective scan."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ssm import ops
from ssm.distributed.context import operators
from ssm.modules.arguments import check_dtype, check_int, check_positive
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
from ssm.modules.norm import RMSNorm, WeightlessRMSNorm
from ssm.modules.precision import DeltaProjection, at_least_fp32, project
from ssm.modules.sequence import check_input, sequence_meta
from ssm.seq_meta import SeqMeta
from ssm.state import State
from ssm.utils import dispatch


class Mamba1(nn.Module):
    """Mamba block (Gu & Dao 2023, arXiv:2312.00752, section 3.4 and algorithm 2).

    Args:
        d_model: width of input and output.
        d_state: N, states per channel.
        d_conv: W, taps of the causal convolution.
        expand: d_inner = expand * d_model channels inside.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: initial step sizes are raised to this.
        bias: whether in_proj and out_proj have a bias.
        conv_bias: whether the convolution has a bias.
        use_fast_path: False forces the reference operators in place of the compiled ones.
        layer_idx: key of this layer in a state; needed for more than one layer.
        device: where the parameters live.
        dtype: of the parameters. A_log, D and the bias of dt_proj are float32 or better.
        dt_rank: R, rank of the step size projection; "auto" is ceil(d_model / 16).
        dt_init: "random" (uniform) or "constant" weights of the step size projection.
        dt_scale: scale of those weights.
        bcdt_norm: RMSNorm of B, C and the low-rank part of the step sizes, each for itself: None
            for none, "learned" with weights (Jamba), "weightless" without (FalconMamba).
        bcdt_norm_eps: eps of these norms.

    Shape:
        (B, L, d_model) -> (B, L, d_model), dtype of the input. Any B and L, 0 included.

    State:
        conv_state (B, d_inner, W): the last W inputs of the convolution, oldest first. Column 0 is
        never read; behind a call with packing or padding it is 0. Model dtype.
        ssm_state (B, d_inner, N): h after the last step, float32 (float64 in a float64 model).

    Raises:
        ValueError: an argument is out of its range.
        TypeError: a size is no int.
    """

    # Weight decay would pull the decay rates to 1 and the skip to 0, which no loss asks for.
    no_weight_decay = ("A_log", "D")

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        *,
        dt_rank: int | str = "auto",
        dt_init: str = "random",
        dt_scale: float = 1.0,
        bcdt_norm: str | None = None,
        bcdt_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_dtype("Mamba1", dtype)
        check_int("Mamba1", "d_model", d_model)
        if isinstance(dt_rank, str) and dt_rank == "auto":
            dt_rank = math.ceil(d_model / 16)
        for name, value in (("d_state", d_state), ("d_conv", d_conv), ("dt_rank", dt_rank)):
            check_int("Mamba1", name, value)
        scales = {"dt_min": dt_min, "dt_max": dt_max, "dt_init_floor": dt_init_floor}
        scales |= {"expand": expand, "dt_scale": dt_scale, "bcdt_norm_eps": bcdt_norm_eps}
        for name, value in scales.items():
            check_positive("Mamba1", name, value)
        if dt_max < dt_min:
            raise ValueError(f"Mamba1: dt_max must be at least dt_min = {dt_min}, got {dt_max}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba1: dt_init must be 'random' or 'constant', got {dt_init!r}")
        if bcdt_norm not in (None, "learned", "weightless"):
            raise ValueError(
                f"Mamba1: bcdt_norm must be None, 'learned' or 'weightless', got {bcdt_norm!r}"
            )

        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = dt_rank
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx

        factory = {"device": device, "dtype": dtype}
        stable = {"device": device, "dtype": at_least_fp32(dtype)}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            **factory,
        )
        self.x_proj = nn.Linear(self.d_inner, dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = DeltaProjection(dt_rank, self.d_inner, **factory)
        # Here, so that random numbers are drawn in the order of mamba_ssm.
        self._init_delta(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self.bcdt_norm = bcdt_norm
        if bcdt_norm == "learned":
            self.dt_norm = RMSNorm(dt_rank, bcdt_norm_eps, **factory)
            self.B_norm = RMSNorm(d_state, bcdt_norm_eps, **factory)
            self.C_norm = RMSNorm(d_state, bcdt_norm_eps, **factory)
        elif bcdt_norm == "weightless":
            self.dt_norm = self.B_norm = self.C_norm = WeightlessRMSNorm(bcdt_norm_eps)
        decay_rates = torch.arange(1, d_state + 1, **stable).expand(self.d_inner, -1)
        self.A_log = nn.Parameter(torch.log(decay_rates).contiguous())
        self.D = nn.Parameter(torch.ones(self.d_inner, **stable))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)
        self.A_log._no_weight_decay = True
        self.D._no_weight_decay = True

    def forward(
        self,
        hidden_states: Tensor,
        inference_params=None,
        *,
        state: State | None = None,
        seq_meta: SeqMeta | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        context_group=None,
        **kwargs,
    ) -> Tensor:
        """Mix over time, from and into a state if one is given.

        Args:
            hidden_states: (B, L, d_model). Without gradients and with L = 1 the states are stepped
                in place; else a scan runs from them and they are written at its end.
            inference_params: state in the protocol of mamba_ssm. ``seqlen_offset`` 0 starts from
                nothing, any other continues; the caller advances it.
            state: state that is continued, always. Excludes inference_params.
            seq_meta: packing and padding in one object; excludes the next three.
            seq_idx: (B, L) int, sequence id per step, -1 = padding.
            cu_seqlens: (S + 1,) int, boundaries over the flattened B L steps. States have S rows
                then.
            attention_mask: (B, L or more), nonzero = real token.
            position_ids: accepted and unused, a recurrence knows where it is.
            context_group: ranks that hold consecutive parts of the steps; L, seq_idx and masks are
                those of this rank, a state is that of the whole sequence on all of them.
            **kwargs: refused; named in the API for subclasses.

        Returns:
            (B, L, d_model), dtype of hidden_states; skipped steps give 0 (or the bias of out_proj).

        Raises:
            ValueError: a shape does not fit, or two arguments exclude each other.
            TypeError: an argument that nobody knows.
        """
        if kwargs:
            raise TypeError(f"Mamba1: got an unexpected keyword argument {next(iter(kwargs))!r}")
        check_input("Mamba1", "hidden_states", hidden_states)
        if hidden_states.dim() != 3 or hidden_states.shape[-1] != self.d_model:
            raise ValueError(
                f"Mamba1: hidden_states must have shape (B, L, {self.d_model}), "
                f"got {tuple(hidden_states.shape)}"
            )
        batch, seqlen, _ = hidden_states.shape
        seq_meta = sequence_meta(
            "Mamba1", batch, seqlen, seq_meta, seq_idx, cu_seqlens, attention_mask
        )
        rows = batch
        if seq_meta is not None and seq_meta.state_per_sequence:
            rows = seq_meta.cu_seqlens.numel() - 1
        memory = memory_of(self, inference_params, state, rows)
        layer_state = None if memory is None else memory[key_of(self)]
        y, new_state = self._mix(hidden_states, layer_state, seq_meta, context_group)
        if new_state is not None:
            memory[key_of(self)] = new_state
        return y

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode one token and change both states in place (signature of mamba_ssm).

        Args:
            hidden_states: (B, 1, d_model).
            conv_state: (B, d_inner, W).
            ssm_state: (B, d_inner, N).

        Returns:
            (output (B, 1, d_model), conv_state, ssm_state), the states being the tensors given.

        Raises:
            ValueError: hidden_states holds more or less than one token, or a state has another
                shape.
        """
        check_input("Mamba1", "hidden_states", hidden_states)
        if hidden_states.dim() != 3 or hidden_states.shape[1:] != (1, self.d_model):
            raise ValueError(
                f"Mamba1: hidden_states must have shape (B, 1, {self.d_model}) in step, "
                f"got {tuple(hidden_states.shape)}"
            )
        check_shapes(self, (conv_state, ssm_state), hidden_states.shape[0])
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
            conv_state: (B, d_inner, W).
            ssm_state: (B, d_inner, N), float32, or float64 in a float64 model.
        """
        check_int("Mamba1", "batch_size", batch_size, 0)
        if max_seqlen is not None:
            check_int("Mamba1", "max_seqlen", max_seqlen, 0)
        check_dtype("Mamba1", dtype)
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
        return (rows, self.d_inner, self.d_conv), (rows, self.d_inner, self.d_state)

    def _init_delta(self, dt_min, dt_max, dt_init, dt_scale, dt_init_floor) -> None:
        spread = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        else:
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        with torch.no_grad():
            low, high = math.log(dt_min), math.log(dt_max)
            bias = self.dt_proj.bias
            dt = torch.exp(torch.rand_like(bias) * (high - low) + low).clamp(min=dt_init_floor)
            # The inverse of softplus, in the form that does not overflow.
            bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.dt_proj.bias._no_reinit = True
        self.dt_proj.bias._no_weight_decay = True

    def _mix(self, hidden_states, layer_state, seq_meta=None, context_group=None):
        """The one path of forward and step: returns (y (B, L, d_model), state after it or None)."""
        batch, seqlen, _ = hidden_states.shape
        keep = None
        if seq_meta is not None:
            keep = seq_meta.positions(batch, seqlen, hidden_states.device) >= 0
            # A NaN in padding would reach the weight gradient of in_proj as 0 * NaN.
            hidden_states = hidden_states.masked_fill(~keep[..., None], 0)
        x, z = project(self.in_proj, hidden_states).chunk(2, dim=-1)  # each (B, L, D)
        with nullcontext() if self.use_fast_path else dispatch.use_backend("python"):
            if context_group is None and can_step(seqlen, layer_state, seq_meta):
                y = self._step(x[:, 0], z[:, 0], layer_state, keep)[:, None]
            else:
                y, layer_state = self._scan(x, z, layer_state, seq_meta, context_group)
        return project(self.out_proj, y).to(hidden_states.dtype), layer_state

    def _step(self, x, z, layer_state, keep):
        """One token: x and z (B, D), states changed in place; returns y (B, D)."""
        conv_state, ssm_state = layer_state
        rows = stepped_rows(keep)
        x = ops.dw_causal_conv_step(
            x, conv_state, self.conv1d.weight, self.conv1d.bias, "silu", state_indices=rows
        )
        delta, B, C = self._select(x)
        A = self._decay_rates(x.dtype)
        return ops.selective_state_step(
            ssm_state, x, delta, A, B, C, self.D, z, None, True, state_indices=rows
        )

    def _scan(self, x, z, layer_state, seq_meta, context_group):
        """Any number of tokens: x and z (B, L, D); returns (y (B, L, D), new state or None)."""
        over_time = operators("Mamba1", context_group)
        conv_inputs = x.transpose(1, 2)  # (B, D, L), a view: the operators take any strides
        arguments = (conv_inputs, self.conv1d.weight, self.conv1d.bias, "silu")
        if layer_state is None:
            x = over_time.dw_causal_conv(*arguments, seq_meta=seq_meta).transpose(1, 2)
            conv_last = ssm_state = None
        else:
            conv_state, ssm_state = layer_state
            x, conv_last = over_time.dw_causal_conv(
                *arguments,
                initial_state=conv_state[..., 1:],
                return_final_state=True,
                seq_meta=seq_meta,
            )
            x = x.transpose(1, 2)
        delta, B, C = (part.transpose(1, 2) for part in self._select(x))
        scanned = over_time.selective_scan(
            x.transpose(1, 2),
            delta,
            self._decay_rates(x.dtype),
            B,
            C,
            self.D,
            z.transpose(1, 2),
            None,
            True,
            layer_state is not None,
            initial_state=ssm_state,
            seq_meta=seq_meta,
        )
        if layer_state is None:
            return scanned.transpose(1, 2), None
        y, ssm_last = scanned
        oldest = oldest_input(conv_state, conv_inputs, seq_meta, context_group)
        conv_last = torch.cat([oldest.to(conv_last.dtype), conv_last], dim=-1)
        return y.transpose(1, 2), replaced(layer_state, (conv_last, ssm_last))

    def _select(self, x):
        """From x (..., D) the input-dependent delta (..., D), B and C (..., N)."""
        dt, B, C = project(self.x_proj, x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.bcdt_norm is not None:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        return project(self.dt_proj, dt), B, C

    def _decay_rates(self, dtype):
        """A = -exp(A_log) (D, N), in float32 or better also after ``model.to(torch.bfloat16)``."""
        return -torch.exp(
            self.A_log.to(at_least_fp32(torch.promote_types(dtype, self.A_log.dtype)))
        )
