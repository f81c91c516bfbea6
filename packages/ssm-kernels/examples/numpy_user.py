"""A NumPy program that runs the selective scan, checks it and takes a training step with it.

No other package is needed. The exit status is not 0 when a result is wrong.
"""

import sys

import numpy as np
import ssm_kernels


def definition(u, delta, A, B, C, D):
    """Compute y in float64, one step at a time: Gu & Dao 2023, arXiv:2312.00752, eq. 2-4."""
    dt = np.logaddexp(0.0, delta.astype(np.float64))  # softplus
    state, y = np.zeros((*u.shape[:2], A.shape[1])), np.empty(u.shape)
    for t in range(u.shape[2]):
        step = dt[:, :, t, None]
        drive = step * B[:, None, :, t] * u[:, :, t, None]
        state = np.exp(step * A) * state + drive
        y[:, :, t] = (state * C[:, None, :, t]).sum(-1)
    return y + D[:, None] * u


def main() -> int:
    """Run; return the exit status."""
    batch, dim, seqlen, dstate = 2, 24, 50, 16
    rng = np.random.default_rng(0)
    shapes = {
        "u": (batch, dim, seqlen),
        "delta": (batch, dim, seqlen),
        "A": (dim, dstate),
        "B": (batch, dstate, seqlen),
        "C": (batch, dstate, seqlen),
        "D": (dim,),
    }
    inputs = {name: rng.standard_normal(s, dtype=np.float32) for name, s in shapes.items()}
    inputs["A"] = -np.exp(inputs["A"])

    # The short way: the output is made for you.
    y = ssm_kernels.selective_scan(**inputs, softplus=True)
    error = np.abs(y - definition(**inputs)).max()
    print(f"ssm-kernels {ssm_kernels.__version__}, {ssm_kernels.active_isa()}: error {error:.1e}")

    # The kernels themselves: every output is an argument, so that a loop allocates nothing.
    outputs = {"y": y, "checkpoints": np.empty((batch, -(-seqlen // 32), dstate, dim), np.float32)}
    ssm_kernels.selective_scan_fwd(**inputs, **outputs, softplus=True)
    gradients = {f"d{name}": np.empty_like(value) for name, value in inputs.items()}
    ssm_kernels.selective_scan_bwd(
        **inputs, checkpoints=outputs["checkpoints"], dy=y, **gradients, softplus=True
    )
    # dy = y is the gradient of half the sum of squares: a small step against it makes that smaller.
    before = (y**2).sum()
    rate = 1e-3 / np.abs(gradients["dC"]).max()
    ssm_kernels.selective_scan_fwd(
        **{**inputs, "C": inputs["C"] - rate * gradients["dC"]}, **outputs, softplus=True
    )
    after = (y**2).sum()
    print(f"sum of squares {before:.4f}, after a step against the gradient {after:.4f}")
    return 0 if error < 1e-4 and after < before else 1


if __name__ == "__main__":
    sys.exit(main())
