"""The compiled selective_scan in torch. Judges: the reference, float64 NumPy loops, gradcheck."""

import subprocess
import sys

import pytest
import torch

from ssm import ops
from ssm.ops.compiled.selective_scan import selective_scan
from ssm.ops.python import reference
from ssm.seq_meta import SeqMeta
from ssm.utils import dispatch
from tests import gradient_judge, judge
from tests.cases import CASES, ScanCase
from tests.tensors import FLOATS, arrays, gradcheck, gradients, leaves, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "selective_scan"
DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
SMALL = (
    ScanCase("bare", 2, 2, 4, 2, given="", softplus=False),
    ScanCase("options", 1, 3, 3, 2),
    ScanCase("two_tiles", 1, 2, 34, 1),
    ScanCase("groups", 1, 4, 3, 2, "grouped", "shared", 2),
    ScanCase("constant_bc", 2, 2, 3, 2, "constant", "constant"),
    ScanCase("packed", 2, 2, 6, 2, layout="cu_seqlens"),
    ScanCase("packed_bare", 2, 2, 6, 2, given="", layout="cu_seqlens"),
    ScanCase("packed_holes", 2, 2, 6, 1, "grouped", "shared", 2, layout="cu_seqlens mask"),
    ScanCase("seq_idx", 2, 2, 8, 1, layout="seq_idx"),
    ScanCase("padded", 3, 2, 4, 1, layout="mask"),
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small problems wait for a second thread longer than it helps; test_threads_agree has more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scan(**arguments):
    return selective_scan(return_last_state=True, **arguments)


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
    want = gradient_judge.selective_scan(dy, dstate, **arrays(arguments))
    return dict(zip(wanted, got, strict=True)), want


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case, dtype):
    arguments = make_tensors(case, 1, dtype)
    y, last_state = scan(**arguments)
    assert (y.dtype, last_state.dtype) == (dtype, acc(dtype))
    want_y, want_state = judge.selective_scan(**arrays(arguments))
    assert_close("y", y, want_y, TOLERANCES[OP, name_of(dtype)])
    assert_close("last_state", last_state, want_state, TOLERANCES[OP, name_of(acc(dtype))])
    assert torch.equal(selective_scan(**arguments), y)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_gradients_match_judge(case, dtype):
    got, want = judged_gradients(make_tensors(case, 1, dtype))
    for name, gradient in got.items():
        assert gradient.dtype == dtype
        assert_close(f"d{name}", gradient, want[name], TOLERANCES[f"{OP}_bwd", name_of(dtype)])


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=name_of)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_reference(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    want = reference.selective_scan(return_last_state=True, **arguments)
    for name, a, b in zip(("y", "last_state"), scan(**arguments), want, strict=True):
        assert_close(name, a, b, TOLERANCES[OP, name_of(dtype)])
    wanted = gradients(lambda **t: reference.selective_scan(return_last_state=True, **t), arguments)
    for name, gradient in gradients(scan, arguments).items():
        tolerance = TOLERANCES[f"{OP}_bwd", name_of(dtype)]
        assert_close(f"d{name}", gradient, wanted[name], tolerance)


def test_mixed_dtypes():
    case = ScanCase("mixed", 2, 6, 40, 4, "grouped", "shared", 2)
    dtypes = {"A": torch.float32, "C": torch.float16, "dt_bias": torch.float64, "z": torch.float32}
    for dtype in FLOATS:
        arguments = make_tensors(case, 0, dtype)
        for name, other in dtypes.items():
            arguments[name] = make_tensors(case, 0, other)[name]
        y, last_state = scan(**arguments)
        want_y, want_state = judge.selective_scan(**arrays(arguments))
        assert (y.dtype, last_state.dtype) == (dtype, acc(dtype))
        assert_close("y", y, want_y, TOLERANCES[OP, name_of(dtype)])
        assert_close("last_state", last_state, want_state, TOLERANCES[OP, name_of(acc(dtype))])
        got, want = judged_gradients(arguments)
        exactness = [torch.float64, torch.float32, torch.bfloat16]
        for name, gradient in got.items():
            assert gradient.dtype == arguments[name].dtype, name
            own = torch.bfloat16 if gradient.dtype == torch.bfloat16 else gradient.dtype
            coarsest = own
            if own in exactness[:2] and acc(dtype) == torch.float32:
                coarsest = torch.float32
            tolerance = TOLERANCES[f"{OP}_bwd", name_of(coarsest)]
            assert_close(f"d{name}", gradient, want[name], tolerance)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(scan, make_tensors(case))


@pytest.mark.parametrize("unused", [0, 1])
def test_gradient_of_one_output(unused):
    """Each output alone has the gradient that both have when the other's weight is zero."""
    arguments = make_tensors(SMALL[1])

    def one(**given):
        return scan(**given)[1 - unused]

    def both(**given):
        outputs = list(scan(**given))
        outputs[unused] = outputs[unused] * 0.0
        return outputs[0].sum() + outputs[1].sum()

    given, again = leaves(arguments), leaves(arguments)
    one(**given).sum().backward()
    both(**again).backward()
    for name in DIFFERENTIABLE:
        first = given[name].grad
        assert torch.equal(
            torch.zeros_like(again[name]) if first is None else first, again[name].grad
        )


def test_gradient_of_some_inputs():
    arguments = make_tensors(SMALL[1])
    want = gradients(scan, arguments)
    for name in DIFFERENTIABLE:
        given = {**arguments, name: arguments[name].clone().requires_grad_()}
        outputs = scan(**given)
        generator = torch.Generator().manual_seed(0)
        kind = {"generator": generator, "dtype": torch.float64}
        sum((o * torch.randn(o.shape, **kind)).sum() for o in outputs).backward()
        assert torch.equal(given[name].grad, want[name]), name


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
    arguments = make_tensors(ScanCase("expanded", 2, 4, 6, 3))
    row = arguments["delta"][:1, :, :1].clone().requires_grad_()
    dense = row.detach().expand(2, 4, 6).clone().requires_grad_()
    scan(**{**arguments, "delta": row.expand(2, 4, 6)})[0].sum().backward()
    scan(**{**arguments, "delta": dense})[0].sum().backward()
    assert torch.allclose(row.grad, dense.grad.sum((0, 2), keepdim=True)[:, :, :], rtol=1e-12)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("case", [SMALL[1], SMALL[5]], ids=str)
def test_opcheck(case, save):
    given = make_tensors(case, 0, torch.float32)
    meta, batch, seqlen = given["seq_meta"], *given["u"].shape[::2]
    if save:
        given = leaves(given)
    ids = meta.positions(batch, seqlen, "cpu") if meta else None
    per_sequence = bool(meta and meta.state_per_sequence)
    nstates = meta.num_sequences if per_sequence else batch
    inputs = [given[name] for name in DIFFERENTIABLE]
    torch.library.opcheck(
        torch.ops.ssm.selective_scan_fwd.default,
        (*inputs, ids, given["softplus"], per_sequence, nstates, save),
    )


def test_compiles_without_graph_breaks():
    arguments = make_tensors(ScanCase("compile", 2, 6, 40, 4, "grouped", "shared", 2))
    del arguments["seq_meta"]

    def function(**given):
        y, state = ops.selective_scan(return_last_state=True, **given)
        return y * 2.0, state

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (40, 33, 7):
        given = dict(arguments)
        for name in ("u", "delta", "z", "B", "C"):
            given[name] = arguments[name][..., :seqlen]
        for got, want in zip(compiled(**given), function(**given), strict=True):
            assert torch.equal(got, want)
        want = gradients(function, given)
        for name, gradient in gradients(compiled, given).items():
            assert torch.equal(gradient, want[name]), name


def test_exports():
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return ops.selective_scan(u, delta, A, B, C, softplus=True)

    arguments = make_tensors(ScanCase("export", 2, 6, 40, 4))
    inputs = tuple(arguments[n] for n in ("u", "delta", "A", "B", "C"))
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    shapes = ({2: seqlen}, {2: seqlen}, None, {2: seqlen}, {2: seqlen})
    program = torch.export.export(Scan(), inputs, dynamic_shapes=shapes)
    shorter = tuple(t if t.shape == (6, 4) else t[..., :9] for t in inputs)
    for given in (inputs, shorter):
        assert torch.equal(program.module()(*given), Scan()(*given))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 6, 4)], ids=str)
@pytest.mark.parametrize("sample", [7, 200])
def test_exports_with_gradients_for_any_length(sizes, sample):
    """The states saved for a backward are those of any number of parts, the first of one."""
    batch, dim, dstate = sizes

    class Scan(torch.nn.Module):
        def __init__(self, A):
            super().__init__()
            self.A = torch.nn.Parameter(A)

        def forward(self, u, delta, B, C):
            return ops.selective_scan(u, delta, self.A, B, C, softplus=True)

    arguments = make_tensors(ScanCase("export", batch, dim, 400, dstate))
    module = Scan(arguments["A"])

    def inputs(length):
        return tuple(arguments[n][..., :length].contiguous() for n in ("u", "delta", "B", "C"))

    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    program = torch.export.export(module, inputs(sample), dynamic_shapes=({2: seqlen},) * 4)
    for length in (2, 31, 32, 33, 400):
        got, want = program.module()(*inputs(length)), module(*inputs(length))
        assert torch.equal(got, want)
        dA = torch.autograd.grad(got.sum(), program.parameters())[0]
        assert torch.equal(dA, torch.autograd.grad(want.sum(), module.A)[0])


def test_saves_little_for_backward():
    batch, dim, seqlen, dstate = 2, 64, 256, 16
    arguments = make_tensors(ScanCase("memory", batch, dim, seqlen, dstate), 0, torch.float32)
    given = leaves(arguments)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = scan(**given)
    kept = sum(t.untyped_storage().nbytes() for n, t in given.items() if n in DIFFERENTIABLE)
    checkpoints = 4 * batch * dim * dstate * seqlen // 32
    assert sum(saved.values()) <= kept + checkpoints
    y.sum().backward()
    # Without gradients nothing is kept, and no checkpoint is made.
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(**arguments)
        with torch.no_grad():
            scan(**given)
    assert not saved


def test_refuses_second_derivative():
    given = leaves(make_tensors(SMALL[1]))
    (first,) = torch.autograd.grad(scan(**given)[0].sum(), given["u"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^selective_scan: a second derivative must be taken"):
        first.sum().backward()


def test_chunked_equals_whole():
    """Four segments that hand their state on have the gradients of the whole."""
    case = ScanCase("segments", 2, 5, 100, 3)
    arguments = make_tensors(case, 4)

    def segments(**given):
        state, ys = given["initial_state"], []
        for begin in range(0, 100, 25):
            part = {**given, "initial_state": state}
            for name in ("u", "delta", "z", "B", "C"):
                part[name] = given[name][..., begin : begin + 25]
            y, state = scan(**part)
            ys.append(y)
        return torch.cat(ys, -1), state

    for got, want in zip(segments(**arguments), scan(**arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    want = gradients(scan, arguments)
    for name, gradient in gradients(segments, arguments).items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-8, atol=1e-8)


def test_threads_agree():
    arguments = make_tensors(ScanCase("threads", 2, 130, 70, 16), 0, torch.float32)
    want = gradients(scan, arguments)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for name, gradient in gradients(scan, arguments).items():
            assert torch.equal(gradient, want[name]), name


def test_is_deterministic():
    arguments = make_tensors(SMALL[2], 0, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        want = gradients(scan, arguments)
        for name, gradient in gradients(scan, arguments).items():
            assert torch.equal(gradient, want[name]), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_vmap():
    """A batch of batches is the calls one by one."""
    given = make_tensors(ScanCase("vmap", 2, 3, 5, 2), 0, torch.float32)
    inputs = tuple(given[n] for n in ("u", "delta", "A", "B", "C"))
    stacked = tuple(torch.stack([t, 0.5 * t, -t.abs()]) for t in inputs)
    got = torch.vmap(selective_scan)(*stacked)
    for i in range(3):
        assert torch.equal(got[i], selective_scan(*(t[i] for t in stacked)))


def test_autocast_leaves_the_scan_alone():
    arguments = make_tensors(SMALL[1], 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = scan(**arguments)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, scan(**arguments)[0])


def test_leaves_inputs_alone():
    arguments = make_tensors(SMALL[1], 0, torch.float32)
    before = {n: t.clone() for n, t in arguments.items() if torch.is_tensor(t)}
    gradients(scan, arguments)
    scan(**arguments)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor), name


def test_backends_can_be_chosen():
    arguments = make_tensors(SMALL[1], 0, torch.float32)
    assert dispatch.implementation(OP, arguments["u"]) is selective_scan
    for backend, function in (("python", reference.selective_scan), ("cpu", selective_scan)):
        with dispatch.use_backend(backend):
            assert dispatch.implementation(OP, arguments["u"]) is function
            assert torch.equal(ops.selective_scan(**arguments), function(**arguments))


@pytest.mark.parametrize("backend", ["python", "cpu"])
def test_environment_chooses_the_backend(backend, monkeypatch):
    monkeypatch.setenv("SSM_BACKEND", backend)
    program = "from ssm.utils.dispatch import why; print(why('selective_scan'))"
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.stdout.startswith(f"selective_scan on cpu: {backend}, "), child.stderr


REJECTED = {
    "u_shape": ({"u": torch.zeros(4, 6)}, "u must have shape (B, D, L), got (4, 6)"),
    "A_dtype": (
        {"A": torch.zeros(4, 3, dtype=torch.int32)},
        "A must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "B_groups": (
        {"B": torch.zeros(2, 3, 3, 6)},
        "B must have a group count that divides D = 4, got 3",
    ),
    "initial_state_shape": (
        {"initial_state": torch.zeros(3, 4, 3)},
        "initial_state must have shape (S, D, N) = (2, 4, 3), got (3, 4, 3)",
    ),
    "z_missing_axis": (
        {"z": torch.zeros(2, 4)},
        "z must have shape (B, D, L) = (2, 4, 6), got (2, 4)",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
@pytest.mark.parametrize(
    "function", [selective_scan, reference.selective_scan], ids=["cpu", "python"]
)
def test_rejects(name, function):
    """Both implementations refuse with the same words."""
    changed, sentence = REJECTED[name]
    arguments = make_tensors(ScanCase("reject", 2, 4, 6, 3))
    with pytest.raises(ValueError) as caught:
        function(**{**arguments, **changed})
    assert str(caught.value) == f"{OP}: {sentence}"


def test_seq_meta_of_padding_in_torch():
    """Left padding gives what the unpadded row gives."""
    arguments = make_tensors(ScanCase("padded", 1, 3, 40, 2))
    mask = torch.arange(40)[None] >= 7
    y, state = scan(**{**arguments, "seq_meta": SeqMeta(mask=mask)})
    alone = dict(arguments)
    for name in ("u", "delta", "z", "B", "C"):
        alone[name] = arguments[name][..., 7:]
    want_y, want_state = scan(**alone)
    assert not y[..., :7].any()
    torch.testing.assert_close(y[..., 7:], want_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, want_state, rtol=1e-12, atol=1e-12)
