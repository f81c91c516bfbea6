"""What tools/refresh_goldens.py refuses, and, given clones, that it writes what is committed.

Judge: small repositories made here; the committed goldens.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import goldens
from tests.clones import commit_all, git
from tools import refresh_goldens
from tools.goldens import clone, upstream
from tools.goldens.files import Fault, encode

TOOL = Path(refresh_goldens.__file__)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clone of something that looks like upstream."""
    folder = tmp_path / "clone"
    package = folder / "mamba_ssm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    commit_all(folder)
    return folder


def refusal(folder: Path, *options: str) -> str:
    """Run the tool on a clone that it must refuse; return its one sentence."""
    output = folder / "../output"
    run = subprocess.run(
        [sys.executable, TOOL, "--mamba-repo", folder, "--output", output, *options],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert not output.exists()
    assert run.stderr.count("\n") == 1, run.stderr
    return run.stderr


def test_other_commit_is_refused(repository):
    commit = git(repository, "rev-parse", "HEAD")
    sentence = refusal(repository)
    assert f"must be at commit {clone.MAMBA.commit} without --allow-other-commit" in sentence
    assert sentence.endswith(f"got {commit}\n")


def test_other_commit_is_named_where_it_is_allowed(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert clone.check(clone.MAMBA, repository, allow_other_commit=True) == commit
    pinned = dataclasses.replace(clone.MAMBA, commit=commit)
    assert clone.check(pinned, repository) == commit


@pytest.mark.parametrize("file", ["mamba_ssm/__init__.py", "mamba_ssm/added.py"])
def test_changed_clone_is_refused(repository, file):
    (repository / file).write_text("x = 1\n")
    sentence = refusal(repository, "--allow-other-commit")
    assert "--mamba-repo must be a clone without changes, got 1, the first: " in sentence
    assert file in sentence


def test_folder_without_git_is_refused(tmp_path):
    sentence = refusal(tmp_path)
    assert f"must be the root of a git clone of state-spaces/mamba, got {tmp_path}" in sentence


def test_missing_folder_is_refused(tmp_path):
    assert "must be the root of a git clone" in refusal(tmp_path / "absent")


def test_folder_inside_a_clone_is_refused(repository):
    assert "must be the root of a git clone" in refusal(repository / "mamba_ssm")


def test_other_repository_is_refused(repository):
    git(repository, "mv", "mamba_ssm", "something_else")
    git(repository, "commit", "--quiet", "--message", "second")
    sentence = refusal(repository, "--allow-other-commit")
    assert "--mamba-repo must hold mamba_ssm/ of state-spaces/mamba, got" in sentence


def test_what_upstream_imports_and_is_missing_is_named(repository):
    # Upstream imports einops; where that is missing, the refusal reads like this one.
    operators = repository / "mamba_ssm/ops/triton"
    operators.mkdir(parents=True)
    (operators / "layer_norm.py").write_text("import triton\nimport not_installed_anywhere\n")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "second")
    sentence = refusal(repository, "--allow-other-commit")
    assert (
        "not_installed_anywhere must be installed to import state-spaces/mamba on cpu" in sentence
    )


def test_device_without_hardware_is_refused(repository, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Fault, match="--device must be one of this machine, got cuda:0"):
        upstream.refresh(repository / "output", {clone.MAMBA: repository}, "cuda:0", True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "cuda:0"],
        ["--allow-other-commit"],
        ["--conv-repo", "x"],
        ["--rotary-repo", "x"],
        ["--mamba-repo", "x", "--device", "tpu"],
        ["--mamba-repo", "x", "--device", "cuda:0", "--conv-repo", "x"],
    ],
    ids="-".join,
)
def test_options_that_do_not_fit_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        refresh_goldens.parse(arguments)
    assert stop.value.code == 2
    assert "error: --" in capsys.readouterr().err


def test_kernel_that_is_called_on_a_cpu_stops_the_run():
    kernel = clone.Absent("a function")
    assert kernel("decorated") is kernel
    with pytest.raises(Fault, match="a kernel must not be called on cpu"):
        kernel[(1,)]


def test_float64_is_kept_and_nothing_else():
    import torch

    from tools.goldens.upstream_loading import KeepFloat64

    wide, half = torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16)
    with KeepFloat64():
        assert wide.float() is wide
        assert wide.to(torch.float32) is wide
        assert wide.to(dtype=torch.float32) is wide
        assert torch.arange(3, dtype=torch.float32).dtype == torch.float64
        assert half.float().dtype == torch.float32
        assert wide.to(torch.int64).dtype == torch.int64
        assert wide.half().dtype == torch.float16
    assert wide.float().dtype == torch.float32


def test_files_do_not_depend_on_the_order_of_names():
    import torch

    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate("abc")}
    reversed_tensors = dict(reversed(tensors.items()))
    assert encode(tensors, {"x": 1, "y": 2}) == encode(reversed_tensors, {"y": 2, "x": 1})


@pytest.fixture
def clones(request) -> list[str]:
    """Options that name real clones of upstream."""
    options = [repository.option for repository in clone.REPOSITORIES]
    found = {option: request.config.getoption(option) for option in options}
    if None in found.values():
        pytest.skip(f"needs {', '.join(options)}, each with a CLONE")
    return [word for pair in found.items() for word in pair]


@pytest.mark.goldens
def test_refreshing_gives_the_goldens(clones, tmp_path):
    for name in ("first", "second"):
        command = [sys.executable, TOOL, *clones, "--output", tmp_path / name]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    first, second = (tmp_path / name / "upstream/cpu" for name in ("first", "second"))
    files = sorted(p.relative_to(first) for p in first.rglob("*.*"))
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    committed = goldens.FOLDER / "upstream/cpu"
    assert files == sorted(p.relative_to(committed) for p in committed.rglob("*.*"))
    made = json.loads((first / "manifest.json").read_text())["goldens"]
    kept = json.loads((committed / "manifest.json").read_text())["goldens"]
    assert [entry["case"] for entry in made] == [entry["case"] for entry in kept]
    # Another processor may round the last place of a sum differently.
    for entry in made:
        found, want = (load_file(folder / entry["file"]) for folder in (first, committed))
        assert found.keys() == want.keys()
        for name, array in want.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.goldens
def test_goldens_stay_where_their_clone_is_not_given(clones, tmp_path):
    run = [sys.executable, TOOL, "--output", tmp_path]
    subprocess.run([*run, *clones], check=True, capture_output=True)
    place = tmp_path / "upstream/cpu"
    before = {p: p.read_bytes() for p in place.rglob("*.*")}
    subprocess.run([*run, *clones[:2]], check=True, capture_output=True)
    assert {p: p.read_bytes() for p in place.rglob("*.*")} == before
