"""Workloads of ssd_chunk_scan: fp32 with a skip weight, sizes of Mamba-2 models.

Multiply-add operations, for each step and head, with the kernels' chunks of Q = 32 steps:

- forward 2 N P (a step into the state and out of it) and Q P / 2 (the steps of its chunk);
- backward 5 N P (dX, dB, dC, the state's gradient, and the states once more) and Q P (the products
  of the rows of X with those of dy, and the rows of dy that reach a row of dX).

What the heads of a group share, C B^T, and the exponentials, one per pair of steps of a chunk and
head, are counted as exponentials only.
"""

import torch
from torch.nn.functional import softplus

from tools.workload import Case, Draw, Peer, Problem, Work, nbytes, whole_chunks

CASES = (
    Case(
        "prefill_2k_mamba2_130m",
        {"batch": 1, "seqlen": 2048, "nheads": 24, "headdim": 64, "dstate": 128},
    ),
    Case(
        "prefill_8k_mamba2_130m",
        {"batch": 1, "seqlen": 8192, "nheads": 24, "headdim": 64, "dstate": 128},
    ),
    Case(
        "prefill_2k_mamba2_130m_bf16",
        {"batch": 1, "seqlen": 2048, "nheads": 24, "headdim": 64, "dstate": 128},
        {"dtype": torch.bfloat16},
    ),
    Case(
        "train_b4_l512_mamba2_130m",
        {"batch": 4, "seqlen": 512, "nheads": 24, "headdim": 64, "dstate": 128},
    ),
)

CHUNK = 32  # steps of the kernels
PEER_CHUNK = 64  # the fastest of 16 to 256 for the peer


def _torch_chunks(X, dt, A, B, C, chunk_size, D):
    """Run what a user without this library writes: matrix products over chunks, one group."""
    size, seqlen = PEER_CHUNK, X.shape[1]

    def chunked(t):
        # Steps of size zero fill the last chunk.
        return whole_chunks(t, size).unflatten(1, (-1, size))

    x = chunked(X * dt[..., None])  # (B, C, Q, H, P)
    B, C = (chunked(m[:, :, 0]) for m in (B, C))  # (B, C, Q, N)
    a = chunked(dt * A).permute(0, 3, 1, 2)  # (B, H, C, Q)
    sums = a.cumsum(3)
    causal = torch.ones(size, size, dtype=torch.bool, device=X.device).tril()
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    weights = torch.einsum("bcin,bcjn->bcij", C, B)[:, None] * decay
    y = torch.einsum("bhcij,bcjhp->bcihp", weights, x)
    into_end = (sums[..., -1:] - sums).exp().permute(0, 2, 3, 1)
    local = torch.einsum("bcjn,bcjhp->bchpn", B, x * into_end[..., None])
    state, entering = torch.zeros_like(local[:, 0]), []
    whole = sums[..., -1].exp().permute(0, 2, 1)[..., None, None]
    for add, factor in zip(local.unbind(1), whole.unbind(1), strict=True):
        entering.append(state)
        state = factor * state + add
    from_start = sums.exp().permute(0, 2, 3, 1)[..., None]
    y = y + torch.einsum("bcin,bchpn->bcihp", C, torch.stack(entering, 1)) * from_start
    return y.flatten(1, 2)[:, :seqlen] + D[:, None] * X


def setup(case, device) -> Problem:
    """Return the tensors, the work and the peers of a case."""
    sizes = ("batch", "seqlen", "nheads", "headdim", "dstate")
    batch, seqlen, nheads, headdim, dstate = (case.sizes[n] for n in sizes)
    dtype = case.options.get("dtype", torch.float32)
    draw = Draw(device)
    X = draw.normal(batch, seqlen, nheads, headdim).to(dtype)
    B, C = (draw.normal(batch, seqlen, 1, dstate).to(dtype) for _ in range(2))
    dt = softplus(draw.normal(batch, seqlen, nheads, mean=-4.0)).to(dtype)
    A, D = -draw.normal(nheads).exp(), draw.normal(nheads)
    moved, rows = nbytes(X, dt, A, B, C, D), batch * seqlen * nheads
    exponentials = rows * (CHUNK // 2 + 2)
    forward = rows * headdim * (2 * dstate + CHUNK // 2)
    backward = rows * headdim * (5 * dstate + CHUNK)
    peers = ()
    if dtype == torch.float32:
        peers = (Peer("torch chunks", _torch_chunks),)
    return Problem(
        args=(X, dt, A, B, C, PEER_CHUNK, D),
        forward=Work(moved=moved + nbytes(X), fma=forward, exp=exponentials),
        # The backward reads the inputs and dy and writes one gradient per input.
        both=Work(moved=3 * moved + 2 * nbytes(X), fma=forward + backward, exp=2 * exponentials),
        peers=peers,
    )
