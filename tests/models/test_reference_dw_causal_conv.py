"""The reference of dw_causal_conv.  Judge: a float64 NumPy loop, and finite differences."""

import numpy as np
import pytest
import torch

from ssm.ops.python.reference import dw_causal_conv, dw_causal_conv_step
from ssm.seq_meta import SeqMeta
from tests import judge
from tests.cases import CASES, ConvCase, make
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

OP = "dw_causal_conv"
EXACT = TOLERANCES[OP, "float64"]
SMALL = (
    ConvCase("bare", 2, 2, 4, 3, None, given=""),
    ConvCase("options", 1, 2, 4, 3),
    ConvCase("shorter_than_width", 2, 2, 2, 4),
    ConvCase("width_1", 1, 2, 3, 1),
    ConvCase("packed", 2, 2, 6, 3, layout="cu_seqlens"),
    ConvCase("packed_holes", 2, 1, 7, 4, layout="cu_seqlens mask"),
    ConvCase("seq_idx", 2, 2, 8, 3, layout="seq_idx"),
    ConvCase("padded", 3, 2, 5, 3, layout="mask"),
)


def conv(**arguments):
    return dw_causal_conv(return_final_state=True, **arguments)


@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_judge(case):
    y, state = conv(**make_tensors(case, 1))
    want_y, want_state = judge.dw_causal_conv(**make(case, 1))
    assert_close("y", y, want_y, EXACT)
    assert_close("final_state", state, want_state, EXACT)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_low_precision_matches_judge(case, dtype):
    arguments = make_tensors(case, 2, dtype)
    y, state = conv(**arguments)
    want_y, want_state = judge.dw_causal_conv(**arrays(arguments))
    assert (y.dtype, state.dtype) == (dtype, dtype)
    assert_close("y", y, want_y, TOLERANCES[OP, str(dtype).removeprefix("torch.")])
    assert torch.equal(state, torch.from_numpy(want_state).to(dtype))


@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_matches_torch_conv1d(width):
    arguments = make_tensors(ConvCase("plain", 2, 5, 9, width, None, given="bias"), 3)
    x, weight = arguments["x"], arguments["weight"]
    padded = torch.nn.functional.pad(x, (width - 1, 0))
    want = torch.nn.functional.conv1d(padded, weight[:, None], arguments["bias"], groups=5)
    assert_close("y", dw_causal_conv(**arguments), want, EXACT)
    silu = torch.nn.functional.silu(want)
    for activation, value in (("silu", silu), ("swish", silu), ("identity", want), (None, want)):
        arguments["activation"] = activation
        assert_close(str(activation), dw_causal_conv(**arguments), value, EXACT)
    arguments["weight"] = weight[:, None]
    assert torch.equal(
        dw_causal_conv(**arguments), dw_causal_conv(**{**arguments, "weight": weight})
    )


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(conv, make_tensors(case))


def test_gradgradcheck():
    gradcheck(conv, make_tensors(ConvCase("options", 1, 2, 3, 3)), second=True)


@pytest.mark.parametrize(("ntokens", "memory"), [(1, 3), (1, 5), (3, 3), (3, 4)])
def test_step_equals_scan(ntokens, memory):
    arguments = make_tensors(ConvCase("steps", 2, 5, 9), 4)
    y, state = conv(**arguments)
    x, initial = arguments.pop("x"), arguments.pop("initial_state")
    del arguments["seq_meta"]
    conv_state = torch.nn.functional.pad(initial, (memory - 3, 0), value=5.0)
    found = [
        dw_causal_conv_step(x[..., t : t + ntokens], conv_state, **arguments)
        for t in range(0, 9, ntokens)
    ]
    assert_close("y", torch.cat(found, 2), y, EXACT)
    assert_close("state", conv_state[..., memory - 3 :], state, EXACT)


def test_split_anywhere_equals_whole():
    arguments = make_tensors(ConvCase("split", 2, 3, 9, 4), 5)

    def split(cut, **given):
        first, state = conv(**{**given, "x": given["x"][..., :cut]})
        second, state = conv(**{**given, "x": given["x"][..., cut:], "initial_state": state})
        return torch.cat([first, second], 2), state

    want, want_gradients = conv(**arguments), gradients(conv, arguments)
    for cut in range(10):
        for name, got, value in zip("yh", split(cut, **arguments), want, strict=True):
            assert_close(name, got, value, EXACT)
        found = gradients(lambda cut=cut, **given: split(cut, **given), arguments)
        for name, gradient in found.items():
            assert_close(f"gradient of {name}", gradient, want_gradients[name], EXACT)


def test_packed_equals_separate():
    lengths = [3, 0, 5, 1, 4]
    ends = np.cumsum([0, *lengths]).tolist()
    arguments = make_tensors(ConvCase("packed", 1, 4, sum(lengths) + 2), 6)
    arguments["initial_state"] = torch.randn(5, 4, 3, dtype=torch.float64)
    packed = {**arguments, "seq_meta": SeqMeta(cu_seqlens=torch.tensor(ends))}

    def separate(**given):
        ys, states = [], []
        for s in range(len(lengths)):
            piece = {**given, "x": given["x"][..., ends[s] : ends[s + 1]]}
            piece["initial_state"] = given["initial_state"][s : s + 1]
            y, state = conv(**piece)
            ys.append(y)
            states.append(state)
        return torch.cat([*ys, torch.zeros(1, 4, 2, dtype=torch.float64)], 2), torch.cat(states)

    for name, got, want in zip("yh", conv(**packed), separate(**arguments), strict=True):
        assert_close(name, got, want, EXACT)
    want = gradients(separate, arguments)
    for name, gradient in gradients(conv, packed).items():
        assert_close(f"gradient of {name}", gradient, want[name], EXACT)


@pytest.mark.parametrize("layout", ["mask", "seq_idx", "cu_seqlens", "cu_seqlens mask"])
def test_nan_in_padding_changes_nothing(layout):
    arguments = make_tensors(ConvCase("padded", 3, 4, 16, layout=layout), 7)
    skipped = arguments["seq_meta"].positions(3, 16) < 0
    assert skipped.any()
    poisoned = poison(arguments, {"x": 2}, skipped)
    for got, want in zip(conv(**poisoned), conv(**arguments), strict=True):
        assert torch.equal(got, want)
    assert not conv(**poisoned)[0].movedim(1, 2)[skipped].any()
    found, want = gradients(conv, poisoned), gradients(conv, arguments)
    for name, gradient in found.items():
        assert torch.equal(gradient, want[name]), name
    assert not found["x"].movedim(1, 2)[skipped].any()


def test_batch_without_sequences():
    """Every step is padding, and there is no state, though the window is longer than the batch."""
    arguments = make_tensors(ConvCase("nothing", 1, 3, 2, 8, given="bias"))
    y, state = conv(**{**arguments, "seq_meta": SeqMeta(cu_seqlens=torch.tensor([0]))})
    assert not y.any()
    assert state.shape == (0, 3, 7)


def test_holes_are_invisible():
    """The window holds the last W - 1 inputs that were not skipped."""
    arguments = make_tensors(ConvCase("holes", 1, 3, 9, 4), 8)
    mask = torch.tensor([[True, False, True, True, False, False, True, True, False]])
    y, state = conv(**{**arguments, "seq_meta": SeqMeta(mask=mask)})
    want_y, want_state = conv(**{**arguments, "x": arguments["x"][:, :, mask[0]]})
    assert_close("y", y[:, :, mask[0]], want_y, EXACT)
    assert_close("state", state, want_state, EXACT)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_noncontiguous(case):
    arguments = make_tensors(case, 9)
    for got, want in zip(conv(**strided(arguments)), conv(**arguments), strict=True):
        assert torch.equal(got, want)
    arguments["x"] = arguments["x"][:, :, :1].expand(*arguments["x"].shape)
    copied = {**arguments, "x": arguments["x"].contiguous()}
    for got, want in zip(conv(**arguments), conv(**copied), strict=True):
        assert torch.equal(got, want)


def test_leaves_inputs_alone():
    for case in (SMALL[1], SMALL[3], ConvCase("empty_seq", 2, 3, 0)):
        arguments = make_tensors(case)
        before = {n: t.clone() for n, t in arguments.items() if torch.is_tensor(t)}
        for output in conv(**arguments):
            output.fill_(9.0)
        assert all(torch.equal(arguments[n], t) for n, t in before.items())


def test_final_state_is_optional():
    arguments = make_tensors(SMALL[4])
    assert torch.equal(dw_causal_conv(**arguments), conv(**arguments)[0])


REJECTED = {
    "x": (lambda t: t[0], "x must have shape (B, D, L), got (4, 6)"),
    "weight": (lambda t: t[:3], "weight must have shape (D, W) = (4, 3), got (3, 3)"),
    "bias": (lambda t: t[None], "bias must have shape (D,) = (4,), got (1, 4)"),
    "initial_state": (
        lambda t: t[..., :1],
        "initial_state must have shape (S, D, W - 1) = (2, 4, 2), got (2, 4, 1)",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_shape(name):
    arguments = make_tensors(ConvCase("reject", 2, 4, 6, 3))
    change, message = REJECTED[name]
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError) as error:
        dw_causal_conv(**arguments)
    assert str(error.value) == f"{OP}: {message}"


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_dtype_device_and_type(name):
    arguments = make_tensors(ConvCase("reject", 2, 4, 6, 3))
    floats = "float64, float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=f"^{OP}: {name} must have dtype {floats}, got int64$"):
        dw_causal_conv(**{**arguments, name: arguments[name].long()})
    if name != "x":
        with pytest.raises(ValueError, match=f"^{OP}: {name} must be on cpu, got meta$"):
            dw_causal_conv(**{**arguments, name: arguments[name].to("meta")})
    with pytest.raises(TypeError, match=f"^{OP}: {name} must be a torch.Tensor, got list$"):
        dw_causal_conv(**{**arguments, name: [1.0]})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": torch.zeros(4, 2, 3)},
            ValueError,
            r"weight must have shape \(D, 1, W\) = \(4, 1, 3\), got \(4, 2, 3\)",
        ),
        (
            {"weight": torch.zeros(4, 0)},
            ValueError,
            "weight must have a width of at least 1, got 0",
        ),
        (
            {"activation": "relu"},
            ValueError,
            "activation must be 'silu', 'swish', 'identity' or None, got 'relu'",
        ),
        ({"seq_meta": {}}, TypeError, "seq_meta must be a SeqMeta, got dict"),
        (
            {"seq_meta": SeqMeta(cu_seqlens=torch.tensor([0, 6, 9, 12]))},
            ValueError,
            r"initial_state must have shape \(S, D, W - 1\) = \(3, 4, 2\), got \(2, 4, 2\)",
        ),
    ],
)
def test_rejects_value(change, error, message):
    with pytest.raises(error, match=f"^{OP}: {message}$"):
        dw_causal_conv(**{**make_tensors(ConvCase("reject", 2, 4, 6, 3)), **change})
