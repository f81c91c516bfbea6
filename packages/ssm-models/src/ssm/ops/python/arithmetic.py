"""The arithmetic of the operators: in which dtype they compute, and their activations."""

import functools
import inspect
from collections.abc import Callable

import torch


def without_autocast(function: Callable) -> Callable:
    """Make an operator compute in its own dtype under ``torch.autocast`` too.

    Args:
        function: an operator that multiplies matrices, which autocast would round first.

    Source:
        docs/numerics.md, Autocast.
    """
    name = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def run(*args, **kwargs):
        main = args[0] if args else kwargs.get(name)
        kind = main.device.type if isinstance(main, torch.Tensor) else None
        if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return run


def acc_dtype(main: torch.Tensor) -> torch.dtype:
    """Return the dtype in which an operator computes: float64 if its main input is, else float32.

    Source:
        docs/numerics.md, Precision.
    """
    return torch.float64 if main.dtype == torch.float64 else torch.float32


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 + exp(x)), any shape, without overflow.

    Source:
        Higham 2002, Accuracy and Stability of Numerical Algorithms, section 1.14.1 (log1p).
    """
    # maximum, not clamp: at x = 0 it halves the gradient, which makes the sum's gradient 1/2.
    return torch.maximum(x, torch.zeros_like(x)) + torch.log1p(torch.exp(-x.abs()))


def silu(x: torch.Tensor) -> torch.Tensor:
    """Return x sigmoid(x), any shape.

    Source:
        Elfwing et al. 2017 (arXiv:1702.03118), eq. 10.
    """
    return x * torch.sigmoid(x)
