"""tools/dev.py counts every test once, loses no failure, and refuses a bad machine in one sentence.

Judge: reports written by hand.
"""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tools import dev

SUITE = """<testsuites><testsuite>
<testcase classname="a" name="good"/>
<testcase classname="a" name="bad"><failure message="x"/></testcase>
<testcase classname="a" name="broken"><error message="x"/></testcase>
<testcase classname="a" name="gpu"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""
GOOD = '<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>'


def summarise(tmp_path: Path, results: dict[str, str], reports: dict[str, str]):
    log = tmp_path / "testlog.json"
    lines = [json.dumps({"name": f"x - ssm:{n}", "result": r}) for n, r in results.items()]
    log.write_text("\n".join(lines))
    for name, text in reports.items():
        (tmp_path / f"{name}.xml").write_text(text)
    counts, failed, reasons = dev.summarise(log, tmp_path)
    return tuple(counts[k] for k in ("passed", "failed", "skipped")), failed, dict(reasons)


def test_counts_cases_of_suites_and_programs(tmp_path):
    results = {"models": "FAIL", "test_tensor": "OK", "test_vmath_avx512": "SKIP"}
    counts, failed, reasons = summarise(tmp_path, results, {"models": SUITE})
    assert counts == (2, 2, 2)
    assert failed == ["a::bad", "a::broken"]
    assert reasons == {"no CUDA device": 1, "test_vmath_avx512 is not for this machine": 1}


@pytest.mark.parametrize("result", ["FAIL", "TIMEOUT", "ERROR", "INTERRUPT"])
def test_counts_a_suite_that_died(tmp_path, result):
    assert summarise(tmp_path, {"kernels": result}, {})[:2] == ((0, 1, 0), [f"kernels ({result})"])
    # It died after its report was written, as a crash at exit does.
    assert summarise(tmp_path, {"kernels": result}, {"kernels": GOOD})[0] == (1, 1, 0)


def test_counts_nothing_without_a_log(tmp_path):
    counts, failed, _ = dev.summarise(tmp_path / "testlog.json", tmp_path)
    assert (sum(counts.values()), failed) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--python", "/nowhere/python"], "--python must be a working Python 3.10 or later"),
        (["-j1", "kernels", "--python", "/nowhere/python", "docs"], "--python must be a working"),
        (["--python", sys.executable], "a C++ compiler must be on PATH, got none"),
    ],
)
def test_refuses_a_bad_machine(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(dev, "VENV", tmp_path / "venv")
    monkeypatch.setattr(dev, "BUILD", tmp_path / "build")
    monkeypatch.setattr(sys, "argv", ["dev.py", "test", *arguments])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert dev.main() == 1
    output = capsys.readouterr()
    assert output.out == "0 passed, 1 failed, 0 skipped\n"
    errors = output.err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(f"dev.py: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"version": [3, 9, 1]}, "Python must be 3.10 or later, got 3.9.1"),
        ({"headers": "/nowhere/Python.h"}, "the headers of Python 3.11.2 must be installed"),
        ({"venv": False}, "Python 3.11.2 must be able to make virtual environments"),
    ],
)
def test_refuses_an_incomplete_python(tmp_path, monkeypatch, facts, message):
    complete = {"version": [3, 11, 2], "headers": __file__, "venv": True}
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps({**complete, **facts})}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(dev, "compiler_fault", lambda: "")
    with pytest.raises(dev.Fault, match=f"^{message}.*(apt|--python)"):
        dev.check_machine(str(python))


@pytest.mark.parametrize(
    ("banner", "version", "fault"),
    [
        ("Free Software Foundation", "9.4.0", "must be version 11 or later, got 9.4.0"),
        ("Free Software Foundation", "11", ""),
        ("Debian clang version", "14.0.6", "must be version 16 or later, got 14.0.6"),
        ("Apple clang version", "15.0.0", ""),
        ("another compiler", "1", ""),
    ],
)
def test_refuses_an_old_compiler(tmp_path, monkeypatch, banner, version, fault):
    compiler = tmp_path / "a-compiler"
    compiler.write_text(f"#!/bin/sh\n[ $1 = -dumpversion ] && echo {version} || echo {banner}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = dev.compiler_fault()
    assert fault in found
    assert bool(fault) == bool(found)


OLDEST_PYTHON = "3.10"  # of both packages


@pytest.mark.parametrize("text", [text for step in dev.REQUIREMENTS for text in step])
def test_installs_on_the_oldest_python(text):
    """Without a bound pip finds an older version; with one there has to be a marker."""
    wanted = Requirement(text)
    python = {"python_version": OLDEST_PYTHON}
    if wanted.marker is not None and not wanted.marker.evaluate(python):
        return
    try:
        needs = metadata.metadata(wanted.name)["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        pytest.skip(f"{wanted.name} is not installed")
    assert not wanted.specifier or SpecifierSet(needs).contains(OLDEST_PYTHON)


def test_prints_its_commands():
    command = [sys.executable, dev.__file__, "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert all(command in result.stdout for command in dev.COMMANDS)


@pytest.mark.parametrize(
    ("command", "programs", "wanted"),
    [
        (["demo"], [], ["cpu_package"]),
        (["demo"], ["nvidia-smi"], ["all"]),
        (["demo", "--cuda"], ["nvcc"], ["all"]),
        (["build"], [], ["all"]),
        (["test"], [], ["all", "meson-test-prereq"]),
    ],
)
def test_compiles_what_runs(tmp_path, monkeypatch, command, programs, wanted):
    """The demo waits neither for the tests nor, without a GPU, for the CUDA kernels."""
    called = []
    monkeypatch.setattr(dev, "setup", lambda arguments: None)
    monkeypatch.setattr(dev, "setup_cutlass", lambda: "")
    monkeypatch.setattr(dev, "listing", lambda: "")
    monkeypatch.setattr(dev, "VENV", tmp_path / "venv")
    monkeypatch.setattr(dev, "BUILD", tmp_path / "build")
    monkeypatch.setattr(dev, "JUNIT", tmp_path / "build/junit")
    monkeypatch.setattr(dev, "check_machine", lambda python: None)
    monkeypatch.setattr(dev.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(dev, "link", lambda: None)
    monkeypatch.setattr(dev, "call", lambda *words: called.append(words) or 0)
    monkeypatch.setattr(sys, "argv", ["dev.py", *command])
    (tmp_path / "build").mkdir()
    dev.main()
    (compiled,) = [words for words in called if words[0] == "ninja"]
    assert list(compiled[compiled.index("-j") + 2 :]) == wanted


def test_links_the_checkout(tmp_path, monkeypatch):
    site = tmp_path / "venv/lib/python3.11/site-packages"
    for folder in (site, tmp_path / "venv/bin", tmp_path / "build/packages/ssm-kernels/python"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(dev, "VENV", tmp_path / "venv")
    monkeypatch.setattr(dev, "BUILD", tmp_path / "build")
    dev.link()
    first = (site / "ssm-checkout.pth").read_text().splitlines()[0]
    assert Path(first).is_dir()
    (tmp_path / "venv/bin/python").symlink_to("/bin/echo")
    for program, module in dev.PROGRAMS.items():
        command = [str(tmp_path / "venv/bin" / program), "info", "--json"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout == f"-m {module} info --json\n"


@pytest.fixture
def nvcc_beside(tmp_path, monkeypatch):
    """Let .venv have an nvcc, and nothing else be on PATH; return its folder of programs."""
    programs = tmp_path / "venv/bin"
    programs.mkdir(parents=True)
    (programs / "nvcc").touch(0o755)
    monkeypatch.setattr(dev, "VENV", tmp_path / "venv")
    monkeypatch.setenv("PATH", str(tmp_path))
    return programs


def test_disassembler_is_put_beside_nvcc(nvcc_beside, monkeypatch):
    wheel = nvcc_beside.parent / "lib/python3.11/site-packages/nvidia/cu13/bin"
    installed = []

    def install(*wheels):
        installed.extend(wheels)
        wheel.mkdir(parents=True)
        for name in ("cuobjdump", "nvdisasm"):
            (wheel / name).touch(0o755)
        return True

    monkeypatch.setattr(dev, "install_if_possible", install)
    dev.setup_disassembler()
    assert tuple(installed) == dev.DISASSEMBLER
    assert (nvcc_beside / "cuobjdump").resolve() == wheel / "cuobjdump"
    assert (nvcc_beside / "nvdisasm").is_file()
    dev.setup_disassembler()
    assert tuple(installed) == dev.DISASSEMBLER, "installed twice"


def test_goes_on_without_disassembler(nvcc_beside, monkeypatch, capsys):
    monkeypatch.setattr(dev, "install_if_possible", lambda *wheels: False)
    dev.setup_disassembler()
    assert "going on without cuobjdump" in capsys.readouterr().out
    (nvcc_beside / "nvcc").unlink()
    monkeypatch.setattr(dev, "install_if_possible", lambda *wheels: pytest.fail("installed"))
    dev.setup_disassembler()
