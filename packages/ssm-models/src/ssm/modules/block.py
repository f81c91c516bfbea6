"""One residual block: add, normalise and mix over time, and once more over channels if wanted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssm.modules.norm import add_norm, is_fusable
from ssm.modules.parallel import ParallelMixer


class Block(nn.Module):
    """Pre-norm block with the residual stream apart: Add, Norm, Mixer [, Add, Norm, MLP].

    The residual enters at the start instead of being added at the end, so that the addition can be
    fused with the normalisation; the caller adds the last one (Gu & Dao 2023, released code).

    Args:
        dim: D, width of the stream.
        mixer_cls: dim -> module that mixes over time; ``nn.Identity`` for none.
        mlp_cls: dim -> module that mixes over channels; ``nn.Identity`` for none.
        norm_cls: dim -> norm.
        fused_add_norm: use ``ssm.ops.fused_layer_norm`` for addition and norm together.
        residual_in_fp32: keep the residual stream in float32 whatever the model dtype.
        residual_multiplier: factor of what mixer and MLP add to the stream (Granite).

    Shape:
        hidden_states, residual (B, L, D) -> (hidden_states, residual), both (B, L, D).

    Raises:
        ValueError: neither mixer nor MLP, or fused_add_norm with a norm that the operator does not
            compute.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] | type[nn.Identity] = nn.Identity,
        norm_cls: type[nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        *,
        residual_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.residual_multiplier = residual_multiplier
        self.mixer = self.mlp = None
        if mixer_cls is not nn.Identity:
            self.norm = norm_cls(dim)
            self.mixer = mixer_cls(dim)
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if self.mixer is None and self.mlp is None:
            raise ValueError("Block: mixer_cls must give a mixer if mlp_cls gives none, got none")
        norm = self.norms()[0]
        if fused_add_norm and not is_fusable(norm):
            raise ValueError(
                "Block: norm_cls must give an RMSNorm or a LayerNorm if fused_add_norm, "
                f"got {type(norm).__name__}"
            )

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            hidden_states: (B, L, D), output of the block before.
            residual: (B, L, D), residual stream before that output is added; None at the first
                block.
            inference_params: state in the protocol of mamba_ssm, handed to the mixer.
            **kwargs: handed to the mixer.

        Returns:
            hidden_states: (B, L, D), in the dtype of the input.
            residual: (B, L, D), float32 (or float64) if residual_in_fp32.
        """
        if self.mixer is not None:
            hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
            hidden_states = self.mixer(hidden_states, inference_params=inference_params, **kwargs)
            hidden_states = self._multiply(hidden_states)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self._multiply(self.mlp(hidden_states))
        return hidden_states, residual

    def norms(self) -> list[nn.Module]:
        """Return the norms of the block, in the order of use."""
        return [getattr(self, name) for name in ("norm", "norm2") if hasattr(self, name)]

    def mixers(self) -> list[nn.Module]:
        """Return the modules that have a state: none, the mixer, or both of a parallel pair."""
        mixer = self.mixer
        if isinstance(mixer, ParallelMixer):
            return list(mixer.mixers)
        return [] if mixer is None else [mixer]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs
    ) -> tuple[Tensor, ...]:
        """Return the zero state of the mixer, of both of a parallel pair; see there for shapes."""
        caches = (
            mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for mixer in self.mixers()
        )
        return tuple(tensor for cache in caches for tensor in cache)

    def _multiply(self, hidden_states):
        if self.residual_multiplier == 1:
            return hidden_states
        return hidden_states * self.residual_multiplier

    def _add_norm(self, norm, hidden_states, residual):
        return add_norm(
            norm,
            hidden_states,
            residual,
            fused=self.fused_add_norm,
            residual_in_fp32=self.residual_in_fp32,
        )
