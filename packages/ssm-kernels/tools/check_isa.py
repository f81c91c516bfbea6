"""Prove that the sealed objects of the instruction sets cannot mix.

Usage: check_isa.py OBJECT...

Fails on a global, weak or unique symbol outside the object's own namespace (the linker would merge
it with another object's copy), on a missing namespace, and on registers that the instruction set
does not have.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

# Registers that must not occur: baseline code runs on every x86-64, avx2 code without AVX-512.
FOREIGN_REGISTERS = {"baseline": r"%[yz]mm", "avx2": r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|\{%k"}


def output_of(*command: str) -> str:
    """Run a program and return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbol_faults(isa: str, listing: str) -> list[str]:
    """Return one sentence for each symbol of an `nm -P` listing that breaks the rule."""
    own = re.compile(rf"_ZN?K?3ssm3cpu{len(isa)}{isa}(?=\d|[A-Z])|DW\.ref\.")
    faults, mine = [], 0
    for line in listing.splitlines():
        name, kind = line.split()[:2]
        is_local = kind.islower() and kind not in "uvw"
        # An undefined reference, weak (w) or not, defines nothing that could be merged.
        if is_local or kind in "Uw":
            continue
        if own.match(name):
            mine += 1
        else:
            faults.append(f"{isa}: symbol {name} ({kind}) must be local")
    return faults if mine else [*faults, f"{isa}: no symbol of namespace ssm::cpu::{isa}"]


def code_faults(isa: str, assembly: str) -> list[str]:
    """Return a sentence when a disassembly uses registers foreign to the instruction set."""
    pattern = FOREIGN_REGISTERS.get(isa)
    found = re.search(pattern, assembly) if pattern else None
    return [f"{isa}: the code uses {found.group(0)}"] if found else []


def main(paths: list[str]) -> int:
    """Check every object; return the exit status."""
    faults = []
    for path in paths:
        isa = Path(path).stem.removeprefix("ssm_cpu_")
        faults += symbol_faults(isa, output_of("nm", "-P", path))
        if shutil.which("objdump") and isa in FOREIGN_REGISTERS:
            faults += code_faults(isa, output_of("objdump", "-d", "--no-show-raw-insn", path))
    print(*faults, sep="\n")
    print(f"{len(paths)} objects, {len(faults)} faults")
    return 1 if faults or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
