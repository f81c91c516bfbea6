"""Workloads of the five ssd stages: fp32, the layers of Mamba-2 130M in chunks of 256.

Multiply-adds: one per step and head for the sums of decays, and one for the step size; P N per step
and head for what a chunk adds; one per element of a state for passing it on; Q N per step and group
for C B^T; per step and head P (Q + 1) / 2 within the chunk, P N for what enters, and 3 per weight
for its difference, step size and product. Exponentials: one per weight.
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
    nchunks, draw = -(-seqlen // CHUNK), Draw(device)
    steps = batch * seqlen * heads
    raw = draw.normal(batch, seqlen, heads).abs() * 0.05
    A = -draw.normal(heads).exp()
    if case.operator == "ssd_chunk_cumsum":
        outputs = 2 * 4 * batch * heads * nchunks * CHUNK
        return Problem((raw, A, CHUNK), Work(nbytes(raw, A) + outputs, fma=2 * steps))

    full = torch.zeros(batch, nchunks * CHUNK, heads, device=device)
    full[:, :seqlen] = raw
    dt = full.view(batch, nchunks, CHUNK, heads).permute(0, 3, 1, 2).contiguous()
    decay = (dt * A[:, None, None]).cumsum(3)
    x = draw.normal(batch, seqlen, heads, headdim)
    B, C = (draw.normal(batch, seqlen, 1, dstate) for _ in range(2))
    states = draw.normal(batch, nchunks, heads, headdim, dstate)
    if case.operator == "ssd_chunk_state":
        moved = nbytes(x, B, dt, decay, states)
        return Problem((x, B, dt, decay), Work(moved, fma=steps * headdim * dstate, exp=steps))
    if case.operator == "ssd_state_passing":
        final = 4 * states[:, 0].numel() if nchunks else 0
        work = Work(
            nbytes(states, states, decay) + final,
            fma=states.numel(),
            exp=batch * heads * nchunks,
        )
        return Problem((states, decay), work)
    products = draw.normal(batch, nchunks, 1, CHUNK, CHUNK)
    if case.operator == "ssd_bmm_chunk":
        fma = batch * seqlen * CHUNK * dstate
        return Problem((C, B, CHUNK), Work(nbytes(C, B, products), fma=fma))
    weights = steps * (CHUNK + 1) // 2
    return Problem(
        (products, x, dt, decay, C, states),
        Work(
            nbytes(products, x, dt, decay, C, states, x),
            fma=weights * (headdim + 3) + steps * headdim * dstate,
            exp=weights + steps,
        ),
    )
