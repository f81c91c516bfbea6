"""Sequences at the edge of what a row holds, where every sequence has a state of its own.

Judge: the same sequence in a call of its own.
"""

import numpy as np
import pytest
import ssm_kernels


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype("float32")


def scan_inputs(batch: int, seqlen: int) -> dict:
    u, B = draw(batch, 3, seqlen), draw(batch, 4, seqlen)
    return {"u": u, "delta": abs(u) + 0.1, "A": -np.ones((3, 4), "f"), "B": B, "C": B[:, None]}


def ssd_inputs(batch: int, seqlen: int) -> dict:
    X, B = draw(batch, seqlen, 2, 8), draw(batch, seqlen, 1, 8)
    dt, A = np.full((batch, seqlen, 2), 0.1, "f"), -np.ones(2, "f")
    return {"X": X, "dt": dt, "A": A, "B": B, "C": B}


def conv_inputs(batch: int, seqlen: int) -> dict:
    return {"x": draw(batch, 8, seqlen), "weight": draw(8, 4)}


# Inputs, the names of the states before and behind, and the shape of one.
OPERATORS = {
    "selective_scan": (scan_inputs, "initial_state", "last_state", (3, 4)),
    "ssd_chunk_scan": (ssd_inputs, "initial_states", "final_states", (2, 8, 8)),
    "dw_causal_conv": (conv_inputs, "initial_state", "final_state", (8, 3)),
}
OVER_TIME = ("u", "delta", "B", "C", "X", "dt", "x")


@pytest.mark.parametrize("seqlen", [8, 600])
@pytest.mark.parametrize("op", OPERATORS)
def test_a_row_without_a_step_has_no_state(op, seqlen, guarded):
    inputs_of, initial, name, shape = OPERATORS[op]
    # The row of the other number would find its state behind the only one there is.
    inputs = inputs_of(2, seqlen) | {initial: guarded(draw(1, *shape))}
    fwd = getattr(ssm_kernels, f"{op}_fwd")
    ids = np.repeat([[-1], [0]], seqlen, axis=1).astype(np.int32)
    around = np.full((3, *shape), 7, "f")  # the one state lies between others
    y = np.full_like(next(iter(inputs.values())), np.nan)
    fwd(**inputs, seq_idx=ids, state_per_sequence=True, y=y, **{name: around[1:2]})
    alone = {n: v[1:] if n in OVER_TIME else v for n, v in inputs.items()}
    want_y, want = np.full_like(y[1:], np.nan), np.full((1, *shape), np.nan, "f")
    fwd(**alone, y=want_y, **{name: want})
    assert (around[::2] == 7).all()
    np.testing.assert_allclose(around[1:2], want, 1e-5, 1e-5)
    np.testing.assert_allclose(y[1:], want_y, 1e-5, 1e-5)
    assert not y[0].any()


@pytest.mark.parametrize("op", OPERATORS)
def test_no_sequence_at_all(op):
    inputs_of, *names, shape = OPERATORS[op]
    inputs, ids = inputs_of(2, 8), np.full((2, 8), -1, np.int32)
    y = np.full_like(next(iter(inputs.values())), np.nan)
    states = {name: np.empty((0, *shape), "f") for name in names}
    packing = {"seq_idx": ids, "state_per_sequence": True}
    getattr(ssm_kernels, f"{op}_fwd")(**inputs, **packing, **states, y=y)
    assert not y.any()


@pytest.mark.parametrize("op", OPERATORS)
def test_without_states_a_sequence_has_any_number(op):
    inputs_of, _, name, shape = OPERATORS[op]
    inputs, fwd = inputs_of(1, 8), getattr(ssm_kernels, f"{op}_fwd")
    ids = np.repeat([[0, 5]], 4, axis=1).astype(np.int32)
    packing = {"seq_idx": ids, "state_per_sequence": True}
    y, want = (np.full_like(next(iter(inputs.values())), np.nan) for _ in range(2))
    fwd(**inputs, **packing, y=y)
    fwd(**inputs, **packing, y=want, **{name: np.empty((6, *shape), "f")})
    np.testing.assert_array_equal(y, want)


def scan_and_gradients(given: dict, dy: np.ndarray, dlast_state: np.ndarray) -> dict:
    """Return y, and the gradient of every array that has one."""
    (batch, _, seqlen), y = dy.shape, np.full_like(dy, np.nan)
    checkpoints = np.full((batch, -(-seqlen // 32), 4, 3), np.nan, "f")
    last = np.full_like(given["initial_state"], np.nan)
    ssm_kernels.selective_scan_fwd(**given, y=y, last_state=last, checkpoints=checkpoints)
    names = ("u", "delta", "A", "B", "C", "initial_state")
    out = {n: np.full_like(given[n], np.nan) for n in names}
    grads = {f"d{n}": gradient for n, gradient in out.items()}
    given = given | {"checkpoints": checkpoints, "dy": dy, "dlast_state": dlast_state}
    ssm_kernels.selective_scan_bwd(**given, **grads)
    return {"y": y, **out}


def test_the_gradient_of_the_first_of_the_last_states():
    inputs, cut = scan_inputs(1, 12), 5
    ids = np.repeat([0, 1], [cut, 12 - cut])[None].astype(np.int32)
    initial, dlast, dy = draw(2, 3, 4), draw(2, 3, 4) + 1, draw(1, 3, 12)

    def gradients(seqlen: int, states: int, **packing) -> dict:
        given = {n: v[..., :seqlen] if n in OVER_TIME else v for n, v in inputs.items()}
        given |= packing | {"initial_state": initial[:states]}
        return scan_and_gradients(given, dy[..., :seqlen], dlast[:states])

    got, want = gradients(12, 2, seq_idx=ids, state_per_sequence=True), gradients(cut, 1)
    for name in ("u", "delta"):
        np.testing.assert_allclose(got[name][..., :cut], want[name], 1e-5, 1e-5, err_msg=name)
    np.testing.assert_allclose(got["initial_state"][:1], want["initial_state"], 1e-5, 1e-5)


def test_gradients_where_every_step_is_a_sequence():
    """More sequences in a tile than there could be, were one step more in it."""
    count = 70
    inputs = scan_inputs(1, count) | {"initial_state": draw(count, 3, 4)}
    dlast, dy = draw(count, 3, 4) + 1, draw(1, 3, count)

    def as_rows(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(array, -1, 0)[:, 0, ..., None])

    packing = {"seq_idx": np.arange(count, dtype=np.int32)[None], "state_per_sequence": True}
    got = scan_and_gradients(inputs | packing, dy, dlast)
    alone = {n: as_rows(v) if n in OVER_TIME else v for n, v in inputs.items()}
    want = scan_and_gradients(alone, as_rows(dy), dlast)
    for name, gradient in got.items():
        value = as_rows(gradient) if name in ("y", *OVER_TIME) else gradient
        np.testing.assert_allclose(value, want[name], 1e-5, 1e-5, err_msg=name)
