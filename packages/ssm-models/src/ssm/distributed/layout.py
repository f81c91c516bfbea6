"""Which part of a parameter a rank holds, and how parts and wholes become each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssm.distributed.collectives import gathered, rank_of, summed


@dataclass(frozen=True)
class Section:
    """A stretch of a split axis, cut into equal pieces.

    Args:
        width: entries of the whole stretch.
        pieces: how many parts it is cut into, a divisor of width and of the number of ranks. With
            fewer pieces than ranks, neighbouring ranks hold the same piece.
    """

    width: int
    pieces: int


@dataclass(frozen=True)
class Shard:
    """The part of a parameter that each rank holds.

    Args:
        dim: the split axis.
        sections: stretches of that axis, in order; each is cut on its own.
        group: process group.
    """

    dim: int
    sections: tuple[Section, ...]
    group: object

    @property
    def whole_width(self) -> int:
        """Entries of the split axis before it is split."""
        return sum(section.width for section in self.sections)

    def take(self, whole: Tensor, rank: int | None = None) -> Tensor:
        """Return a copy of the part of ``whole`` that a rank holds; None is this one."""
        rank = rank_of(self.group) if rank is None else rank
        parts = []
        for section, stretch in zip(self.sections, self._stretches(whole), strict=True):
            parts.append(stretch.tensor_split(section.pieces, self.dim)[self._piece(section, rank)])
        return torch.cat(parts, self.dim)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Return the whole from the parts of all ranks, in order."""
        ranks = self.group.size()
        widths = [section.width // section.pieces for section in self.sections]
        split = [part.split(widths, self.dim) for part in parts]
        found = []
        for number, section in enumerate(self.sections):
            step = ranks // section.pieces
            found += [split[rank][number] for rank in range(0, ranks, step)]
        return torch.cat(found, self.dim)

    def sum_replicas(self, gradient: Tensor) -> Tensor:
        """Sum the gradient of a part over the ranks that hold the same piece of it.

        Args:
            gradient: of the part of this rank.

        Returns:
            The same shape; sections that are held once are as they were.
        """
        rank = rank_of(self.group)
        widths = [section.width // section.pieces for section in self.sections]
        parts = list(gradient.split(widths, self.dim))
        for number, section in enumerate(self.sections):
            if section.pieces < self.group.size() and section.width:
                piece = self._piece(section, rank)
                # One sum over all ranks, a slot per piece: no groups of some ranks are needed.
                slots = gradient.new_zeros((section.pieces, *parts[number].shape))
                slots[piece] = parts[number]
                parts[number] = summed(slots, self.group)[piece]
        return torch.cat(parts, self.dim)

    def share(self, parameter: Tensor) -> Tensor:
        """Return a parameter as an operator should read it: replicas get the sum of gradients.

        Args:
            parameter: the part of this rank.

        Returns:
            The same values.
        """
        if all(section.pieces == self.group.size() for section in self.sections):
            return parameter
        return _Share.apply(parameter, self)

    def _piece(self, section: Section, rank: int) -> int:
        return rank * section.pieces // self.group.size()

    def _stretches(self, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.split([section.width for section in self.sections], self.dim)


class _Share(torch.autograd.Function):
    """The identity, whose gradient is summed over replicas."""

    @staticmethod
    def forward(ctx, parameter, shard):
        ctx.shard = shard
        return parameter.view_as(parameter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return ctx.shard.sum_replicas(gradient), None


def keep_part(module: nn.Module, name: str, shard: Shard) -> None:
    """Replace a whole parameter of a module by the part that this rank holds.

    ``module.shards`` remembers how: a dict, as attributes of parameters are lost when a module is
    moved or copied.

    Args:
        module: has the parameter, or None in its place.
        name: of the parameter.
        shard: how it is split.
    """
    whole = getattr(module, name)
    if whole is None:
        return
    with torch.no_grad():
        part = nn.Parameter(shard.take(whole.detach()), requires_grad=whole.requires_grad)
    for mark in ("_no_weight_decay", "_no_reinit"):
        if hasattr(whole, mark):
            setattr(part, mark, getattr(whole, mark))
    setattr(module, name, part)
    module.shards = {**getattr(module, "shards", {}), name: shard}


def initialise(module: nn.Module, name: str, function: Callable[[Tensor], object]) -> None:
    """Draw a parameter as one process would, and keep the part of this rank.

    Args:
        module: has the parameter.
        name: of the parameter.
        function: fills a tensor of the whole shape in place.
    """
    parameter = getattr(module, name)
    shard = getattr(module, "shards", {}).get(name)
    with torch.no_grad():
        if shard is None:
            function(parameter)
            return
        shape = list(parameter.shape)
        shape[shard.dim] = shard.whole_width
        whole = parameter.new_empty(shape)
        function(whole)
        parameter.copy_(shard.take(whole))


def shards_of(module: nn.Module) -> Iterator[tuple[str, Shard]]:
    """List the split parameters.

    Args:
        module: built with a process group.

    Yields:
        (name in the state dict, how it is split).
    """
    for prefix, child in module.named_modules():
        for name, shard in getattr(child, "shards", {}).items():
            yield f"{prefix}.{name}" if prefix else name, shard


def shard_state_dict(
    module: nn.Module, state_dict: dict[str, Tensor], rank: int | None = None
) -> dict[str, Tensor]:
    """Cut the state dict of one process for a rank of a tensor-parallel module.

    Args:
        module: built with a process group; says how its parameters are split.
        state_dict: of the same module built without one.
        rank: whose part; None is that of this process.

    Returns:
        What ``module.load_state_dict`` takes on that rank. Entries that are not split are those
        given.

    Raises:
        ValueError: the module has no such entry, or a split one has the wrong length along its
            axis.
    """
    unknown = state_dict.keys() - module.state_dict().keys()
    if unknown:
        raise ValueError(
            f"shard_state_dict: state_dict must hold entries of the module, got {min(unknown)!r}"
        )
    cut = dict(state_dict)
    for name, shard in shards_of(module):
        if name not in cut:
            continue
        whole = cut[name]
        width = whole.shape[shard.dim] if whole.dim() > shard.dim else None
        if width != shard.whole_width:
            raise ValueError(
                f"shard_state_dict: {name} must have {shard.whole_width} entries along axis "
                f"{shard.dim}, got shape {tuple(whole.shape)}"
            )
        cut[name] = shard.take(whole, rank)
    return cut


def gather_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Join the parameters of all ranks to the state dict of one process.

    Every rank of the group must call it.

    Args:
        module: built with a process group.

    Returns:
        name -> whole tensor, without gradient, on every rank. Two names of one parameter keep
        sharing their storage.
    """
    whole = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    for name, shard in shards_of(module):
        if name in whole:
            whole[name] = shard.join(list(gathered(whole[name], shard.group).unbind(0)))
    return whole
