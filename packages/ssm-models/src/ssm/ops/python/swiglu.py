"""The SwiGLU activation, specified in PyTorch."""

from ssm.ops.python import arithmetic, check


def swiglu(gate, up=None):
    """Multiply one half of a feed-forward layer by the SiLU of the other.

    Computes ``y = silu(gate) * up``. Packed, ``gate`` holds both halves side by side.

    Args:
        gate: (..., D), float64 | float32 | bfloat16 | float16; or (..., 2 D) without ``up``: the
            gate in the first half, up in the second.
        up: as gate in shape, any of these dtypes, or None.

    Returns:
        y: (..., D), dtype of gate.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device breaks the contract above; the message names the
            argument.

    Source:
        Shazeer 2020 (arXiv:2002.05202), eq. 5.

    Example:
        >>> y = swiglu(*linear(x).chunk(2, dim=-1))
    """
    check.swiglu(gate, up)
    acc, dtype = arithmetic.acc_dtype(gate), gate.dtype
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (arithmetic.silu(gate.to(acc)) * up.to(acc)).to(dtype)
