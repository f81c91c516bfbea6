"""The machine that executes PTX (tests/ptx): what it computes, and that it sees what is wrong.

Judge: small kernels written for it, with results that are known. The kernels of ssm-kernels run on
it by the tests of their operators.
"""

import ctypes
import os

import numpy as np
import pytest

if "SSM_TEST_PTX" not in os.environ:
    pytest.skip("SSM_TEST_PTX names no modules of a GPU", allow_module_level=True)

RUN = ctypes.CDLL(os.environ["SSM_TEST_CUDA_HOST"]).ssm_ptx_run
RUN.restype = ctypes.c_char_p

KERNEL = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry kernel(.param .u64 kernel_param_0)
.maxntid 128, 1, 1
{
    .reg .pred %p<4>, q;
    .reg .b32 %r<20>;
    .reg .f32 %f<20>;
    .reg .b64 %rd<20>;
    ld.param.u64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, memory;
    shl.b32 %r3, %r1, 4;
    add.s32 %r4, %r2, %r3;          // 16 bytes of shared memory for each thread
    mul.wide.s32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;       // an element of the array for each thread
    BODY
    ret;
}
"""


def run(body: str, threads: int = 32, shared_bytes: int = 4096) -> tuple[np.ndarray, str]:
    """Return 256 elements of 32 bits after the body, which begin as their number, and the fault."""
    kernel = KERNEL.replace("BODY", body)
    array = np.arange(256, dtype=np.uint32)
    pointer = ctypes.c_void_p(array.ctypes.data)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(pointer))
    said = RUN(kernel.encode(), 1, threads, shared_bytes, arguments)
    return array, said.decode()


PARTING = """
    setp.lt.s32 %p1, %r1, 7;
    @%p1 bra $LOW;
    mov.u32 %r5, 100;
    bra.uni $MET;
$LOW:
    mov.u32 %r5, 1;
$MET:
    shfl.sync.down.b32 %r6|%p2, %r5, 1, 31, -1;
    selp.b32 %r6, %r6, 5, %p2;
    st.global.u32 [%rd3], %r6;
"""


def test_lanes_that_part_meet_again():
    found, said = run(PARTING)
    assert said == ""
    np.testing.assert_array_equal(found[:33], [1] * 6 + [100] * 25 + [5] + [32])


LOOP = """
    mov.u32 %r5, 0;
    mov.u32 %r6, %r1;
$AGAIN:
    add.s32 %r5, %r5, %r6;
    sub.s32 %r6, %r6, 1;
    setp.gt.s32 %p1, %r6, 0;
    @%p1 bra $AGAIN;
    vote.sync.ballot.b32 %r7, %p1, -1;
    add.s32 %r5, %r5, %r7;
    st.global.u32 [%rd3], %r5;
"""


def test_lanes_leave_a_loop_one_by_one():
    found, said = run(LOOP)
    assert said == ""
    np.testing.assert_array_equal(found[1:32], [n * (n + 1) // 2 for n in range(1, 32)])


ARITHMETIC = [
    ("shr.s32 %r5, -5, 40;", "r5", 0xFFFFFFFF),
    ("shl.b32 %r5, 1, 32;", "r5", 0),
    ("mov.u64 %rd4, -7;\n div.s64 %rd4, %rd4, 2;\n cvt.u32.u64 %r5, %rd4;", "r5", 0xFFFFFFFD),
    ("mov.u64 %rd4, 5;\n bfi.b64 %rd4, %rd4, -1, 8, 4;\n cvt.u32.u64 %r5, %rd4;", "r5", 0xFFFFF5FF),
    ("mov.u64 %rd4, 1;\n clz.b64 %r5, %rd4;", "r5", 63),
    ("bfe.u32 %r5, 0xabcd, 4, 8;", "r5", 0xBC),
    ("mov.b32 %r5, 0x1ff;\n cvt.s8.s32 %r6, %r5;\n cvt.s32.s8 %r5, %r6;", "r5", 0xFFFFFFFF),
    ("mov.b32 %r5, {1, 2};", "r5", 0x20001),
    ("setp.num.f32 %p1, 0f7FC00000, 0f3F800000;\n selp.b32 %r5, 1, 0, %p1;", "r5", 0),
    ("setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000;\n selp.b32 %r5, 1, 0, %p1;", "r5", 1),
    ("setp.ne.f32 %p1, 0f7FC00000, 0f7FC00000;\n selp.b32 %r5, 1, 0, %p1;", "r5", 0),
    ("cvt.rn.bf16x2.f32 %r5, 0f3F808000, 0f3F818000;", "r5", 0x3F803F82),
    ("cvt.rna.tf32.f32 %r5, 0f3F801000;", "r5", 0x3F802000),
    ("add.rz.f32 %f1, 0f3F800000, 0f337FFFFF;\n mov.b32 %r5, %f1;", "r5", 0x3F800000),
    ("max.f32 %f1, 0f7FC00000, 0fC0000000;\n mov.b32 %r5, %f1;", "r5", 0xC0000000),
    ("ex2.approx.ftz.f32 %f1, 0fC3000000;\n mov.b32 %r5, %f1;", "r5", 0),
]


@pytest.mark.parametrize(("body", "register", "value"), ARITHMETIC)
def test_arithmetic(body, register, value):
    found, said = run(f"{body}\n st.global.u32 [%rd3], %{register};")
    assert said == ""
    assert found[0] == value, hex(found[0])


COPY = """
    cp.async.cg.shared.global [%r4], [%rd1], 16, {bytes};
    cp.async.commit_group;
    {wait}
    ld.shared.u32 %r5, [%r4+4];
    st.global.u32 [%rd3], %r5;
"""


def test_copies_arrive_when_they_are_waited_for():
    assert run(COPY.format(bytes=16, wait="cp.async.wait_group 0;"))[0][0] == 1
    assert run(COPY.format(bytes=0, wait="cp.async.wait_all;"))[0][0] == 0
    for wait in ("", "cp.async.wait_group 1;"):
        found, said = run(COPY.format(bytes=16, wait=wait))
        assert said == ""
        assert found[0] == 0xFFFFFFFF


HALF = "setp.lt.s32 %p1, %r1, {threads};\n @%p1 bra $SKIP;\n {what}\n $SKIP:\n {then}"
SHUFFLE = "shfl.sync.bfly.b32 %r5|%p2, %r1, 1, 31, -1;"
FAULTS = {
    "lanes of a warp wait at different places": (
        HALF.format(threads=7, what=SHUFFLE, then="bar.warp.sync -1;"),
    ),
    "lanes are missing": (f"setp.lt.s32 %p1, %r1, 7;\n @%p1 {SHUFFLE}",),
    "not for all lanes": (SHUFFLE.replace("-1", "255"),),
    "not aligned": (
        "ld.global.v2.f32 {%f1, %f2}, [%rd3];",
        "st.shared.u32 [%r4+2], %r1;",
        "cp.async.cg.shared.global [%r4], [%rd3], 16, 16;",
    ),
    "outside of shared memory": ("ld.shared.u32 %r5, [%r2+4096];", "st.shared.u32 [%r1], %r1;"),
    "no memory there": ("mov.u64 %rd4, 0;\n ld.global.u32 %r5, [%rd4];",),
    "barriers that never meet": (HALF.format(threads=32, what="bar.sync 0;", then="bar.sync 1;"),),
    "lanes differ in an operand": ("bar.sync %r1, 64;",),
    "a trap in kernel": ("trap;",),
    "unknown instruction": ("frobnicate.b32 %r5, %r1;",),
    "unknown operand": ("mov.u32 %r5, elsewhere;",),
}


@pytest.mark.parametrize(("said", "body"), [(said, b) for said, of in FAULTS.items() for b in of])
def test_machine_sees_what_is_wrong(said, body):
    assert run(body, threads=64)[1].startswith(f"PTX: {said}")


def test_machine_refuses_what_a_driver_refuses():
    assert run("", threads=128, shared_bytes=48 << 10)[1] == ""
    said = "PTX: more threads than kernel is compiled for"
    assert run("", threads=160)[1] == said
    said = "PTX: more shared memory than kernel asked for"
    assert run("", shared_bytes=(48 << 10) + 16)[1] == said


# One product of 64 x 64 x 16 of ones, the left operand in registers. The groups of 8 columns of the
# right one lie at one place, in units of 16 bytes: 64.
PRODUCT = """
    mov.b32 %r5, 0x3f803f80;
    st.shared.v4.u32 [%r4], {%r5, %r5, %r5, %r5};
    bar.sync 0;
    mov.u64 %rd4, DESCRIPTOR;
    setp.ne.b32 q, 0, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {SUMS}, {%r5, %r5, %r5, %r5}, %rd4, q, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    UNDER_WAY
    wgmma.wait_group.sync.aligned PENDING;
    st.global.f32 [%rd3], %s3;
"""  # noqa: E501
PRODUCT = PRODUCT.replace("DESCRIPTOR", str(1 << 62 | 64))
PRODUCT = PRODUCT.replace("SUMS", ", ".join(f"%s{i}" for i in range(32)))


@pytest.mark.parametrize(
    ("under_way", "pending", "wanted"),
    [
        ("", 0, ""),
        ("", 1, "products that nobody waited for"),
        ("mov.f32 %s3, 0f00000000;", 0, "sums changed before their product was waited for"),
        ("st.shared.u32 [%r4], 1;", 0, "an operand changed before its product was waited for"),
    ],
)
def test_products_of_warpgroups_are_watched(under_way, pending, wanted):
    body = PRODUCT.replace("UNDER_WAY", under_way).replace("PENDING", str(pending))
    found, said = run(body, threads=128)
    assert said == (f"PTX: {wanted}" if wanted else "")
    if not wanted:
        assert (found[:128].view("f4") == 16).all()
