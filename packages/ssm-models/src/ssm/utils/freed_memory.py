"""What becomes of memory that tensors on the CPU no longer use."""

import ctypes
import sys

import torch

# Parameters of mallopt in malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def expect_large_tensors() -> None:
    """Let glibc keep up to 62 MiB of freed tensors, as it does in a process that freed a large one.

    The memory at the end of its heap goes back to the system where it exceeds twice the largest
    block that was freed so far, and comes back page by page for the next layer of a model. Here it
    sees a block of 31 MiB, whose pages are never touched; it learns from none above 32. Other
    allocators, and one whose limits were set, take no notice.

    Source:
        mallopt(3), M_MMAP_THRESHOLD.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for later ones.

    By default glibc hands blocks of 32 MiB and more back to the system when they are freed, and the
    next tensor of that size gets pages that the system has to clear first: longer than most
    operators take. Kept memory is not available to other processes. A setting of the whole process,
    for programs to make; this package by itself goes no further than :func:`expect_large_tensors`.

    Returns:
        True if the allocator took the setting; False where it has none (not glibc).

    Source:
        mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    most = 2**31 - 1
    return all([mallopt(_MMAP_THRESHOLD, most // 2), mallopt(_TRIM_THRESHOLD, most)])
