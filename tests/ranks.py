"""Run cases in several processes that form a group, and keep what each of them found.

One spawn serves many cases, as importing PyTorch costs more than any of them. Processes are
spawned, not forked: OpenMP's threads do not survive a fork.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240


def run_cases(modules: list[str], ranks: int) -> dict[str, str]:
    """Run the cases of modules: their functions ``case_<name>(group)``.

    Args:
        modules: dotted names; ``RANKS`` in one says for which numbers of ranks a case is meant, by
            name, 2 where it says nothing.
        ranks: number of processes.

    Returns:
        "<module>.<name>" -> "" or the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # No OpenMP thread spins while another process wants its core.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
        command = [sys.executable, "-m", "tests.ranks", ",".join(modules), str(ranks), folder]
        processes = [
            subprocess.Popen(
                [*command, str(rank)],
                env=env,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = []
        try:
            for process in processes:
                outputs.append(process.communicate(timeout=SECONDS)[0])
        finally:
            for process in processes:
                process.kill()
        found = {}
        for rank, output in enumerate(outputs):
            text = Path(folder, f"result{rank}").read_text() if outputs else ""
            for line in text.split("\x1e")[:-1]:
                name, _, message = line.partition("\x1f")
                found[name] = found.get(name) or message
            for name in cases_of(modules, ranks):
                if name not in found:
                    found[name] = f"rank {rank} did not get here:\n{output}"
    return found


def cases_of(modules: list[str], ranks: int) -> list[str]:
    """Return the names of the cases for a number of ranks."""
    names = []
    for module in modules:
        found = importlib.import_module(module)
        wanted = getattr(found, "RANKS", {})
        for function in vars(found):
            name = function.removeprefix("case_")
            if name != function and ranks in wanted.get(name, (2,)):
                names.append(f"{module}.{name}")
    return names


def main(modules: str, ranks: str, folder: str, rank: str) -> None:
    """Run the cases as one rank; stop at the first that fails, as the others will wait."""
    torch.set_num_threads(1)
    tempfile.tempdir = folder  # so that what a case leaves goes with it
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=int(ranks),
        timeout=timedelta(seconds=60),
    )
    with open(Path(folder, f"result{rank}"), "w") as file:
        for name in cases_of(modules.split(","), int(ranks)):
            message = ""
            torch.manual_seed(0)
            try:
                module, _, function = name.rpartition(".")
                getattr(importlib.import_module(module), f"case_{function}")(dist.group.WORLD)
            except BaseException:
                message = f"rank {rank}: {traceback.format_exc()}"
            file.write(f"{name}\x1f{message}\x1e")
            file.flush()
            if message:
                os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
