"""What ssm_kernels.ssd_chunk_scan_fwd and _bwd refuse, and with which words.

Judge: the error grammar `<op>: <argument> must <rule>, got <value>`, word by word. The checks are
made before an instruction set is chosen, so one run is enough.
"""

import numpy as np
import pytest
import ssm_kernels

OP = "ssd_chunk_scan"
GRADIENTS = ("X", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def small() -> dict:
    """Arguments of both directions that pass: B = 2, L = 6, H = 4, P = 3, N = 5, S = 2."""
    shapes = {"X": (2, 6, 4, 3), "dt": (2, 6, 4), "A": (4,), "B": (2, 6, 1, 5), "C": (2, 6, 2, 5)}
    shapes |= {"D": (4,), "z": (2, 6, 4, 3), "dt_bias": (4,), "initial_states": (2, 4, 3, 5)}
    found = {name: np.zeros(shape, "f4") for name, shape in shapes.items()}
    found |= {f"d{name}": np.zeros(shape, "f4") for name, shape in shapes.items()}
    found |= {n: np.zeros((2, 4, 3, 5), "f4") for n in ("final_states", "dfinal_states")}
    found |= {n: np.zeros((2, 6, 4, 3), "f4") for n in ("y", "dy")}
    return {**found, "checkpoints": np.zeros((2, 1, 4, 5, 3), "f4")}


def zeros(*shape, dtype="f4"):
    return np.zeros(shape, dtype)


IDS = {
    "low": np.array([[0, -2, 0, 0, 0, 0]] * 2, "i4"),
    "high": np.array([[0, 0, 1, 1, 1, 2], [-1] * 6], "i4"),
    "twice": np.array([[0, 0, 1, 1, 0, 0], [-1] * 6], "i4"),
    "rows": np.array([[0] * 6] * 2, "i4"),
}
FLOAT = "have dtype float64, float32, bfloat16 or float16"
HEADS = "(B, L, H, P) = (2, 6, 4, 3)"
INPUTS_REJECTED = {
    "X_missing": ({"X": None}, "X must be given, got None"),
    "X_rank": ({"X": zeros(6, 4, 3)}, "X must have shape (B, L, H, P), got (6, 4, 3)"),
    "X_dtype": ({"X": zeros(2, 6, 4, 3, dtype="i4")}, f"X must {FLOAT}, got int32"),
    "dt_missing": ({"dt": None}, "dt must be given, got None"),
    "dt_shape": (
        {"dt": zeros(2, 5, 4)},
        "dt must have shape (B, L, H) = (2, 6, 4), got (2, 5, 4)",
    ),
    "A_missing": ({"A": None}, "A must be given, got None"),
    "A_shape": ({"A": zeros(4, 5)}, "A must have shape (H,) = (4,), got (4, 5)"),
    "A_dtype": ({"A": zeros(4, dtype="u1")}, f"A must {FLOAT}, got uint8"),
    "B_missing": ({"B": None}, "B must be given, got None"),
    "B_rank": (
        {"B": zeros(2, 6, 5)},
        "B must have shape (B, L, G, N) = (2, 6, 1, 1), got (2, 6, 5)",
    ),
    "B_shape": (
        {"B": zeros(2, 5, 1, 5)},
        "B must have shape (B, L, G, N) = (2, 6, 1, 5), got (2, 5, 1, 5)",
    ),
    "B_groups": ({"B": zeros(2, 6, 3, 5)}, "B must have a group count that divides H = 4, got 3"),
    "B_no_groups": (
        {"B": zeros(2, 6, 0, 5)},
        "B must have a group count that divides H = 4, got 0",
    ),
    "B_dtype": ({"B": zeros(2, 6, 1, 5, dtype="i1")}, f"B must {FLOAT}, got int8"),
    "C_groups": ({"C": zeros(2, 6, 8, 5)}, "C must have a group count that divides H = 4, got 8"),
    "C_states": (
        {"C": zeros(2, 6, 1, 4)},
        "C must have shape (B, L, G, N) = (2, 6, 1, 5), got (2, 6, 1, 4)",
    ),
    "D_shape": ({"D": zeros(3)}, "D must have shape (H,) = (4,), got (3,)"),
    "D_per_channel": (
        {"D": zeros(4, 4), "dD": zeros(4, 4)},
        "D must have shape (H, P) = (4, 3), got (4, 4)",
    ),
    "D_dtype": ({"D": zeros(4, dtype="c8")}, f"D must {FLOAT}, got an unsupported dtype"),
    "z_shape": ({"z": zeros(2, 6, 3, 4)}, f"z must have shape {HEADS}, got (2, 6, 3, 4)"),
    "dt_bias_shape": ({"dt_bias": zeros(1, 4)}, "dt_bias must have shape (H,) = (4,), got (1, 4)"),
    "initial_states_shape": (
        {"initial_states": zeros(3, 4, 3, 5)},
        "initial_states must have shape (S, H, P, N) = (2, 4, 3, 5), got (3, 4, 3, 5)",
    ),
    "seq_idx_shape": (
        {"seq_idx": zeros(2, 5, dtype="i4")},
        "seq_idx must have shape (B, L) = (2, 6), got (2, 5)",
    ),
    "seq_idx_dtype": (
        {"seq_idx": zeros(2, 6, dtype="i8")},
        "seq_idx must have dtype int32, got int64",
    ),
    "seq_idx_missing": ({"state_per_sequence": True}, "seq_idx must be given, got None"),
    "seq_idx_low": ({"seq_idx": IDS["low"]}, "seq_idx must be -1 or a sequence number, got -2"),
    "seq_idx_high": (
        {"seq_idx": IDS["high"], "state_per_sequence": True},
        "seq_idx must be below the number of states 2, got 2",
    ),
    "seq_idx_twice": (
        {"seq_idx": IDS["twice"], "state_per_sequence": True},
        "seq_idx must keep each sequence in one place, got sequence 0 again at row 0",
    ),
    "seq_idx_rows": (
        {"seq_idx": IDS["rows"], "state_per_sequence": True},
        "seq_idx must keep each sequence in one place, got sequence 0 again at row 1",
    ),
    "dt_limit_order": (
        {"dt_low": 0.5, "dt_high": 0.25},
        "dt_limit must be (low, high), got (0.5, 0.25)",
    ),
    "dt_limit_nan": ({"dt_high": np.nan}, "dt_limit must be (low, high), got (0, nan)"),
}
overlapping = np.lib.stride_tricks.as_strided
SAVED = "(B, ceil(L / 96), H, N, P) = (2, 1, 4, 5, 3)"
CHECKPOINTS_REJECTED = {
    "checkpoints_shape": (
        {"checkpoints": zeros(2, 2, 4, 5, 3)},
        f"checkpoints must have shape {SAVED}, got (2, 2, 4, 5, 3)",
    ),
    "checkpoints_dtype": (
        {"checkpoints": zeros(2, 1, 4, 5, 3, dtype="f8")},
        "checkpoints must have dtype float32, got float64",
    ),
    "checkpoints_strides": (
        {"checkpoints": zeros(2, 1, 4, 3, 5).swapaxes(3, 4)},
        "checkpoints must be contiguous, got stride 5 along axis 4",
    ),
}
OUTPUTS_REJECTED = {
    **CHECKPOINTS_REJECTED,
    "y_missing": ({"y": None}, "y must be given, got None"),
    "y_shape": ({"y": zeros(2, 7, 4, 3)}, f"y must have shape {HEADS}, got (2, 7, 4, 3)"),
    "y_dtype": ({"y": zeros(2, 6, 4, 3, dtype="i4")}, f"y must {FLOAT}, got int32"),
    "y_overlap": (
        {"y": overlapping(zeros(72), (2, 6, 4, 3), (0, 48, 12, 4))},
        "y must not overlap itself, got stride 0 along axis 0",
    ),
    "final_states_shape": (
        {"final_states": zeros(1, 4, 3, 5)},
        "final_states must have shape (S, H, P, N) = (2, 4, 3, 5), got (1, 4, 3, 5)",
    ),
    "final_states_overlap": (
        {"final_states": overlapping(zeros(60), (2, 4, 3, 5), (0, 60, 20, 4))},
        "final_states must not overlap itself, got stride 0 along axis 0",
    ),
}
GRADIENTS_REJECTED = {
    **CHECKPOINTS_REJECTED,
    "checkpoints_missing": ({"checkpoints": None}, "checkpoints must be given, got None"),
    "dfinal_states_shape": (
        {"dfinal_states": zeros(2, 3, 3, 5)},
        "dfinal_states must have shape (S, H, P, N) = (2, 4, 3, 5), got (2, 3, 3, 5)",
    ),
    "dinitial_states_shape": (
        {"dinitial_states": zeros(2, 4, 4, 5)},
        "dinitial_states must have shape (S, H, P, N) = (2, 4, 3, 5), got (2, 4, 4, 5)",
    ),
    "dinitial_states_overlap": (
        {"dinitial_states": overlapping(zeros(60), (2, 4, 3, 5), (0, 60, 20, 4))},
        "dinitial_states must not overlap itself, got stride 0 along axis 0",
    ),
    "dy_missing": ({"dy": None}, "dy must be given, got None"),
    "dX_shape": ({"dX": zeros(2, 6, 4, 4)}, f"dX must have shape {HEADS}, got (2, 6, 4, 4)"),
    "ddt_shape": (
        {"ddt": zeros(2, 6, 3)},
        "ddt must have shape (B, L, H) = (2, 6, 4), got (2, 6, 3)",
    ),
    "dA_shape": ({"dA": zeros(5)}, "dA must have shape (H,) = (4,), got (5,)"),
    "dB_missing": ({"dB": None}, "dB must be given, got None"),
    "dC_groups": (
        {"dC": zeros(2, 6, 4, 5)},
        "dC must have shape (B, L, G, N) = (2, 6, 2, 5), got (2, 6, 4, 5)",
    ),
    "dD_missing": ({"dD": None}, "dD must be given, got None"),
    "dD_per_channel_missing": ({"D": zeros(4, 3), "dD": None}, "dD must be given, got None"),
    "dD_form": ({"dD": zeros(4, 3)}, "dD must have shape (H,) = (4,), got (4, 3)"),
    "dz_missing": ({"dz": None}, "dz must be given, got None"),
    "ddt_bias_missing": ({"ddt_bias": None}, "ddt_bias must be given, got None"),
}


def call(direction: str, arguments: dict) -> None:
    """Call a direction with those of `arguments` that it takes."""
    options = {"seq_idx", "softplus", "state_per_sequence", "checkpoints", "dt_low", "dt_high"}
    if direction == "fwd":
        names = {*GRADIENTS, "y", "final_states"} | options
    else:
        names = {*GRADIENTS, "dy", "dfinal_states"} | options | {f"d{name}" for name in GRADIENTS}
    function = getattr(ssm_kernels, f"{OP}_{direction}")
    function(**{name: value for name, value in arguments.items() if name in names})


def refused(direction: str, changed: dict, error: type) -> str:
    """Return the message; no output may have been touched."""
    arguments = {**small(), **changed}
    outputs = {"y", "final_states"} if direction == "fwd" else {f"d{n}" for n in GRADIENTS}
    before = {n: v for n, v in arguments.items() if n in outputs and v is not None}
    for value in before.values():
        if value.flags.writeable and 0 not in value.strides and value.dtype.kind == "f":
            value.fill(7)
    before = {n: v.copy() for n, v in before.items()}
    with pytest.raises(error) as caught:
        call(direction, arguments)
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)
    return str(caught.value)


def test_small_arguments_pass():
    call("fwd", small())
    call("bwd", small())
    call("bwd", {**small(), "D": zeros(4, 3), "dD": zeros(4, 3)})


@pytest.mark.parametrize("name", [*INPUTS_REJECTED, *OUTPUTS_REJECTED])
def test_rejects_in_forward(name):
    changed, sentence = {**INPUTS_REJECTED, **OUTPUTS_REJECTED}[name]
    assert refused("fwd", changed, ValueError) == f"{OP}: {sentence}"


@pytest.mark.parametrize("name", [*INPUTS_REJECTED, *GRADIENTS_REJECTED])
def test_rejects_in_backward(name):
    changed, sentence = {**INPUTS_REJECTED, **GRADIENTS_REJECTED}[name]
    assert refused("bwd", changed, ValueError) == f"{OP}: {sentence}"


def test_rejects_what_is_not_an_array():
    for direction in ("fwd", "bwd"):
        for name in GRADIENTS:
            for value in (
                [1.0],
                "u",
                3,
                zeros(1, 1, 1, 1, 1, 1, 1),
                zeros(2, 6, 4, 3, dtype=">f4"),
            ):
                start = (
                    f"{OP}: {name} must be an array or tensor with DLPack and at most 6 axes, got "
                )
                message = refused(direction, {name: value}, TypeError)
                reason = ": DLPack only supports native byte order."  # NumPy's
                given = type(value).__name__ + (
                    reason if getattr(value, "dtype", "") == ">f4" else ""
                )
                assert message == start + given


def test_rejects_read_only_outputs():
    for direction, names in (
        ("fwd", ("y", "final_states", "checkpoints")),
        ("bwd", [f"d{n}" for n in GRADIENTS]),
    ):
        for name in names:
            frozen = small()[name]
            frozen.flags.writeable = False
            message = refused(direction, {name: frozen}, TypeError)
            assert message.startswith(f"{OP}: {name} must be a writable array or tensor"), message
