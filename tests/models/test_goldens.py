"""Every backend against goldens/. Judge: the reference in float64, computed once and kept."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ssm.ops
from ssm.utils import dispatch
from tests import goldens
from tests.tensors import tensors
from tests.tolerances import TOLERANCES, assert_close
from tools import refresh_goldens
from tools.goldens import operators

ENTRIES = goldens.manifest()
CALLS = [
    pytest.param(entry, backend, id=f"{entry['op']}-{entry['case']}-{backend}")
    for entry in ENTRIES
    for backend in ("python", "cpu")
    if backend == "python" or entry["op"] in dispatch.COMPILED
]


@pytest.mark.parametrize(("entry", "backend"), CALLS)
def test_matches_golden(entry, backend):
    op = entry["op"]
    # A library that is there and does not load is a failure.
    if backend == "cpu" and importlib.util.find_spec("ssm_kernels") is None:
        pytest.skip("ssm_kernels is not built")
    golden = goldens.read(entry)
    arguments = tensors(golden.arguments, torch.float32)
    function = getattr(ssm.ops, op)
    with dispatch.use_backend(backend):
        with torch.no_grad():
            outputs = operators.call(op, function, arguments)
        for name, want in golden.outputs.items():
            assert_close(f"{op} {name}", outputs[name], want, TOLERANCES[op, "float32"])
        if golden.weights:
            weights = tensors(golden.weights, torch.float32)
            found = operators.gradients(
                lambda leaves: operators.call(op, function, leaves), arguments, weights
            )
            assert set(found) == set(golden.gradients)
            tolerance = TOLERANCES[f"{op}_bwd", "float32"]
            for name, want in golden.gradients.items():
                assert_close(f"{op} gradient of {name}", found[name], want, tolerance)


def test_every_operator_has_goldens():
    assert {entry["op"] for entry in ENTRIES} == set(dispatch.OPERATORS)


def test_manifest_lists_every_file_once():
    listed = sorted(entry["file"] for entry in ENTRIES)
    files = goldens.FOLDER.glob("ops/*/*")
    assert listed == sorted(path.relative_to(goldens.FOLDER).as_posix() for path in files)


def test_goldens_stay_small():
    sizes = [(goldens.FOLDER / entry["file"]).stat().st_size for entry in ENTRIES]
    assert max(sizes) < operators.FILE_LIMIT
    assert sum(sizes) < operators.TOTAL_LIMIT


def test_tampered_file_is_refused(tmp_path):
    entry = ENTRIES[0]
    copy = tmp_path / entry["file"]
    copy.parent.mkdir(parents=True)
    shutil.copy(goldens.FOLDER / entry["file"], copy)
    goldens.read(entry, tmp_path)
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(ValueError, match=r"must have the sha256 .*tools/refresh_goldens\.py"):
        goldens.read(entry, tmp_path)


def test_refreshing_twice_gives_the_same_bytes(tmp_path):
    tool = Path(refresh_goldens.__file__)
    # Two processes at a time: hash seeds and memory layouts of one cannot leak into the other.
    runs = [
        subprocess.Popen([sys.executable, tool, "--output", tmp_path / name], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in ("first", "second")
    ]  # fmt: skip
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    first, second = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in ("first", "second")
    )
    assert first == second
    made = json.loads(first[Path("manifest.json")])["goldens"]
    assert [entry["file"] for entry in made] == [entry["file"] for entry in ENTRIES]
