"""The operator grid holds, and each of its rules catches what it is there for.

Judge: the rules of CONTRIBUTING.md, broken one by one in a small copy of the tree.
"""

import re
from pathlib import Path

import pytest

from tools import grid

OP = "selective_scan"
CPU = f"{grid.KERNELS}/src/cpu"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The smallest tree that breaks no rule."""
    for op, columns in grid.OPERATORS.items():
        for column in columns - {"golden"}:
            write(tmp_path / grid.CELLS[column].format(op).replace("[part]", ""), "x = 1\n")
        if "golden" in columns:
            write(tmp_path / grid.CELLS["golden"].format(op) / "tiny.safetensors", "x\n")
    for folder, helpers in grid.HELPERS.items():
        for name in helpers:
            write(tmp_path / folder / f"{name}.h", "// vector, torch/ and nanobind in a comment\n")
    return tmp_path


def test_repository_keeps_the_rules(capsys):
    status = grid.main(Path(grid.__file__).resolve().parents[1])
    assert status == 0, capsys.readouterr().out


def test_build_has_the_same_operators():
    build = Path(grid.__file__).resolve().parents[1] / grid.KERNELS / "meson.build"
    ops = re.search(r"^ops = \[(.*?)\]", build.read_text(), re.MULTILINE | re.DOTALL).group(1)
    compiled = [op for op, columns in grid.OPERATORS.items() if "cpu" in columns]
    assert re.findall(r"'(\w+)'", ops) == compiled


def test_smallest_tree_is_accepted(tree, capsys):
    assert grid.main(tree) == 0, capsys.readouterr().out


def test_forward_and_backward_files_are_one_cell(tree, capsys):
    (tree / f"{CPU}/{OP}.cpp").rename(tree / f"{CPU}/{OP}_fwd.cpp")
    write(tree / f"{CPU}/{OP}_bwd.cpp", "int y;\n")
    assert grid.main(tree) == 0, capsys.readouterr().out


def test_shared_header_of_an_operator_is_accepted(tree, capsys):
    write(tree / f"{CPU}/{OP}_tile.h", "struct Tile;\n")
    assert grid.main(tree) == 0, capsys.readouterr().out
    (tree / f"{CPU}/{OP}_tile.h").rename(tree / f"{CPU}/{OP}_tile.cpp")
    assert grid.main(tree) == 1


@pytest.mark.parametrize(
    ("op", "column"), [(op, c) for op, columns in grid.OPERATORS.items() for c in sorted(columns)]
)
def test_rejects_missing_cell(tree, capsys, op, column):
    path = tree / grid.CELLS[column].format(op).replace("[part]", "")
    if column == "golden":
        (path / "tiny.safetensors").unlink()
    else:
        path.unlink()
    assert grid.main(tree) == 1
    assert f"missing cell ({column} of {op})" in capsys.readouterr().out


@pytest.mark.parametrize("folder", sorted(grid.HELPERS))
@pytest.mark.parametrize("name", [f"{OP}_v2", f"{OP}_avx2", "helpers"])
def test_rejects_foreign_name(tree, capsys, folder, name):
    suffix = ".md" if folder == "docs/ops" else ".cpp"
    write(tree / folder / (name + suffix), "x\n")
    assert grid.main(tree) == 1
    assert f"{folder}/{name}{suffix}: not an operator name" in capsys.readouterr().out


# Place -> one line that it may not contain.
SPOILED = {
    f"{grid.KERNELS}/include/ssm/{OP}.h": "#include <nanobind/nanobind.h>",
    f"{grid.KERNELS}/src/op/{OP}.cpp": "#include <immintrin.h>",
    f"{CPU}/{OP}.cpp": "#include <vector>",
    f"{CPU}/simd.h": "#pragma omp parallel for",
    f"{CPU}/parallel.h": "omp_set_num_threads(2);",
    f"{grid.KERNELS}/src/cuda/{OP}.cu": "#include <omp.h>",
    f"{grid.KERNELS}/src/cuda/launch.h": "#include <cutlass/cutlass.h>",
    f"{grid.KERNELS}/src/bind/{OP}.cpp": "#include <torch/extension.h>",
    f"{grid.KERNELS}/python/ssm_kernels/__init__.py": "    import torch",
    f"tests/kernels/test_{OP}.py": "from torch import nn",
    f"{grid.REFERENCE}/{OP}.py": "import ssm_kernels",
    f"{grid.MODELS}/modules/mamba1.py": "from ssm.ops.compiled import selective_scan",
    f"{grid.MODELS}/models/lm.py": "from ssm.ops.python import reference",
    f"{grid.MODELS}/utils/__init__.py": "from ssm.utils import dispatch",
}


def test_every_word_rule_is_spoiled_once():
    rules = {*grid.FORBIDDEN, *(folder for folder, _ in grid.ONLY_IN.values())}
    assert not {r for r in rules if not any(p == r or p.startswith(f"{r}/") for p in SPOILED)}


@pytest.mark.parametrize("place", sorted(SPOILED))
def test_rejects_forbidden_word(tree, capsys, place):
    path = tree / place
    before = path.read_text() if path.exists() else ""
    write(path, before + SPOILED[place] + "\n")
    assert grid.main(tree) == 1
    assert f"{place}: may not contain" in capsys.readouterr().out


def test_allows_the_word_where_it_belongs(tree, capsys):
    write(tree / f"{CPU}/parallel.h", "#pragma omp parallel for\n")
    write(tree / f"{CPU}/{OP}.cpp", "#pragma omp simd\n")
    assert grid.main(tree) == 0, capsys.readouterr().out


def test_rejects_long_file(tree, capsys):
    write(tree / "tools/bench.py", "x = 1\n" * grid.LINE_LIMIT)
    assert grid.main(tree) == 0, capsys.readouterr().out
    write(tree / "tools/bench.py", "x = 1\n" * (grid.LINE_LIMIT + 1))
    assert grid.main(tree) == 1
    assert "tools/bench.py: 601 lines, the limit is 600" in capsys.readouterr().out
