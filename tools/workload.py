"""What tools/bench/<op>.py describes: named problems of an operator and the work in them.

A module of tools/bench defines ``CASES``, a tuple of :class:`Case`, and ``setup(case, device)``,
which returns a :class:`Problem`. Case names are unique within an operator.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class Work:
    """What one call cannot avoid; tools/bench.py divides it by what the machine can do.

    Attributes:
        moved: bytes read plus bytes written if every tensor crosses the memory once.
        fma: multiply-adds, multiplications and additions that only a multiply-add unit can do.
        exp: exponentials among them.
    """

    moved: int
    fma: int
    exp: int = 0


@dataclass(frozen=True)
class Case:
    """A named workload: sizes by name, and how its activations lie in memory.

    A module for several operators says whose workload it is.
    """

    name: str
    sizes: dict[str, int]
    options: dict[str, object] = field(default_factory=dict)
    operator: str = ""

    def reduced(self, **limits: int) -> "Case":
        """Return the case with the named sizes cut to at most these: for checking gradients."""
        cut = {n: min(size, limits.get(n, size)) for n, size in self.sizes.items()}
        return replace(self, sizes=cut)


@dataclass(frozen=True)
class Peer:
    """Another way to the same result, or a yardstick, that needs nothing but torch.

    Attributes:
        name: what the row is called.
        function: takes the arguments of the operator.
        yardstick: what a copy takes: no result to compare and no backward.
        slow_backward: its gradients are compared, but its backward would be timed for minutes.
    """

    name: str
    function: Callable
    yardstick: bool = False
    slow_backward: bool = False


@dataclass(frozen=True)
class Problem:
    """One case with its tensors.

    Attributes:
        args: positional arguments of ``ssm.ops.<op>``.
        forward: work of a forward.
        both: work of a forward and a backward; None: the operator has no backward.
        mutated: index in ``args`` of the tensor that a call updates in place, or None.
        peers: rows besides the operator's own.
        options: keyword arguments, for operators that take them by keyword only.
    """

    args: tuple
    forward: Work
    both: Work | None = None
    mutated: int | None = None
    peers: tuple[Peer, ...] = ()
    options: dict[str, object] = field(default_factory=dict)


class Draw:
    """Random float32 tensors, the same for the same order of calls."""

    def __init__(self, device: torch.device, seed: int = 0):
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        """Return normally distributed values."""
        values = torch.randn(shape, generator=self.generator)
        return (values * std + mean).to(self.device)

    def decay(self, *shape: int) -> torch.Tensor:
        """Return continuous decays as a trained model has them: -1 to -N along the last axis."""
        return -torch.arange(1.0, shape[-1] + 1).expand(shape).contiguous().to(self.device)


def channel_last(tensor: torch.Tensor) -> torch.Tensor:
    """Return equal values (..., D, L) that lie in memory as (..., L, D)."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def off_line(tensor: torch.Tensor) -> torch.Tensor:
    """Return equal values that begin 16 bytes into a line of cache, as large arrays of NumPy do."""
    skipped = 16 // tensor.element_size()
    return tensor.new_empty(skipped + tensor.numel())[skipped:].view(tensor.shape).copy_(tensor)


def whole_chunks(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Return (B, L, ...) with zeros behind, as far as L is no multiple of a size."""
    missing = -tensor.shape[1] % size
    return pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing)) if missing else tensor


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Return the bytes of all elements of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
