"""How much memory of freed tensors stays in the process: some after an import, all after a call."""

import platform
import subprocess
import sys

import pytest

from ssm.utils import freed_memory

CODE = """
import resource, sys, torch
from ssm.utils.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)  # 64 MiB: 16384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = faults()
kept = keep_freed_memory()
for _ in range(5):  # blocks that are a little too small are put together first
    faults()
print(kept, by_default, faults())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Linux has the allocator asked for"
)
def test_pages_are_faulted_once():
    child = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    kept, by_default, afterwards = child.stdout.split()
    if kept == "False":
        pytest.skip("the C library has no mallopt")
    assert int(by_default) > 4 * 1000
    assert int(afterwards) < 1000


LAYERS = """
import resource, torch
import ssm.ops

def layer():
    kept = [torch.ones(3 << 18) for _ in range(12)]  # 36 MiB at a time: 9216 pages of 4 KiB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        layer()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_pages_of_a_layer_serve_the_next_one():
    child = subprocess.run([sys.executable, "-c", LAYERS], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    # The first layer has to take its pages, and a few blocks may find no room between others. By
    # default the second takes as many again, and where nothing lies behind them, so do all.
    assert int(child.stdout) < 2 * 9216


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(freed_memory.sys, "platform", "darwin")
    assert freed_memory.keep_freed_memory() is False
