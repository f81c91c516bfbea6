"""Workloads of dw_causal_conv_step: one token, fp32, width 4 with bias and SiLU.

Multiply-add operations per output: one per tap and SiLU's nine. The window is read and written.
"""

from tools.workload import Case, Draw, Problem, Work, nbytes

CASES = (
    Case("decode_mamba130m", {"batch": 1, "dim": 1536, "memory": 4, "width": 4}),
    Case("decode_mamba130m_b32", {"batch": 32, "dim": 1536, "memory": 4, "width": 4}),
)


def setup(case, device) -> Problem:
    """Return the tensors and the work of a case."""
    batch, dim, memory, width = (case.sizes[n] for n in ("batch", "dim", "memory", "width"))
    draw = Draw(device)
    x, window = draw.normal(batch, dim), draw.normal(batch, dim, memory)
    weight, bias = draw.normal(dim, width, std=0.5), draw.normal(dim)
    return Problem(
        args=(x, window, weight, bias, "silu"),
        forward=Work(
            nbytes(x, x, window, window, weight, bias), (width + 9) * x.numel(), x.numel()
        ),
        mutated=1,
    )
