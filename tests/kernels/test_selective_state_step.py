"""ssm_kernels.selective_state_step_fwd. Judge: the float64 NumPy loop of tests.judge."""

import itertools
import math
import os

import numpy as np
import pytest
import ssm_kernels

from tests import judge
from tests.cases import CASES, StepCase, make
from tests.guard import far_apart, guarded
from tests.tolerances import TOLERANCES, assert_close

OP = "selective_state_step"
DTYPES = ("float64", "float32", "float16")


def typed(arguments: dict, dtype: str) -> dict:
    """Return the arguments with their floats in `dtype`."""
    return {
        name: value.astype(dtype)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in arguments.items()
    }


def run(arguments: dict, num_threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Call the kernel on a copy of the state and a poisoned y; return y and the new state."""
    arguments = {**arguments, "state": arguments["state"].copy(order="K")}
    y = np.full_like(arguments["x"], np.nan, subok=False)
    ssm_kernels.selective_state_step_fwd(**arguments, y=y, num_threads=num_threads)
    return y, arguments["state"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case, dtype):
    arguments = typed(make(case), dtype)
    y, state = run(arguments)
    want_y, want_state = judge.selective_state_step(**arguments)
    assert_close("y", y, want_y, TOLERANCES[OP, dtype])
    assert_close("state", state, want_state, TOLERANCES[OP, dtype])


def test_every_isa(on_other_isas):
    on_other_isas(__file__)


@pytest.mark.parametrize("dstate", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 129, 256])
def test_odd_sizes(dstate):
    rng = np.random.default_rng(dstate)
    for dim in (1, 3, 15, 16, 17, 33, 130):
        arguments = {
            "state": rng.standard_normal((2, dim, dstate)),
            "x": rng.standard_normal((2, dim)),
            "dt": rng.standard_normal((2, dim)),
            "A": -np.exp(rng.standard_normal((dim, dstate))),
            "B": rng.standard_normal((2, dstate)),
            "C": rng.standard_normal((2, dstate)),
            "D": rng.standard_normal(dim),
            "z": rng.standard_normal((2, dim)),
        }
        for dtype in ("float64", "float32"):
            values = typed(arguments, dtype)
            y, state = run(values)
            want_y, want_state = judge.selective_state_step(**values)
            # The sum over the states grows with their number.
            assert_close(f"y {dim}", y / dstate, want_y / dstate, TOLERANCES[OP, dtype])
            assert_close(f"state {dim}", state, want_state, TOLERANCES[OP, dtype])


def spread(array: np.ndarray, kind: str) -> np.ndarray:
    """Return an array of the same values in another memory layout."""
    if kind == "reversed_axes":
        return np.asfortranarray(array)
    gap = np.nan if array.dtype.kind == "f" else 7
    if kind == "padded":
        wide = np.full([2 * n + 1 for n in array.shape], gap, array.dtype)
        view = wide[tuple(slice(1, 2 * n + 1, 2) for n in array.shape)]
    elif kind == "apart":  # elements of the last axis adjacent, lines apart
        wide = np.full((*array.shape[:-1], array.shape[-1] + 3), gap, array.dtype)
        view = wide[..., : array.shape[-1]]
    else:  # unaligned: one element beyond any vector boundary
        wide = np.empty(array.size + 1, array.dtype)
        view = wide[1:].reshape(array.shape)
    view[...] = array
    return view


MORE = (
    # More channels than one task has, and idle rows among them.
    StepCase("wide_indices", 4, 300, 0, 16, ntokens=2, nrows=6),
    StepCase("heads_of_vectors", 2, 2, 32, 32, ngroups=1, tied=False),
)


@pytest.mark.parametrize("kind", ["reversed_axes", "padded", "apart", "unaligned"])
@pytest.mark.parametrize(
    "name", ["mamba130m", "tokens_groups", "heads_tokens", "heads_untied", *(c.name for c in MORE)]
)
def test_noncontiguous(name, kind):
    case = next(c for c in (*CASES[OP], *MORE) if c.name == name)
    plain = typed(make(case), "float32")
    want_y, want_state = run(plain)
    other = {
        key: spread(value, kind) if isinstance(value, np.ndarray) and value.ndim else value
        for key, value in plain.items()
    }
    state = other["state"]
    outer = state if state.base is None else state.base
    before = outer.copy()
    y = spread(np.zeros_like(plain["x"]), kind)
    y[...] = np.nan
    ssm_kernels.selective_state_step_fwd(**other, y=y)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(state, want_state)
    if kind == "padded":  # nothing between the elements was touched
        state[...] = np.nan
        assert np.isnan(outer).sum() == np.isnan(before).sum() + state.size


def test_stride_zero_inputs_are_tied_inputs():
    case = next(c for c in CASES[OP] if c.name == "mamba2_130m")
    tied = typed(make(case), "float32")
    heads, headdim, dstate = tied["state"].shape[1:]
    full = {
        **tied,
        "dt": np.broadcast_to(tied["dt"][..., None], (1, heads, headdim)),
        "A": np.broadcast_to(tied["A"][:, None, None], (heads, headdim, dstate)),
        "D": np.broadcast_to(tied["D"][:, None], (heads, headdim)),
        "dt_bias": np.broadcast_to(tied["dt_bias"][:, None], (heads, headdim)),
    }
    want_y, want_state = run(tied)
    y, state = run(full)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(state, want_state)
    # Written out, the same numbers take the way of an A that depends on the state.
    dense = {
        k: np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v for k, v in full.items()
    }
    y, state = run(dense)
    assert_close("y", y, want_y, TOLERANCES[OP, "float32"])
    assert_close("state", state, want_state, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize("dstate", [1, 16])
def test_every_mixture_of_tied_and_untied(dstate):
    """dt, A, D and dt_bias per head or per channel, and an A that is constant along one axis."""
    rng, batch, heads, headdim = np.random.default_rng(0), 2, 3, 20
    forms = {"dt": [(batch, heads), (batch, heads, headdim)]}
    forms["A"] = [(heads,), *((heads, p, n) for p in (1, headdim) for n in (1, dstate))]
    forms["D"] = forms["dt_bias"] = [(heads,), (heads, headdim)]
    plain = typed(make(StepCase("mixture", batch, heads, headdim, dstate, ngroups=1)), "float32")
    for shapes in itertools.product(*forms.values()):
        for name, shape in zip(forms, shapes, strict=True):
            value = rng.standard_normal(shape).astype("float32")
            plain[name] = -np.exp(value) if name == "A" else value
        if plain["A"].ndim == 3:
            plain["A"] = np.broadcast_to(plain["A"], (heads, headdim, dstate))
        y, state = run(plain)
        want_y, want_state = judge.selective_state_step(**plain)
        assert_close(f"y {shapes}", y / dstate, want_y / dstate, TOLERANCES[OP, "float32"])
        assert_close(f"state {shapes}", state, want_state, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize(("b_groups", "c_groups"), [(2, 3), (1, 6), (6, 2)])
@pytest.mark.parametrize("headdim", [0, 5])
def test_unlike_groups(headdim, b_groups, c_groups):
    arguments = make(StepCase("groups", 2, 6, headdim, 4, ntokens=2, ngroups=6))
    arguments["B"] = arguments["B"][:, :, :b_groups]
    arguments["C"] = arguments["C"][:, :, :c_groups]
    y, state = run(arguments)
    want_y, want_state = judge.selective_state_step(**arguments)
    assert_close("y", y, want_y, TOLERANCES[OP, "float64"])
    assert_close("state", state, want_state, TOLERANCES[OP, "float64"])


@pytest.mark.skipif("SSM_TEST_CUDA_HOST" in os.environ, reason="no CUDA kernel asks for a size")
@pytest.mark.parametrize("tied", [True, False])
def test_states_larger_than_the_caches(tied):
    """They give what parts of them give that the caches hold."""
    case = StepCase("large", 17, 8, 64, 512, ngroups=2, tied=tied)
    arguments = typed(make(case), "float32")
    assert arguments["state"].size > 2**22
    y, state = run(arguments)
    few = {n: arguments[n][14:] for n in ("state", "x", "dt", "z", "B", "C")}
    want_y, want_state = run({**arguments, **few})
    np.testing.assert_array_equal(y[14:], want_y)
    np.testing.assert_array_equal(state[14:], want_state)


@pytest.mark.parametrize("state_dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("x_dtype", ["float64", "float32", "float16"])
def test_mixed_dtypes(x_dtype, state_dtype):
    case = next(c for c in CASES[OP] if c.name == "tokens")
    arguments = typed(make(case), x_dtype)
    arguments["state"] = arguments["state"].astype(state_dtype)
    arguments["dt"] = arguments["dt"].astype("float32")
    arguments["A"] = arguments["A"].astype("float64")
    y, state = run(arguments)
    want_y, want_state = judge.selective_state_step(**arguments)
    assert_close("y", y, want_y, TOLERANCES[OP, x_dtype])
    # float32 arithmetic limits a float64 state.
    coarsest = max("float64" if x_dtype == "float64" else "float32", state_dtype, key=DTYPES.index)
    assert_close("state", state, want_state, TOLERANCES[OP, coarsest])


def test_tokens_equal_steps_one_by_one():
    for name in ("tokens", "tokens_groups", "heads_tokens", "tokens_indices"):
        case = next(c for c in CASES[OP] if c.name == name)
        arguments = typed(make(case), "float32")
        y, state = run(arguments)
        one = dict(arguments)
        for t in range(y.shape[1]):
            for key in ("x", "dt", "z", "B", "C"):
                one[key] = arguments[key][:, t]
            y_t, one["state"] = run(one)
            np.testing.assert_array_equal(y_t, y[:, t])
        np.testing.assert_array_equal(one["state"], state)


@pytest.mark.parametrize("name", ["mamba2_130m", "tokens_indices", "mamba130m"])
def test_threads_agree(name):
    case = next(c for c in CASES[OP] if c.name == name)
    arguments = typed(make(case), "float32")
    # Large enough that the work is shared.
    for key in ("state", "x", "dt", "z", "B", "C"):
        if arguments["state_indices"] is None:
            arguments[key] = np.repeat(arguments[key], 6, axis=0)
    want_y, want_state = run(arguments, 1)
    for threads in (2, 3, 8):
        y, state = run(arguments, threads)
        np.testing.assert_array_equal(y, want_y)
        np.testing.assert_array_equal(state, want_state)


def test_rows_are_independent():
    rng = np.random.default_rng(1)
    case = next(c for c in CASES[OP] if c.name == "heads")
    one = typed(make(case), "float32")
    many = dict(one)
    for key in ("state", "x", "dt", "z", "B", "C"):
        filler = rng.standard_normal((9, *one[key].shape[1:])).astype("float32")
        filler[0] = np.nan
        many[key] = np.concatenate([filler[:5], one[key], filler[5:]])
    want_y, want_state = run(one)
    y, state = run(many)
    np.testing.assert_array_equal(y[5:7], want_y)
    np.testing.assert_array_equal(state[5:7], want_state)


@pytest.mark.parametrize("name", ["heads_indices", "wide_indices"])
def test_skipped_rows_change_nothing(name):
    case = next(c for c in (*CASES[OP], *MORE) if c.name == name)
    arguments = typed(make(case), "float32")
    indices = arguments["state_indices"]
    skipped = indices == -1
    assert skipped.any()
    arguments["x"][skipped] = np.nan  # content of a skipped row must not matter
    y, state = run(arguments)
    assert (y[skipped] == 0).all()
    untouched = np.setdiff1d(np.arange(len(state)), indices)
    np.testing.assert_array_equal(state[untouched], arguments["state"][untouched])


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd", "tokens", "heads", "heads_untied", "mamba2_130m"])
def test_stays_in_bounds(name, dtype, at_end):
    """A read or write beyond any tensor faults and ends the process."""
    plain = typed(make(next(c for c in CASES[OP] if c.name == name)), dtype)
    want_y, want_state = run(plain)
    fenced = {
        key: guarded(value, at_end) if isinstance(value, np.ndarray) else value
        for key, value in plain.items()
    }
    y = guarded(np.full_like(plain["x"], np.nan), at_end)
    ssm_kernels.selective_state_step_fwd(**fenced, y=y)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(fenced["state"], want_state)


@pytest.mark.parametrize("name", ["indices", "heads_untied"])
def test_large_offsets(name):
    plain = typed(make(next(c for c in CASES[OP] if c.name == name)), "float16")
    want_y, want_state = run(plain)
    try:
        far = {key: far_apart(plain[key]) for key in ("state", "x", "dt", "A", "B", "C", "z", "D")}
        y = far_apart(np.full_like(plain["x"], np.nan))
    except OSError as error:
        pytest.skip(f"no address space for tensors beyond 2^31 elements: {error}")
    assert far["x"].strides[0] > 2**31
    ssm_kernels.selective_state_step_fwd(**{**plain, **far}, y=y)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(far["state"], want_state)


def test_leaves_inputs_alone():
    for name in ("tokens", "heads_untied"):
        arguments = typed(make(next(c for c in CASES[OP] if c.name == name)), "float32")
        before = {k: v.copy() for k, v in arguments.items() if isinstance(v, np.ndarray)}
        run(arguments)
        for key, value in before.items():
            np.testing.assert_array_equal(arguments[key], value, err_msg=key)


def test_extreme_step_sizes():
    """Decays that underflow, and softplus far on either side of zero, stay exact and finite."""
    dt = np.array([[-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, np.inf]], np.float32)
    ones = np.ones((1, 8), np.float32)
    arguments = {
        "state": np.full((1, 8, 4), 2.0, np.float32),
        "x": np.zeros((1, 8), np.float32),
        "dt": dt,
        "A": np.full((8, 4), -3.0, np.float32),
        "B": ones[:, :4],
        "C": ones[:, :4],
    }
    arguments["dt"][0, 7] = 1e30
    y, state = run(arguments)
    want_y, want_state = judge.selective_state_step(**arguments)
    assert np.isfinite(y).all()
    assert_close("y", y, want_y, TOLERANCES[OP, "float32"])
    assert_close("state", state, want_state, TOLERANCES[OP, "float32"])


def test_accepts_no_state_elements():
    for shape in ((2, 3, 0), (2, 0, 4), (0, 3, 4)):
        rows, dim, dstate = shape
        zeros = np.zeros((rows, dstate), np.float32)
        x = np.ones((rows, dim), np.float32)
        y, _ = run(
            {
                "state": np.zeros(shape, np.float32),
                "x": x,
                "dt": x,
                "A": np.ones((dim, dstate), np.float32),
                "B": zeros,
                "C": zeros,
                "D": np.full(dim, 2.0, np.float32),
            }
        )
        np.testing.assert_array_equal(y, 2 * x)


def small() -> dict:
    """Arguments that pass, Mamba-2 shapes: B = 2, H = 4, P = 3, N = 5, G = 2."""
    rng = np.random.default_rng(0)
    shapes = {
        "state": (2, 4, 3, 5),
        "x": (2, 4, 3),
        "dt": (2, 4),
        "A": (4,),
        "B": (2, 2, 5),
        "C": (2, 2, 5),
        "D": (4,),
        "z": (2, 4, 3),
        "dt_bias": (4,),
        "y": (2, 4, 3),
    }
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


ZEROS = np.zeros
REJECTED = {
    "state_rank": (
        {"state": ZEROS((2, 4))},
        "state must have shape (R, H, P, N), got (2, 4)",
    ),
    "state_dtype": (
        {"state": ZEROS((2, 4, 3, 5), np.int32)},
        "state must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "state_overlap": (
        {"state": np.lib.stride_tricks.as_strided(ZEROS(5), (2, 4, 3, 5), (0, 0, 0, 8))},
        "state must not overlap itself, got stride 0 along axis 0",
    ),
    "x_shape": (
        {"x": ZEROS((2, 4, 2))},
        "x must have shape (B, H, P) = (2, 4, 3), got (2, 4, 2)",
    ),
    "x_rank": (
        {"x": ZEROS((2, 4))},
        "x must have shape (B, T, H, P) = (B, T, 4, 3), got (2, 4)",
    ),
    "dt_shape": ({"dt": ZEROS((2, 3))}, "dt must have shape (B, H) = (2, 4), got (2, 3)"),
    "A_shape": ({"A": ZEROS(3)}, "A must have shape (H,) = (4,), got (3,)"),
    "A_rank": (
        {"A": ZEROS((4, 3))},
        "A must have shape (H, P, N) = (4, 3, 5), got (4, 3)",
    ),
    "B_shape": ({"B": ZEROS((2, 6))}, "B must have shape (B, N) = (2, 5), got (2, 6)"),
    "B_groups": (
        {"B": ZEROS((2, 3, 5))},
        "B must have a group count that divides H = 4, got 3",
    ),
    "C_groups": (
        {"C": ZEROS((2, 0, 5))},
        "C must have a group count that divides H = 4, got 0",
    ),
    "D_shape": ({"D": ZEROS((4, 2))}, "D must have shape (H, P) = (4, 3), got (4, 2)"),
    "z_shape": ({"z": ZEROS((2, 4))}, "z must have shape (B, H, P) = (2, 4, 3), got (2, 4)"),
    "dt_bias_shape": ({"dt_bias": ZEROS(5)}, "dt_bias must have shape (H,) = (4,), got (5,)"),
    "y_shape": ({"y": ZEROS((2, 4, 2))}, "y must have shape (B, H, P) = (2, 4, 3), got (2, 4, 2)"),
    "y_overlap": (
        {"y": np.lib.stride_tricks.as_strided(ZEROS(12), (2, 4, 3), (0, 24, 8))},
        "y must not overlap itself, got stride 0 along axis 0",
    ),
    "x_missing": ({"x": None}, "x must be given, got None"),
    "rows": (
        {"state": ZEROS((3, 4, 3, 5))},
        "state must have B = 2 rows without state_indices, got 3",
    ),
    "indices_shape": (
        {"state_indices": ZEROS(3, np.int32)},
        "state_indices must have shape (B,) = (2,), got (3,)",
    ),
    "indices_dtype": (
        {"state_indices": ZEROS(2, np.int64)},
        "state_indices must have dtype int32, got int64",
    ),
    "indices_low": (
        {"state_indices": np.array([0, -2], np.int32)},
        "state_indices must lie in -1..1, got -2",
    ),
    "indices_high": (
        {"state_indices": np.array([0, 2], np.int32)},
        "state_indices must lie in -1..1, got 2",
    ),
    "indices_twice": (
        {"state_indices": np.array([1, 1], np.int32)},
        "state_indices must not name a row twice, got 1",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    change, sentence = REJECTED[name]
    arguments = {**small(), **change}
    y = arguments.pop("y")
    state = arguments["state"]
    before = np.array(state)
    with pytest.raises(ValueError) as caught:
        ssm_kernels.selective_state_step_fwd(**arguments, y=y)
    assert str(caught.value) == f"{OP}: {sentence}"
    np.testing.assert_array_equal(state, before)


def test_rejects_mamba1_sentences():
    arguments = {
        "state": ZEROS((2, 6, 4)),
        "x": ZEROS((2, 6)),
        "dt": ZEROS((2, 6)),
        "A": ZEROS((6, 4)),
        "B": ZEROS((2, 4)),
        "C": ZEROS((2, 4)),
        "y": ZEROS((2, 6)),
    }
    for change, sentence in (
        ({"dt": ZEROS((2, 5))}, "dt must have shape (B, D) = (2, 6), got (2, 5)"),
        ({"A": ZEROS((6, 5))}, "A must have shape (D, N) = (6, 4), got (6, 5)"),
        ({"B": ZEROS((2, 4, 4))}, "B must have a group count that divides D = 6, got 4"),
        ({"D": ZEROS(4)}, "D must have shape (D,) = (6,), got (4,)"),
        (
            {"x": ZEROS((2, 3, 6))},
            "dt must have shape (B, T, D) = (2, 3, 6), got (2, 6)",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            ssm_kernels.selective_state_step_fwd(**{**arguments, **change})
        assert str(caught.value) == f"{OP}: {sentence}"


@pytest.mark.parametrize(
    ("indices", "twice"), [([0, 0, 1, 2], 0), ([3, 0, -1, 3], 3), ([-1, 1, 0, 0], 0)]
)
def test_rejects_rows_named_twice_anywhere(indices, twice):
    per_row = ("x", "dt", "B", "C", "z", "y", "state")
    arguments = {
        n: np.tile(a, (2, *(1,) * (a.ndim - 1))) if n in per_row else a for n, a in small().items()
    }
    arguments["state_indices"] = np.array([-1, 2, -1, 0], np.int32)
    ssm_kernels.selective_state_step_fwd(**arguments)
    arguments["state_indices"] = np.array(indices, np.int32)
    with pytest.raises(ValueError, match=f"state_indices must not name a row twice, got {twice}$"):
        ssm_kernels.selective_state_step_fwd(**arguments)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "z", "y"])
def test_rejects_a_state_in_the_place_of_another_argument(name):
    arguments = small()
    shape = arguments[name].shape
    memory = arguments["state"].reshape(-1)
    arguments[name] = memory[: math.prod(shape)].reshape(shape)
    with pytest.raises(ValueError, match=f"state must not share memory with {name}, got"):
        ssm_kernels.selective_state_step_fwd(**arguments)


def test_rejects_what_is_not_an_array():
    arguments = small()
    with pytest.raises(TypeError, match="selective_state_step: A must be an array or tensor"):
        ssm_kernels.selective_state_step_fwd(**{**arguments, "A": [1.0]})
    frozen = arguments["state"].copy()
    frozen.flags.writeable = False
    with pytest.raises(TypeError, match="selective_state_step: state must be a writable array"):
        ssm_kernels.selective_state_step_fwd(**{**arguments, "state": frozen})
