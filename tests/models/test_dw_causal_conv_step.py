"""ssm.ops.dw_causal_conv_step on compiled kernels. Judge: the reference in float64."""

import pytest
import torch

from ssm import ops
from ssm.ops.compiled import dw_causal_conv_step as compiled
from ssm.ops.python import reference
from ssm.utils import dispatch
from tests.cases import CASES, ConvCase, ConvStepCase
from tests.tensors import FLOATS, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "dw_causal_conv_step"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_float64(arguments: dict) -> dict:
    return {
        n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for n, t in arguments.items()
    }


def test_is_what_serves():
    assert dispatch.implementation(OP, torch.zeros(1)) is compiled.dw_causal_conv_step


@pytest.mark.parametrize("layout", [dict, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_reference(case, dtype, layout):
    arguments = make_tensors(case, 1, dtype)
    want_arguments = in_float64(arguments)
    want_arguments["conv_state"] = want_arguments["conv_state"].clone()
    want = reference.dw_causal_conv_step(**want_arguments)
    arguments = layout(arguments)
    y = compiled.dw_causal_conv_step(**arguments)
    assert y.dtype == dtype
    assert_close("y", y, want, TOLERANCES[OP, name_of(dtype)])
    assert torch.equal(arguments["conv_state"], want_arguments["conv_state"].to(dtype))


def test_bfloat16_state_beside_float32_inputs():
    arguments = make_tensors(ConvStepCase("mixed", 2, 20, 3, ntokens=2), 2, torch.float32)
    arguments["conv_state"] = arguments["conv_state"].bfloat16()
    twin = {**arguments, "conv_state": arguments["conv_state"].clone()}
    want = reference.dw_causal_conv_step(**twin)
    assert_close("y", ops.dw_causal_conv_step(**arguments), want, TOLERANCES[OP, "float32"])
    assert torch.equal(arguments["conv_state"], twin["conv_state"])


@pytest.mark.parametrize("memory", [3, 4, 6])
def test_continues_a_whole_call(memory):
    arguments = make_tensors(ConvCase("whole", 2, 19, 30), 3, torch.float32)
    del arguments["seq_meta"]
    want = ops.dw_causal_conv(**arguments)
    x, initial = arguments.pop("x"), arguments.pop("initial_state")
    first, state = ops.dw_causal_conv(
        x[..., :20], **arguments, initial_state=initial, return_final_state=True
    )
    conv_state = torch.nn.functional.pad(state, (memory - 3, 0), value=float("nan"))
    rest = [ops.dw_causal_conv_step(x[..., t], conv_state, **arguments) for t in range(20, 30)]
    assert torch.equal(torch.cat([first, torch.stack(rest, 2)], 2), want)


def test_opcheck():
    for name in ("tokens", "circular_indices"):
        case = next(c for c in CASES[OP] if c.name == name)
        arguments = make_tensors(case, 4, torch.float32)
        names = ("x", "conv_state", "weight", "bias", "cache_seqlens", "state_indices")
        operator = torch.ops.ssm.dw_causal_conv_step_fwd.default
        torch.library.opcheck(operator, (*(arguments[n] for n in names), True))


def test_compiles_whole():
    arguments = make_tensors(ConvStepCase("compiled", 2, 5, 4), 5, torch.float32)
    twin = {**arguments, "conv_state": arguments["conv_state"].clone()}
    call = torch.compile(ops.dw_causal_conv_step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(call(**arguments), ops.dw_causal_conv_step(**twin))
        assert torch.equal(arguments["conv_state"], twin["conv_state"])


def test_gradients_come_from_the_reference():
    arguments = make_tensors(ConvStepCase("gradient", 2, 3, 4, ntokens=2), 6)
    arguments["weight"].requires_grad_()
    twin = {**arguments, "conv_state": arguments["conv_state"].clone()}
    found, want = (
        torch.autograd.grad(function(**given).square().sum(), arguments["weight"])[0]
        for function, given in (
            (ops.dw_causal_conv_step, arguments),
            (reference.dw_causal_conv_step, twin),
        )
    )
    assert torch.equal(found, want)


def test_a_step_with_gradients_knows_the_place_in_a_circular_window():
    arguments = make_tensors(ConvStepCase("circular", 2, 3, 4), 7)
    arguments["conv_state"] = torch.randn(2, 3, 4, dtype=torch.float64)
    arguments["cache_seqlens"] = torch.tensor([5, 2], dtype=torch.int32)
    twin = {**arguments, "conv_state": arguments["conv_state"].clone()}
    twin["weight"] = arguments["weight"].clone().requires_grad_()
    want, got = ops.dw_causal_conv_step(**arguments), ops.dw_causal_conv_step(**twin)
    assert got.requires_grad
    assert_close("y", got, want, TOLERANCES[OP, "float64"])
    assert torch.equal(twin["conv_state"], arguments["conv_state"])


REJECTED = {
    "x_dtype": (
        {"x": torch.zeros(2, 3).int()},
        "x must have dtype float64, float32, bfloat16 or float16, got int32",
    ),
    "state_memory": (
        {"conv_state": torch.zeros(2, 3, 2)},
        "conv_state must hold at least W - 1 = 3 inputs, got 2",
    ),
    "state_rows": (
        {"conv_state": torch.zeros(3, 3, 4)},
        "conv_state must have B = 2 rows without state_indices, got 3",
    ),
    "activation": (
        {"activation": "gelu"},
        "activation must be 'silu', 'swish', 'identity' or None, got 'gelu'",
    ),
    "seqlens_negative": (
        {"cache_seqlens": torch.tensor([0, -1], dtype=torch.int32)},
        "cache_seqlens must not be negative, got -1",
    ),
    "indices_twice": (
        {"state_indices": torch.tensor([1, 1], dtype=torch.int32)},
        "state_indices must not name a row twice, got 1",
    ),
    "indices_high": (
        {"state_indices": torch.tensor([0, 2], dtype=torch.int32)},
        "state_indices must lie in -1..1, got 2",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_like_the_reference(name):
    change, sentence = REJECTED[name]
    arguments = {"x": torch.zeros(2, 3), "conv_state": torch.zeros(2, 3, 4)}
    arguments |= {"weight": torch.zeros(3, 4), **change}
    for function in (compiled.dw_causal_conv_step, reference.dw_causal_conv_step):
        with pytest.raises(ValueError) as caught:
            function(**arguments)
        assert str(caught.value) == f"{OP}: {sentence}"
    assert not arguments["conv_state"].any()
