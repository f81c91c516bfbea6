"""The arguments of a case as torch tensors: what ``tests.cases`` makes without torch."""

import collections

import numpy as np
import torch

from ssm.seq_meta import SeqMeta
from tests.cases import make

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensors(arguments: dict, dtype: torch.dtype = torch.float64) -> dict:
    """Return the arguments with arrays as tensors: floats in ``dtype``, integers as they are."""
    found = {}
    for name, value in arguments.items():
        if name == "seq_meta" and value is not None:
            value = SeqMeta(**{n: torch.from_numpy(a) for n, a in value.items()})
        elif isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
            value = value.to(dtype) if value.is_floating_point() else value
        found[name] = value
    return found


def make_tensors(case, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict:
    """Return the arguments of a case as tensors."""
    return tensors(make(case, seed), dtype)


def arrays(arguments: dict) -> dict:
    """Return tensors as float64 arrays: what the judge takes. The inverse of :func:`tensors`."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, SeqMeta):
            given = {n: getattr(value, n) for n in ("seq_idx", "cu_seqlens", "mask")}
            value = {n: t.numpy() for n, t in given.items() if t is not None}
        elif isinstance(value, torch.Tensor):
            value = value.detach()
            value = (value.double() if value.is_floating_point() else value).numpy()
        found[name] = value
    return found


def leaves(arguments: dict) -> dict:
    """Return the arguments with every float tensor as a fresh leaf that wants a gradient."""
    return {
        name: value.detach().clone().requires_grad_() if _is_float(value) else value
        for name, value in arguments.items()
    }


def gradients(function, arguments: dict, weights_seed: int = 0) -> dict:
    """Return the gradient of a fixed random weighting of all outputs, by argument name."""
    arguments = leaves(arguments)
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(weights_seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    return {n: t.grad for n, t in arguments.items() if _is_float(t)}


def gradcheck(function, arguments: dict, second: bool = False) -> None:
    """Compare the gradients of a float64 call with finite differences.

    Args:
        function: takes the arguments by name and returns a tensor or a tuple of tensors.
        arguments: of the call.
        second: compare second derivatives too.
    """
    # gradcheck refuses tensors without elements.
    names = [n for n, t in arguments.items() if _is_float(t) and t.numel()]

    def call(*values):
        return function(**{**arguments, **dict(zip(names, values, strict=True))})

    values = [arguments[n].detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, values)
    if second:
        assert torch.autograd.gradgradcheck(call, values)


def count_nodes(function, arguments: dict) -> collections.Counter:
    """Return how many nodes of each kind the autograd graph of a call has."""
    outputs = function(**leaves(arguments))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seen, left, found = set(), [o.grad_fn for o in outputs], collections.Counter()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found[node.name()] += 1
            left += [parent for parent, _ in node.next_functions]
    return found


def strided(arguments: dict) -> dict:
    """Return equal tensors, not contiguous: a stride of 3, an offset, the axes in reverse order."""
    found = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            shape = value.shape[::-1]
            buffer = torch.full((*shape[:-1], 3 * shape[-1] + 1), 7, dtype=value.dtype)
            view = buffer[..., 1::3].permute(*reversed(range(value.ndim)))
            found[name] = view.copy_(value)
    return found


def poison(arguments: dict, names: dict[str, int], skipped: torch.Tensor) -> dict:
    """Return the arguments with NaN in the skipped steps.

    Args:
        arguments: of a call.
        names: argument -> its time axis; the batch axis is first.
        skipped: (B, L), bool.
    """
    found = dict(arguments)
    for name, axis in names.items():
        value = arguments[name]
        if value is not None:
            shape = [1] * value.ndim
            shape[0], shape[axis] = skipped.shape
            found[name] = value.masked_fill(skipped.reshape(shape), float("nan"))
    return found


def _is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
