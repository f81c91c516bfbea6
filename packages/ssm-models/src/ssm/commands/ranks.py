"""Several processes for one command: those of torchrun, or some that the command starts."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# While the first rank measures or writes, the others wait; a rank that dies is noticed at once.
PATIENCE = timedelta(days=7)


@contextmanager
def group_of(count: int, work: Callable, *arguments) -> Iterator:
    """Enter a group of processes that talk by gloo.

    Under torchrun these are the processes that it started. Else this process becomes the first
    rank and starts the others, which run ``work(*arguments, group)`` without a word; the threads of
    PyTorch are divided among them.

    Args:
        count: number of ranks.
        work: a function of a module, called on the ranks started here.
        *arguments: of it, picklable.

    Yields:
        The process group; None for one rank.

    Raises:
        ValueError: torchrun has started another number of processes.
        RuntimeError: PyTorch was built without torch.distributed, or a rank does not start.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    started = int(os.environ["WORLD_SIZE"]) if launched else count
    if started != count:
        raise ValueError(
            f"train: context-parallel must be the {started} processes of torchrun, got {count}"
        )
    if count == 1:
        yield None
        return
    if not dist.is_available():
        raise RuntimeError("train: context-parallel must have torch.distributed, got none")
    if launched:
        dist.init_process_group("gloo", timeout=PATIENCE)
        try:
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()
        return
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    spawn = multiprocessing.get_context("spawn")  # OpenMP's threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        others = [
            spawn.Process(
                target=_other, args=(folder, rank, count, share, work, arguments), daemon=True
            )
            for rank in range(1, count)
        ]
        try:
            torch.set_num_threads(share)
            for process in others:
                process.start()
            _await(folder, others)
            _join(folder, 0, count)
            yield dist.group.WORLD
            for process in others:
                process.join()
        finally:
            torch.set_num_threads(threads)
            for process in others:
                if process.is_alive():
                    process.terminate()
            if dist.is_initialized():
                dist.destroy_process_group()


def _join(folder: str, rank: int, count: int) -> None:
    # A file as meeting point: no port that another program may have.
    dist.init_process_group(
        "gloo",
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=count,
        timeout=PATIENCE,
    )


def _await(folder: str, others: list) -> None:
    """Wait until every process has come up, or one has died."""
    while True:
        # In this order: a process that was there and is done has left its mark.
        dead = [process for process in others if process.exitcode is not None]
        missing = [n for n in range(1, len(others) + 1) if not Path(folder, f"up{n}").exists()]
        if not missing:
            return
        if dead:
            raise RuntimeError(
                f"train: rank {missing[0]} must start, got exit code {dead[0].exitcode}"
            )
        time.sleep(0.02)


def _other(folder, rank, count, threads, work, arguments) -> None:
    """Run as one of the other ranks. What goes wrong there, the first rank meets as well."""
    Path(folder, f"up{rank}").touch()
    try:
        torch.set_num_threads(threads)
        _join(folder, rank, count)
        work(*arguments, dist.group.WORLD)
        dist.destroy_process_group()
    except (Exception, KeyboardInterrupt):
        # Neither a traceback nor the wait for peers that the interpreter's end would bring.
        sys.stderr.flush()
        os._exit(1)
