"""The C++ tests: list them for Meson, or run a test if the machine has the instruction set.

Usage: cpp_tests.py                 prints `<name>` or `<name> isa` for every tests/cpp/test_*.cpp
       cpp_tests.py ISA PROGRAM...  runs PROGRAM, or exits with 77 (skipped) if the CPU lacks ISA
"""

import re
import subprocess
import sys
from pathlib import Path

# Flags of /proc/cpuinfo that stand for x86-64-v3 and x86-64-v4.
NEEDED = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "avx512": {"avx512vl", "avx512dq", "avx512bw"},
}
SKIPPED = 77


def names() -> list[str]:
    """List the tests; ` isa` marks those that include a header of src/cpu."""
    found = []
    for path in sorted((Path(__file__).parent / "cpp").glob("test_*.cpp")):
        per_isa = re.search(r'#include "cpu/', path.read_text())
        found.append(path.stem + (" isa" if per_isa else ""))
    return found


def cpu_flags() -> set[str]:
    """Return the CPU's feature flags as Linux reports them."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^flags\s*:(.*)$", info.read_text() if info.exists() else "", re.M)
    return set(match.group(1).split()) if match else set()


def main(arguments: list[str]) -> int:
    """Run as the usage says; return the exit status."""
    if not arguments:
        print(*names(), sep="\n")
        return 0
    isa, *program = arguments
    missing = NEEDED[isa] - cpu_flags()
    if missing:
        print(f"{Path(program[0]).name}: skipped, this CPU lacks {', '.join(sorted(missing))}")
        return SKIPPED
    return subprocess.run(program).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
