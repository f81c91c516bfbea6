"""Seal the objects of one instruction set.

Usage: seal_isa.py LD OBJCOPY ISA ARCHIVE OUTPUT

Joins an archive into one object and makes every symbol local that does not belong to
ssm::cpu::<ISA>. Without this an inline function compiled with AVX-512 could be the copy that the
linker keeps for the baseline path: an illegal instruction on an older CPU, which no test on a newer
one would see.
"""

import subprocess
import sys


def own_symbols(isa: str) -> list[str]:
    """Return the patterns that may stay global: the namespace, and the DW.ref of exceptions."""
    space = f"3ssm3cpu{len(isa)}{isa}"
    return [f"_ZN{space}*", f"_ZNK{space}*", f"_Z*TI*N{space}*", "DW.ref.*"]


def main(ld: str, objcopy: str, isa: str, archive: str, output: str) -> None:
    """Write the sealed object."""
    # Without COMDAT groups: the final link would drop a group that another object carries as well,
    # and with it the local symbols that this object still calls.
    subprocess.run(
        [ld, "-r", "--force-group-allocation", "--whole-archive", archive, "-o", output], check=True
    )
    keep = [f"--keep-global-symbol={pattern}" for pattern in own_symbols(isa)]
    subprocess.run([objcopy, "--wildcard", *keep, output], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
