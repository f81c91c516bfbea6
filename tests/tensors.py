"""The arguments of a case as torch tensors: what ``tests.cases`` makes without torch."""

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
