"""What the CUDA compiler made of the kernels: linked, within their registers, nothing spilled.

Judge: the report of ptxas, which the build keeps beside every object, and the bytes of the
extension module. No GPU is needed.
"""

import collections
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import ssm_kernels

from tools.checkout import ROOT

CUDA = ssm_kernels.info()["cuda"]

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
    "ssd_chunk_scan_hopper": 168,
}
ANY_OTHER = 255
# Kernels that ask for other numbers of blocks than the rest of their file: a part of the name.
MOST_OF_KERNEL = {("ssd_chunk_scan_bwd", "SsdStatesIfN"): 168}  # of elements of 16 bits
# There, fewer blocks are asked for where registers would not do for as many (kBeforeHopper).
BEFORE_HOPPER = ("sm_80",)
MOST_BEFORE_HOPPER = {"selective_scan_fwd": 255}
# Kernels that multiply matrices: how their names begin, behind the number of their letters.
MULTIPLYING = {
    "ssd_chunk_scan_fwd": r"\dForward",
    "ssd_chunk_scan_bwd": r"\d(SsdStates|SsdDifferentiate)",
    "ssd_stages_fwd": r"\dChunk(States|Products|Outputs)",
    "ssd_stages_bwd": r"\dDifferentiate(Add|Factor|Gates|Pairs|Inputs|Entering|Reading)",
}
# Operands that are made on the way to shared memory are not copied there.
MAKING = ("ssd_stages_fwd", "ssd_stages_bwd")
# All but device.cu hold kernels.
SOURCES = sorted(
    {path.stem for path in (ROOT / "packages/ssm-kernels/src/cuda").glob("*.cu")} - {"device"}
)


def reports() -> dict[str, str]:
    """Return what ptxas said of each CUDA source."""
    if not CUDA.startswith("built"):
        pytest.skip(f"_cuda is {CUDA}")
    folder = Path(ssm_kernels.__file__).parents[2] / "src"
    found = {path.stem: path.read_text() for path in sorted(folder.glob("*.ptxas"))}
    if not found:
        pytest.skip("ssm_kernels is not a build tree: the reports of ptxas are not installed")
    return found


def kernels_of(report: str) -> list[tuple[str, str, list[str], int]]:
    """Return architecture, name, bytes of local memory and registers of every kernel in a report.

    Bytes of the frame, stored by spills and loaded by them.
    """
    found = []
    for arch, text in re.findall(r"for '(\w+)'\n(.*?registers)", report, re.DOTALL):
        name = re.search(r"properties for (\S+)", text).group(1)
        local = re.findall(r"(\d+) bytes (?:stack frame|spill)", text)
        found.append((arch, name, local, int(re.search(r"Used (\d+) registers", text).group(1))))
    return found


def test_kernels_spill_nothing_and_keep_to_their_registers():
    checked = set()
    for source, report in reports().items():
        for arch, name, local, used in kernels_of(report):
            most = MOST_REGISTERS.get(source, ANY_OTHER)
            if arch in BEFORE_HOPPER:
                most = MOST_BEFORE_HOPPER.get(source, most)
            for (file, part), fewer in MOST_OF_KERNEL.items():
                most = fewer if file == source and part in name else most
            assert local == ["0", "0", "0"], f"{source}: {name} has local memory on {arch}: {local}"
            assert used <= most, f"{source}: {name} has {used} registers on {arch}"
            checked.add((source, arch))
    kernels = {source for source, report in reports().items() if "properties for" in report}
    assert checked == {(source, arch) for source in kernels for arch, _ in architectures("sm")}


def architectures(kind: str) -> list[tuple[str, int]]:
    """Return name and number of the architectures that the build says it is for."""
    found = re.findall(rf"\b({kind}_(\d+)a?)\b", CUDA)
    return [(name, int(number)) for name, number in found]


def images_of(module: bytes) -> list[tuple[int, int]]:
    """Return kind (1 PTX, 2 machine code) and architecture of all code for GPUs in a module."""
    found, magic = [], struct.pack("<I", 0xBA55ED50)
    at = module.find(magic)
    while at >= 0:
        version, header, size = struct.unpack_from("<HHQ", module, at + 4)
        at += header if version == 1 else 4
        end = at + size if version == 1 else at
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", module, at)
            found.append((kind, *struct.unpack_from("<I", module, at + 28)))
            at += header + size
        at = module.find(magic, at)
    return found


# What instructions the kernels that multiply matrices are made of, with tensor cores: products,
# their operands from shared memory, and copies to it.
TENSOR = ("HMMA", "LDSM", "LDGSTS")


def instructions(source: str) -> dict[tuple[str, str], str]:
    """Return the machine code of the kernels of a source, by architecture and name."""
    found = shutil.which("cuobjdump")
    if found is None:
        pytest.skip("no cuobjdump on PATH: the machine code cannot be read")
    path = Path(ssm_kernels.__file__).parents[2] / f"src/{source}.cu.o"
    code = subprocess.run([found, "-sass", path], capture_output=True, text=True, check=True)
    kernels = {}
    for image in re.split(r"^Fatbin elf code:", code.stdout, flags=re.M)[1:]:
        arch = re.search(r"^arch = (\w+)", image, re.M).group(1)
        parts = re.split(r"Function : (\S+)", image)
        kernels |= {(arch, n): code for n, code in zip(parts[1::2], parts[2::2], strict=True)}
    return kernels


@pytest.fixture(scope="module", params=SOURCES)
def code(request) -> tuple[str, dict[tuple[str, str], str]]:
    """Return the name of a source and what instructions() finds in it."""
    if request.param not in reports():
        pytest.skip(f"{request.param} is not built")
    return request.param, instructions(request.param)


def test_machine_code_touches_no_local_memory(code):
    source, kernels = code
    assert {arch for arch, _ in kernels} == {arch for arch, _ in architectures("sm")}
    for (arch, name), lines in kernels.items():
        assert not re.search(r"\b(LDL|STL)\b", lines), f"{source}: {name} on {arch}"


def test_matrices_are_multiplied_by_tensor_cores(code):
    source, found = code
    if source not in MULTIPLYING:
        assert not any(re.search(r"\bHMMA\b", lines) for lines in found.values())
        return
    kernels = {at: lines for at, lines in found.items() if re.search(MULTIPLYING[source], at[1])}
    assert {arch for arch, _ in kernels} == {arch for arch, _ in architectures("sm")}
    for (arch, name), lines in kernels.items():
        # Elements of 16 bits come as they lie, float32 without ldmatrix.
        is_half = "Bf16" in name or "F16" in name
        for word in TENSOR if is_half else ("HMMA", "LDGSTS"):
            used = re.search(rf"\b{word}\b", lines) is not None
            wanted = word != "HMMA" or "on tensor cores" in CUDA
            wanted = wanted and not (word == "LDGSTS" and source in MAKING)
            what = "is missing" if wanted else "is there"
            assert used == wanted, f"{name} on {arch}: {word} {what}"


def test_warpgroups_of_hopper_multiply_beside_each_other(code):
    source, found = code
    for (arch, name), lines in found.items():
        is_for_them = arch == "sm_90a" and "ForwardOnHopper" in name
        wanted = is_for_them and "on tensor cores" in CUDA
        # Products, their operands from and to shared memory, and copies to it.
        for word in ("HGMMA", "LDSM", "STSM", "LDGSTS") if wanted else ("HGMMA",):
            used = re.search(rf"\b{word}\b", lines) is not None
            assert used == wanted, f"{source}: {name} on {arch}: {word}"
    # ptxas says so where a product has to wait for the one before.
    assert "serialized" not in reports()[source]


@pytest.mark.parametrize("source", SOURCES)
def test_host_code_calls_no_code_of_the_device(source):
    """Where it does, nvcc says nothing, and puts a call of exit in place of the function."""
    if source not in reports():
        pytest.skip(f"{source} is not built")
    path = Path(ssm_kernels.__file__).parents[2] / f"src/{source}.cu.o"
    wanted = subprocess.run(["nm", "-u", path], capture_output=True, text=True, check=True)
    names = wanted.stdout.split()
    assert any("LaunchKernel" in name for name in names)
    assert "exit" not in names


def test_every_kernel_is_in_the_extension_module():
    names = re.findall(r"properties for (\S+)", "\n".join(reports().values()))
    module = next(Path(ssm_kernels.__file__).parent.glob("_cuda*.so")).read_bytes()
    assert names
    assert not [name for name in names if name.encode() not in module]
    counts = collections.Counter(images_of(module))
    wanted = [(2, n) for _, n in architectures("sm")] + [
        (1, n) for _, n in architectures("compute")
    ]
    assert set(counts) == set(wanted)
    assert len(set(counts.values())) == 1, "an architecture lacks a source"
    assert counts[wanted[0]] >= len(reports())


def test_module_knows_the_gpus_that_it_runs_on():
    if not CUDA.startswith("built"):
        pytest.skip(f"_cuda is {CUDA}")
    from ssm_kernels import _cuda

    wanted = set()
    for major in range(5, 14):
        for minor in range(10):
            number = 10 * major + minor
            of_this = any(n == number for _, n in architectures("sm"))
            of_generation = any(
                n // 10 == major and n <= number and not name.endswith("a")
                for name, n in architectures("sm")
            )
            translated = any(n <= number for _, n in architectures("compute"))
            if of_this or of_generation or translated:
                wanted.add((major, minor))
            assert _cuda.runs_on(major, minor) == ((major, minor) in wanted), (major, minor)
    assert wanted
    assert not _cuda.runs_on(5, 0)
    # No such GPU: the launch has more to say.
    assert _cuda.architecture_fault(1000) == ""


def test_module_loads_without_a_driver():
    if not CUDA.startswith("built"):
        pytest.skip(f"_cuda is {CUDA}")
    from ssm_kernels import _cuda

    assert _cuda.architectures
    assert _cuda.devices() or _cuda.fault()
