"""The classes of ``mamba_ssm`` with its order of arguments, on the modules of ``ssm``."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules import mamba2
from ssm.modules.attention import MHA
from ssm.modules.block import Block
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mlp import GatedMLP

__all__ = [
    "MHA",
    "Block",
    "GatedMLP",
    "InferenceParams",
    "Mamba",
    "Mamba2",
    "MambaConfig",
    "MambaLMHeadModel",
]


class Mamba(Mamba1):
    """:class:`ssm.modules.mamba1.Mamba1` with the order of arguments of ``mamba_ssm.Mamba``.

    Args:
        d_model: width of input and output.
        d_state: N, states per channel.
        d_conv: W, taps of the causal convolution.
        expand: d_inner = expand * d_model channels inside.
        dt_rank: R, rank of the step size projection; "auto" is ceil(d_model / 16).
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init: "random" or "constant" weights of the step size projection.
        dt_scale: scale of those weights.
        dt_init_floor: initial step sizes are raised to this.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have a bias.
        use_fast_path: False forces the reference operators.
        layer_idx: key of this layer in a state.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        (B, L, d_model) -> (B, L, d_model).
    """

    def __init__(
        self,
        d_model,
        d_state=16,
        d_conv=4,
        expand=2,
        dt_rank="auto",
        dt_min=0.001,
        dt_max=0.1,
        dt_init="random",
        dt_scale=1.0,
        dt_init_floor=1e-4,
        conv_bias=True,
        bias=False,
        use_fast_path=True,
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_min,
            dt_max,
            dt_init_floor,
            bias,
            conv_bias,
            use_fast_path,
            layer_idx,
            device,
            dtype,
            dt_rank=dt_rank,
            dt_init=dt_init,
            dt_scale=dt_scale,
        )


class Mamba2(mamba2.Mamba2):
    """:class:`ssm.modules.mamba2.Mamba2` with the order of arguments of ``mamba_ssm.Mamba2``.

    Args:
        d_model: width of input and output.
        d_state: N, states per channel.
        d_conv: W, taps of the causal convolution.
        conv_init: bound of the initial weights of the convolution; None takes torch's.
        expand: d_inner = expand * d_model channels inside.
        headdim: P, channels per head.
        d_ssm: channels of the recurrence; None takes all d_inner.
        ngroups: G, groups of heads that share B and C.
        A_init_range: range of the initial decay rates.
        D_has_hdim: D has a weight per channel, else per head.
        rmsnorm: gate and normalise, else only gate.
        norm_before_gate: normalise first.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: initial step sizes are raised to this.
        dt_limit: (low, high), to which step sizes are clamped.
        bias: whether in_proj and out_proj have a bias.
        conv_bias: whether the convolution has a bias.
        chunk_size: hint for the scan.
        use_mem_eff_path: False forces the reference operators.
        layer_idx: key of this layer in a state.
        process_group: ranks among which the heads are split.
        sequence_parallel: whether each rank holds a part of the tokens.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        (B, L, d_model) -> (B, L, d_model).
    """

    def __init__(
        self,
        d_model,
        d_state=128,
        d_conv=4,
        conv_init=None,
        expand=2,
        headdim=64,
        d_ssm=None,
        ngroups=1,
        A_init_range=(1, 16),
        D_has_hdim=False,
        rmsnorm=True,
        norm_before_gate=False,
        dt_min=0.001,
        dt_max=0.1,
        dt_init_floor=1e-4,
        dt_limit=(0.0, float("inf")),
        bias=False,
        conv_bias=True,
        chunk_size=256,
        use_mem_eff_path=True,
        layer_idx=None,
        process_group=None,
        sequence_parallel=True,
        device=None,
        dtype=None,
    ):
        super().__init__(
            d_model,
            d_state,
            d_conv,
            headdim,
            expand,
            ngroups,
            d_ssm,
            chunk_size,
            bias,
            conv_bias,
            layer_idx,
            device,
            dtype,
            conv_init=conv_init,
            A_init_range=A_init_range,
            D_has_hdim=D_has_hdim,
            rmsnorm=rmsnorm,
            norm_before_gate=norm_before_gate,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            use_mem_eff_path=use_mem_eff_path,
            process_group=process_group,
            sequence_parallel=sequence_parallel,
        )

    def forward(
        self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None, **kwargs
    ):
        """Mix over time; the arguments of ``mamba_ssm``, then those of the base class by name."""
        return super().forward(u, inference_params, seq_idx, cu_seqlens, seqlen=seqlen, **kwargs)


@dataclass
class InferenceParams:
    """What a decoding loop hands to every layer, in the protocol of ``mamba_ssm``.

    Args:
        max_seqlen: tokens that the states can take.
        max_batch_size: rows of the states.
        seqlen_offset: tokens seen so far; the caller advances it.
        batch_size_offset: accepted, not read.
        key_value_memory_dict: layer index -> states of that layer.
        lengths_per_sample: (B,), tokens in each row, or None.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen, max_batch_size):
        """Start a new text of new sizes; layers zero their states at offset 0."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
