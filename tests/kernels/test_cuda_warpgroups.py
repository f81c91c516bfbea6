"""Products of warpgroups as the host executes them, and where the kernels that use them serve.

Judges: NumPy's product; the layouts of the PTX ISA (matrix descriptor), written down once more as
shapes and strides; ssd_chunk_scan's own judge in test_cuda_ssd.py, which runs over these kernels
where SSM_TEST_CUDA_WARPGROUPS is set.
"""

import ctypes
import itertools
import os

import numpy as np
import pytest

from tests.kernels import test_cuda_ssd as ssd

if "SSM_TEST_CUDA_HOST" not in os.environ:
    pytest.skip("SSM_TEST_CUDA_HOST names no CUDA kernels for the host", allow_module_level=True)

LIBRARY = ctypes.CDLL(os.environ["SSM_TEST_CUDA_HOST"])
KINDS = {
    "matrix memory read by a product without a fence behind its writer": (1,),
    "matrix memory read by a product in a race": (2, 3),
    "matrix memory written in a race": (4, 6),
    "matrix memory written while a product reads it": (5,),
    "matrix memory left with sums that changed under a product": (7,),
    "matrix memory given sums that another product adds to": (8,),
    "matrix memory left with products under way": (9,),
    "matrix memory read by a product before written": (10,),
}


def multiplied(left, right, bfloat16=True, rows_are_k=False, in_registers=False, kind=0):
    """Return three times the product of (64, K) and (K, N) by a warpgroup, and what is wrong."""
    (rows, depth), columns = left.shape, right.shape[1]
    product = np.full((rows, columns), np.nan)
    stored = np.array(right if rows_are_k else right.T, order="C")
    call = LIBRARY.ssm_cuda_host_warpgroup_product
    call.restype = ctypes.c_char_p
    pointers = [
        ctypes.c_void_p(a.ctypes.data) for a in (np.ascontiguousarray(left), stored, product)
    ]
    said = call(bfloat16, depth, columns, rows_are_k, in_registers, kind, *pointers)
    return product, said.decode()


@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize(
    ("depth", "columns", "rows_are_k"),
    [(64, 64, False), (128, 64, False), (64, 64, True), (64, 128, True)],
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_product(bfloat16, depth, columns, rows_are_k, in_registers):
    make = np.random.default_rng(1)
    left = make.integers(-128, 129, (64, depth)).astype(float)
    right = make.integers(-128, 129, (depth, columns)).astype(float)
    left[3, 5] = 1 + 2.0**-9  # which bfloat16 rounds
    product, said = multiplied(left, right, bfloat16, rows_are_k, in_registers)
    assert said == ""
    left[3, 5] = 1 if bfloat16 else left[3, 5]
    # A wrong place makes a difference of 3 or more, rounding of sums beyond 2^17 less than this.
    np.testing.assert_allclose(product, 3 * left @ right, rtol=1e-6, atol=0.1)


@pytest.mark.parametrize(
    ("said", "kind"), [(said, kind) for said, kinds in KINDS.items() for kind in kinds]
)
def test_host_sees_a_wrong_use_of_products(said, kind):
    found = multiplied(np.ones((64, 64)), np.ones((64, 64)), kind=kind)[1]
    assert found.partition(":")[0] == said


def place(shape, stride, *coordinates) -> int:
    """Where nested shapes and strides, the innermost first, put coordinates."""
    found = 0
    for sizes, steps, at in zip(shape, stride, coordinates, strict=True):
        for size, step in zip(sizes, steps, strict=True):
            found += at % size * step
            at //= size
    return found


@pytest.mark.parametrize("rows_are_k", [False, True])
@pytest.mark.parametrize(("mode", "units"), [(0, 1), (3, 2), (2, 4), (1, 8)])
def test_descriptors_name_the_layouts_of_the_manual(mode, units, rows_are_k):
    start, leading, stride = 4096, 2048 * 3, 1024 * 5
    code = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62
    element = LIBRARY.ssm_cuda_host_element_by
    element.argtypes = (ctypes.c_uint64, ctypes.c_bool, ctypes.c_int, ctypes.c_int)
    more, step, lead = 1 << 20, stride // 2, leading // 2  # of 8 elements a unit
    if rows_are_k and mode == 0:
        layout = ((8, 1, more), (8, more)), ((1, 8, step), (8, lead))
    elif rows_are_k:
        layout = ((8, units, more), (8, more)), ((1, 8, lead), (8 * units, step))
    elif mode == 0:
        layout = ((8, more), (8, more)), ((8, step), (1, lead))
    else:
        layout = ((8, more), (8, 2)), ((8 * units, step), (1, 8))
    for other, k in itertools.product(range(128), range(16)):
        byte = start + 2 * place(*layout, other, k)
        byte ^= (byte >> 7) % units << 4
        assert element(code, rows_are_k, other, k) == byte // 2, (other, k)


def blocks_of(sequences="none", states="f4", **sizes) -> int:
    """Return how many blocks of a call run on warpgroups, where they serve wherever they can."""
    call = LIBRARY.ssm_cuda_host_use_warpgroups
    call.restype = ctypes.c_int64
    call(True)
    try:
        arguments = ssd.inputs(**sizes)
        arguments["initial_states"] = arguments["initial_states"].astype(states)
        seq_meta = ssd.meta(sequences, sizes["batch"], sizes["seqlen"])
        ssd.run(ssd.with_states(arguments, seq_meta), seq_meta)
    finally:
        found = call("SSM_TEST_CUDA_WARPGROUPS" in os.environ)
    return found


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (2 * 3, {}),
        (2 * 2, {"groups": (1, 1)}),
        (2 * 2 * 2, {"groups": (2, 1), "headdim": 65}),
        (0, {"dtype": "f4"}),
        (0, {"states": "f2"}),
        (2 * 3, {"sequences": "rows"}),
        (2 * 3, {"sequences": "packed"}),
        (0, {"sequences": "packed", "states": "f2"}),
        (0, {"dstate": 129}),
        (0, {"seqlen": 600}),  # cut into segments
    ],
)
def test_where_warpgroups_serve(expected, changes):
    sizes = {"batch": 2, "seqlen": 20, "heads": 6, "headdim": 8, "dstate": 40, "groups": (1, 3)}
    assert blocks_of(**{**sizes, "dtype": "f2", **changes}) == expected
