"""What kernel tests share: every instruction set, and memory that shows a stray access.

NumPy only, like everything in this folder: the library must stand without torch.
"""

import ctypes
import functools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_NO_ACCESS = 0
_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux; a name in mmap since Python 3.13


def forced_isa() -> str | None:
    """Return the instruction set that SSM_ISA names, or None."""
    name = os.environ.get("SSM_ISA", "auto")
    return None if name in ("", "auto") else name


def runs_cuda_kernels() -> bool:
    """Return whether the CUDA kernels, compiled for the host, serve this run."""
    return "SSM_TEST_CUDA_HOST" in os.environ


def runs_device_code() -> bool:
    """Return whether it is what nvcc made of the kernels that serves this run (tests/ptx)."""
    return "SSM_TEST_PTX" in os.environ


def _skip_float64() -> None:
    """Skip tests where they come to a call in float64, which a GPU would refuse."""
    import ssm_kernels
    from ssm_kernels import _cpu

    def wrapped(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            for value in (*args, *kwargs.values()):
                if getattr(value, "dtype", None) == np.float64:
                    pytest.skip("the kernels of a GPU do not compute in float64")
            return function(*args, **kwargs)

        return call

    operators = tuple(name.removesuffix("_fwd") for name in dir(_cpu) if name.endswith("_fwd"))
    for module in (ssm_kernels, _cpu):
        for name in dir(module):
            if name.startswith(operators):
                setattr(module, name, wrapped(getattr(module, name)))


if runs_device_code():
    _skip_float64()  # before test modules take functions by name


@pytest.fixture(autouse=True, scope="session")
def table() -> int | None:
    """Let the CUDA kernels of the library that SSM_TEST_CUDA_HOST names serve CPU arrays.

    If SSM_TEST_CUDA_WARPGROUPS is set, those for the warpgroups of Hopper serve wherever they can.

    Returns:
        The address of their table, if there is such a library.
    """
    if not runs_cuda_kernels():
        return None
    from ssm_kernels import _cpu

    library = ctypes.CDLL(os.environ["SSM_TEST_CUDA_HOST"])
    library.ssm_cuda_host_use_warpgroups("SSM_TEST_CUDA_WARPGROUPS" in os.environ)
    kernels = library.ssm_cuda_host_kernels
    kernels.restype = ctypes.c_void_p
    address = kernels()
    _cpu._use_cuda_kernels(address)
    return address


@pytest.fixture(autouse=True, scope="session")
def _working_memory_is_guarded() -> None:
    """Let no block of working memory that an earlier call left hide that one is too small."""
    from ssm_kernels import _cpu

    _cpu._guard_scratch(True)


@pytest.fixture(autouse=True)
def _elements_are_aligned(request: pytest.FixtureRequest) -> None:
    """Skip the arrays at odd addresses, which a GPU cannot read and the front refuses there."""
    if runs_cuda_kernels() and "unaligned" in request.node.name:
        pytest.skip("a GPU reads whole elements at addresses that are multiples of their size")


@pytest.fixture(autouse=True, scope="session")
def _forced_isa_is_used() -> None:
    """Make every result of a forced run a result of that instruction set."""
    if forced_isa():
        import ssm_kernels

        assert ssm_kernels.active_isa() == forced_isa()


@pytest.fixture
def on_other_isas() -> Callable[[str], None]:
    """Return a function that runs a test file on the instruction sets that do not serve this run.

    The choice is made once per process, so each gets a process of its own. A module says:

        def test_every_isa(on_other_isas):
            on_other_isas(__file__)
    """
    if forced_isa():
        pytest.skip("SSM_ISA is forced")
    if runs_cuda_kernels():
        pytest.skip("the CUDA kernels have no instruction sets")
    if "MESON_TEST_ITERATION" in os.environ:
        pytest.skip("meson test runs the whole folder on every instruction set")
    import ssm_kernels

    def run(path: str) -> None:
        for isa in ssm_kernels.available_isas():
            if isa == ssm_kernels.active_isa():
                continue
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
            python_path = os.pathsep.join(p for p in sys.path if p)
            env = {**os.environ, "SSM_ISA": isa, "PYTHONPATH": python_path}
            child = subprocess.run(command, env=env, capture_output=True, text=True)
            assert child.returncode == 0, f"{isa}:\n{child.stdout[-4000:]}{child.stderr[-2000:]}"

    return run


@pytest.fixture(params=["end", "start"])
def guarded(request: pytest.FixtureRequest) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that copies an array to memory of its own, with no access on either side.

    The array ends where the memory ends, or starts where it starts. A stray access kills the
    process with a segmentation fault; pytest's fault handler then names the test.
    """

    def copy(array: np.ndarray) -> np.ndarray:
        page = mmap.PAGESIZE
        inside = max(1, -(-array.nbytes // page)) * page
        memory = mmap.mmap(-1, inside + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + page + inside):
            assert _libc.mprotect(guard, page, _NO_ACCESS) == 0, os.strerror(ctypes.get_errno())
        offset = page if request.param == "start" else page + inside - array.nbytes
        view = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
        view[...] = array
        return view

    return copy


@pytest.fixture
def sparse() -> Callable[[np.ndarray, int, int], np.ndarray]:
    """Return a function that copies an array to memory with one huge stride.

    Only the pages that are touched take memory; the test is skipped where the system refuses.
    """

    def copy(array: np.ndarray, axis: int, stride: int) -> np.ndarray:
        """Place neighbours along `axis` `stride` elements apart."""
        rest = np.moveaxis(array, axis, 0)
        assert stride >= rest[0].size
        count = (rest.shape[0] - 1) * stride + rest[0].size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        try:
            memory = mmap.mmap(-1, count * array.itemsize, flags=flags)
        except (OSError, OverflowError) as error:
            pytest.skip(f"{count * array.itemsize >> 30} GiB of sparse memory: {error}")
        inner = np.empty(rest.shape[1:], array.dtype).strides
        flat = np.frombuffer(memory, array.dtype)
        strides = (stride * array.itemsize, *inner)
        view = np.lib.stride_tricks.as_strided(flat, rest.shape, strides)
        view[...] = rest
        return np.moveaxis(view, 0, axis)

    return copy
