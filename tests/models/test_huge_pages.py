"""The weights of a loaded model lie in memory for which huge pages were asked."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ssm.utils.huge_pages import prefer_huge_pages
from ssm.utils.safetensors_file import SafetensorsFile

SIZE = 3 << 21  # bytes: at least two whole huge pages


def flags_of(address: int) -> list[str]:
    """Return the flags of the mapping that holds an address."""
    holds = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            holds = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif holds and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:x}")


def has_huge_pages() -> bool:
    return sys.platform.startswith("linux") and prefer_huge_pages(torch.empty(SIZE // 4))


@pytest.mark.skipif(not has_huge_pages(), reason="the system has no huge pages to ask for")
def test_a_loaded_tensor_is_asked_for(tmp_path):
    given = torch.arange(SIZE // 4, dtype=torch.float32)
    save_file({"w": given}, tmp_path / "model.safetensors")
    read = SafetensorsFile(tmp_path / "model.safetensors").read("w")
    assert "hg" in flags_of(read.data_ptr() + SIZE // 2)
    assert torch.equal(read, given)


def test_a_small_tensor_is_left_alone():
    assert not prefer_huge_pages(torch.empty(4))
    assert not prefer_huge_pages(torch.empty(0))
