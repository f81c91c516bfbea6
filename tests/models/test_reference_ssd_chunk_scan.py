"""The reference of ssd_chunk_scan.  Judge: a float64 NumPy loop over tokens, without chunks."""

import numpy as np
import pytest
import torch

from ssm.ops.python.reference import selective_scan, ssd_chunk_scan
from ssm.seq_meta import SeqMeta
from tests import judge
from tests.cases import CASES, SsdCase, make
from tests.tensors import (
    FLOATS,
    arrays,
    gradcheck,
    gradients,
    make_tensors,
    poison,
    strided,
)
from tests.tolerances import TOLERANCES, assert_close

OP = "ssd_chunk_scan"
EXACT = TOLERANCES[OP, "float64"]
TIME_AXES = {"X": 1, "dt": 1, "B": 1, "C": 1, "z": 1}
SMALL = (
    SsdCase("bare", 2, 3, 1, 2, 2, 2, given="", softplus=False),
    SsdCase("options", 1, 5, 2, 2, 1, 2, 2, 1, skip="channel"),
    SsdCase("packed", 2, 6, 2, 1, 2, 4, layout="cu_seqlens"),
    SsdCase("packed_holes", 1, 7, 1, 2, 1, 3, layout="cu_seqlens mask"),
    SsdCase("seq_idx", 2, 8, 1, 1, 2, 3, layout="seq_idx"),
    SsdCase("padded", 3, 4, 1, 2, 1, 2, layout="mask"),
)


def scan(**arguments):
    return ssd_chunk_scan(return_final_states=True, **arguments)


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case):
    y, states = scan(**make_tensors(case, 1))
    want_y, want_states = judge.ssd_chunk_scan(**make(case, 1))
    assert_close("y", y, want_y, EXACT)
    assert_close("final_states", states, want_states, EXACT)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_low_precision_matches_judge(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    y, states = scan(**arguments)
    want_y, want_states = judge.ssd_chunk_scan(**arrays(arguments))
    assert (y.dtype, states.dtype) == (dtype, torch.float32)
    assert_close("y", y, want_y, TOLERANCES[OP, str(dtype).removeprefix("torch.")])
    assert_close("final_states", states, want_states, TOLERANCES[OP, "float32"])


@pytest.mark.parametrize("layout", ["", "cu_seqlens mask", "seq_idx mask"])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 16, 23, 24, 100])
def test_chunk_size_does_not_matter(layout, chunk_size):
    case = SsdCase("chunks", 2, 23, 2, 3, 4, chunk_size, 2, layout=layout)
    y, states = scan(**make_tensors(case, 3))
    want_y, want_states = judge.ssd_chunk_scan(**make(case, 3))
    assert_close("y", y, want_y, EXACT)
    assert_close("final_states", states, want_states, EXACT)


def test_matches_judge_with_strong_decay_in_float32():
    """A difference of cumulative sums would lose the small decays behind a large one."""
    arguments = make(SsdCase("strong", 1, 64, 1, 1, 1, 64, given="", softplus=False))
    arguments["A"][:] = -1.0
    arguments["dt"][:] = 1e-3
    arguments["dt"][0, :32] = 1e3
    tensors = {n: torch.from_numpy(a).float() for n, a in arguments.items() if n in "X dt A B C"}
    y, states = scan(**tensors, chunk_size=64)
    want_y, want_states = judge.ssd_chunk_scan(**{**arguments, **arrays(tensors)})
    assert_close("y", y, want_y, TOLERANCES["selective_scan", "float32"])
    assert_close("final_states", states, want_states, TOLERANCES["selective_scan", "float32"])


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(scan, make_tensors(case))


def test_equals_selective_scan():
    """One decay per head is the selective scan with that decay in all its channels."""
    arguments = make_tensors(SsdCase("heads", 2, 9, 4, 3, 5, 4, 2, 2), 4)
    y, states = scan(**arguments)

    def channels(tensor, axis):
        return tensor.repeat_interleave(3, axis)

    x, z = (arguments[n].flatten(2).transpose(1, 2) for n in ("X", "z"))
    B, C = (arguments[n].permute(0, 2, 3, 1) for n in "BC")
    D, dt_bias = (channels(arguments[n], 0) for n in ("D", "dt_bias"))
    delta = channels(arguments["dt"], 2).transpose(1, 2)
    A = channels(arguments["A"], 0)[:, None].expand(12, 5)
    initial = arguments["initial_states"].flatten(1, 2)
    want_y, want_state = selective_scan(
        x, delta, A, B, C, D, z, dt_bias, True, True, initial_state=initial
    )
    assert_close("y", y.flatten(2).transpose(1, 2), want_y, EXACT)
    assert_close("state", states.flatten(1, 2), want_state, EXACT)


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.2, 0.4), (0.0, 0.1)])
def test_dt_limit(limit):
    arguments = make(SsdCase("limit", 2, 9, 2, 3, 4, 4, layout="mask"), 5)
    tensors = make_tensors(SsdCase("limit", 2, 9, 2, 3, 4, 4, layout="mask"), 5)
    y, states = scan(**tensors, dt_limit=limit)
    want_y, want_states = judge.ssd_chunk_scan(**arguments, dt_limit=limit)
    assert_close("y", y, want_y, EXACT)
    assert_close("final_states", states, want_states, EXACT)


def test_split_anywhere_equals_whole():
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
            assert_close(f"gradient of {name}", gradient, want_gradients[name], EXACT)


def test_packed_equals_separate():
    lengths = [3, 0, 5, 1, 9]
    ends = np.cumsum([0, *lengths]).tolist()
    arguments = make_tensors(SsdCase("packed", 1, sum(lengths) + 2, 2, 3, 2, 4), 7)
    arguments["initial_states"] = torch.randn(5, 2, 3, 2, dtype=torch.float64)
    packed = {**arguments, "seq_meta": SeqMeta(cu_seqlens=torch.tensor(ends))}

    def separate(**given):
        ys, states = [], []
        for s in range(len(lengths)):
            piece = {n: given[n][:, ends[s] : ends[s + 1]] for n in TIME_AXES}
            piece["initial_states"] = given["initial_states"][s : s + 1]
            y, state = scan(**{**given, **piece})
            ys.append(y)
            states.append(state)
        return torch.cat([*ys, torch.zeros(1, 2, 2, 3, dtype=torch.float64)], 1), torch.cat(states)

    for name, got, want in zip("yh", scan(**packed), separate(**arguments), strict=True):
        assert_close(name, got, want, EXACT)
    want = gradients(separate, arguments)
    for name, gradient in gradients(scan, packed).items():
        assert_close(f"gradient of {name}", gradient, want[name], EXACT)


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


def test_batch_without_sequences():
    arguments = make_tensors(SsdCase("nothing", 2, 3, 2, 3, 4, 2, given="D z dt_bias"))
    y, states = scan(**{**arguments, "seq_meta": SeqMeta(cu_seqlens=torch.tensor([0]))})
    assert not y.any()
    assert states.shape == (0, 2, 3, 4)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 9)
    for got, want in zip(scan(**strided(arguments)), scan(**arguments), strict=True):
        # einsum may choose another order of summation for another layout.
        assert_close("output", got, want, EXACT)


def test_leaves_inputs_alone():
    for case in (SMALL[1], SsdCase("empty_seq", 2, 0, 2, 3, 2, 4)):
        arguments = make_tensors(case)
        before = {n: t.clone() for n, t in arguments.items() if torch.is_tensor(t)}
        for output in scan(**arguments):
            output.fill_(9.0)
        assert all(torch.equal(arguments[n], t) for n, t in before.items())


def test_final_states_are_optional():
    arguments = make_tensors(SMALL[2])
    assert torch.equal(ssd_chunk_scan(**arguments), scan(**arguments)[0])


REJECTED = {
    "X": (lambda t: t[0], "X must have shape (B, L, H, P), got (6, 4, 3)"),
    "dt": (lambda t: t[:, :5], "dt must have shape (B, L, H) = (2, 6, 4), got (2, 5, 4)"),
    "A": (lambda t: t[:3], "A must have shape (H,) = (4,), got (3,)"),
    "B": (lambda t: t[:, :, 0], "B must have shape (B, L, G, N) = (2, 6, 1, N), got (2, 6, 5)"),
    "C": (
        lambda t: t[..., :2],
        "C must have shape (B, L, G, N) = (2, 6, 2, 5), got (2, 6, 2, 2)",
    ),
    "D": (lambda t: t[:3], "D must have shape (H,) = (4,), got (3,)"),
    "z": (lambda t: t[:1], "z must have shape (B, L, H, P) = (2, 6, 4, 3), got (1, 6, 4, 3)"),
    "dt_bias": (lambda t: t[None], "dt_bias must have shape (H,) = (4,), got (1, 4)"),
    "initial_states": (
        lambda t: t[:1],
        "initial_states must have shape (S, H, P, N) = (2, 4, 3, 5), got (1, 4, 3, 5)",
    ),
}
CASE = SsdCase("reject", 2, 6, 4, 3, 5, 4, 2, 2)


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_shape(name):
    arguments = make_tensors(CASE)
    change, message = REJECTED[name]
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError) as error:
        ssd_chunk_scan(**arguments)
    assert str(error.value) == f"{OP}: {message}"


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_dtype_device_and_type(name):
    arguments = make_tensors(CASE)
    floats = "float64, float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=f"^{OP}: {name} must have dtype {floats}, got int64$"):
        ssd_chunk_scan(**{**arguments, name: arguments[name].long()})
    if name != "X":
        with pytest.raises(ValueError, match=f"^{OP}: {name} must be on cpu, got meta$"):
            ssd_chunk_scan(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(TypeError, match=f"^{OP}: {name} must be a torch.Tensor, got list$"):
        ssd_chunk_scan(**{**arguments, name: [1.0]})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"B": torch.zeros(2, 6, 3, 5)},
            ValueError,
            "B must have a group count that divides H = 4",
        ),
        (
            {"C": torch.zeros(2, 6, 0, 5)},
            ValueError,
            "C must have a group count that divides H = 4",
        ),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 4.0}, TypeError, "chunk_size must be an int, got float"),
        ({"dt_limit": (1.0, 0.0)}, ValueError, r"dt_limit must be \(low, high\), got \(1.0, 0.0\)"),
        ({"dt_limit": 1.0}, ValueError, r"dt_limit must be \(low, high\), got 1.0"),
        ({"seq_meta": {}}, TypeError, "seq_meta must be a SeqMeta, got dict"),
    ],
)
def test_rejects_value(change, error, message):
    with pytest.raises(error, match=f"^{OP}: {message}"):
        ssd_chunk_scan(**{**make_tensors(CASE), **change})
