"""What the CUDA compiler made of the kernels: linked, within their registers, nothing spilled.

Judge: the report of ptxas, which the build keeps beside every object, and the bytes of the
extension module. No GPU is needed.
"""

import re
from pathlib import Path

import pytest
import ssm_kernels
from ssm_kernels import _build

# Beyond these, fewer blocks run at a time than the launch bounds of the kernels promise: 65536
# registers of a multiprocessor over the threads of a block and the blocks that a file asks for.
MOST_REGISTERS = {
    "dw_causal_conv_fwd": 168,
    "dw_causal_conv_bwd": 168,
    "dw_causal_conv_step": 64,
    "fused_layer_norm_fwd": 128,
    "fused_layer_norm_bwd": 128,
    "gated_norm_fwd": 128,
    "gated_norm_bwd": 128,
    "selective_scan_fwd": 128,
    "selective_state_step": 128,
}
ANY_OTHER = 255


def reports() -> dict[str, str]:
    """Return what ptxas said of each CUDA source."""
    if not _build.CUDA.startswith("built"):
        pytest.skip(f"_cuda is {_build.CUDA}")
    folder = Path(ssm_kernels.__file__).parents[2] / "src"
    found = {path.stem: path.read_text() for path in sorted(folder.glob("*.ptxas"))}
    if not found:
        pytest.skip("ssm_kernels is not a build tree: the reports of ptxas are not installed")
    return found


def test_kernels_spill_nothing_and_keep_to_their_registers():
    checked = 0
    for source, report in reports().items():
        pattern = r"properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
        for name, stores, loads in re.findall(pattern, report):
            assert (stores, loads) == ("0", "0"), f"{source}: {name} spills"
            checked += 1
        for used in re.findall(r"Used (\d+) registers", report):
            assert int(used) <= MOST_REGISTERS.get(source, ANY_OTHER), f"{source}: {used} registers"
    assert checked > 0


def test_every_kernel_is_in_the_extension_module():
    names = re.findall(r"properties for (\S+)", "\n".join(reports().values()))
    module = next(Path(ssm_kernels.__file__).parent.glob("_cuda*.so")).read_bytes()
    assert names
    assert not [name for name in names if name.encode() not in module]


def test_module_loads_without_a_driver():
    if not _build.CUDA.startswith("built"):
        pytest.skip(f"_cuda is {_build.CUDA}")
    from ssm_kernels import _cuda

    assert _cuda.architectures
    assert _cuda.devices() or _cuda.fault()
