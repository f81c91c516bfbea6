"""The reference of selective_scan.  Judge: a float64 NumPy loop, and finite differences."""

import numpy as np
import pytest
import torch

from ssm.ops.python.reference import selective_scan, selective_state_step
from ssm.seq_meta import SeqMeta
from tests import judge
from tests.cases import CASES, ScanCase, make
from tests.tensors import (
    FLOATS,
    arrays,
    count_nodes,
    gradcheck,
    gradients,
    make_tensors,
    poison,
    strided,
)
from tests.tolerances import TOLERANCES, assert_close

OP = "selective_scan"
EXACT = TOLERANCES[OP, "float64"]
TIME_AXES = {"u": 2, "delta": 2, "z": 2}
SMALL = (
    ScanCase("bare", 2, 2, 4, 2, given="", softplus=False),
    ScanCase("options", 1, 3, 3, 2),
    ScanCase("groups", 1, 4, 3, 2, "grouped", "shared", 2),
    ScanCase("constant_bc", 2, 2, 3, 2, "constant", "constant"),
    ScanCase("packed", 2, 2, 6, 2, layout="cu_seqlens"),
    ScanCase("packed_bare", 2, 2, 6, 2, given="", layout="cu_seqlens"),
    ScanCase("packed_holes", 2, 2, 6, 1, "grouped", "shared", 2, layout="cu_seqlens mask"),
    ScanCase("seq_idx", 2, 2, 8, 1, layout="seq_idx"),
    ScanCase("padded", 3, 2, 4, 1, layout="mask"),
)


def scan(**arguments):
    return selective_scan(return_last_state=True, **arguments)


def time_axes(arguments):
    forms = {n: arguments[n].ndim - 1 for n in "BC" if arguments[n].ndim > 2}
    return {**TIME_AXES, **forms}


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case):
    arguments = make(case, 1)
    y, last_state = scan(**make_tensors(case, 1))
    want_y, want_state = judge.selective_scan(**arguments)
    assert_close("y", y, want_y, EXACT)
    assert_close("last_state", last_state, want_state, EXACT)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_low_precision_matches_judge(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    y, last_state = scan(**arguments)
    want_y, want_state = judge.selective_scan(**arrays(arguments))
    assert y.dtype == dtype
    assert last_state.dtype == torch.float32
    assert_close("y", y, want_y, TOLERANCES[OP, str(dtype).removeprefix("torch.")])
    assert_close("last_state", last_state, want_state, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(scan, make_tensors(case))


def test_gradgradcheck():
    gradcheck(scan, make_tensors(ScanCase("options", 1, 2, 2, 1)), second=True)


@pytest.mark.parametrize("layout", ["", "cu_seqlens", "seq_idx mask"])
def test_backward_is_linear_in_seqlen(layout):
    """A step that selects from the whole sequence would have a gradient as long as it."""

    def selections(seqlen):
        case = ScanCase("steps", 2, 2, seqlen, 2, "grouped", "shared", 2, layout=layout)
        counts = count_nodes(scan, make_tensors(case))
        return sum(n for kind, n in counts.items() if kind.startswith(("Select", "Slice", "Index")))

    assert selections(20) == selections(10)


def test_softplus_has_half_a_gradient_at_zero():
    delta = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    # y = softplus(delta) u B C, and the decay acts on a state of zero.
    selective_scan(one[None], delta, -one, one, one, softplus=True).sum().backward()
    assert delta.grad.item() == 0.5


def test_mixed_dtypes():
    case = ScanCase("mixed", 2, 6, 9, 4, "grouped", "shared", 2)
    arguments = make_tensors(case, 0, torch.bfloat16)
    for name, dtype in (("A", torch.float32), ("C", torch.float16), ("dt_bias", torch.float64)):
        arguments[name] = make_tensors(case, 0, dtype)[name]
    y, last_state = scan(**arguments)
    want_y, want_state = judge.selective_scan(**arrays(arguments))
    assert (y.dtype, last_state.dtype) == (torch.bfloat16, torch.float32)
    assert_close("y", y, want_y, TOLERANCES[OP, "bfloat16"])
    assert_close("last_state", last_state, want_state, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize("ntokens", [None, 1, 3])
def test_step_equals_scan(ntokens):
    arguments = make_tensors(ScanCase("steps", 2, 6, 9, 4, "grouped", "shared", 2))
    y, last_state = scan(**arguments)
    initial_state = arguments.pop("initial_state")
    del arguments["seq_meta"]
    state, found = initial_state.clone(), []
    for t in range(0, 9, ntokens or 1):
        token = dict(arguments)
        for name, axis in {**TIME_AXES, "B": 3, "C": 2}.items():
            piece = arguments[name].narrow(axis, t, ntokens or 1).movedim(axis, 1)
            token[name] = piece if ntokens else piece[:, 0]
        x, dt = token.pop("u"), token.pop("delta")
        out = selective_state_step(state, x, dt, **token)
        found.append(out.movedim(1, 2) if ntokens else out[:, :, None])
    assert_close("y", torch.cat(found, 2), y, EXACT)
    assert_close("state", state, last_state, EXACT)


@pytest.mark.parametrize("layout", ["", "mask"])
def test_split_anywhere_equals_whole(layout):
    case = ScanCase("split", 2, 3, 8, 2, "shared", "constant", layout=layout)
    arguments = make_tensors(case, 3)
    axes, mask = time_axes(arguments), None
    if layout:
        mask = arguments["seq_meta"].mask

    def part(begin, end, state, given):
        piece = {**given, "initial_state": state}
        for name, axis in axes.items():
            piece[name] = given[name].narrow(axis, begin, end - begin)
        piece["seq_meta"] = SeqMeta(mask=mask[:, begin:end]) if layout else None
        return scan(**piece)

    def split(cut, **given):
        first, state = part(0, cut, given["initial_state"], given)
        second, state = part(cut, case.seqlen, state, given)
        return torch.cat([first, second], 2), state

    want = scan(**arguments)
    want_gradients = gradients(scan, arguments)
    for cut in range(case.seqlen + 1):
        y, state = split(cut, **arguments)
        assert_close("y", y, want[0], EXACT)
        assert_close("state", state, want[1], EXACT)
        found = gradients(lambda cut=cut, **given: split(cut, **given), arguments)
        for name, gradient in found.items():
            assert_close(f"gradient of {name}", gradient, want_gradients[name], EXACT)


def test_packed_equals_separate():
    lengths = [3, 0, 5, 1, 4]
    ends = np.cumsum([0, *lengths]).tolist()
    case = ScanCase("packed", 1, 4, sum(lengths) + 2, 3)
    arguments = make_tensors(case, 4)
    arguments["initial_state"] = torch.randn(len(lengths), 4, 3, dtype=torch.float64)
    packed = {**arguments, "seq_meta": SeqMeta(cu_seqlens=torch.tensor(ends))}

    def separate(**given):
        ys, states = [], []
        for s in range(len(lengths)):
            piece = {**given, "initial_state": given["initial_state"][s : s + 1]}
            for name, axis in time_axes(given).items():
                piece[name] = given[name].narrow(axis, ends[s], lengths[s])
            y, state = scan(**piece)
            ys.append(y)
            states.append(state)
        padding = torch.zeros(1, 4, 2, dtype=torch.float64)
        return torch.cat([*ys, padding], 2), torch.cat(states)

    for name, got, want in zip(("y", "state"), scan(**packed), separate(**arguments), strict=True):
        assert_close(name, got, want, EXACT)
    want = gradients(separate, arguments)
    for name, gradient in gradients(scan, packed).items():
        assert_close(f"gradient of {name}", gradient, want[name], EXACT)


@pytest.mark.parametrize("layout", ["mask", "seq_idx", "cu_seqlens", "cu_seqlens mask"])
def test_nan_in_padding_changes_nothing(layout):
    case = ScanCase("padded", 3, 4, 16, 2, "grouped", "shared", 2, layout=layout)
    arguments = make_tensors(case, 5)
    skipped = arguments["seq_meta"].positions(3, 16) < 0
    assert skipped.any()
    axes = time_axes(arguments)
    poisoned = poison(arguments, axes, skipped)
    for got, want in zip(scan(**poisoned), scan(**arguments), strict=True):
        assert torch.equal(got, want)
    assert not scan(**poisoned)[0].movedim(1, 2)[skipped].any()
    found, want = gradients(scan, poisoned), gradients(scan, arguments)
    for name, gradient in found.items():
        assert torch.equal(gradient, want[name]), name
        if name in axes:
            assert not gradient.movedim(axes[name], 1)[skipped].any(), name


def test_batch_without_sequences():
    arguments = make_tensors(ScanCase("nothing", 2, 3, 2, 4, given="D z dt_bias"))
    y, state = scan(**{**arguments, "seq_meta": SeqMeta(cu_seqlens=torch.tensor([0]))})
    assert not y.any()
    assert state.shape == (0, 3, 4)


def test_padded_equals_unpadded():
    lengths, case = [5, 2, 0], ScanCase("padded", 3, 4, 5, 2)
    arguments = make_tensors(case, 6)
    # Left-padded rows: the last steps are real.
    mask = torch.tensor([[t >= 5 - n for t in range(5)] for n in lengths])
    y, state = scan(**{**arguments, "seq_meta": SeqMeta(mask=mask)})
    for row, length in enumerate(lengths):
        alone = {**arguments, "initial_state": arguments["initial_state"][row : row + 1]}
        for name, axis in time_axes(arguments).items():
            alone[name] = arguments[name][row : row + 1].narrow(axis, 5 - length, length)
        want_y, want_state = scan(**alone)
        assert_close("y", y[row : row + 1, :, 5 - length :], want_y, EXACT)
        assert_close("state", state[row : row + 1], want_state, EXACT)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 7)
    for got, want in zip(scan(**strided(arguments)), scan(**arguments), strict=True):
        assert torch.equal(got, want)


def test_broadcast_strides():
    arguments = make_tensors(ScanCase("expanded", 2, 4, 6, 3))
    arguments["delta"] = arguments["delta"][:, :1, :1].expand(2, 4, 6)
    arguments["B"] = arguments["B"][:1].expand(2, 3, 6)
    copies = {n: t.contiguous() if torch.is_tensor(t) else t for n, t in arguments.items()}
    for got, want in zip(scan(**arguments), scan(**copies), strict=True):
        assert torch.equal(got, want)


def test_leaves_inputs_alone():
    for case in (SMALL[4], ScanCase("empty_seq", 2, 3, 0, 2)):
        arguments = make_tensors(case)
        before = {n: t.clone() for n, t in arguments.items() if torch.is_tensor(t)}
        y, state = scan(**arguments)
        y.fill_(9.0)
        state.fill_(9.0)
        assert all(torch.equal(arguments[n], t) for n, t in before.items())


def test_last_state_is_optional():
    arguments = make_tensors(SMALL[4])
    assert torch.equal(selective_scan(**arguments), scan(**arguments)[0])


REJECTED = {
    "u": (lambda t: t[0], "u must have shape (B, D, L), got (4, 6)"),
    "delta": (lambda t: t[:, :, :5], "delta must have shape (B, D, L) = (2, 4, 6), got (2, 4, 5)"),
    "A": (lambda t: t[:3], "A must have shape (D, N) = (4, 3), got (3, 3)"),
    "B": (lambda t: t[0, 0, 0], "B must have shape (B, G, N, L) = (2, 1, 3, 6), got (6,)"),
    "C": (lambda t: t[:, :2], "C must have shape (B, N, L) = (2, 3, 6), got (2, 2, 6)"),
    "D": (lambda t: t[:3], "D must have shape (D,) = (4,), got (3,)"),
    "z": (lambda t: t.transpose(1, 2), "z must have shape (B, D, L) = (2, 4, 6), got (2, 6, 4)"),
    "dt_bias": (lambda t: t[None], "dt_bias must have shape (D,) = (4,), got (1, 4)"),
    "initial_state": (
        lambda t: t[:1],
        "initial_state must have shape (S, D, N) = (2, 4, 3), got (1, 4, 3)",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_shape(name):
    arguments = make_tensors(ScanCase("reject", 2, 4, 6, 3, "grouped", "shared", 2))
    change, message = REJECTED[name]
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError) as error:
        selective_scan(**arguments)
    assert str(error.value) == f"selective_scan: {message}"


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_dtype_device_and_type(name):
    arguments = make_tensors(ScanCase("reject", 2, 4, 6, 3))
    floats = "float64, float32, bfloat16 or float16"
    with pytest.raises(
        ValueError, match=f"^selective_scan: {name} must have dtype {floats}, got int64$"
    ):
        selective_scan(**{**arguments, name: arguments[name].long()})
    if name != "u":
        with pytest.raises(ValueError, match=f"^selective_scan: {name} must be on cpu, got meta$"):
            selective_scan(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(
        TypeError, match=f"^selective_scan: {name} must be a torch.Tensor, got list$"
    ):
        selective_scan(**{**arguments, name: [1.0]})


@pytest.mark.parametrize("name", ["B", "C"])
def test_rejects_groups(name):
    arguments = make_tensors(ScanCase("reject", 2, 4, 6, 3))
    arguments[name] = torch.zeros(2, 3, 3, 6)
    message = f"{name} must have a group count that divides D = 4, got 3"
    with pytest.raises(ValueError, match=f"^selective_scan: {message}$"):
        selective_scan(**arguments)


def test_rejects_seq_meta():
    arguments = make_tensors(ScanCase("reject", 2, 4, 6, 3))
    with pytest.raises(TypeError, match=r"^selective_scan: seq_meta must be a SeqMeta, got dict$"):
        selective_scan(**{**arguments, "seq_meta": {}})
    with pytest.raises(ValueError, match=r"\(S, D, N\) = \(3, 4, 3\), got \(2, 4, 3\)$"):
        selective_scan(**{**arguments, "seq_meta": SeqMeta(cu_seqlens=torch.tensor([0, 1, 2, 3]))})
    with pytest.raises(ValueError, match=r"^seq_meta: mask must have shape \(B, L\) = \(2, 6\)"):
        selective_scan(
            **{**arguments, "seq_meta": SeqMeta(mask=torch.ones(2, 5, dtype=torch.bool))}
        )
