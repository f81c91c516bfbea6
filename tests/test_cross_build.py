"""A build for a processor that this machine does not have: configured here, not compiled.

Judge: the targets that Meson lists. The compiler is that of this machine; nothing of it runs.
"""

import json
import shutil
import subprocess
import sys

import pytest

from tools.checkout import ROOT

CROSS_FILE = """
[binaries]
cpp = '{compiler}'
ar = 'ar'
python = '{python}'
exe_wrapper = 'true'

[host_machine]
system = 'linux'
cpu_family = 'aarch64'
cpu = 'aarch64'
endian = 'little'
"""


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> set[str]:
    """Return the names of what a build for 64-bit Arm consists of."""
    meson, compiler = shutil.which("meson"), shutil.which("c++") or shutil.which("g++")
    if not meson or not compiler:
        pytest.skip("needs meson and a C++ compiler on PATH")
    folder = tmp_path_factory.mktemp("cross")
    (folder / "arm.ini").write_text(CROSS_FILE.format(compiler=compiler, python=sys.executable))
    setup = [meson, "setup", str(folder / "build"), str(ROOT / "packages/ssm-kernels")]
    setup += ["--cross-file", str(folder / "arm.ini"), "-Dcuda=disabled", "-Dtests=false"]
    done = subprocess.run(setup, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    introspect = [meson, "introspect", "--targets", str(folder / "build")]
    listed = subprocess.run(introspect, capture_output=True, text=True, check=True).stdout
    return {target["name"] for target in json.loads(listed)}


def test_one_instruction_set_is_linked_as_it_is(targets):
    """Sealing would take the linker of this machine for the objects of another one."""
    assert {name for name in targets if name.startswith("ssm_cpu")} == {"ssm_cpu_baseline"}


def test_module_of_another_machine_is_not_imported(targets):
    assert any(name.startswith("_cpu.") for name in targets)
    assert "_cpu.pyi" not in targets
