"""Workloads of dw_causal_conv: fp32, width 4 with bias and SiLU, in both layouts.

Multiply-add operations per output: one per tap and SiLU's nine; a backward needs two per tap (dx
and dweight), the filter's output again and SiLU's derivative. It moves x and y forward, and x, dy
and dx backward.
"""

import torch
import torch.nn.functional as F

from tools.workload import Case, Draw, Peer, Problem, Work, channel_last, nbytes

SIZES = {"batch": 1, "dim": 1536, "seqlen": 2048, "width": 4}
CASES = (
    Case("prefill_2k_d1536", SIZES),
    Case("prefill_2k_d1536_channel_last", SIZES, {"channel_last": True}),
    Case("train_b4_l512_d1536", {**SIZES, "batch": 4, "seqlen": 512}),
)
SILU, SILU_BACKWARD = 9, 13


def _torch_conv(x, weight, bias, activation):
    """Run what a user without this library writes."""
    width = weight.shape[1]
    y = F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])
    return F.silu(y[..., : x.shape[2]])


def setup(case, device) -> Problem:
    """Return the tensors, the work and the peers of a case."""
    batch, dim, seqlen, width = (case.sizes[n] for n in ("batch", "dim", "seqlen", "width"))
    draw = Draw(device)
    x = draw.normal(batch, dim, seqlen)
    x = channel_last(x) if case.options.get("channel_last") else x
    weight, bias = draw.normal(dim, width, std=0.5), draw.normal(dim)
    target = torch.empty_like(x)
    outputs, parameters = x.numel(), nbytes(weight, bias)
    return Problem(
        args=(x, weight, bias, "silu"),
        forward=Work(2 * nbytes(x) + parameters, (width + SILU) * outputs, outputs),
        both=Work(
            5 * nbytes(x) + 3 * parameters,
            (4 * width + SILU + SILU_BACKWARD) * outputs,
            2 * outputs,
        ),
        peers=(
            Peer("torch conv1d + silu", _torch_conv),
            Peer("torch copy", lambda x, *_: target.copy_(x), yardstick=True),
        ),
    )
