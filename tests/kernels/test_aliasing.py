"""No output of a kernel may begin where another argument does, but for what is carried in place.

Judge: the sentence of the refusal; for states and residuals, the call with memory of their own.
"""

import itertools
import os

import numpy as np
import pytest
import ssm_kernels

B, L, D, N, H, P, G, Q = 2, 100, 6, 5, 4, 3, 2, 32
CHUNKS = -(-L // Q)
LINE, STATE, MATRIX = (B, D, L), (B, D, N), (B, G, N, L)
ROW, HEADS, IN_CHUNKS = (B, L, H, P), (B, L, H), (B, H, CHUNKS, Q)
GROUPS, PRODUCTS, STATES = (B, L, G, N), (B, CHUNKS, G, Q, Q), (B, CHUNKS, H, P, N)
HEAD_STATE = (B, H, P, N)
SCAN = {"u": LINE, "delta": LINE, "A": (D, N), "B": MATRIX, "C": MATRIX, "D": (D,), "z": LINE}
SCAN |= {"dt_bias": (D,), "initial_state": STATE, "seq_idx": (B, L)}
SAVED = (B, -(-L // 32), N, D)
SSD = {"X": ROW, "dt": HEADS, "A": (H,), "B": GROUPS, "C": GROUPS, "D": (H,), "z": ROW}
SSD |= {"dt_bias": (H,), "initial_states": HEAD_STATE, "seq_idx": (B, L)}
SSD_SAVED = (B, -(-L // 96), H, N, P)
CONV = {"x": LINE, "weight": (D, 4), "bias": (D,), "initial_state": (B, D, 3), "seq_idx": (B, L)}
NORM = {"x": (L, D), "weight": (D,), "bias": (D,)}
STAGE = {"x": ROW, "dt": IN_CHUNKS, "dA_cumsum": IN_CHUNKS, "seq_idx": (B, L)}

# Function -> shapes of its inputs and outputs.
CALLS = {
    "selective_scan_fwd": (SCAN, {"y": LINE, "last_state": STATE, "checkpoints": SAVED}),
    "selective_scan_bwd": (
        {**SCAN, "checkpoints": SAVED, "dy": LINE, "dlast_state": STATE},
        {f"d{n}": s for n, s in SCAN.items() if n != "seq_idx"},
    ),
    "ssd_chunk_scan_fwd": (SSD, {"y": ROW, "final_states": HEAD_STATE, "checkpoints": SSD_SAVED}),
    "ssd_chunk_scan_bwd": (
        {**SSD, "checkpoints": SSD_SAVED, "dy": ROW, "dfinal_states": HEAD_STATE},
        {f"d{n}": s for n, s in SSD.items() if n != "seq_idx"},
    ),
    "dw_causal_conv_fwd": (CONV, {"y": LINE, "final_state": (B, D, 3)}),
    "dw_causal_conv_bwd": (
        {**CONV, "dy": LINE, "dfinal_state": (B, D, 3)},
        {f"d{n}": s for n, s in CONV.items() if n != "seq_idx"},
    ),
    "dw_causal_conv_step_fwd": (
        {"x": (B, D), "weight": (D, 4), "bias": (D,), "cache_seqlens": (B,), "state_indices": (B,)},
        {"conv_state": (B, D, 3), "y": (B, D)},
    ),
    "selective_state_step_fwd": (
        {"x": (B, D), "dt": (B, D), "A": (D, N), "B": (B, N), "C": (B, N), "D": (D,), "z": (B, D)}
        | {"dt_bias": (D,), "state_indices": (B,)},
        {"state": STATE, "y": (B, D)},
    ),
    "fused_layer_norm_fwd": (
        {**NORM, "residual": (L, D)},
        {"y": (L, D), "residual_out": (L, D), "mean": (L,), "rstd": (L,)},
    ),
    "fused_layer_norm_bwd": (
        {"x": (L, D), "weight": (D,), "mean": (L,), "rstd": (L,), "dy": (L, D)}
        | {"dresidual_out": (L, D)},
        {"dx": (L, D), "dresidual": (L, D), "dweight": (D,), "dbias": (D,)},
    ),
    "gated_norm_fwd": ({**NORM, "z": (L, D)}, {"y": (L, D), "rstd": (L,)}),
    "gated_norm_bwd": (
        {**NORM, "z": (L, D), "rstd": (L,), "dy": (L, D)},
        {"dx": (L, D), "dz": (L, D), "dweight": (D,), "dbias": (D,)},
    ),
    "swiglu_fwd": ({"gate": (L, D), "up": (L, D)}, {"y": (L, D)}),
    "swiglu_bwd": (
        {"gate": (L, D), "up": (L, D), "dy": (L, D)},
        {"dgate": (L, D), "dup": (L, D)},
    ),
    "ssd_chunk_cumsum_fwd": (
        {"dt": HEADS, "A": (H,), "dt_bias": (H,), "seq_idx": (B, L)},
        {"dt_out": IN_CHUNKS, "dA_cumsum": IN_CHUNKS},
    ),
    "ssd_chunk_cumsum_bwd": (
        {"dt": HEADS, "A": (H,), "dt_bias": (H,), "seq_idx": (B, L)}
        | {"ddt_out": IN_CHUNKS, "ddA_cumsum": IN_CHUNKS},
        {"ddt": HEADS, "dA": (H,), "ddt_bias": (H,)},
    ),
    "ssd_chunk_state_fwd": ({**STAGE, "B": GROUPS}, {"states": STATES}),
    "ssd_chunk_state_bwd": (
        {**STAGE, "B": GROUPS, "dstates": STATES},
        {"dx": ROW, "dB": GROUPS, "ddt": IN_CHUNKS, "ddA_cumsum": IN_CHUNKS},
    ),
    "ssd_state_passing_fwd": (
        {"states": STATES, "dA_cumsum": IN_CHUNKS, "initial_states": HEAD_STATE}
        | {"seq_idx": (B, L)},
        {"states_in": STATES, "final_states": HEAD_STATE},
    ),
    "ssd_state_passing_bwd": (
        {"states_in": STATES, "dA_cumsum": IN_CHUNKS, "seq_idx": (B, L)}
        | {"dstates_in": STATES, "dfinal_states": HEAD_STATE},
        {"dstates": STATES, "ddA_cumsum": IN_CHUNKS, "dinitial_states": HEAD_STATE},
    ),
    "ssd_bmm_chunk_fwd": ({"C": GROUPS, "B": GROUPS}, {"CB": PRODUCTS}),
    "ssd_bmm_chunk_bwd": (
        {"C": GROUPS, "B": GROUPS, "dCB": PRODUCTS},
        {"dC": GROUPS, "dB": GROUPS},
    ),
    "ssd_chunk_output_fwd": (
        {**STAGE, "CB": PRODUCTS, "C": GROUPS, "states_in": STATES, "D": (H,), "z": ROW},
        {"y": ROW},
    ),
    "ssd_chunk_output_bwd": (
        {**STAGE, "CB": PRODUCTS, "C": GROUPS, "states_in": STATES, "D": (H,), "z": ROW, "dy": ROW},
        {"dCB": PRODUCTS, "dx": ROW, "ddt": IN_CHUNKS, "ddA_cumsum": IN_CHUNKS, "dC": GROUPS}
        | {"dstates_in": STATES, "dD": (H,), "dz": ROW},
    ),
}
ON_GPU = "SSM_TEST_CUDA_HOST" in os.environ
INTEGERS = ("seq_idx", "cache_seqlens", "state_indices")
# Function -> output and the input whose place it may take.
CARRIED = {
    "selective_scan_fwd": ("last_state", "initial_state"),
    "ssd_chunk_scan_fwd": ("final_states", "initial_states"),
    "dw_causal_conv_fwd": ("final_state", "initial_state"),
    "ssd_state_passing_fwd": ("final_states", "initial_states"),
    "fused_layer_norm_fwd": ("residual_out", "residual"),
}
PAIRS = [
    (name, output, other)
    for name, (inputs, outputs) in CALLS.items()
    for output, other in itertools.chain(
        itertools.product(outputs, inputs), itertools.combinations(outputs, 2)
    )
    if CARRIED.get(name) != (output, other)
    # On a GPU this backward computes the states once more and does not look at them.
    and not (ON_GPU and (name, other) == ("ssd_chunk_scan_bwd", "checkpoints"))
]


def arrays(name: str) -> dict[str, np.ndarray]:
    """Draw the arguments of a function; two sequences and skipped steps in `seq_idx`."""
    draw, found = np.random.default_rng(0), {}
    for argument, shape in itertools.chain(*(part.items() for part in CALLS[name])):
        found[argument] = draw.standard_normal(shape).astype("float32")
        if argument in INTEGERS:
            found[argument] = np.zeros(shape, "int32")
    if "seq_idx" in found:
        found["seq_idx"][:, 40:60] = -1
        found["seq_idx"][:, 60:] = 1
    if "state_indices" in found:
        found["state_indices"][:] = [1, 0]
    return found


def test_every_function_is_here():
    functions = {n for n in dir(ssm_kernels) if n.endswith(("_fwd", "_bwd"))}
    assert functions == set(CALLS)


@pytest.mark.parametrize(("name", "output", "other"), PAIRS)
def test_refuses_an_output_in_the_place_of_another_argument(name, output, other):
    call = arrays(name)
    # State indices may not repeat; -1 may.
    bits = -1 if other == "state_indices" else 0
    memory = np.full(max(call[output].size, call[other].size), bits, "int32").view("float32")
    for argument in (output, other):
        shape, dtype = call[argument].shape, call[argument].dtype
        call[argument] = memory.view(dtype)[: call[argument].size].reshape(shape)
    before = {n: array.copy() for n, array in call.items()}
    with pytest.raises(ValueError, match=r"^\w+: \w+ must not share memory with") as caught:
        getattr(ssm_kernels, name)(**call)
    op, _ = name.rsplit("_", 1)
    assert str(caught.value) in {
        f"{op}: {a} must not share memory with {b}, got the same address"
        for a, b in ((output, other), (other, output))
    }
    for argument, array in call.items():
        np.testing.assert_array_equal(array, before[argument])


@pytest.mark.parametrize("name", CARRIED)
def test_is_carried_in_place(name):
    output, place = CARRIED[name]
    call = arrays(name)
    if "seq_idx" in call and name != "ssd_state_passing_fwd":  # which has one state per row
        call["seq_idx"][1, call["seq_idx"][1] >= 0] += 2
        call["state_per_sequence"] = True
        for argument in (output, place):
            call[argument] = np.concatenate([call[argument], 2 * call[argument]])
    initial = call[place].copy()
    getattr(ssm_kernels, name)(**call)
    want = {n: call[n].copy() for n in CALLS[name][1]}
    call[place] = call[output] = initial
    getattr(ssm_kernels, name)(**call)
    for argument, array in want.items():
        np.testing.assert_array_equal(call[argument], array)


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("change", ["type", "strides"])
def test_refuses_what_is_carried_to_other_elements(name, change):
    output, place = CARRIED[name]
    call = arrays(name)
    shape = call[place].shape
    if change == "type":
        halves = call[place].view("float16").reshape(-1)  # of the same strides, in elements
        call[output] = halves[: call[place].size].reshape(shape)
    else:
        call[output] = call[place].reshape(shape[::-1]).T
    assert call[output].shape == shape
    assert call[output].ctypes.data == call[place].ctypes.data
    with pytest.raises(ValueError, match=f"{output} must not share memory with {place}, got"):
        getattr(ssm_kernels, name)(**call)


def test_empty_arrays_share_nothing():
    nothing = np.zeros((0, 4), "float32")
    ssm_kernels.swiglu_fwd(nothing, nothing, y=nothing)
