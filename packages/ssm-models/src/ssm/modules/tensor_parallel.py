"""How the blocks are split over ranks: by heads, with the groups that heads share kept whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssm.distributed.collectives import rank_of
from ssm.distributed.layout import Section, Shard, keep_part
from ssm.distributed.linear import ColumnParallelLinear, RowParallelLinear
from ssm.distributed.norm import gated_rms_norm
from ssm.modules.norm import RMSNormGated


def check_split(owner: str, name: str, width: int, ranks: int, *, shared: bool = False) -> None:
    """Refuse what the ranks cannot split evenly.

    Args:
        owner: class name for messages.
        name: of the size.
        width: the size.
        ranks: number of ranks.
        shared: whether several ranks may hold the same one.

    Raises:
        ValueError: width is no multiple of ranks (nor, if shared, a divisor).
    """
    if width % ranks and not (shared and ranks % width == 0):
        rule = "be a multiple or a divisor" if shared else "be a multiple"
        raise ValueError(
            f"{owner}: {name} must {rule} of the {ranks} ranks of process_group, got {width}"
        )


def column_linear(
    in_features: int, out_features: int, bias: bool, split: tuple | None, sections, **factory
) -> nn.Linear:
    """Return a linear map whose outputs are split, or a plain one.

    Args:
        in_features: width of the input.
        out_features: width of the output over all ranks.
        bias: whether there is a bias.
        split: (process group, sequence_parallel); None for one rank.
        sections: stretches of the output.
        **factory: device and dtype.

    Returns:
        A module with ``weight`` and ``bias``.
    """
    if split is None:
        return nn.Linear(in_features, out_features, bias=bias, **factory)
    return ColumnParallelLinear(
        in_features, out_features, split[0], bias, split[1], sections, **factory
    )


def row_linear(
    in_features: int, out_features: int, bias: bool, split: tuple | None, sections, **factory
) -> nn.Linear:
    """Return a linear map whose inputs are split, or a plain one; see ``column_linear``.

    Args:
        in_features: width of the input over all ranks.
        out_features: width of the output.
        bias: whether there is a bias.
        split: (process group, sequence_parallel); None for one rank.
        sections: stretches of the input.
        **factory: device and dtype.

    Returns:
        A module with ``weight`` and ``bias``.
    """
    if split is None:
        return nn.Linear(in_features, out_features, bias=bias, **factory)
    return RowParallelLinear(
        in_features, out_features, split[0], bias, split[1], sections, **factory
    )


class SharedRMSNormGated(RMSNormGated):
    """RMSNormGated whose group of channels reaches over several ranks.

    Args:
        norm: the norm of one process over all channels; its weight becomes this one's.
        group_size: channels of a group over all ranks.
        groups: number of groups over all ranks.
        process_group: ranks.

    Shape:
        x, z (..., D of this rank) -> the same, dtype of x.
    """

    def __init__(self, norm: RMSNormGated, group_size: int, groups: int, process_group) -> None:
        nn.Module.__init__(self)
        self.eps = norm.eps
        self.group_size = group_size
        self.norm_before_gate = norm.norm_before_gate
        self.groups = groups
        self.process_group = process_group
        self.weight = norm.weight

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise x (..., D) and gate it by z (..., D), if given."""
        ranks, rank = self.process_group.size(), rank_of(self.process_group)
        return gated_rms_norm(
            x,
            self.weight,
            z,
            eps=self.eps,
            norm_before_gate=self.norm_before_gate,
            width=self.group_size,
            slot=rank * self.groups // ranks,
            slots=self.groups,
            group=self.process_group,
        )


def keep_channels(conv: nn.Conv1d, sections: tuple[Section, ...], group) -> None:
    """Keep this rank's channels of a depthwise convolution.

    Args:
        conv: over all channels; changed in place.
        sections: stretches of its channels.
        group: ranks.
    """
    shard = Shard(0, sections, group)
    keep_part(conv, "weight", shard)
    keep_part(conv, "bias", shard)
    conv.in_channels = conv.out_channels = conv.groups = conv.weight.shape[0]


def conv_parameters(conv: nn.Conv1d) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a depthwise convolution for an operator.

    Args:
        conv: perhaps with channels that other ranks hold too, whose gradients are summed then.

    Returns:
        (C, 1, W) and (C,) or None.
    """
    shards = getattr(conv, "shards", None)
    if not shards or not torch.is_grad_enabled():
        return conv.weight, conv.bias
    bias = None if conv.bias is None else shards["bias"].share(conv.bias)
    return shards["weight"].share(conv.weight), bias


def own_skipped(keep: Tensor, x: Tensor, group, parts: int) -> Tensor:
    """Say which of the steps that a rank holds outside a block are skipped.

    Args:
        keep: (B, L) bool, all steps.
        x: (n, ..., D), the rank's part along axis 0 of (B L, D) or (B, L, D).
        group: ranks.
        parts: into how many parts the tokens are cut; 1 for not at all.

    Returns:
        (n, ..., 1) bool.
    """
    skipped = ~keep.view(parts * len(x), *x.shape[1:-1], 1)
    return skipped if parts == 1 else skipped.narrow(0, rank_of(group) * len(x), len(x))
