"""A JAX program that calls the selective scan, inside and outside of a compiled function.

Does nothing but say so where JAX is not installed. The exit status is not 0 when a result is wrong.
"""

import sys

import ssm_kernels

try:
    import jax
except ModuleNotFoundError:
    print("skipped: JAX is not installed")
    sys.exit(0)

import jax.numpy as jnp
import numpy as np


def definition(u, delta, A, B, C):
    """Compute y with a scan of JAX: Gu & Dao 2023, arXiv:2312.00752, eq. 2-4."""

    def step(state, inputs):
        x, dt, b, c = inputs
        state = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * b[:, None, :]
        return state, (state * c[:, None, :]).sum(-1)

    over_time = [jnp.moveaxis(a, -1, 0) for a in (u, jax.nn.softplus(delta), B, C)]
    _, y = jax.lax.scan(step, jnp.zeros((*u.shape[:2], A.shape[1]), u.dtype), over_time)
    return jnp.moveaxis(y, 0, -1)


@jax.jit
def compiled(u, delta, A, B, C):
    """Call the kernel from a compiled function: JAX hands its arrays to Python and back."""

    def scan(*inputs):
        return np.asarray(ssm_kernels.selective_scan(*map(np.asarray, inputs), softplus=True))

    shape = jax.ShapeDtypeStruct(u.shape, u.dtype)
    return jax.pure_callback(scan, shape, u, delta, A, B, C)


def main() -> int:
    """Run; return the exit status."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((2, 24, 50), (2, 24, 50), (24, 16), (2, 16, 50), (2, 16, 50))
    u, delta, A, B, C = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    A = -jnp.exp(A)
    want = definition(u, delta, A, B, C)

    # JAX arrays go in as they are, and a JAX array comes out.
    y = ssm_kernels.selective_scan(u, delta, A, B, C, softplus=True)
    errors = [float(jnp.abs(got - want).max()) for got in (y, compiled(u, delta, A, B, C))]
    print(f"ssm-kernels {ssm_kernels.__version__}, jax {jax.__version__}: errors {errors}")
    return 0 if isinstance(y, jax.Array) and max(errors) < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
