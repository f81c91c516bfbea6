"""Which backends are held to upstream's goldens: every instruction set, each in its own process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.upstream.judging import BACKENDS

pytestmark = pytest.mark.goldens
FOLDER = Path(__file__).parent
FILES = [str(FOLDER / f"test_{name}.py") for name in ("operators", "modules", "compat")]


def test_other_instruction_sets_match_upstream():
    if importlib.util.find_spec("ssm_kernels") is None:
        pytest.skip("ssm_kernels is not built")
    import ssm_kernels

    # The best one, or the one that SSM_ISA names, serves the tests of this process.
    others = set(ssm_kernels.available_isas()) - {ssm_kernels.active_isa()}
    for isa in sorted(others):
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--run-goldens", "-k", "cpu-float", *FILES],
            cwd=FOLDER.parents[1],
            env={**os.environ, "SSM_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{isa}:\n{run.stdout[-4000:]}{run.stderr[-2000:]}"
        assert " passed" in run.stdout


def test_cuda_is_compared_where_it_is():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device, so that nothing was compared on one")
    assert "cuda" in BACKENDS
