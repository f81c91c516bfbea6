"""The correctness check before a benchmark, and calls that run forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ssm.ops.python import reference
from tests.tolerances import TOLERANCES, assert_close


def verify(op: str, module, case, limits: dict[str, int], function: Callable, device) -> None:
    """Compare a function with the reference in float64: outputs, updated state and gradients.

    Args:
        op: name of the operator.
        module: its workloads, tools/bench/<op>.py.
        case: one of them; the outputs are compared at its full size.
        limits: sizes to which the case is cut for the comparison of gradients.
        function: an implementation of the operator.
        device: where to.

    Raises:
        AssertionError: they differ; the message names the argument and the worst element.
    """
    judge = getattr(reference, op)
    problem = module.setup(case, device)
    args, wide = _copies(problem.args), _copies(problem.args, torch.float64)
    with torch.no_grad():
        got, want = _outputs(function(*args)), _outputs(judge(*wide))
    if problem.mutated is not None:
        got.append(args[problem.mutated])
        want.append(wide[problem.mutated])
    tolerance = TOLERANCES[op, "float32"]
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(f"{case.name} output {i}", ours, theirs, tolerance)
    if problem.both is None:
        return
    small = module.setup(case.reduced(**limits), device).args
    got = forward_and_backward(function, small)()
    want = forward_and_backward(judge, _copies(small, torch.float64))()
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert_close(f"{case.name} gradient {i}", ours, theirs, TOLERANCES[f"{op}_bwd", "float32"])


def forward_and_backward(function: Callable, args: tuple) -> Callable[[], tuple]:
    """Return a call that gives the gradients of all float tensors for a fixed output gradient."""
    leaves = _leaves(args)
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        outputs = _outputs(function(*args))
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]

    def call():
        return torch.autograd.grad(_outputs(function(*leaves)), wanted, weights)

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


def _outputs(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def _copies(args: tuple, dtype: torch.dtype = torch.float32) -> tuple:
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
