"""ssm.compat has upstream's interface, and its functions give upstream's results.

Judge: goldens/upstream, made by upstream's own code; see goldens/README.md.
"""

import importlib
import json

import pytest
import torch

from ssm.utils import dispatch
from tests import golden_cases, goldens
from tests.upstream.judging import RUNS, compare, device_of, placed, tolerance_of
from tools.goldens import operators
from tools.goldens.upstream_loading import signature

JUDGES = [
    pytest.param(made, golden, id=f"{made.folder.name}-{golden}")
    for made in goldens.upstream()
    for golden in golden_cases.COMPAT
]
NAMES = [f"{module}.{name}" for module, names in golden_cases.SIGNATURES.items() for name in names]


def ours(name: str):
    """Return what ssm.compat has under `<module>.<name>`."""
    module, _, name = name.partition(".")
    return getattr(importlib.import_module(f"ssm.compat.{module}"), name)


@pytest.mark.goldens
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize(("made", "golden"), JUDGES)
def test_matches_upstream(made, golden, backend, dtype):
    device = device_of(backend)
    kept, kind = made.read(golden), made.folder.name
    arguments = placed(kept.arguments, dtype, device)

    def outputs_of(arguments: dict) -> dict:
        found = ours(golden.ours)(**arguments)
        found = found if isinstance(found, tuple) else (found,)
        assert len(found) == len(kept.outputs)
        return {str(i): tensor for i, tensor in enumerate(found)}

    with dispatch.use_backend(backend):
        with torch.no_grad():
            found = outputs_of(arguments)
        tolerance = tolerance_of(kind, "upstream", dtype)
        compare(golden.ours, found, kept.outputs, tolerance, scaled=True)
        weights = placed(kept.weights, dtype, device)
        found = operators.gradients(outputs_of, arguments, weights)
    assert set(found) == set(kept.gradients)
    tolerance = tolerance_of(kind, "upstream_bwd", dtype)
    compare(f"{golden.ours} gradient of", found, kept.gradients, tolerance, scaled=True)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_upstreams_in_order(name):
    path = goldens.FOLDER / "upstream/cpu/manifest.json"
    theirs = json.loads(path.read_text(encoding="utf-8"))["signatures"][name]
    # What is ours alone comes behind what upstream has; a default may be ours alone too.
    found = signature(ours(name))[: len(theirs)]
    assert len(found) == len(theirs)
    for got, want in zip(found, theirs, strict=True):
        assert want in (got, got.partition("=")[0])
