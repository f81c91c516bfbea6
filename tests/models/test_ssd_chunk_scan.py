"""The compiled ssd_chunk_scan in torch. Judges: the reference, float64 NumPy loops, gradcheck."""

import types

import pytest
import torch

from ssm import ops
from ssm.ops.compiled.ssd_chunk_scan import ssd_chunk_scan
from ssm.ops.python import reference
from ssm.seq_meta import SeqMeta
from ssm.utils import dispatch
from tests import gradient_judge, judge
from tests.cases import CASES, SsdCase
from tests.tensors import (
    FLOATS,
    arrays,
    gradcheck,
    gradients,
    leaves,
    make_tensors,
    poison,
    strided,
)
from tests.tolerances import TOLERANCES, assert_close

OP = "ssd_chunk_scan"
EXACT, EXACT_BWD = TOLERANCES[OP, "float64"], TOLERANCES[f"{OP}_bwd", "float64"]
DIFFERENTIABLE = ("X", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
TIME_AXES = {"X": 1, "dt": 1, "B": 1, "C": 1, "z": 1}
SMALL = (
    SsdCase("bare", 2, 3, 1, 2, 2, 2, given="", softplus=False),
    SsdCase("options", 1, 5, 2, 2, 1, 2, 2, 1, skip="channel"),
    SsdCase("groups", 1, 3, 6, 1, 2, 2, 2, 3),
    SsdCase("two_tiles", 1, 34, 1, 1, 1, 2),
    SsdCase("packed", 2, 6, 2, 1, 2, 4, layout="cu_seqlens"),
    SsdCase("packed_bare", 2, 6, 1, 2, 2, 4, given="", layout="cu_seqlens"),
    SsdCase("packed_holes", 1, 7, 1, 2, 1, 3, layout="cu_seqlens mask"),
    SsdCase("seq_idx", 2, 8, 1, 1, 2, 3, layout="seq_idx"),
    SsdCase("padded", 3, 4, 1, 2, 1, 2, layout="mask"),
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small problems wait for a second thread longer than it helps; test_threads_agree has more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scan(**arguments):
    return ssd_chunk_scan(return_final_states=True, **arguments)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def judged_gradients(arguments: dict) -> tuple[dict, dict]:
    """Return the compiled gradients and the judge's, by name, for one random weighting."""
    given = leaves(arguments)
    outputs = scan(**given)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    wanted = {n: given[n] for n in DIFFERENTIABLE if given[n] is not None}
    got = torch.autograd.grad(outputs, list(wanted.values()), weights)
    dy, dstate = (w.double().numpy() for w in weights)
    want = gradient_judge.ssd_chunk_scan(dy, dstate, **arrays(arguments))
    return dict(zip(wanted, got, strict=True)), want


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case, dtype):
    arguments = make_tensors(case, 1, dtype)
    y, states = scan(**arguments)
    assert (y.dtype, states.dtype) == (dtype, acc(dtype))
    want_y, want_states = judge.ssd_chunk_scan(**arrays(arguments))
    assert_close("y", y, want_y, TOLERANCES[OP, name_of(dtype)])
    assert_close("final_states", states, want_states, TOLERANCES[OP, name_of(acc(dtype))])
    assert torch.equal(ssd_chunk_scan(**arguments), y)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_gradients_match_judge(case, dtype):
    got, want = judged_gradients(make_tensors(case, 1, dtype))
    for name, gradient in got.items():
        assert gradient.dtype == dtype
        assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", name_of(dtype)])


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=name_of)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.5)], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_reference(case, limit, dtype):
    arguments = {**make_tensors(case, 2, dtype), "dt_limit": limit}
    want = reference.ssd_chunk_scan(return_final_states=True, **arguments)
    for name, a, b in zip(("y", "final_states"), scan(**arguments), want, strict=True):
        assert_close(name, a, b, TOLERANCES[OP, name_of(dtype)])
    wanted = gradients(
        lambda **t: reference.ssd_chunk_scan(return_final_states=True, **t), arguments
    )
    for name, gradient in gradients(scan, arguments).items():
        tolerance = TOLERANCES[f"{OP}_bwd", name_of(dtype)]
        assert_close(f"d{name}", gradient, wanted[name], tolerance)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 1000])
def test_chunk_size_changes_nothing(chunk_size):
    arguments = make_tensors(SsdCase("chunks", 2, 50, 2, 3, 4, 16), 3, torch.float32)
    for got, want in zip(
        scan(**{**arguments, "chunk_size": chunk_size}), scan(**arguments), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.2, 0.6)], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case, limit):
    gradcheck(scan, {**make_tensors(case), "dt_limit": limit})


@pytest.mark.parametrize("unused", [0, 1])
def test_gradient_of_one_output(unused):
    """Each output alone has the gradient that both have when the other's weight is zero."""
    arguments = make_tensors(SMALL[1])

    def both(**given):
        outputs = list(scan(**given))
        outputs[unused] = outputs[unused] * 0.0
        return outputs[0].sum() + outputs[1].sum()

    given, again = leaves(arguments), leaves(arguments)
    scan(**given)[1 - unused].sum().backward()
    both(**again).backward()
    for name in DIFFERENTIABLE:
        first = given[name].grad
        assert torch.equal(
            torch.zeros_like(again[name]) if first is None else first, again[name].grad
        )


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 7)
    for got, want in zip(scan(**strided(arguments)), scan(**arguments), strict=True):
        assert torch.equal(got, want)
    want = gradients(scan, arguments)
    for name, gradient in gradients(scan, strided(arguments)).items():
        assert torch.equal(gradient, want[name]), name


def test_expanded_inputs():
    """Gradients of a tensor with stride 0 are summed over what it stands for."""
    arguments = make_tensors(SsdCase("expanded", 2, 6, 4, 3, 2, 4))
    row = arguments["dt"][:1, :1].clone().requires_grad_()
    dense = row.detach().expand(2, 6, 4).clone().requires_grad_()
    scan(**{**arguments, "dt": row.expand(2, 6, 4)})[0].sum().backward()
    scan(**{**arguments, "dt": dense})[0].sum().backward()
    assert torch.allclose(row.grad, dense.grad.sum((0, 1), keepdim=True), rtol=1e-12)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("case", [SMALL[1], SMALL[4]], ids=str)
def test_opcheck(case, save):
    given = make_tensors(case, 0, torch.float32)
    meta, batch, seqlen = given["seq_meta"], *given["X"].shape[:2]
    if save:
        given = leaves(given)
    ids = meta.positions(batch, seqlen, "cpu") if meta else None
    per_sequence = bool(meta and meta.state_per_sequence)
    nstates = meta.num_sequences if per_sequence else batch
    inputs = [given[name] for name in DIFFERENTIABLE]
    torch.library.opcheck(
        torch.ops.ssm.ssd_chunk_scan_fwd.default,
        (*inputs, ids, 0.0, float("inf"), given["softplus"], per_sequence, nstates, save),
    )


def test_compiles_without_graph_breaks():
    arguments = make_tensors(SsdCase("compile", 2, 40, 4, 3, 5, 16, 2))
    del arguments["seq_meta"]

    def function(**given):
        y, state = ops.ssd_chunk_scan(return_final_states=True, **given)
        return y * 2.0, state

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (40, 33, 7):
        given = dict(arguments)
        for name in TIME_AXES:
            given[name] = arguments[name][:, :seqlen]
        for got, want in zip(compiled(**given), function(**given), strict=True):
            assert torch.equal(got, want)
        want = gradients(function, given)
        for name, gradient in gradients(compiled, given).items():
            assert torch.equal(gradient, want[name]), name


def test_exports():
    class Scan(torch.nn.Module):
        def forward(self, X, dt, A, B, C):
            return ops.ssd_chunk_scan(X, dt, A, B, C, 16, softplus=True)

    arguments = make_tensors(SsdCase("export", 2, 40, 4, 3, 5, 16))
    inputs = tuple(arguments[n] for n in ("X", "dt", "A", "B", "C"))
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    shapes = ({1: seqlen}, {1: seqlen}, None, {1: seqlen}, {1: seqlen})
    program = torch.export.export(Scan(), inputs, dynamic_shapes=shapes)
    shorter = tuple(t if t.ndim == 1 else t[:, :9] for t in inputs)
    for given in (inputs, shorter):
        assert torch.equal(program.module()(*given), Scan()(*given))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("sample", [7, 200])
def test_exports_with_gradients_for_any_length(sizes, sample):
    """The states saved for a backward are those of any number of parts, the first of one."""
    batch, nheads, headdim, dstate = sizes

    class Scan(torch.nn.Module):
        def __init__(self, A):
            super().__init__()
            self.A = torch.nn.Parameter(A)

        def forward(self, X, dt, B, C):
            return ops.ssd_chunk_scan(X, dt, self.A, B, C, 16, softplus=True)

    arguments = make_tensors(SsdCase("export", batch, 400, nheads, headdim, dstate, 16))
    module = Scan(arguments["A"])

    def inputs(length):
        return tuple(arguments[n][:, :length].contiguous() for n in ("X", "dt", "B", "C"))

    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    program = torch.export.export(module, inputs(sample), dynamic_shapes=({1: seqlen},) * 4)
    for length in (2, 95, 96, 97, 400):
        got, want = program.module()(*inputs(length)), module(*inputs(length))
        assert torch.equal(got, want)
        dA = torch.autograd.grad(got.sum(), program.parameters())[0]
        assert torch.equal(dA, torch.autograd.grad(want.sum(), module.A)[0])


def test_saves_little_for_backward():
    batch, seqlen, nheads, headdim, dstate = 2, 192, 4, 16, 8
    case = SsdCase("memory", batch, seqlen, nheads, headdim, dstate, 64)
    given = leaves(make_tensors(case, 0, torch.float32))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = scan(**given)
    kept = sum(t.untyped_storage().nbytes() for n, t in given.items() if n in DIFFERENTIABLE)
    checkpoints = 4 * batch * nheads * headdim * dstate * seqlen // 96
    assert sum(saved.values()) <= kept + checkpoints
    y.sum().backward()
    # Without gradients nothing is kept, and no checkpoint is made.
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.no_grad():
        scan(**given)
    assert not saved


def test_refuses_second_derivative():
    given = leaves(make_tensors(SMALL[1]))
    (first,) = torch.autograd.grad(scan(**given)[0].sum(), given["X"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^ssd_chunk_scan: a second derivative must be taken"):
        first.sum().backward()


def test_split_anywhere_equals_whole():
    """Two parts that hand their state on have the gradients of the whole."""
    case = SsdCase("split", 2, 9, 2, 3, 2, 4)
    arguments = make_tensors(case, 6)

    def split(cut, **given):
        ys, states = [], given["initial_states"]
        for begin, end in ((0, cut), (cut, case.seqlen)):
            piece = {n: given[n][:, begin:end] for n in TIME_AXES}
            y, states = scan(**{**given, **piece, "initial_states": states})
            ys.append(y)
        return torch.cat(ys, 1), states

    want, want_gradients = scan(**arguments), gradients(scan, arguments)
    for cut in range(case.seqlen + 1):
        for name, got, value in zip("yh", split(cut, **arguments), want, strict=True):
            assert_close(name, got, value, EXACT)
        found = gradients(lambda cut=cut, **given: split(cut, **given), arguments)
        for name, gradient in found.items():
            assert_close(f"gradient of {name}", gradient, want_gradients[name], EXACT_BWD)


@pytest.mark.parametrize("layout", ["mask", "seq_idx", "cu_seqlens", "cu_seqlens mask"])
def test_nan_in_padding_changes_nothing(layout):
    arguments = make_tensors(SsdCase("padded", 3, 16, 2, 2, 3, 5, layout=layout), 8)
    skipped = arguments["seq_meta"].positions(3, 16) < 0
    assert skipped.any()
    poisoned = poison(arguments, TIME_AXES, skipped)
    for got, want in zip(scan(**poisoned), scan(**arguments), strict=True):
        assert torch.equal(got, want)
    assert not scan(**poisoned)[0][skipped].any()
    found, want = gradients(scan, poisoned), gradients(scan, arguments)
    for name, gradient in found.items():
        assert torch.equal(gradient, want[name]), name
        if name in TIME_AXES:
            assert not gradient[skipped].any(), name


def test_padding_equals_the_unpadded_row():
    arguments = make_tensors(SsdCase("padded", 1, 40, 2, 3, 2, 8))
    mask = torch.arange(40)[None] >= 7
    y, state = scan(**{**arguments, "seq_meta": SeqMeta(mask=mask)})
    alone = {**arguments, **{n: arguments[n][:, 7:] for n in TIME_AXES}}
    want_y, want_state = scan(**alone)
    assert not y[:, :7].any()
    assert_close("y", y[:, 7:], want_y, EXACT)
    assert_close("state", state, want_state, EXACT)


def test_threads_agree():
    arguments = make_tensors(SsdCase("threads", 2, 130, 12, 20, 9, 16, 2), 0, torch.float32)
    want = gradients(scan, arguments)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for name, gradient in gradients(scan, arguments).items():
            assert torch.equal(gradient, want[name]), name


def test_is_deterministic():
    arguments = make_tensors(SMALL[3], 0, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        want = gradients(scan, arguments)
        for name, gradient in gradients(scan, arguments).items():
            assert torch.equal(gradient, want[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_vmap():
    """A batch of batches is the calls one by one."""
    given = make_tensors(SsdCase("vmap", 2, 5, 2, 3, 2, 4), 0, torch.float32)
    inputs = tuple(given[n] for n in ("X", "dt", "A", "B", "C"))
    stacked = tuple(torch.stack([t, 0.5 * t, -t.abs()]) for t in inputs)
    got = torch.vmap(lambda *t: ssd_chunk_scan(*t, 4))(*stacked)
    for i in range(3):
        assert torch.equal(got[i], ssd_chunk_scan(*(t[i] for t in stacked), 4))


def test_backends_can_be_chosen():
    arguments = make_tensors(SMALL[1], 0, torch.float32)
    assert dispatch.implementation(OP, arguments["X"]) is ssd_chunk_scan
    for backend, function in (("python", reference.ssd_chunk_scan), ("cpu", ssd_chunk_scan)):
        with dispatch.use_backend(backend):
            assert dispatch.implementation(OP, arguments["X"]) is function
            assert torch.equal(ops.ssd_chunk_scan(**arguments), function(**arguments))


REJECTED = {
    "X_shape": ({"X": torch.zeros(6, 4, 3)}, "X must have shape (B, L, H, P), got (6, 4, 3)"),
    "B_rank": (
        {"B": torch.zeros(2, 6, 5)},
        "B must have shape (B, L, G, N) = (2, 6, 1, N), got (2, 6, 5)",
    ),
    "A_dtype": (
        {"A": torch.zeros(4, dtype=torch.int32)},
        "A must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "B_groups": (
        {"B": torch.zeros(2, 6, 3, 5)},
        "B must have a group count that divides H = 4, got 3",
    ),
    "initial_states_shape": (
        {"initial_states": torch.zeros(3, 4, 3, 5)},
        "initial_states must have shape (S, H, P, N) = (2, 4, 3, 5), got (3, 4, 3, 5)",
    ),
    "D_shape": ({"D": torch.zeros(3)}, "D must have shape (H,) = (4,), got (3,)"),
    "chunk_size": ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    "dt_limit": ({"dt_limit": (1.0, 0.0)}, "dt_limit must be (low, high), got (1.0, 0.0)"),
}


@pytest.mark.parametrize("name", REJECTED)
@pytest.mark.parametrize(
    "function", [ssd_chunk_scan, reference.ssd_chunk_scan], ids=["cpu", "python"]
)
def test_rejects(name, function):
    """Both implementations refuse with the same words."""
    changed, sentence = REJECTED[name]
    arguments = make_tensors(SsdCase("reject", 2, 6, 4, 3, 5, 4))
    with pytest.raises(ValueError) as caught:
        function(**{**arguments, **changed})
    assert str(caught.value) == f"{OP}: {sentence}"


@pytest.mark.parametrize(
    ("kib", "dtype", "dstate", "save", "has_room"),
    [
        (99, torch.bfloat16, 256, True, True),
        (99, torch.float16, 128, True, True),
        (99, torch.float32, 128, False, True),
        (99, torch.float32, 16, True, False),
        (99, torch.float32, 129, False, False),
        (163, torch.float32, 256, True, True),
        (161, torch.float32, 256, True, False),
    ],
)
def test_room_on_a_gpu(monkeypatch, kib, dtype, dstate, save, has_room):
    """tests/kernels/test_cuda_room.py holds the kernels to the same numbers."""
    from ssm.ops.compiled import ssd_chunk_scan as compiled

    gpu = types.SimpleNamespace(shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert compiled._has_room(torch.empty(0, dtype=dtype), dstate, save) == has_room
