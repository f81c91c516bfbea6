"""The one state object of a model: what it remembers between two calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LayerState = tuple[Tensor, ...]


class State:
    """Recurrent state of every layer, and the number of tokens that went into it.

    ``model(x, state=state)`` continues from the state and leaves the state behind the last token;
    the sequence may be cut anywhere. A State also follows the ``inference_params`` protocol of
    mamba_ssm (``key_value_memory_dict``, ``seqlen_offset``, ``max_batch_size``, ``max_seqlen``),
    where the caller advances ``seqlen_offset`` and offset 0 means a start from nothing.

    While gradients are enabled, a forward pass replaces the tensors instead of writing into them,
    so that gradients flow from one segment into the one before; ``detach`` cuts them (truncated
    backpropagation through time). Without gradients the tensors keep their storage.

    Args:
        key_value_memory_dict: layer index -> tensors of that layer, whose first axis is the rows.
            Mamba1 holds (conv_state (B, D, W), model dtype; ssm_state (B, D, N), float32 or
            float64), Mamba2 (conv_state (B, d_ssm + 2 G N, W), ssm_state (B, H, P, N)).
        max_batch_size: rows of every tensor.
        max_seqlen: tokens that the state can take; None where no layer has a limit.
        seqlen_offset: tokens seen so far.
    """

    def __init__(
        self,
        key_value_memory_dict: dict[int, LayerState] | None = None,
        max_batch_size: int = 0,
        max_seqlen: int | None = None,
        seqlen_offset: int = 0,
    ) -> None:
        self.key_value_memory_dict = {} if key_value_memory_dict is None else key_value_memory_dict
        self.max_batch_size = max_batch_size
        self.max_seqlen = max_seqlen
        self.seqlen_offset = seqlen_offset
        self.batch_size_offset = 0
        self.lengths_per_sample = None

    def reset(self, max_seqlen: int | None = None, max_batch_size: int | None = None) -> State:
        """Forget everything: zero all tensors, in place where no graph holds them; count from 0.

        Args:
            max_seqlen: new limit; None keeps the present one.
            max_batch_size: must be the present one or None; rows are fixed at allocation.

        Returns:
            The state itself.

        Raises:
            ValueError: max_batch_size differs from the allocated rows.
        """
        if max_batch_size is not None and max_batch_size != self.max_batch_size:
            raise ValueError(
                f"State: max_batch_size must stay {self.max_batch_size}, got {max_batch_size}"
            )
        if max_seqlen is not None:
            self.max_seqlen = max_seqlen
        # A tensor that is part of a graph must stay what it was for the backward pass.
        self._replace(
            lambda tensor: torch.zeros_like(tensor) if tensor.requires_grad else tensor.zero_()
        )
        self.seqlen_offset = 0
        return self

    def clone(self) -> State:
        """Return an independent copy; gradients flow through it."""
        copy = State(
            dict(self.key_value_memory_dict),
            self.max_batch_size,
            self.max_seqlen,
            self.seqlen_offset,
        )
        copy._replace(lambda tensor: tensor.clone())
        return copy

    def detach(self) -> State:
        """Cut the gradient history, in place (a TBPTT segment ends here); return the state."""
        self._replace(lambda tensor: tensor.detach())
        return self

    def to(self, *args, **kwargs) -> State:
        """Move or cast as ``torch.Tensor.to`` does, in place; return the state."""
        self._replace(lambda tensor: tensor.to(*args, **kwargs))
        return self

    def _replace(self, function: Callable[[Tensor], Tensor]) -> None:
        for layer, tensors in self.key_value_memory_dict.items():
            self.key_value_memory_dict[layer] = tuple(function(tensor) for tensor in tensors)

    def __repr__(self) -> str:
        return (
            f"State(layers={len(self.key_value_memory_dict)}, batch={self.max_batch_size}, "
            f"seqlen_offset={self.seqlen_offset})"
        )
