"""What ssm_kernels.selective_scan_fwd and _bwd refuse, and with which words.

Judge: the error grammar `<op>: <argument> must <rule>, got <value>`, word by word. The checks are
made before an instruction set is chosen, so one run is enough.
"""

import numpy as np
import pytest
import ssm_kernels

OP = "selective_scan"
GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def small() -> dict:
    """Arguments of both directions that pass: B = 2, D = 4, N = 3, L = 6, S = 2."""
    shapes = {"u": (2, 4, 6), "delta": (2, 4, 6), "A": (4, 3), "B": (2, 3, 6), "C": (2, 2, 3, 6)}
    shapes |= {"D": (4,), "z": (2, 4, 6), "dt_bias": (4,), "initial_state": (2, 4, 3)}
    found = {name: np.zeros(shape, "f4") for name, shape in shapes.items()}
    found |= {f"d{name}": np.zeros(shape, "f4") for name, shape in shapes.items()}
    found |= {n: np.zeros((2, 4, 3), "f4") for n in ("last_state", "dlast_state")}
    found |= {n: np.zeros((2, 4, 6), "f4") for n in ("y", "dy")}
    return {**found, "checkpoints": np.zeros((2, 1, 3, 4), "f4")}


def zeros(*shape, dtype="f4"):
    return np.zeros(shape, dtype)


IDS = {
    "low": np.array([[0, -2, 0, 0, 0, 0]] * 2, "i4"),
    "high": np.array([[0, 0, 1, 1, 1, 2], [-1] * 6], "i4"),
    "twice": np.array([[0, 0, 1, 1, 0, 0], [-1] * 6], "i4"),
    "rows": np.array([[0] * 6] * 2, "i4"),
}
FLOAT = "have dtype float64, float32, bfloat16 or float16"
INPUTS_REJECTED = {
    "u_missing": ({"u": None}, "u must be given, got None"),
    "u_rank": ({"u": zeros(4, 6)}, "u must have shape (B, D, L), got (4, 6)"),
    "u_dtype": ({"u": zeros(2, 4, 6, dtype="i4")}, f"u must {FLOAT}, got int32"),
    "u_bool": ({"u": zeros(2, 4, 6, dtype="?")}, f"u must {FLOAT}, got an unsupported dtype"),
    "delta_missing": ({"delta": None}, "delta must be given, got None"),
    "delta_shape": (
        {"delta": zeros(2, 4, 5)},
        "delta must have shape (B, D, L) = (2, 4, 6), got (2, 4, 5)",
    ),
    "delta_dtype": ({"delta": zeros(2, 4, 6, dtype="i8")}, f"delta must {FLOAT}, got int64"),
    "A_missing": ({"A": None}, "A must be given, got None"),
    "A_rank": ({"A": zeros(4)}, "A must have shape (D, N), got (4,)"),
    "A_shape": ({"A": zeros(5, 3)}, "A must have shape (D, N) = (4, 3), got (5, 3)"),
    "A_dtype": ({"A": zeros(4, 3, dtype="u1")}, f"A must {FLOAT}, got uint8"),
    "B_missing": ({"B": None}, "B must be given, got None"),
    "B_constant": ({"B": zeros(4, 2)}, "B must have shape (D, N) = (4, 3), got (4, 2)"),
    "B_shared": ({"B": zeros(2, 2, 6)}, "B must have shape (B, N, L) = (2, 3, 6), got (2, 2, 6)"),
    "B_grouped": (
        {"B": zeros(2, 2, 3, 5)},
        "B must have shape (B, G, N, L) = (2, 2, 3, 6), got (2, 2, 3, 5)",
    ),
    "B_rank": ({"B": zeros(6)}, "B must have shape (B, G, N, L) = (2, 1, 3, 6), got (6,)"),
    "B_groups": ({"B": zeros(2, 3, 3, 6)}, "B must have a group count that divides D = 4, got 3"),
    "B_no_groups": (
        {"B": zeros(2, 0, 3, 6)},
        "B must have a group count that divides D = 4, got 0",
    ),
    "B_dtype": ({"B": zeros(2, 3, 6, dtype="i1")}, f"B must {FLOAT}, got int8"),
    "C_groups": ({"C": zeros(2, 8, 3, 6)}, "C must have a group count that divides D = 4, got 8"),
    "C_shared": ({"C": zeros(1, 3, 6)}, "C must have shape (B, N, L) = (2, 3, 6), got (1, 3, 6)"),
    "D_shape": ({"D": zeros(3)}, "D must have shape (D,) = (4,), got (3,)"),
    "D_dtype": ({"D": zeros(4, dtype="c8")}, f"D must {FLOAT}, got an unsupported dtype"),
    "z_shape": ({"z": zeros(2, 6, 4)}, "z must have shape (B, D, L) = (2, 4, 6), got (2, 6, 4)"),
    "dt_bias_shape": ({"dt_bias": zeros(1, 4)}, "dt_bias must have shape (D,) = (4,), got (1, 4)"),
    "initial_state_shape": (
        {"initial_state": zeros(3, 4, 3)},
        "initial_state must have shape (S, D, N) = (2, 4, 3), got (3, 4, 3)",
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
}
overlapping = np.lib.stride_tricks.as_strided
CHECKPOINTS_REJECTED = {
    "checkpoints_shape": (
        {"checkpoints": zeros(2, 2, 3, 4)},
        "checkpoints must have shape (B, ceil(L / 32), N, D) = (2, 1, 3, 4), got (2, 2, 3, 4)",
    ),
    "checkpoints_dtype": (
        {"checkpoints": zeros(2, 1, 3, 4, dtype="f8")},
        "checkpoints must have dtype float32, got float64",
    ),
    "checkpoints_strides": (
        {"checkpoints": zeros(2, 1, 4, 3).swapaxes(2, 3)},
        "checkpoints must be contiguous, got stride 3 along axis 3",
    ),
}
OUTPUTS_REJECTED = {
    **CHECKPOINTS_REJECTED,
    "y_missing": ({"y": None}, "y must be given, got None"),
    "y_shape": ({"y": zeros(2, 4, 7)}, "y must have shape (B, D, L) = (2, 4, 6), got (2, 4, 7)"),
    "y_dtype": ({"y": zeros(2, 4, 6, dtype="i4")}, f"y must {FLOAT}, got int32"),
    "y_overlap": (
        {"y": overlapping(zeros(24), (2, 4, 6), (0, 24, 4))},
        "y must not overlap itself, got stride 0 along axis 0",
    ),
    "last_state_shape": (
        {"last_state": zeros(1, 4, 3)},
        "last_state must have shape (S, D, N) = (2, 4, 3), got (1, 4, 3)",
    ),
    "last_state_overlap": (
        {"last_state": overlapping(zeros(8), (2, 4, 3), (16, 4, 0))},
        "last_state must not overlap itself, got stride 0 along axis 2",
    ),
    # The last element of a line is the first of the next.
    "last_state_overlaps_by_one": (
        {"last_state": overlapping(zeros(64), (2, 4, 3), (64, 8, 4))},
        "last_state must not overlap itself, got strides (16, 2, 1)",
    ),
}
GRADIENTS_REJECTED = {
    **CHECKPOINTS_REJECTED,
    "checkpoints_missing": ({"checkpoints": None}, "checkpoints must be given, got None"),
    "dlast_state_shape": (
        {"dlast_state": zeros(2, 3, 3)},
        "dlast_state must have shape (S, D, N) = (2, 4, 3), got (2, 3, 3)",
    ),
    "dinitial_state_shape": (
        {"dinitial_state": zeros(2, 4, 4)},
        "dinitial_state must have shape (S, D, N) = (2, 4, 3), got (2, 4, 4)",
    ),
    "dy_missing": ({"dy": None}, "dy must be given, got None"),
    "dA_shape": ({"dA": zeros(4, 4)}, "dA must have shape (D, N) = (4, 3), got (4, 4)"),
    "dB_missing": ({"dB": None}, "dB must be given, got None"),
    # The form of B itself counts.
    "dB_form": ({"dB": zeros(4, 3)}, "dB must have shape (2, 1, 3, 6), got (4, 3)"),
    "dC_groups": ({"dC": zeros(2, 4, 3, 6)}, "dC must have shape (2, 2, 3, 6), got (2, 4, 3, 6)"),
    "dB_overlap": (
        {"dB": overlapping(zeros(1), (2, 3, 6), (0, 0, 0))},
        "dB must not overlap itself, got stride 0 along axis 0",
    ),
    "dC_overlap": (
        {"dC": overlapping(zeros(36), (2, 2, 3, 6), (72, 0, 24, 4))},
        "dC must not overlap itself, got stride 0 along axis 1",
    ),
    "dC_missing": ({"dC": None}, "dC must be given, got None"),
    "dD_missing": ({"dD": None}, "dD must be given, got None"),
    "dz_missing": ({"dz": None}, "dz must be given, got None"),
    "ddt_bias_missing": ({"ddt_bias": None}, "ddt_bias must be given, got None"),
}
for _name, _letters, _shape in (("du", "B, D, L", "2, 4, 6"), ("ddelta", "B, D, L", "2, 4, 6")):
    GRADIENTS_REJECTED[f"{_name}_shape"] = (
        {_name: zeros(2, 4, 5)},
        f"{_name} must have shape ({_letters}) = ({_shape}), got (2, 4, 5)",
    )


def call(direction: str, arguments: dict) -> None:
    """Call a direction with those of `arguments` that it takes."""
    inputs = {*GRADIENTS, "seq_idx", "softplus", "state_per_sequence", "checkpoints"}
    if direction == "fwd":
        names = inputs | {"y", "last_state"}
    else:
        names = inputs | {"dy", "dlast_state"} | {f"d{name}" for name in GRADIENTS}
    function = getattr(ssm_kernels, f"{OP}_{direction}")
    function(**{name: value for name, value in arguments.items() if name in names})


def refused(direction: str, changed: dict, error: type) -> str:
    """Return the message; no output may have been touched."""
    arguments = {**small(), **changed}
    outputs = {"y", "last_state"} if direction == "fwd" else {f"d{n}" for n in GRADIENTS}
    before = {n: v.copy() for n, v in arguments.items() if n in outputs and v is not None}
    for value in before.values():
        value.fill(0)
    with pytest.raises(error) as caught:
        call(direction, arguments)
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)
    return str(caught.value)


def test_small_arguments_pass():
    call("fwd", small())
    call("bwd", small())
    # Strides of an axis of one element mean nothing.
    one = overlapping(zeros(24), (2, 1, 3, 4), (48, 4, 16, 4))
    call("bwd", {**small(), "checkpoints": one})


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
            for value in ([1.0], "u", 3, zeros(1, 1, 1, 1, 1, 1, 1), zeros(2, 4, 6, dtype=">f4")):
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
        ("fwd", ("y", "last_state", "checkpoints")),
        ("bwd", [f"d{n}" for n in GRADIENTS]),
    ):
        for name in names:
            frozen = small()[name]
            frozen.flags.writeable = False
            message = refused(direction, {name: frozen}, TypeError)
            assert message.startswith(f"{OP}: {name} must be a writable array or tensor"), message
