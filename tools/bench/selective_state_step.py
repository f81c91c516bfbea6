"""Workloads of selective_state_step: one token, fp32 with bias, softplus, skip weight and gate.

Multiply-add operations per state element: the nine of selective_scan where every element has a
decay of its own (Mamba-1); where a head shares one decay (Mamba-2) its exp2 is not paid per element
and three are left: (dt x) * B and the multiply-adds of the state and of the output. Per channel
softplus 15 (Mamba-2: per head), SiLU 9 and three products. The state is read and written once.
"""

from tools.workload import Case, Draw, Problem, Work, nbytes

MAMBA1 = {"nheads": 1536, "headdim": 0, "dstate": 16}
MAMBA2 = {"nheads": 24, "headdim": 64, "dstate": 128}
CASES = (
    Case("decode_mamba130m", {"batch": 1, **MAMBA1}),
    Case("decode_mamba130m_b32", {"batch": 32, **MAMBA1}),
    Case("decode_mamba2_130m", {"batch": 1, **MAMBA2}),
    Case("decode_mamba2_130m_b32", {"batch": 32, **MAMBA2}),
)


def setup(case, device) -> Problem:
    """Return the tensors and the work of a case; headdim 0 is Mamba-1."""
    batch, heads, headdim, dstate = (
        case.sizes[n] for n in ("batch", "nheads", "headdim", "dstate")
    )
    draw = Draw(device)
    channels = (heads, headdim) if headdim else (heads,)
    groups = (1,) if headdim else ()
    state = draw.normal(batch, *channels, dstate)
    x, z = (draw.normal(batch, *channels) for _ in range(2))
    dt = draw.normal(batch, heads, std=0.5)
    A = -draw.normal(heads).exp() if headdim else draw.decay(heads, dstate)
    B, C = (draw.normal(batch, *groups, dstate) for _ in range(2))
    D, dt_bias = draw.normal(heads), draw.normal(heads, mean=-4.0, std=0.5)
    steps = batch * heads  # step sizes, each through softplus
    per_state, decays = (3, steps) if headdim else (9, state.numel())
    return Problem(
        args=(state, x, dt, A, B, C, D, z, dt_bias, True),
        forward=Work(
            moved=nbytes(state, state, x, dt, A, B, C, D, z, dt_bias, x),
            fma=per_state * state.numel() + 15 * steps + 12 * x.numel(),
            exp=decays + steps + x.numel(),
        ),
        mutated=0,
    )
