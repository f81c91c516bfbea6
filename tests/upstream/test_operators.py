"""Every backend against the operators of the official implementation.

Judge: goldens/upstream, made by upstream's own code; see goldens/README.md.
"""

import pytest
import torch

import ssm.ops
from ssm.utils import dispatch
from tests import golden_cases, goldens
from tests.upstream.judging import RUNS, compare, device_of, placed, tolerance_of
from tools.goldens import operators

pytestmark = pytest.mark.goldens
JUDGES = [
    pytest.param(made, golden, id=f"{made.folder.name}-{golden}")
    for made in goldens.upstream()
    for golden in golden_cases.OPERATORS
    if made.folder.name == "cpu" or golden.cuda
]


def outputs_of(golden, arguments: dict) -> dict:
    """Return our outputs for a golden's arguments."""
    if "B" in arguments and golden.op == "ssd_chunk_output":
        # Upstream's function contains the stage before.
        arguments = dict(arguments)
        product = ssm.ops.ssd_bmm_chunk(
            arguments["C"], arguments.pop("B"), arguments["dt"].shape[-1]
        )
        arguments["CB"] = product
    return operators.call(golden.op, getattr(ssm.ops, golden.op), arguments)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize(("made", "golden"), JUDGES)
def test_matches_upstream(made, golden, backend, dtype):
    device = device_of(backend)
    kept = made.read(golden)
    arguments = placed(kept.arguments, dtype, device)
    kind = made.folder.name
    with dispatch.use_backend(backend):
        with torch.no_grad():
            found = outputs_of(golden, arguments)
        compare(golden.op, found, kept.outputs, tolerance_of(kind, golden.op, dtype))
        if golden.op in operators.IN_PLACE:
            assert not kept.weights
            return
        weights = placed(kept.weights, dtype, device)
        found = operators.gradients(lambda leaves: outputs_of(golden, leaves), arguments, weights)
    assert set(found) == set(kept.gradients)
    tolerance = tolerance_of(kind, f"{golden.op}_bwd", dtype)
    compare(f"{golden.op} gradient of", found, kept.gradients, tolerance)


def test_every_operator_of_upstream_is_judged():
    # Upstream has no operator for the rest: it multiplies gates in its modules, and makes step
    # sizes and their sums inside kernels.
    rest = {"swiglu", "ssd_chunk_cumsum", "ssd_bmm_chunk"}
    judged = {golden.op for golden in golden_cases.OPERATORS}
    assert judged | rest == set(dispatch.OPERATORS)
    assert not judged & rest
