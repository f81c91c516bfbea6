"""The five stages of the state-space dual scan one after the other, by whoever has them."""


def compose(
    ops, X, dt, A, B, C, chunk_size, D=None, z=None, seq_idx=None, initial_states=None, *,
    dt_bias=None, softplus=False, dt_limit=(0.0, float("inf")),
):  # fmt: skip
    """Return y (B, L, H, P) and final_states (B, H, P, N), as ssd_chunk_scan gives them.

    Args:
        ops: has the five stages: ``ssm.ops``, a reference, a judge, or wrappers of raw kernels.
        X: and the others as in ``ssm.ops.ssd_chunk_scan``.
        seq_idx: (B, L), int32, in place of ``seq_meta``.
    """
    step, decay = ops.ssd_chunk_cumsum(
        dt, A, chunk_size, dt_bias=dt_bias, softplus=softplus, dt_limit=dt_limit, seq_idx=seq_idx
    )
    states = ops.ssd_chunk_state(X, B, step, decay, seq_idx=seq_idx)
    states_in, final_states = ops.ssd_state_passing(
        states, decay, initial_states=initial_states, seq_idx=seq_idx
    )
    products = ops.ssd_bmm_chunk(C, B, chunk_size)
    y = ops.ssd_chunk_output(products, X, step, decay, C, states_in, D=D, z=z, seq_idx=seq_idx)
    return y, final_states
