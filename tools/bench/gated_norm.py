"""Workloads of gated_norm: the width of Mamba-2 130M, both orders, one group and several.

Counts. Moved: x, z and y forward; x, z, dy, dx and dz backward. Per element one exponential and
some six products forward (squares, scale, weight, silu, gate); a backward takes the exponential
again, and some fourteen products. Memory is the limit beyond the second-level cache.
"""

import torch
import torch.nn.functional as F

from tools.workload import Case, Draw, Peer, Problem, Work, nbytes

CASES = (
    Case("rms_64_d1536", {"rows": 64, "dim": 1536}, {"order": "norm first"}),
    Case("rms_512_d1536", {"rows": 512, "dim": 1536}, {"order": "norm first"}),
    Case("rms_2k_d1536", {"rows": 2048, "dim": 1536}, {"order": "norm first"}),
    Case("gate_first_2k_d1536", {"rows": 2048, "dim": 1536}, {"order": "gate first"}),
    Case("groups_2k_d1536", {"rows": 2048, "dim": 1536}, {"order": "gate first", "groups": 8}),
    Case("layer_2k_d1536", {"rows": 2048, "dim": 1536}, {"order": "norm first", "is_rms": False}),
    Case("rms_16k_d1536", {"rows": 16384, "dim": 1536}, {"order": "norm first"}),
)


def setup(case, device) -> Problem:
    """Return the tensors, the work and the peers of a case."""
    rows, dim = case.sizes["rows"], case.sizes["dim"]
    is_rms, groups = case.options.get("is_rms", True), case.options.get("groups", 1)
    norm_first, size = case.options["order"] == "norm first", dim // groups
    draw = Draw(device)
    x, z = draw.normal(rows, dim), draw.normal(rows, dim)
    weight = draw.normal(dim, mean=1.0, std=0.1)
    target, elements = torch.empty_like(x), x.numel()

    def torch_norm(x, weight, bias, z, **_):
        """Run what a user without this library writes."""
        gate = F.silu(z)
        s = (x if norm_first else x * gate).unflatten(-1, (groups, size))
        norm = F.rms_norm if is_rms else F.layer_norm
        y = norm(s, (size,), eps=1e-5).flatten(-2) * weight
        return y * gate if norm_first else y

    def copy(x, *_, **__):
        target.copy_(x)

    options = {"is_rms": is_rms, "group_size": size, "norm_before_gate": norm_first}
    return Problem(
        args=(x, weight, None, z),
        options=options,
        forward=Work(3 * nbytes(x) + nbytes(weight), 6 * elements, elements),
        both=Work(8 * nbytes(x) + 3 * nbytes(weight), 20 * elements, 2 * elements),
        peers=(
            Peer("torch norm * silu", torch_norm),
            Peer("torch copy of one", copy, yardstick=True),
        ),
    )
