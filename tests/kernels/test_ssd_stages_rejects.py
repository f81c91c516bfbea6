"""Every sentence with which the ssd stages refuse, forward and backward."""

import numpy as np
import pytest
import ssm_kernels

from tests.cases import StageCase, make
from tests.stage_kernels import (
    STAGES,
    backward,
    kernel_inputs,
    named,
    output_gradients,
    outputs,
    poisoned,
    run,
    typed,
)


def bad_ids(*shape, value=0) -> np.ndarray:
    return np.full(shape, value, np.int32)


REJECTED = [
    ("ssd_chunk_cumsum", "dt", lambda a: a[0], "dt must have shape (B, L, H), got (6, 4)"),
    ("ssd_chunk_cumsum", "dt", lambda a: None, "dt must be given, got None"),
    (
        "ssd_chunk_cumsum",
        "dt",
        lambda a: a.astype("int64"),
        "dt must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    ("ssd_chunk_cumsum", "A", lambda a: a[:3], "A must have shape (H,) = (4,), got (3,)"),
    (
        "ssd_chunk_cumsum",
        "seq_idx",
        lambda a: bad_ids(2, 5),
        "seq_idx must have shape (B, L) = (2, 6), got (2, 5)",
    ),
    (
        "ssd_chunk_cumsum",
        "seq_idx",
        lambda a: bad_ids(2, 6, value=-2),
        "seq_idx must be -1 or a sequence number, got -2",
    ),
    (
        "ssd_chunk_cumsum",
        "dt_limit",
        lambda a: (1.0, 0.5),
        "dt_limit must be (low, high), got (1.0, 0.5)",
    ),
    (
        "ssd_chunk_cumsum",
        "dt_limit",
        lambda a: (0.0, float("nan")),
        "dt_limit must be (low, high), got (0.0, nan)",
    ),
    (
        "ssd_chunk_cumsum",
        "dt_out",
        lambda a: np.empty((2, 4, 1, 4), "float32"),
        "dt_out must have ceil(L / Q) chunks for L = 6 and Q = 4, got 1",
    ),
    (
        "ssd_chunk_cumsum",
        "dt_out",
        lambda a: np.empty((2, 4, 3, 4), "float32"),
        "dt_out must have ceil(L / Q) chunks for L = 6 and Q = 4, got 3",
    ),
    ("ssd_chunk_cumsum", "dt_out", lambda a: a, None),
    (
        "ssd_chunk_cumsum",
        "dA_cumsum",
        lambda a: np.empty((2, 4, 1, 6), "float32"),
        "dA_cumsum must have shape (B, H, C, Q) = (2, 4, 2, 4), got (2, 4, 1, 6)",
    ),
    ("ssd_chunk_state", "x", lambda a: a[0], "x must have shape (B, L, H, P), got (6, 4, 3)"),
    (
        "ssd_chunk_state",
        "B",
        lambda a: a[:, :, [0, 0, 0]],
        "B must have a group count that divides H = 4, got 3",
    ),
    (
        "ssd_chunk_state",
        "dt",
        lambda a: a[..., :0],
        "dt must have at least 1 step per chunk, got 0",
    ),
    (
        "ssd_chunk_state",
        "dA_cumsum",
        lambda a: a[..., :3],
        "dA_cumsum must have shape (B, H, C, Q) = (2, 4, 2, 4), got (2, 4, 2, 3)",
    ),
    (
        "ssd_chunk_state",
        "states",
        lambda a: np.empty((2, 2, 4, 3, 4), "float32"),
        "states must have shape (B, C, H, P, N) = (2, 2, 4, 3, 5), got (2, 2, 4, 3, 4)",
    ),
    (
        "ssd_state_passing",
        "initial_states",
        lambda a: a[:1],
        "initial_states must have shape (B, H, P, N) = (2, 4, 3, 5), got (1, 4, 3, 5)",
    ),
    (
        "ssd_state_passing",
        "dA_cumsum",
        lambda a: a[..., :0],
        "dA_cumsum must have at least 1 step per chunk, got 0",
    ),
    (
        "ssd_state_passing",
        "seq_idx",
        lambda a: bad_ids(2, 4),
        "seq_idx must have the steps of 2 chunks of 4, got 4",
    ),
    (
        "ssd_state_passing",
        "final_states",
        lambda a: np.empty((2, 4, 3, 4), "float32"),
        "final_states must have shape (B, H, P, N) = (2, 4, 3, 5), got (2, 4, 3, 4)",
    ),
    ("ssd_bmm_chunk", "C", lambda a: a[:, :, :0], "C must have at least 1 group, got 0"),
    ("ssd_bmm_chunk", "B", lambda a: a[:, :, :0], "B must have at least 1 group, got 0"),
    (
        "ssd_bmm_chunk",
        "CB",
        lambda a: np.empty((2, 2, 4, 4, 4), "float32"),
        "CB must have shape (B, C, G, Q, Q) = (2, 2, 2, 4, 4), got (2, 2, 4, 4, 4)",
    ),
    (
        "ssd_bmm_chunk",
        "CB",
        lambda a: np.empty((2, 2, 2, 0, 0), "float32"),
        "CB must have at least 1 step per chunk, got 0",
    ),
    (
        "ssd_chunk_output",
        "CB",
        lambda a: a[:, :, [0, 0, 0]],
        "CB must have a group count that divides H = 4, got 3",
    ),
    (
        "ssd_chunk_output",
        "states_in",
        lambda a: a[..., :4],
        "states_in must have shape (B, C, H, P, N) = (2, 2, 4, 3, 5), got (2, 2, 4, 3, 4)",
    ),
    ("ssd_chunk_output", "D", lambda a: a[:3], "D must have shape (H,) = (4,), got (3,)"),
    (
        "ssd_chunk_output",
        "y",
        lambda a: np.broadcast_to(np.empty((1, 1, 1, 1), "float32"), (2, 6, 4, 3)),
        None,
    ),
]


@pytest.mark.parametrize(("stage", "name", "change", "message"), REJECTED)
def test_rejects_value(stage, name, change, message):
    arguments = typed(make(StageCase(stage, "reject", 2, 6, 4, 3, 5, 4, 2, 2)), "float32")
    out = outputs(stage, arguments)
    if message is None:
        # Elements of an output that share memory, and memory that may not be written.
        out[name] = np.lib.stride_tricks.as_strided(out[name], strides=(0, 0, 0, 4))
        message = f"{name} must"
    elif name in out:
        out[name] = change(out[name])
    else:
        arguments[name] = change(arguments.get(name))
    kept = {key: value.copy() for key, value in out.items()}
    with pytest.raises(ValueError) as error:
        run(stage, arguments, out=out)
    assert str(error.value).startswith(f"{stage}: {message}")
    for key, value in kept.items():
        np.testing.assert_array_equal(out[key], value)


@pytest.mark.parametrize("stage", STAGES)
def test_rejects_what_is_no_array(stage):
    arguments = make(named(stage, "tiny"))
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            with pytest.raises(TypeError, match=f"^{stage}: {name} must be an array"):
                run(stage, {**arguments, name: [1.0]}, out=outputs(stage, arguments))


IN_CHUNKS = "must have shape (B, H, C, Q) = (2, 4, 2, 4), got (2, 4, 2, 3)"
REJECTED_BACKWARD = [
    (
        "ssd_chunk_cumsum",
        {"ddt_out": (2, 4, 1, 4)},
        "ddt_out must have ceil(L / Q) chunks for L = 6 and Q = 4, got 1",
    ),
    (
        "ssd_chunk_cumsum",
        {"ddt_out": None, "ddA_cumsum": (2, 4, 1, 4)},
        "ddA_cumsum must have ceil(L / Q) chunks for L = 6 and Q = 4, got 1",
    ),
    (
        "ssd_chunk_cumsum",
        {"ddt_out": None, "ddA_cumsum": None},
        "ddA_cumsum must be given, got None",
    ),
    ("ssd_chunk_cumsum", {"ddA_cumsum": (2, 4, 2, 3)}, f"ddA_cumsum {IN_CHUNKS}"),
    (
        "ssd_chunk_cumsum",
        {"ddt": (2, 5, 4)},
        "ddt must have shape (B, L, H) = (2, 6, 4), got (2, 5, 4)",
    ),
    ("ssd_chunk_cumsum", {"dA": (3,)}, "dA must have shape (H,) = (4,), got (3,)"),
    ("ssd_chunk_cumsum", {"ddt_bias": None}, "ddt_bias must be given, got None"),
    (
        "ssd_chunk_state",
        {"dstates": (2, 2, 4, 3, 4)},
        "dstates must have shape (B, C, H, P, N) = (2, 2, 4, 3, 5), got (2, 2, 4, 3, 4)",
    ),
    (
        "ssd_chunk_state",
        {"dx": (2, 6, 4, 2)},
        "dx must have shape (B, L, H, P) = (2, 6, 4, 3), got (2, 6, 4, 2)",
    ),
    (
        "ssd_chunk_state",
        {"dB": (2, 6, 1, 5)},
        "dB must have shape (B, L, G, N) = (2, 6, 2, 5), got (2, 6, 1, 5)",
    ),
    ("ssd_chunk_state", {"ddt": (2, 4, 2, 3)}, f"ddt {IN_CHUNKS}"),
    ("ssd_chunk_state", {"ddA_cumsum": (2, 4, 2, 3)}, f"ddA_cumsum {IN_CHUNKS}"),
    ("ssd_state_passing", {"states_in": None}, "states_in must be given, got None"),
    (
        "ssd_state_passing",
        {"dstates_in": (2, 2, 4, 3, 4)},
        "dstates_in must have shape (B, C, H, P, N) = (2, 2, 4, 3, 5), got (2, 2, 4, 3, 4)",
    ),
    (
        "ssd_state_passing",
        {"dfinal_states": (1, 4, 3, 5)},
        "dfinal_states must have shape (B, H, P, N) = (2, 4, 3, 5), got (1, 4, 3, 5)",
    ),
    (
        "ssd_state_passing",
        {"dstates": (2, 1, 4, 3, 5)},
        "dstates must have shape (B, C, H, P, N) = (2, 2, 4, 3, 5), got (2, 1, 4, 3, 5)",
    ),
    ("ssd_state_passing", {"ddA_cumsum": (2, 4, 2, 3)}, f"ddA_cumsum {IN_CHUNKS}"),
    (
        "ssd_state_passing",
        {"dinitial_states": (1, 4, 3, 5)},
        "dinitial_states must have shape (B, H, P, N) = (2, 4, 3, 5), got (1, 4, 3, 5)",
    ),
    (
        "ssd_bmm_chunk",
        {"dCB": (2, 2, 4, 4, 4)},
        "dCB must have shape (B, C, G, Q, Q) = (2, 2, 2, 4, 4), got (2, 2, 4, 4, 4)",
    ),
    (
        "ssd_bmm_chunk",
        {"dCB": (2, 2, 2, 0, 0)},
        "dCB must have at least 1 step per chunk, got 0",
    ),
    (
        "ssd_bmm_chunk",
        {"dC": (2, 6, 1, 5)},
        "dC must have shape (B, L, G, N) = (2, 6, 2, 5), got (2, 6, 1, 5)",
    ),
    (
        "ssd_bmm_chunk",
        {"dB": (2, 6, 1, 5)},
        "dB must have shape (B, L, G, N) = (2, 6, 2, 5), got (2, 6, 1, 5)",
    ),
    (
        "ssd_chunk_output",
        {"dy": (2, 6, 4, 2)},
        "dy must have shape (B, L, H, P) = (2, 6, 4, 3), got (2, 6, 4, 2)",
    ),
    (
        "ssd_chunk_output",
        {"dCB": (2, 2, 2, 4, 3)},
        "dCB must have shape (B, C, G, Q, Q) = (2, 2, 2, 4, 4), got (2, 2, 2, 4, 3)",
    ),
    (
        "ssd_chunk_output",
        {"dx": (2, 6, 4, 2)},
        "dx must have shape (B, L, H, P) = (2, 6, 4, 3), got (2, 6, 4, 2)",
    ),
    ("ssd_chunk_output", {"ddt": (2, 4, 2, 3)}, f"ddt {IN_CHUNKS}"),
    ("ssd_chunk_output", {"ddA_cumsum": (2, 4, 2, 3)}, f"ddA_cumsum {IN_CHUNKS}"),
    (
        "ssd_chunk_output",
        {"dC": (2, 6, 1, 5)},
        "dC must have shape (B, L, G, N) = (2, 6, 2, 5), got (2, 6, 1, 5)",
    ),
    (
        "ssd_chunk_output",
        {"dstates_in": (2, 2, 4, 3, 4)},
        "dstates_in must have shape (B, C, H, P, N) = (2, 2, 4, 3, 5), got (2, 2, 4, 3, 4)",
    ),
    ("ssd_chunk_output", {"dD": (3,)}, "dD must have shape (H,) = (4,), got (3,)"),
    ("ssd_chunk_output", {"dz": None}, "dz must be given, got None"),
]


@pytest.mark.parametrize(("stage", "changes", "message"), REJECTED_BACKWARD)
def test_rejects_value_backward(stage, changes, message):
    arguments = typed(make(StageCase(stage, "reject", 2, 6, 4, 3, 5, 4, 2, 2)), "float32")
    out = poisoned(stage, arguments)
    call = kernel_inputs(stage, arguments)
    for values in (output_gradients(stage, arguments), out):
        call |= {f"d{name}": value for name, value in values.items()}
    for name, shape in changes.items():
        assert name in call
        call[name] = None if shape is None else np.zeros(shape, "float32")
    with pytest.raises(ValueError) as error:
        getattr(ssm_kernels, f"{stage}_bwd")(**call)
    assert str(error.value) == f"{stage}: {message}"
    for name, value in out.items():
        assert np.isnan(value).all(), name


@pytest.mark.parametrize("stage", STAGES)
def test_rejects_gradients_that_share_memory(stage):
    arguments = typed(make(named(stage, "odd")), "float32")
    given = output_gradients(stage, arguments)
    for name, value in poisoned(stage, arguments).items():
        if value.size > 1:
            out = poisoned(stage, arguments)
            out[name] = np.lib.stride_tricks.as_strided(value, strides=(0,) * value.ndim)
            with pytest.raises(ValueError, match=f"^{stage}: d{name} must"):
                backward(stage, arguments, given, out=out)


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "ssd_bmm_chunk"])
def test_rejects_ids_backward(stage):
    arguments = typed(make(named(stage, "seq_idx")), "float32")
    call = kernel_inputs(stage, arguments)
    call["seq_idx"] = np.full_like(call["seq_idx"], -2)
    for values in (output_gradients(stage, arguments), poisoned(stage, arguments)):
        call |= {f"d{name}": value for name, value in values.items()}
    message = "seq_idx must be -1 or a sequence number, got -2"
    with pytest.raises(ValueError, match=f"^{stage}: {message}$"):
        getattr(ssm_kernels, f"{stage}_bwd")(**call)
