"""NumPy arrays in chosen memory.

Beside a page that faults, over more than 2^31 elements, or at a place in a cache line.
"""

import ctypes
import mmap

import numpy as np

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _mapping(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(-1, size, flags=flags)


def guarded(array: np.ndarray, at_end: bool = True) -> np.ndarray:
    """Return a contiguous copy that touches a page which may be neither read nor written.

    Args:
        array: what to copy.
        at_end: the page is behind the last element, else in front of the first one.
    """
    pages = (array.nbytes + _PAGE - 1) // _PAGE
    memory = _mapping((pages + 2) * _PAGE)
    whole = np.frombuffer(memory, np.uint8)
    for page in (0, pages + 1):
        if _libc.mprotect(whole.ctypes.data + page * _PAGE, _PAGE, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    start = (pages + 1) * _PAGE - array.nbytes if at_end else _PAGE
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def far_apart(array: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return a copy whose elements are 2^31 + 64 apart along an axis, dense along the others.

    The memory is mapped, not reserved: only the pages that are touched exist.

    Raises:
        OSError: the machine does not give out that much address space.
    """
    stride = 2**31 + 64
    inner = np.moveaxis(array, axis, 0)
    needed = (len(inner) - 1) * stride + inner[0].size + 64
    flat = np.frombuffer(_mapping(needed * array.itemsize), array.dtype)
    dense = np.empty(inner.shape[1:], array.dtype).strides
    view = np.lib.stride_tricks.as_strided(
        flat, inner.shape, (stride * array.itemsize, *dense), writeable=True
    )
    view[...] = inner
    return np.moveaxis(view, 0, axis)


def in_line(array: np.ndarray, elements: int = 0) -> np.ndarray:
    """Return a contiguous copy that begins so many elements behind the begin of a cache line.

    At 0 a kernel may write it past the caches. NumPy's own large arrays begin 16 bytes into a line.
    """
    memory = np.empty(array.nbytes + 128 + elements * array.itemsize, np.uint8)
    start = -memory.ctypes.data % 64 + elements * array.itemsize
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
