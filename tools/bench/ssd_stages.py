"""Workloads of the five ssd stages: fp32, the layers of Mamba-2 130M in chunks of 256.

Multiply-adds: one per step and head for the sums of decays, and one for the step size; P N per step
and head for what a chunk adds; one per element of a state for passing it on; Q N per step and group
for C B^T; per step and head P (Q + 1) / 2 within the chunk, P N for what enters, and 3 per weight
for its difference, step size and product. Exponentials: one per weight.

A backward has twice the matrix products of its forward, 8 per weight instead of 3 (the weight once
more, and the shares of its four factors), 2 per element of a state passed on, and 4 per step size;
its exponentials are those of the forward. It reads the inputs, or what they gave, and the gradients
of the outputs, and writes those of the inputs.
"""

import torch

from tools.workload import Case, Draw, Problem, Work, nbytes

SIZES = {"batch": 1, "seqlen": 2048, "nheads": 24, "headdim": 64, "dstate": 128}
CHUNK = 256
CASES = (
    Case("cumsum_2k", SIZES, operator="ssd_chunk_cumsum"),
    Case("state_2k", SIZES, operator="ssd_chunk_state"),
    Case("passing_2k", SIZES, operator="ssd_state_passing"),
    Case("bmm_2k", SIZES, operator="ssd_bmm_chunk"),
    Case("output_2k", SIZES, operator="ssd_chunk_output"),
)


def setup(case, device) -> Problem:
    """Return the tensors and the work of a case."""
    batch, seqlen, heads, headdim, dstate = (case.sizes[n] for n in SIZES)
    # A case that is cut to be checked has several chunks too: a single one passes no state on.
    size = min(CHUNK, max(1, seqlen // 2))
    nchunks, draw = -(-seqlen // size), Draw(device)
    steps = batch * seqlen * heads
    raw = draw.normal(batch, seqlen, heads).abs() * 0.05
    A = -draw.normal(heads).exp()
    if case.operator == "ssd_chunk_cumsum":
        outputs = 2 * 4 * batch * heads * nchunks * size
        return _problem((raw, A, size), outputs, fma=2 * steps, backward=4 * steps)

    full = torch.zeros(batch, nchunks * size, heads, device=device)
    full[:, :seqlen] = raw
    dt = full.view(batch, nchunks, size, heads).permute(0, 3, 1, 2).contiguous()
    decay = (dt * A[:, None, None]).cumsum(3)
    x = draw.normal(batch, seqlen, heads, headdim)
    B, C = (draw.normal(batch, seqlen, 1, dstate) for _ in range(2))
    states = draw.normal(batch, nchunks, heads, headdim, dstate)
    if case.operator == "ssd_chunk_state":
        fma = steps * headdim * dstate
        return _problem((x, B, dt, decay), nbytes(states), fma, 2 * fma, exp=steps)
    if case.operator == "ssd_state_passing":
        final = 4 * states[:, 0].numel() if nchunks else 0
        fma, exp = states.numel(), batch * heads * nchunks
        return _problem((states, decay), nbytes(states) + final, fma, 2 * fma, exp)
    products = draw.normal(batch, nchunks, 1, size, size)
    if case.operator == "ssd_bmm_chunk":
        fma = batch * seqlen * size * dstate
        return _problem((C, B, size), nbytes(products), fma, 2 * fma)
    weights = steps * (size + 1) // 2
    entering = steps * headdim * dstate
    return _problem(
        (products, x, dt, decay, C, states),
        nbytes(x),
        fma=weights * (headdim + 3) + entering,
        backward=weights * (2 * headdim + 8) + 2 * entering,
        exp=weights + steps,
    )


def _problem(args: tuple, outputs: int, fma: int, backward: int, exp: int = 0) -> Problem:
    """Return a problem from its arguments, the bytes of its outputs, and the work in it."""
    inputs = nbytes(*(a for a in args if isinstance(a, torch.Tensor)))
    moved = inputs + outputs
    return Problem(
        args,
        Work(moved, fma, exp),
        Work(2 * moved + inputs, fma + backward, 2 * exp),
    )
