"""Threads that do not come: a limit of OpenMP, or a call from another parallel region.

Judge: the same call on one thread, by the tests of the operators themselves.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ssm_kernels


@pytest.mark.parametrize("limit", [1, 2])
def test_fewer_threads_than_asked_for(limit):
    if not ssm_kernels.info()["openmp"]:
        pytest.skip("built without OpenMP")
    folder = Path(__file__).parent
    files = [path for path in folder.glob("test_*.py") if "test_threads_agree" in path.read_text()]
    files.remove(Path(__file__))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    child = subprocess.run(
        [*command, "-k", "test_threads_agree and (float32 or not float)", *files],
        env={**os.environ, "OMP_THREAD_LIMIT": str(limit), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
