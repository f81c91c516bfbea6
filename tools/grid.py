#!/usr/bin/env python3
"""Print the operator grid, and fail where the tree breaks its own rules.

Usage: tools/grid.py [root]

One operator is one name in every layer. The grid shows, for each operator, how many lines stand in
each place; below it come the faults: a missing cell, a file whose name is neither an operator nor
one of the folder's few helpers, a word that a folder may not contain, a file that is too long.
"""

import os
import re
import sys
from pathlib import Path

KERNELS = "packages/ssm-kernels"
MODELS = "packages/ssm-models/src/ssm"
REFERENCE = f"{MODELS}/ops/python"

# Column -> where that cell lives; {} is the operator and [part] also allows _fwd and _bwd, and for
# CUDA _hopper: the forward once more for one architecture.
CELLS = {
    "header": f"{KERNELS}/include/ssm/{{}}.h",
    "op": f"{KERNELS}/src/op/{{}}.cpp",
    "cpu": f"{KERNELS}/src/cpu/{{}}[part].cpp",
    "cuda": f"{KERNELS}/src/cuda/{{}}[part].cu",
    "bind": f"{KERNELS}/src/bind/{{}}.cpp",
    "reference": f"{REFERENCE}/{{}}.py",
    "compiled": f"{MODELS}/ops/compiled/{{}}.py",
    "test_kernel": "tests/kernels/test_{}.py",
    "test_op": "tests/models/test_{}.py",
    "golden": "goldens/ops/{}",
    "bench": "tools/bench/{}.py",
    "doc": "docs/ops/{}.md",
}
COMPLETE = set(CELLS) - {"cuda"}

# Operator -> the cells it must have. One that is only specified so far has less.
OPERATORS = {
    "selective_scan": COMPLETE,
    "selective_state_step": COMPLETE,
    "dw_causal_conv": COMPLETE,
    "dw_causal_conv_step": COMPLETE,
    "fused_layer_norm": COMPLETE,
    "ssd_chunk_scan": COMPLETE,
    "ssd_stages": COMPLETE,
    "gated_norm": COMPLETE,
    "swiglu": COMPLETE,
}
# Row that holds several operators -> their names; every other row holds the operator of its name.
SEVERAL = {
    "ssd_stages": (
        "ssd_chunk_cumsum",
        "ssd_chunk_state",
        "ssd_state_passing",
        "ssd_bmm_chunk",
        "ssd_chunk_output",
    ),
}

# Folder of the grid -> the names in it that are not operators.
HELPERS = {
    f"{KERNELS}/include/ssm": {"ssm", "tensor", "device"},
    f"{KERNELS}/src/op": {
        "ceiling",
        "check",
        "cuda_kernels",
        "device",
        "isa",
        "rows",
        "huge_pages",
        "runs",
        "scratch",
        "visit",
        "vmath",
    },
    f"{KERNELS}/src/cpu": {
        "ceiling",
        "element",
        "gate",
        "gemm",
        "kernels",
        "pack",
        "parallel",
        "rows",
        "sequences",
        "simd",
        "step_size",
        "tile",
        "transpose",
        "vmath",
    },
    f"{KERNELS}/src/cuda": {
        "architecture",
        "block",
        "block_host",
        "device",
        "element",
        "host",
        "host_gpu",
        "kernels",
        "launch",
        "norms",
        "numerics",
        "rows",
        "sequences",
        "tile_gemm",
        "warpgroup_gemm",
    },
    f"{KERNELS}/src/bind": {
        "device",
        "dlpack",
        "module_cpu",
        "module_cuda",
        "nanobind_lib",
        "tensor_arg",
    },
    REFERENCE: {"__init__", "arithmetic", "check", "layout", "reference"},
    f"{MODELS}/ops/compiled": {"__init__", "library"},
    "goldens/ops": set(),
    "tools/bench": set(),
    "docs/ops": set(),
}

# <operator>_<noun>.h: what the forward and the backward of one operator share.
SHARED_NOUNS = (
    *(
        "tile",
        "filter",
        "shape",
        "group",
        "output",
        "adjoint",
        "states",
        "gradients",
        "sums",
        "chain",
    ),
)

TORCH = r"^\s*(import|from) torch\b"
PYTHON_IN_CPP = r"nanobind|Python\.h|torch/"
# Folder or file -> text that no source under it may contain, comments apart.
FORBIDDEN = {
    f"{KERNELS}/include": rf"{PYTHON_IN_CPP}|cuda_runtime|immintrin|omp\.h",
    f"{KERNELS}/src/op": rf"{PYTHON_IN_CPP}|immintrin|__global__|cutlass/",
    # A standard container compiled per instruction set is a function that two of them share.
    f"{KERNELS}/src/cpu": rf"{PYTHON_IN_CPP}|cuda_runtime|__global__"
    r"|#include <(vector|string|map|functional|algorithm|iostream|sstream)>",
    f"{KERNELS}/src/cuda": rf"{PYTHON_IN_CPP}|immintrin|omp\.h",
    f"{KERNELS}/src/bind": r"torch/|immintrin|cutlass/|omp\.h",
    f"{KERNELS}/src": r"omp_set_num_threads",
    f"{KERNELS}/python": TORCH,
    "tests/kernels": TORCH,
    REFERENCE: r"ssm_kernels|ops\.compiled|utils\.dispatch",
    f"{MODELS}/modules": r"ssm_kernels|ops\.compiled|ops\.python",
    f"{MODELS}/models": r"ssm_kernels|ops\.compiled|ops\.python",
    # utils is not a layer: dispatch is below the operators, the rest is above the models.
    f"{MODELS}/utils/__init__.py": r"\S",
}
# The same, for all but one file of a folder, or two.
ONLY_IN = {
    f"{KERNELS}/src/cpu/parallel.h": (f"{KERNELS}/src/cpu", r"#pragma omp (?!simd)|omp\.h"),
    f"{KERNELS}/src/cuda/tile_gemm.cuh {KERNELS}/src/cuda/warpgroup_gemm.cuh": (
        f"{KERNELS}/src/cuda",
        r"cutlass/|cute/",
    ),
}

SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh"}
LINE_LIMIT = 600
NOT_OURS = {".git", ".venv", "build", "dist", "third_party", "__pycache__"}


def operators_of(row: str) -> tuple[str, ...]:
    """Return the names of the operators that a row holds."""
    return SEVERAL.get(row, (row,))


def text_of(path: Path) -> str:
    """Read a source without its C++ comments: a comment may name what the code may not."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def sources(root: Path) -> list[Path]:
    """List all sources of the repository in order."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - NOT_OURS)
        found += [Path(folder) / n for n in sorted(names) if Path(n).suffix in SOURCES]
    return found


def lines_of(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def cell(root: Path, column: str, op: str) -> str:
    """Return what the grid shows for one cell: lines, `yes` for a folder, `-` for nothing."""
    place = CELLS[column].format(op)
    if column == "golden":
        return "yes" if any((root / place).glob("*")) else "-"
    parts = ("", "_fwd", "_bwd", "_hopper") if "[part]" in place else ("",)
    paths = [root / place.replace("[part]", part) for part in parts]
    return str(sum(lines_of(p) for p in paths if p.is_file()) or "-")


def grid_faults(root: Path) -> list[str]:
    """Print the grid; return a sentence for each missing cell."""
    faults = []
    print(" " * 21 + "".join(f"{column:>12}" for column in CELLS))
    for op, required in OPERATORS.items():
        row = {column: cell(root, column, op) for column in CELLS}
        print(f"{op:21}" + "".join(f"{value:>12}" for value in row.values()))
        for column in CELLS:
            if column in required and row[column] == "-":
                place = CELLS[column].format(op).replace("[part]", "[_fwd|_bwd]")
                faults.append(f"{place}: missing cell ({column} of {op})")
    return faults


def name_faults(root: Path) -> list[str]:
    """Return a sentence for each file in the grid's folders that has no business there."""
    faults = []
    for folder, helpers in HELPERS.items():
        for path in sorted((root / folder).glob("*")):
            is_cell = path.is_dir() or path.suffix in SOURCES | {".md"}
            if not is_cell or path.name in NOT_OURS or path.stem in helpers:
                continue
            endings = SHARED_NOUNS if path.suffix in {".h", ".cuh"} else ("fwd", "bwd", "hopper")
            if re.sub(rf"_({'|'.join(endings)})$", "", path.stem) not in OPERATORS:
                faults.append(f"{path.relative_to(root)}: not an operator name")
    return faults


def word_faults(root: Path) -> list[str]:
    """Return a sentence for each forbidden word."""
    rules = [(place, (), pattern) for place, pattern in FORBIDDEN.items()]
    rules += [(folder, names.split(), pattern) for names, (folder, pattern) in ONLY_IN.items()]
    faults = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        for place, allowed, pattern in rules:
            if name in allowed or not (name == place or name.startswith(f"{place}/")):
                continue
            found = re.search(pattern, text_of(path), re.MULTILINE)
            if found:
                faults.append(f"{name}: may not contain {found.group(0).strip()!r}")
    return faults


def length_faults(root: Path) -> list[str]:
    """Return a sentence for each file that is too long to read."""
    return [
        f"{path.relative_to(root)}: {lines_of(path)} lines, the limit is {LINE_LIMIT}"
        for path in sources(root)
        if lines_of(path) > LINE_LIMIT
    ]


def main(root: Path) -> int:
    """Print the grid and the faults; return the exit status."""
    faults = grid_faults(root) + name_faults(root) + word_faults(root) + length_faults(root)
    print(*faults, sep="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1])))
