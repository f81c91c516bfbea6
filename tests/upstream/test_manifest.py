"""Upstream's goldens are those of the table, unchanged, and small; else a sentence says what to do.

Judge: the manifests beside them, and tests.golden_cases.
"""

import dataclasses
import json
import shutil

import pytest

from tests import golden_cases, goldens
from tools.goldens import clone, upstream

MADE = goldens.upstream()
OF_ALL = pytest.mark.parametrize("made", MADE, ids=lambda made: made.folder.name)
CASE = golden_cases.MODULES[0]


@pytest.fixture
def copy(tmp_path):
    """The goldens of the CPU with one file, to be spoilt."""
    folder = tmp_path / "upstream/cpu"
    (folder / "modules").mkdir(parents=True)
    source = goldens.FOLDER / "upstream/cpu"
    for name in ("manifest.json", f"{CASE}.safetensors"):
        shutil.copy(source / name, folder / name)
    return folder


def test_there_are_goldens_of_the_cpu():
    assert "cpu" in [made.folder.name for made in MADE]


@OF_ALL
def test_every_case_of_the_table_has_its_golden(made):
    cases = [c for c in golden_cases.ALL if made.folder.name == "cpu" or getattr(c, "cuda", True)]
    for case in cases:
        made.read(case)
    assert [entry["file"] for entry in made.entries.values()] == [f"{c}.safetensors" for c in cases]


@OF_ALL
def test_no_file_is_left_over(made):
    files = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*.safetensors")}
    assert files == set(made.entries)


@OF_ALL
def test_goldens_are_of_the_pinned_commits(made):
    cases = {f"{case}.safetensors": case for case in golden_cases.ALL}
    for file, entry in made.entries.items():
        for repository in upstream.repositories_of(cases[file]):
            commit = entry["upstream"][repository.name]
            is_installed = made.folder.name != "cpu" and repository is not clone.MAMBA
            assert is_installed or commit == repository.commit, file


@OF_ALL
def test_goldens_stay_small(made):
    sizes = [(made.folder / file).stat().st_size for file in made.entries]
    assert max(sizes) < upstream.FILE_LIMIT
    assert sum(sizes) < upstream.TOTAL_LIMIT


def test_names_are_different():
    assert len({str(case) for case in golden_cases.ALL}) == len(golden_cases.ALL)


def test_copy_is_accepted(copy):
    assert goldens.UpstreamGoldens(copy).read(CASE).outputs


def test_tampered_file_is_refused(copy):
    path = copy / f"{CASE}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"must have the sha256 .*, got \w{64}; .*--mamba-repo"):
        goldens.UpstreamGoldens(copy).read(CASE)


def test_missing_file_is_refused(copy):
    (copy / f"{CASE}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must have the sha256 .*, got no file; .*--mamba-repo"):
        goldens.UpstreamGoldens(copy).read(CASE)


def test_golden_of_another_table_is_refused(copy):
    changed = dataclasses.replace(CASE, seqlen=CASE.seqlen + 1)
    with pytest.raises(ValueError, match=r"must be of the case .*seqlen=12.*--mamba-repo"):
        goldens.UpstreamGoldens(copy).read(changed)


def test_case_without_golden_is_refused(copy):
    added = dataclasses.replace(CASE, name="added")
    with pytest.raises(ValueError, match=r"must list modules/added\.safetensors.*--mamba-repo"):
        goldens.UpstreamGoldens(copy).read(added)


def test_refusal_names_the_tool_that_helps(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["generator"] in goldens.REFRESH_UPSTREAM
