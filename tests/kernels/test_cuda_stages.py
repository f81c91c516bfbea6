"""What only the CUDA sources of the ssd stages have: tiles of 64, bfloat16, working memory.

test_ssd_stages.py and test_ssd_stages_bwd.py run on these sources as well. Judges: the float64
loops of tests/stages_judge.py and tests/stages_gradient_judge.py.
"""

import os

import numpy as np
import pytest
import ssm_kernels

from tests import ssd_rounding, stages_gradient_judge, stages_judge
from tests.cases import StageCase, make
from tests.stage_kernels import (
    MAIN,
    STAGES,
    backward,
    forward,
    kernel_inputs,
    named,
    output_gradients,
    outputs,
    poisoned,
    run,
    typed,
)
from tests.tolerances import TOLERANCES, assert_close

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)

from tests.kernels.test_cuda_ssd import Bfloat16

WITH_IDS = [stage for stage in STAGES if stage != "ssd_bmm_chunk"]


def assert_right(stage: str, arguments: dict, dtype: str) -> None:
    """Hold outputs and gradients to their judges."""
    found = forward(stage, arguments)
    want = getattr(stages_judge, stage)(**arguments)
    want = want if isinstance(want, tuple) else (want,)
    for (name, value), right in zip(found.items(), want, strict=True):
        assert_close(name, value, right, TOLERANCES[stage, dtype])
    given = output_gradients(stage, arguments)
    want = getattr(stages_gradient_judge, stage)(*given.values(), **arguments)
    for name, value in backward(stage, arguments, given).items():
        assert_close(f"d{name}", value, want[name], TOLERANCES[f"{stage}_bwd", dtype])


def ids_of(kind: str, batch: int, seqlen: int) -> np.ndarray:
    """Sequences that begin at, before and behind the edges of tiles and of chunks."""
    rng, rows = np.random.default_rng(3), []
    for row in range(batch):
        if kind == "edges":
            starts = [0, 63, 64, 65, 128, 150, 151, 192 + row, seqlen - 1]
        elif kind == "many":
            starts = np.cumsum(rng.integers(1, 5, seqlen))
        else:
            starts = [0, 70]
        ids = np.searchsorted(starts, np.arange(seqlen), side="right")
        if kind == "holes":
            # A whole tile, a whole chunk, the first and the last steps.
            for first, end in ((0, 3), (66, 134), (150, 300), (seqlen - 2, seqlen)):
                ids[first + row : end + row] = -1
        rows.append(np.where(rng.random(seqlen) < 0.2, -1, ids) if kind == "many" else ids)
    return np.stack(rows).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["edges", "many", "holes"])
@pytest.mark.parametrize("stage", WITH_IDS)
def test_sequences_in_tiles(stage, kind, dtype):
    seqlen = 331
    arguments = make(StageCase(stage, kind, 2, seqlen, 2, 3, 5, 150, layout="seq_idx"))
    arguments["seq_idx"] = ids_of(kind, 2, seqlen)
    assert_right(stage, typed(arguments, dtype), dtype)


@pytest.mark.parametrize(
    ("seqlen", "heads", "headdim", "dstate", "chunk", "groups"),
    [
        (64, 2, 64, 64, 64, (1, 2)),
        (129, 6, 65, 3, 128, (2, 3)),
        (70, 1, 2, 130, 70, (1, 1)),
        (70, 2, 2, 3, 200, (2, 1)),  # tiles of a chunk without a step
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_whole_and_broken_tiles(stage, seqlen, heads, headdim, dstate, chunk, groups):
    case = StageCase(stage, "tiles", 1, seqlen, heads, headdim, dstate, chunk, *groups)
    for dtype in ("float64", "float32"):
        assert_right(stage, typed(make(case), dtype), dtype)


def rounded(arguments: dict) -> tuple[dict, dict]:
    """Return arguments in bfloat16, and the float32 numbers that they are."""
    held = {
        name: Bfloat16(value) if isinstance(value, np.ndarray) and value.dtype == "f4" else value
        for name, value in arguments.items()
    }
    return held, {n: v.numpy() if isinstance(v, Bfloat16) else v for n, v in held.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16(stage):
    """Every array in bfloat16: what it holds decides, and results are rounded once."""
    held, plain = rounded(typed(make(named(stage, "groups")), "float32"))
    for found, want in zip(
        run(stage, held, out=outputs(stage, plain)), run(stage, plain), strict=True
    ):
        np.testing.assert_array_equal(found, want)
    out = {name: Bfloat16(value) for name, value in outputs(stage, plain).items()}
    for found, want in zip(run(stage, held, out=out), run(stage, plain), strict=True):
        np.testing.assert_array_equal(found.bits, ssd_rounding.bfloat16_bits(want))


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_bfloat16(stage):
    held, plain = rounded(typed(make(named(stage, "groups")), "float32"))
    given, plain_given = rounded(output_gradients(stage, plain))
    inputs, _ = rounded(kernel_inputs(stage, plain))
    main = "states_in" if stage == "ssd_state_passing" else MAIN.get(stage, "x")
    assert isinstance(inputs[main], Bfloat16)
    want = backward(
        stage,
        plain,
        plain_given,
        inputs={n: v.numpy() if isinstance(v, Bfloat16) else v for n, v in inputs.items()},
    )
    out = {name: Bfloat16(value) for name, value in poisoned(stage, plain).items()}
    for name, found in backward(stage, held, given, out=out, inputs=inputs).items():
        np.testing.assert_array_equal(found.bits, ssd_rounding.bfloat16_bits(want[name]), name)


@pytest.mark.parametrize("stage", WITH_IDS)
def test_numbers_that_are_none_skip(stage):
    """Index tensors are not looked at before a launch: any number below 0 skips its step."""
    arguments = typed(make(named(stage, "seq_idx")), "float32")
    odd = arguments["seq_idx"].copy()
    assert (odd == -1).any()
    odd[odd == -1] = -7
    for found, want in zip(
        run(stage, {**arguments, "seq_idx": odd}), run(stage, arguments), strict=True
    ):
        np.testing.assert_array_equal(found, want)


def workspace_of(stage: str, inputs: dict, given: dict) -> int:
    """Return what the backward asks for."""
    ask = getattr(ssm_kernels, f"{stage}_bwd_workspace")
    if stage == "ssd_chunk_cumsum":
        return ask(inputs["dt"], given["dt_out"], given["dA_cumsum"])
    if stage == "ssd_state_passing":
        return ask(inputs["states_in"], inputs["dA_cumsum"])
    return ask(*(inputs.get(name) for name in ("CB", "x", "dt", "C", "D", "z")))


@pytest.mark.parametrize("stage", ["ssd_chunk_cumsum", "ssd_state_passing", "ssd_chunk_output"])
def test_workspace_is_the_callers(stage):
    arguments = typed(make(named(stage, "groups")), "float32")
    given, inputs = output_gradients(stage, arguments), kernel_inputs(stage, arguments)
    size = workspace_of(stage, inputs, given)
    assert size > 0
    memory = np.full(size + 16, 0xFF, np.uint8)
    start = -memory.ctypes.data % 16
    want = backward(stage, arguments, given)
    held = {**inputs, "workspace": memory[start : start + size]}
    for name, value in backward(stage, arguments, given, inputs=held).items():
        np.testing.assert_array_equal(value, want[name], name)
    assert (memory[:start] == 0xFF).all()
    assert (memory[start + size :] == 0xFF).all()
    held["workspace"] = memory[start : start + size - 8]
    with pytest.raises(ValueError, match=rf"{stage}: workspace must have at least {size} bytes"):
        backward(stage, arguments, given, inputs=held)
