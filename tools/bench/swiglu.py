"""Workloads of swiglu: the halves of a feed-forward layer, separate, packed and as strided views.

Counts. Moved: both halves and y forward; both halves, dy and both gradients backward. Per element
one exponential and three products forward; a backward takes the exponential again, and eight
products. Memory is the limit beyond the second-level cache.
"""

import torch
import torch.nn.functional as F

from tools.workload import Case, Draw, Peer, Problem, Work, nbytes

CASES = (
    Case("64_d1536", {"rows": 64, "dim": 1536}, {"layout": "separate"}),
    Case("512_d1536", {"rows": 512, "dim": 1536}, {"layout": "separate"}),
    Case("2k_d1536", {"rows": 2048, "dim": 1536}, {"layout": "separate"}),
    Case("2k_d1536_packed", {"rows": 2048, "dim": 1536}, {"layout": "packed"}),
    Case("2k_d1536_views", {"rows": 2048, "dim": 1536}, {"layout": "views"}),
    Case("16k_d1536", {"rows": 16384, "dim": 1536}, {"layout": "separate"}),
)


def _torch_swiglu(gate, up=None):
    """Run what a user without this library writes."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.silu(gate) * up


def setup(case, device) -> Problem:
    """Return the tensors, the work and the peers of a case."""
    rows, dim, layout = case.sizes["rows"], case.sizes["dim"], case.options["layout"]
    draw = Draw(device)
    if layout == "separate":
        args = draw.normal(rows, dim), draw.normal(rows, dim)
    elif layout == "packed":
        args = (draw.normal(rows, 2 * dim),)
    else:
        args = draw.normal(rows, 2 * dim).chunk(2, -1)
    elements = rows * dim
    half = 4 * elements
    target = torch.empty(rows, dim, device=device)

    def copy(gate, up=None):
        target.copy_(gate[..., :dim])

    return Problem(
        args=tuple(args),
        forward=Work(nbytes(*args) + half, 3 * elements, elements),
        both=Work(2 * nbytes(*args) + nbytes(*args) + 2 * half, 11 * elements, 2 * elements),
        peers=(
            Peer("torch silu * up", _torch_swiglu),
            Peer("torch copy of one", copy, yardstick=True),
        ),
    )
