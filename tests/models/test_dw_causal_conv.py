"""ssm.ops.dw_causal_conv on compiled kernels. Judge: the reference in float64."""

import numpy as np
import pytest
import torch

from ssm import ops
from ssm.ops.compiled import dw_causal_conv as compiled
from ssm.ops.python import reference
from ssm.seq_meta import SeqMeta
from ssm.utils import dispatch
from tests.cases import CASES, ConvCase
from tests.tensors import FLOATS, gradcheck, gradients, make_tensors, poison, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "dw_causal_conv"
SMALL = (
    ConvCase("bare", 2, 2, 4, 3, None, given=""),
    ConvCase("options", 1, 2, 4, 4),
    ConvCase("shorter_than_width", 2, 2, 2, 4),
    ConvCase("width_1", 1, 2, 3, 1),
    ConvCase("packed", 2, 2, 6, 3, layout="cu_seqlens"),
    ConvCase("packed_holes", 2, 1, 7, 4, layout="cu_seqlens mask"),
    ConvCase("seq_idx", 2, 2, 8, 3, layout="seq_idx"),
    ConvCase("padded", 3, 2, 5, 3, layout="mask"),
)


def conv(**arguments):
    return compiled.dw_causal_conv(return_final_state=True, **arguments)


def judge(**arguments):
    return reference.dw_causal_conv(return_final_state=True, **arguments)


def in_float64(arguments: dict) -> dict:
    return {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in arguments.items()
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def channel_last(arguments: dict) -> dict:
    x = arguments["x"].transpose(1, 2).contiguous().transpose(1, 2)
    return {**arguments, "x": x}


LAYOUTS = {"time_last": dict, "channel_last": channel_last, "strided": strided}


def test_is_what_serves():
    assert dispatch.implementation(OP, torch.zeros(1)) is compiled.dw_causal_conv


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_reference(case, dtype, layout):
    arguments = make_tensors(case, 1, dtype)
    y, state = conv(**LAYOUTS[layout](arguments))
    want_y, want_state = judge(**in_float64(arguments))
    assert (y.dtype, state.dtype) == (dtype, dtype)
    assert_close("y", y, want_y, TOLERANCES[OP, name_of(dtype)])
    assert torch.equal(state, want_state.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_grad_matches_reference(case, dtype, layout):
    arguments = make_tensors(case, 2, dtype)
    # The weights of the outputs are drawn in float64 and rounded to the dtype: so must the judge's.
    want = gradients(rounded(judge, dtype), in_float64(arguments))
    for name, gradient in gradients(conv, LAYOUTS[layout](arguments)).items():
        value = arguments[name]
        assert gradient.dtype == dtype
        assert gradient.shape == value.shape
        wanted = torch.zeros_like(value) if want[name] is None else want[name]
        assert_close(
            f"gradient of {name}", gradient, wanted, TOLERANCES[f"{OP}_bwd", name_of(dtype)]
        )


class _Round(torch.autograd.Function):
    """The identity, whose gradient is rounded to a dtype."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def rounded(function, dtype):
    return lambda **given: tuple(_Round.apply(out, dtype) for out in function(**given))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    gradcheck(conv, make_tensors(case))


@pytest.mark.parametrize("case", [SMALL[1], SMALL[4], SMALL[7]], ids=str)
def test_opcheck(case):
    for dtype in (torch.float64, torch.float32):
        arguments = make_tensors(case, dtype=dtype)
        meta = arguments["seq_meta"]
        x = arguments["x"]
        ids = None if meta is None else meta.positions(x.shape[0], x.shape[2])
        count = x.shape[0] if meta is None or not meta.state_per_sequence else meta.num_sequences
        tensors = [arguments[n] for n in ("x", "weight", "bias", "initial_state")]
        tensors = [t if t is None else t.clone().requires_grad_() for t in tensors]
        per_sequence = bool(meta and meta.state_per_sequence)
        for with_state in (True, False):
            operator = torch.ops.ssm.dw_causal_conv_fwd.default
            torch.library.opcheck(operator, (*tensors, ids, True, per_sequence, count, with_state))


def test_compiles_whole_and_with_symbolic_sizes():
    def call(x, weight, bias, mask):
        meta = SeqMeta(mask=mask)
        return ops.dw_causal_conv(x, weight, bias, seq_meta=meta, return_final_state=True)

    compiled_call = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, seqlen in ((2, 9), (3, 14)):
        arguments = [torch.randn(batch, 5, seqlen), torch.randn(5, 4), torch.randn(5)]
        arguments = [t.requires_grad_() for t in arguments]
        mask = torch.rand(batch, seqlen) < 0.7
        for got, want in zip(compiled_call(*arguments, mask), call(*arguments, mask), strict=True):
            assert torch.equal(got, want)
        found, want = (
            torch.autograd.grad(f(*arguments, mask)[0].square().sum(), arguments)
            for f in (compiled_call, call)
        )
        for got, value in zip(found, want, strict=True):
            assert torch.equal(got, value)


@pytest.mark.parametrize("layout", ["mask", "seq_idx", "cu_seqlens", "cu_seqlens mask"])
def test_nan_in_padding_changes_nothing(layout):
    arguments = make_tensors(ConvCase("padded", 3, 4, 16, layout=layout), 7, torch.float32)
    skipped = arguments["seq_meta"].positions(3, 16) < 0
    assert skipped.any()
    poisoned = poison(arguments, {"x": 2}, skipped)
    for got, want in zip(conv(**poisoned), conv(**arguments), strict=True):
        assert torch.equal(got, want)
    found, want = gradients(conv, poisoned), gradients(conv, arguments)
    for name, gradient in found.items():
        assert torch.equal(gradient, want[name]), name
    assert not found["x"].movedim(1, 2)[skipped].any()


def test_gradients_through_a_split_equal_the_whole():
    arguments = make_tensors(ConvCase("split", 2, 3, 9, 4), 5)

    def split(cut, **given):
        first, state = conv(**{**given, "x": given["x"][..., :cut]})
        second, state = conv(**{**given, "x": given["x"][..., cut:], "initial_state": state})
        return torch.cat([first, second], 2), state

    want = gradients(conv, arguments)
    for cut in range(10):
        found = gradients(lambda cut=cut, **given: split(cut, **given), arguments)
        for name, gradient in found.items():
            assert_close(f"{name} {cut}", gradient, want[name], TOLERANCES[f"{OP}_bwd", "float64"])


def test_gradient_through_one_output_only():
    arguments = make_tensors(ConvCase("one_output", 2, 3, 9, 4), 6)
    for index in (0, 1):
        found = gradients(lambda index=index, **given: conv(**given)[index], arguments)
        want = gradients(lambda index=index, **given: judge(**given)[index], arguments)
        for name, gradient in found.items():
            wanted = torch.zeros_like(arguments[name]) if want[name] is None else want[name]
            assert_close(name, gradient, wanted, TOLERANCES[f"{OP}_bwd", "float64"])


def test_channel_last_stays_channel_last():
    x = torch.randn(2, 7, 5).transpose(1, 2).requires_grad_()
    y = ops.dw_causal_conv(x, torch.randn(5, 4))
    assert y.stride() == x.stride()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.stride() == x.stride()


@pytest.mark.parametrize("layout", ["time_last", "channel_last"])
def test_threads_agree(layout):
    case = ConvCase("threads", 2, 70, 1300, layout="cu_seqlens mask")
    arguments = LAYOUTS[layout](make_tensors(case, 8, torch.float32))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append([*conv(**arguments), *gradients(conv, arguments).values()])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


def test_expanded_inputs():
    """Stride 0: one row, one channel's filter, for all."""
    x = torch.randn(1, 1, 9, dtype=torch.float64).expand(3, 4, 9)
    weight = torch.randn(1, 4, dtype=torch.float64).expand(4, 4)
    want = reference.dw_causal_conv(x, weight)
    assert_close("y", ops.dw_causal_conv(x, weight), want, TOLERANCES[OP, "float64"])


def test_autocast_and_mixed_dtypes():
    x = torch.randn(2, 5, 9, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.dw_causal_conv(x, weight)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, x.dtype, weight.dtype)


def test_refuses_a_second_derivative():
    x = torch.randn(1, 2, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.dw_causal_conv(x, x[0, :, :2]).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="dw_causal_conv: a second derivative must be taken"):
        dx.sum().backward()


X, WEIGHT = torch.zeros(2, 3, 5), torch.zeros(3, 4)
REJECTED = {
    "x_rank": ({"x": X[0]}, "x must have shape (B, D, L), got (3, 5)"),
    "x_dtype": (
        {"x": X.long()},
        "x must have dtype float64, float32, bfloat16 or float16, got int64",
    ),
    "weight_shape": ({"weight": WEIGHT[:2]}, "weight must have shape (D, W) = (3, 4), got (2, 4)"),
    "bias_shape": ({"bias": X[0, 0]}, "bias must have shape (D,) = (3,), got (5,)"),
    "activation": (
        {"activation": "gelu"},
        "activation must be 'silu', 'swish', 'identity' or None, got 'gelu'",
    ),
    "initial_state_shape": (
        {"initial_state": X},
        "initial_state must have shape (S, D, W - 1) = (2, 3, 3), got (2, 3, 5)",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_like_the_reference(name):
    change, sentence = REJECTED[name]
    arguments = {"x": X, "weight": WEIGHT, **change}
    for function in (compiled.dw_causal_conv, reference.dw_causal_conv):
        with pytest.raises(ValueError) as caught:
            function(**arguments)
        assert str(caught.value) == f"{OP}: {sentence}"


def test_rejects_wrong_types():
    for change, sentence in (
        ({"weight": [1.0]}, "weight must be a torch.Tensor, got list"),
        ({"seq_meta": np.zeros(2)}, "seq_meta must be a SeqMeta, got ndarray"),
    ):
        with pytest.raises(TypeError, match=sentence):
            ops.dw_causal_conv(**{"x": X, "weight": WEIGHT, **change})
