"""The correctness check before a benchmark, and calls that run forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ssm.ops.python import reference
from tests.tolerances import TOLERANCES, assert_close
from tools.workload import Problem


def verify(op: str, problem: Problem, small: Problem, functions: dict[str, Callable]) -> None:
    """Compare implementations with the reference in float64: outputs, updated state, gradients.

    Args:
        op: name of the operator.
        problem: on which the outputs are compared.
        small: the same, cut in length, for the gradients: they need the reference's whole graph.
        functions: implementations of the operator by name.

    Raises:
        AssertionError: one differs; the message names it, the result and the worst element.
    """
    judge = functools.partial(getattr(reference, op), **problem.options)
    want = outputs_of(judge, problem, torch.float64)
    for name, function in functions.items():
        got = outputs_of(function, problem, torch.float32)
        _compare(f"{name}: output", got, want, TOLERANCES[op, "float32"])
    if problem.both is None:
        return
    want = forward_and_backward(judge, _copies(small.args, torch.float64))()
    for name, function in functions.items():
        got = forward_and_backward(function, _copies(small.args, torch.float32))()
        _compare(f"{name}: gradient", got, want, TOLERANCES[f"{op}_bwd", "float32"])


def forward_and_backward(function: Callable, args: tuple) -> Callable[[], tuple]:
    """Return a call that gives the gradients of all float tensors for a fixed output gradient."""
    leaves = _leaves(args)
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    weights = []

    def call():
        outputs = _outputs(function(*leaves))
        if not weights:  # the first call is never timed, and only now are the shapes known
            generator = torch.Generator().manual_seed(1)
            weights.extend(torch.randn(o.shape, generator=generator).to(o) for o in outputs)
        return torch.autograd.grad(outputs, wanted, weights)

    return call


def saved_bytes(function: Callable, args: tuple) -> int:
    """Return the bytes that a forward keeps for its backward, besides its arguments."""
    leaves = _leaves(args)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = function(*leaves)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            kept.pop(leaf.untyped_storage().data_ptr(), None)
    del alive
    return sum(kept.values())


def outputs_of(
    function: Callable, problem: Problem, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Return the outputs, and the state that was updated in place."""
    args = _copies(problem.args, dtype)
    with torch.no_grad():
        outputs = _outputs(function(*args))
    return outputs if problem.mutated is None else [*outputs, args[problem.mutated]]


def _compare(what: str, got, want, tolerance) -> None:
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        # The tolerances are for values about 1; sums over long sequences are larger, as are the
        # terms that cancel in their small elements.
        scale = theirs.pow(2).mean().sqrt().clamp(min=1)
        ours, theirs = ours / scale.to(ours), theirs / scale
        assert_close(f"{what} {i}", ours, theirs, tolerance)


def _outputs(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _copies(args: tuple, dtype: torch.dtype) -> tuple:
    """Return the arguments with every tensor copied: same layout, given dtype."""
    return tuple(
        a.to(dtype, copy=True, memory_format=torch.preserve_format)
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    )


def _leaves(args: tuple) -> list:
    return [
        a.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    ]
