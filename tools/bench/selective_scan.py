"""Workloads of selective_scan: fp32 with bias, softplus, skip weight and gate, as Mamba-1 calls it.

Multiply-add operations of a forward (design: lanes are channels, one pass over the state):

- per state element (B, D, L, N) nine: dt * A, the five of exp2's polynomial, (dt u) * B, and the
  two multiply-adds of the state and of the output. Rounding and scaling of exp2 run on other units;
- per (B, D, L) softplus 15 (exp2 6, log1p 9), SiLU 9 (exp2 6, reciprocal 2, product 1), and
  three products: dt * u, D * u, y * SiLU.

A backward runs exp2 and the state again (8 per state element) and then needs, per state element,
nine for dh, dB, dC and what flows into dt, dt u and A; per (B, D, L) again softplus and SiLU.
"""

from tools.workload import Case, Draw, Problem, Work, channel_last, nbytes, off_line

CASES = (
    Case("prefill_2k_d512", {"batch": 1, "dim": 512, "seqlen": 2048, "dstate": 16}),
    Case(
        "prefill_2k_d512_channel_last",
        {"batch": 1, "dim": 512, "seqlen": 2048, "dstate": 16},
        {"channel_last": True},
    ),
    Case(
        "prefill_2k_d512_off_line",
        {"batch": 1, "dim": 512, "seqlen": 2048, "dstate": 16},
        {"off_line": True},
    ),
    Case("prefill_2k_d1536", {"batch": 1, "dim": 1536, "seqlen": 2048, "dstate": 16}),
    Case("train_b4_l512_d1536", {"batch": 4, "dim": 1536, "seqlen": 512, "dstate": 16}),
)

PER_STATE = 9
PER_STATE_BACKWARD = 8 + 9
PER_CHANNEL = 15 + 9 + 3


def setup(case, device) -> Problem:
    """Return the tensors and the work of a case."""
    batch, dim, seqlen, dstate = (case.sizes[n] for n in ("batch", "dim", "seqlen", "dstate"))
    draw = Draw(device)
    if case.options.get("channel_last"):
        lay = channel_last
    else:
        lay = off_line if case.options.get("off_line") else lambda tensor: tensor
    u, z = (lay(draw.normal(batch, dim, seqlen)) for _ in range(2))
    delta = lay(draw.normal(batch, dim, seqlen, std=0.5))
    B, C = (lay(draw.normal(batch, dstate, seqlen)) for _ in range(2))
    A, D = draw.decay(dim, dstate), draw.normal(dim)
    dt_bias = draw.normal(dim, mean=-4.0, std=0.5)
    moved = nbytes(u, delta, A, B, C, D, z, dt_bias)
    channels = batch * dim * seqlen
    states = channels * dstate
    return Problem(
        args=(u, delta, A, B, C, D, z, dt_bias, True),
        forward=Work(
            moved=moved + nbytes(u),
            fma=PER_STATE * states + PER_CHANNEL * channels,
            exp=states + 2 * channels,
        ),
        # The backward reads the inputs and dy and writes one gradient per input.
        both=Work(
            moved=3 * moved + 2 * nbytes(u),
            fma=(PER_STATE + PER_STATE_BACKWARD) * states + 2 * PER_CHANNEL * channels,
            exp=2 * (states + 2 * channels),
        ),
    )
