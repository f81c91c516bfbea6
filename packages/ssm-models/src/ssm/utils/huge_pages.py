"""Larger pages under the weights of a model on the CPU."""

import ctypes
import mmap
import sys

from torch import Tensor

_PAGE = 1 << 21


def prefer_huge_pages(tensor: Tensor) -> bool:
    """Ask for huge pages under a tensor that was allocated and not yet written.

    Decoding reads every weight once per token, and over pages of 4 KiB a good part of that time
    goes into looking up where they are. A request, without effect on values.

    Args:
        tensor: contiguous, on the CPU.

    Returns:
        True if the system took the request; False for a tensor without a whole huge page, and where
        there are none.

    Source:
        madvise(2), MADV_HUGEPAGE.
    """
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    last = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if first >= last or advice is None or not sys.platform.startswith("linux"):
        return False
    madvise = ctypes.CDLL(None).madvise
    return madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice) == 0
