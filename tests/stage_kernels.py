"""Calls of the raw kernels of the ssd stages, forward and backward, into arrays full of NaN."""

import math

import numpy as np
import ssm_kernels

from tests import judge
from tests.cases import CASES, SsdCase, StageCase, make

STAGES = (
    "ssd_chunk_cumsum",
    "ssd_chunk_state",
    "ssd_state_passing",
    "ssd_bmm_chunk",
    "ssd_chunk_output",
)
MAIN = {"ssd_chunk_cumsum": "dt", "ssd_state_passing": "states", "ssd_bmm_chunk": "C"}
INPUTS = {
    "ssd_chunk_cumsum": ("dt", "A", "dt_bias"),
    "ssd_chunk_state": ("x", "B", "dt", "dA_cumsum"),
    "ssd_state_passing": ("states", "dA_cumsum", "initial_states"),
    "ssd_bmm_chunk": ("C", "B"),
    "ssd_chunk_output": ("CB", "x", "dt", "dA_cumsum", "C", "states_in", "D", "z"),
}
# Sizes of which every block of the kernels has more than one, and a last one that is not full.
BLOCKS = {
    "ssd_chunk_cumsum": StageCase("ssd_chunk_cumsum", "blocks", 1, 205, 35, 1, 1, 130),
    "ssd_chunk_state": StageCase("ssd_chunk_state", "blocks", 1, 205, 2, 67, 131, 150),
    "ssd_state_passing": StageCase(
        "ssd_state_passing", "blocks", 1, 17, 1, 3, 4103, 4, layout="seq_idx"
    ),
    "ssd_bmm_chunk": StageCase("ssd_bmm_chunk", "blocks", 1, 205, 1, 1, 133, 150),
    "ssd_chunk_output": StageCase(
        "ssd_chunk_output", "blocks", 1, 205, 1, 131, 133, 150, skip="channel"
    ),
}


def named(stage: str, name: str) -> StageCase:
    return next(case for case in CASES[stage] if case.name == name)


def whole_and_composed(case: SsdCase, chunk_size: int) -> tuple[dict, dict]:
    """Return one problem twice: for ssd_chunk_scan, and for tests.stages.compose.

    Large cases keep their own chunk size. The stages take no states per sequence, so there are
    none.
    """
    if case.name in ("long", "mamba2_130m"):
        chunk_size = case.chunk_size
    arguments = make(case, 3)
    given = {**arguments, "chunk_size": chunk_size}
    meta = given.pop("seq_meta")
    if meta is not None:
        ids, per_sequence, _ = judge.positions(meta, case.batch, case.seqlen)
        if per_sequence:
            given["initial_states"] = arguments["initial_states"] = None
        arguments["seq_meta"], given["seq_idx"] = {"seq_idx": ids}, ids
    return arguments, given


def typed(arguments: dict, dtype: str) -> dict:
    """Return the arguments with their floats in `dtype`."""
    return {
        name: value.astype(dtype)
        if isinstance(value, np.ndarray) and value.dtype == np.float64
        else value
        for name, value in arguments.items()
    }


def outputs(stage: str, arguments: dict) -> dict:
    """Return outputs of the right shapes and dtypes, full of NaN."""
    main = arguments[MAIN.get(stage, "x")]
    shape, dtype = main.shape, "float64" if main.dtype == np.float64 else "float32"
    if stage in ("ssd_chunk_cumsum", "ssd_bmm_chunk"):
        size = arguments["chunk_size"]
        nchunks = math.ceil(shape[1] / size)
    if stage == "ssd_chunk_cumsum":
        shapes = dict.fromkeys(("dt_out", "dA_cumsum"), (shape[0], shape[2], nchunks, size))
    elif stage == "ssd_chunk_state":
        nchunks, dstate = arguments["dt"].shape[2], arguments["B"].shape[3]
        shapes = {"states": (shape[0], nchunks, *shape[2:], dstate)}
    elif stage == "ssd_state_passing":
        shapes = {"states_in": shape, "final_states": (shape[0], *shape[2:])}
    elif stage == "ssd_bmm_chunk":
        groups = math.lcm(shape[2], arguments["B"].shape[2])
        shapes = {"CB": (shape[0], nchunks, groups, size, size)}
    else:
        dtype, shapes = main.dtype, {"y": shape}
    return {name: np.full(shape, np.nan, dtype) for name, shape in shapes.items()}


def strided(array: np.ndarray) -> np.ndarray:
    """Return equal values in another layout: axes in reverse order, a stride of 3, an offset."""
    shape = array.shape[::-1]
    buffer = np.full((*shape[:-1], 3 * shape[-1] + 1), 7, array.dtype)
    view = buffer[..., 1::3].transpose()
    view[...] = array
    return view


def run(stage: str, arguments: dict, num_threads: int = 0, out: dict | None = None) -> list:
    """Call the kernel on poisoned outputs; return them in order."""
    out = outputs(stage, arguments) if out is None else out
    given = {name: value for name, value in arguments.items() if name != "chunk_size"}
    getattr(ssm_kernels, f"{stage}_fwd")(**given, **out, num_threads=num_threads)
    return list(out.values())


def output_gradients(stage: str, arguments: dict, seed: int = 1) -> dict:
    """Return random gradients of the outputs, by the names of the outputs."""
    rng = np.random.default_rng(seed)
    found = outputs(stage, arguments)
    return {name: rng.standard_normal(out.shape).astype(out.dtype) for name, out in found.items()}


def forward(stage: str, arguments: dict) -> dict:
    """Return the outputs."""
    out = outputs(stage, arguments)
    given = {name: value for name, value in arguments.items() if name != "chunk_size"}
    getattr(ssm_kernels, f"{stage}_fwd")(**given, **out)
    return out


def poisoned(stage: str, arguments: dict) -> dict:
    """Return arrays for the gradients, full of NaN, by the names of the inputs."""
    shapes = {n: arguments.get(n) for n in INPUTS[stage] if arguments.get(n) is not None}
    found = {name: np.full_like(value, np.nan) for name, value in shapes.items()}
    if stage == "ssd_state_passing":
        states = arguments["states"]
        kind = "float64" if states.dtype == np.float64 else "float32"
        found.setdefault("initial_states", np.full((len(states), *states.shape[2:]), np.nan, kind))
    return found


def kernel_inputs(stage: str, arguments: dict) -> dict:
    """Return what the backward takes of the arguments, and of the outputs."""
    given = {name: value for name, value in arguments.items() if name != "chunk_size"}
    if stage == "ssd_state_passing":
        given["states_in"] = forward(stage, arguments)["states_in"]
        del given["states"], given["initial_states"]
    return given


def backward(
    stage: str, arguments: dict, given: dict, num_threads: int = 0, out: dict | None = None,
    inputs: dict | None = None,
) -> dict:  # fmt: skip
    """Call the backward on poisoned outputs; return the gradients by the names of the inputs."""
    out = poisoned(stage, arguments) if out is None else out
    inputs = kernel_inputs(stage, arguments) if inputs is None else inputs
    getattr(ssm_kernels, f"{stage}_bwd")(
        **inputs,
        **{f"d{name}": value for name, value in given.items()},
        **{f"d{name}": value for name, value in out.items()},
        num_threads=num_threads,
    )
    return out
