"""A recurrence and an attention side by side, from one input to one sum."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn


class ParallelMixer(nn.Module):
    """Sum of a recurrent mixer and an attention that read the same input (Falcon-H1).

    Falcon-H1 report (arXiv:2507.22448), section 2. Each of the two has a state of its own, under
    its own ``layer_idx``; this module has none.

    Args:
        dim: D, width of input and output.
        ssm_cls: dim -> recurrent mixer.
        attention_cls: dim -> attention.
        ssm_in_multiplier: factor of what the recurrent mixer reads.
        ssm_out_multiplier: factor of what it gives.
        attention_in_multiplier: factor of what the attention reads.
        attention_out_multiplier: factor of what it gives.

    Shape:
        (B, L, D) -> (B, L, D), dtype of the input.

    Raises:
        ValueError: a factor is not finite.
        TypeError: a factor is no number.
    """

    def __init__(
        self,
        dim: int,
        ssm_cls: Callable[[int], nn.Module],
        attention_cls: Callable[[int], nn.Module],
        ssm_in_multiplier: float = 1.0,
        ssm_out_multiplier: float = 1.0,
        attention_in_multiplier: float = 1.0,
        attention_out_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.ssm_multipliers = (ssm_in_multiplier, ssm_out_multiplier)
        self.attention_multipliers = (attention_in_multiplier, attention_out_multiplier)
        for value in (*self.ssm_multipliers, *self.attention_multipliers):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"ParallelMixer: multiplier must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"ParallelMixer: multiplier must be finite, got {value}")
        self.ssm = ssm_cls(dim)
        self.attention = attention_cls(dim)

    @property
    def mixers(self) -> tuple[nn.Module, nn.Module]:
        """The two modules that have a state."""
        return self.ssm, self.attention

    def forward(self, hidden_states: Tensor, inference_params=None, **kwargs) -> Tensor:
        """Mix over time in both ways.

        Args:
            hidden_states: (B, L, D).
            inference_params: state in the protocol of mamba_ssm, for both.
            **kwargs: handed to both.

        Returns:
            (B, L, D), the sum.
        """
        return sum(
            _scaled(mixer(_scaled(hidden_states, into), inference_params, **kwargs), out)
            for mixer, (into, out) in (
                (self.ssm, self.ssm_multipliers),
                (self.attention, self.attention_multipliers),
            )
        )


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor
