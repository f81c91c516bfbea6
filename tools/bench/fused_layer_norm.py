"""Workloads of fused_layer_norm: fp32 with a residual, within the second-level cache and beyond.

It moves x, residual, y and the sum forward; the sum, dy, the sum's gradient, dx and dresidual
backward. Multiply-add operations per element: the sum of squares, the scale and the weight
(LayerNorm also the mean); three times as many backward. Memory is the limit in every case.
"""

import torch
import torch.nn.functional as F

from tools.workload import Case, Draw, Peer, Problem, Work, nbytes

CASES = (
    Case("rms_64_d768", {"rows": 64, "dim": 768}, {"is_rms": True}),
    Case("rms_512_d768", {"rows": 512, "dim": 768}, {"is_rms": True}),
    Case("rms_2k_d768", {"rows": 2048, "dim": 768}, {"is_rms": True}),
    Case("rms_16k_d768", {"rows": 16384, "dim": 768}, {"is_rms": True}),
    Case("layer_2k_d768", {"rows": 2048, "dim": 768}, {"is_rms": False}),
    Case("layer_8k_d2560", {"rows": 8192, "dim": 2560}, {"is_rms": False}),
)


def _torch_norm(x, weight, bias, residual, is_rms, eps):
    """Run what a user without this library writes."""
    total = x + residual
    if is_rms:
        return F.rms_norm(total, weight.shape, weight, eps), total
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def setup(case, device) -> Problem:
    """Return the tensors, the work and the peers of a case."""
    rows, dim, is_rms = case.sizes["rows"], case.sizes["dim"], case.options["is_rms"]
    draw = Draw(device)
    x, residual = draw.normal(1, rows, dim), draw.normal(1, rows, dim)
    weight, bias = draw.normal(dim, mean=1.0, std=0.1), None if is_rms else draw.normal(dim)
    targets = torch.empty_like(x), torch.empty_like(x)
    parameters, per_element = nbytes(weight, bias), 3 if is_rms else 4

    def copy(x, weight, bias, residual, *_):
        targets[0].copy_(x)
        targets[1].copy_(residual)

    return Problem(
        args=(x, weight, bias, residual, is_rms, 1e-5),
        forward=Work(4 * nbytes(x) + parameters, per_element * x.numel()),
        both=Work(9 * nbytes(x) + 3 * parameters, 4 * per_element * x.numel()),
        peers=(
            Peer("torch add + norm", _torch_norm),
            Peer("torch copy of both", copy, yardstick=True),
        ),
    )
