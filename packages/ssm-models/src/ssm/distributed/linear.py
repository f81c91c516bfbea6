"""Linear maps whose weight is split over ranks (Shoeybi et al. 2019, arXiv:1909.08053)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ssm.distributed.collectives import (
    check_group,
    from_all,
    gather_tokens,
    same_random_state,
    scatter_tokens,
    to_all,
)
from ssm.distributed.layout import Section, Shard, keep_part


class ColumnParallelLinear(nn.Linear):
    """Linear map of which each rank computes a part of the outputs.

    Args:
        in_features: width of the input, whole on every rank.
        out_features: width of the output, over all ranks.
        process_group: ranks.
        bias: whether there is a bias.
        sequence_parallel: the input holds this rank's part of the tokens, along axis 0, and the
            output all of them; else both hold all.
        sections: stretches of the output that are split each on its own; None is one stretch.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        (n, ..., in_features) -> (n or ranks n, ..., out_features / ranks).

    Raises:
        TypeError: process_group is no process group.
        ValueError: the outputs cannot be split evenly.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group,
        bias: bool = True,
        sequence_parallel: bool = True,
        sections: tuple[Section, ...] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        ranks = _ranks("ColumnParallelLinear", process_group)
        if sections is None:
            sections = (_even("ColumnParallelLinear", "out_features", out_features, ranks),)
        same_random_state(process_group, device)
        # Drawn whole and cut: the ranks together are what one process would be.
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        shard = Shard(0, tuple(sections), process_group)
        keep_part(self, "weight", shard)
        keep_part(self, "bias", shard)
        self.out_features = self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (n, ..., in_features) to this rank's outputs."""
        into = gather_tokens if self.sequence_parallel else to_all
        x = into(x, self.process_group)
        bias = None if self.bias is None else self.shards["bias"].share(self.bias)
        return F.linear(x, self.shards["weight"].share(self.weight), bias)


class RowParallelLinear(nn.Linear):
    """Linear map of which each rank reads a part of the inputs; the results are summed.

    The bias is whole on every rank and added once, behind the sum.

    Args:
        in_features: width of the input, over all ranks.
        out_features: width of the output, whole on every rank.
        process_group: ranks.
        bias: whether there is a bias.
        sequence_parallel: the output holds this rank's part of the tokens, along axis 0; else all.
        sections: stretches of the input that are split each on its own; None is one stretch.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        (n, ..., in_features / ranks) -> (n or n / ranks, ..., out_features).

    Raises:
        TypeError: process_group is no process group.
        ValueError: the inputs cannot be split evenly, or in forward the tokens.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group,
        bias: bool = True,
        sequence_parallel: bool = True,
        sections: tuple[Section, ...] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        ranks = _ranks("RowParallelLinear", process_group)
        if sections is None:
            sections = (_even("RowParallelLinear", "in_features", in_features, ranks),)
        same_random_state(process_group, device)
        # Drawn whole and cut: the bounds of the initial values depend on the whole width.
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        keep_part(self, "weight", Shard(1, tuple(sections), process_group))
        self.in_features = self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's inputs (n, ..., in_features / ranks) to the outputs."""
        ranks = self.process_group.size()
        y = F.linear(x, self.shards["weight"].share(self.weight))
        if self.sequence_parallel:
            if y.shape[0] % ranks:
                raise ValueError(
                    f"RowParallelLinear: tokens must be a multiple of {ranks} ranks, "
                    f"got {y.shape[0]}"
                )
            y = scatter_tokens(y, self.process_group)
        else:
            y = from_all(y, self.process_group)
        if self.bias is None:
            return y
        # Each rank saw its own tokens only, so the gradient of the bias is still a part.
        bias = to_all(self.bias, self.process_group) if self.sequence_parallel else self.bias
        return y + bias


def _ranks(owner: str, group) -> int:
    if group is None:
        raise TypeError(
            f"{owner}: process_group must be a torch.distributed process group, got None"
        )
    return check_group(owner, "process_group", group)


def _even(owner: str, name: str, width: int, ranks: int) -> Section:
    if width % ranks:
        raise ValueError(f"{owner}: {name} must be a multiple of {ranks} ranks, got {width}")
    return Section(width, ranks)
