"""ssm.ops.selective_state_step on compiled kernels.  Judge: the reference."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssm import ops
from ssm.ops.compiled import selective_state_step as compiled
from ssm.ops.python import reference
from ssm.utils import dispatch
from tests.cases import CASES
from tests.tensors import FLOATS, make_tensors, strided
from tests.tolerances import TOLERANCES, assert_close

OP = "selective_state_step"
BY_NAME = {case.name: case for case in CASES[OP]}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(function, arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Call on a copy of the state; return y and the new state."""
    state = arguments["state"].clone()
    return function(**{**arguments, "state": state}), state


def test_dispatch_serves_the_kernels():
    assert dispatch.why(OP) == f"{OP} on cpu: cpu, the cpu kernels are loaded"


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", CASES[OP], ids=str)
def test_matches_reference(case, dtype):
    arguments = make_tensors(case, dtype=dtype)
    y, state = run(ops.selective_state_step, arguments)
    exact = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    want_y, want_state = run(reference.selective_state_step, exact)
    assert (y.dtype, y.shape, state.dtype) == (dtype, arguments["x"].shape, dtype)
    assert_close("y", y, want_y, TOLERANCES[OP, name_of(dtype)])
    assert_close("state", state, want_state, TOLERANCES[OP, name_of(dtype)])


@pytest.mark.parametrize("name", ["tokens_groups", "heads_tokens", "mamba130m"])
def test_bfloat16_activations_on_a_float32_state(name):
    arguments = make_tensors(BY_NAME[name], dtype=torch.bfloat16)
    arguments["state"] = arguments["state"].float()
    y, state = run(ops.selective_state_step, arguments)
    want_y, want_state = run(reference.selective_state_step, arguments)
    assert_close("state", state, want_state, TOLERANCES[OP, "float32"])
    # Both were rounded, so they may lie on either side of a value between two bfloat16 numbers.
    torch.testing.assert_close(y, want_y, rtol=2**-7, atol=1e-5)


def test_noncontiguous():
    for name in ("tokens_groups", "heads_tokens", "heads_untied"):
        arguments = make_tensors(BY_NAME[name], dtype=torch.float32)
        want_y, want_state = run(ops.selective_state_step, arguments)
        other = strided(arguments)
        y = ops.selective_state_step(**other)
        assert torch.equal(y, want_y)
        assert torch.equal(other["state"], want_state)


def test_threads_agree():
    arguments = make_tensors(BY_NAME["mamba2_130m"], dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(ops.selective_state_step, arguments))
    finally:
        torch.set_num_threads(before)
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(state, results[0][1])


def test_step_equals_scan():
    """Tokens one by one give the outputs and the last state of selective_scan over all of them."""
    generator = torch.Generator().manual_seed(0)
    batch, dim, seqlen, dstate = 2, 18, 37, 16

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, delta, z = (randn(batch, dim, seqlen) for _ in range(3))
    A, skip, bias = -randn(dim, dstate).exp(), randn(dim), randn(dim)
    B, C = randn(batch, dstate, seqlen), randn(batch, dstate, seqlen)
    want, last = ops.selective_scan(u, delta, A, B, C, skip, z, bias, True, True)
    state = torch.zeros(batch, dim, dstate, dtype=torch.float64)
    for t in range(seqlen):
        inputs = (u[..., t], delta[..., t], A, B[..., t], C[..., t], skip, z[..., t], bias)
        y = ops.selective_state_step(state, *inputs)
        assert_close("y", y, want[..., t], TOLERANCES[OP, "float64"])
    assert_close("state", state, last, TOLERANCES[OP, "float64"])


@pytest.mark.parametrize("softplus", [True, False])
def test_gradients_come_from_the_reference(softplus):
    arguments = {**make_tensors(BY_NAME["tokens"], dtype=torch.float64), "softplus": softplus}
    arguments["A"].requires_grad_()
    arguments["x"].requires_grad_()
    results = []
    for function in (compiled.selective_state_step, reference.selective_state_step):
        y, state = run(function, arguments)
        results.append(
            (y, *torch.autograd.grad(y.sum() + state.sum(), [arguments["A"], arguments["x"]]))
        )
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    with torch.no_grad():
        y, _ = run(compiled.selective_state_step, arguments)
    assert not y.requires_grad
    assert_close("y", y, results[1][0], TOLERANCES[OP, "float64"])


def test_a_graph_that_saved_the_state_notices():
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.float32)
    weight = torch.ones((), requires_grad=True)
    loss = (arguments["state"] * weight).sum()
    with torch.no_grad():
        ops.selective_state_step(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode():
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.float32)
    want = run(ops.selective_state_step, arguments)
    with torch.inference_mode():
        got = run(ops.selective_state_step, arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", ["odd", "tokens_indices", "heads_untied", "bare"])
def test_opcheck(name):
    arguments = make_tensors(BY_NAME[name], dtype=torch.float32)
    order = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state_indices", "softplus")
    torch.library.opcheck(torch.ops.ssm.selective_state_step.default, [arguments[n] for n in order])


def test_compile():
    arguments = make_tensors(BY_NAME["heads_tokens"], dtype=torch.float32)
    want = run(ops.selective_state_step, arguments)
    function = torch.compile(ops.selective_state_step, fullgraph=True, backend="aot_eager")
    got = run(function, arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_results_without_data_have_the_strides_of_real_ones():
    def strides(x, state):
        A, B = x.new_ones(4, 2), x.new_ones(3, 2)
        none = (None,) * 4
        return torch.ops.ssm.selective_state_step(state, x, x, A, B, B, *none, True).stride()

    x, state = torch.randn(4, 3).t(), torch.zeros(3, 4, 2)
    with FakeTensorMode() as mode:
        fake = strides(mode.from_tensor(x), mode.from_tensor(state))
    assert fake == strides(x, state)


@pytest.mark.parametrize("name", ["odd", "heads", "tokens", "heads_untied"])
def test_rejects_with_the_sentences_of_the_reference(name):
    """Every shape made wrong in turn, every dtype, every index: the same sentence from both."""
    arguments = make_tensors(BY_NAME[name], dtype=torch.float32)
    wrong = []
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor):
            wrong.append({key: value[..., :-1]})
            wrong.append({key: value[:1].expand(7, *value.shape[1:])})
            wrong.append({key: value.to(torch.int32)})
            wrong.append({key: value[..., None, None]})
    batch = arguments["x"].shape[0]
    for indices in ([-2], [batch], [1, 1, 1]):
        rows = torch.tensor([*indices, *[-1] * batch][:batch], dtype=torch.int32)
        wrong.append({"state_indices": rows})
    wrong.append({"state_indices": torch.zeros(batch)})
    wrong.append({"state_indices": torch.zeros(batch + 1, dtype=torch.int32)})
    for change in wrong:
        sentences = []
        for function in (reference.selective_state_step, compiled.selective_state_step):
            with pytest.raises(ValueError) as caught:
                run(function, {**arguments, **change})
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1]


def test_rejects_what_is_not_a_tensor():
    arguments = make_tensors(BY_NAME["odd"], dtype=torch.float32)
    with pytest.raises(TypeError, match=f"{OP}: A must be a torch.Tensor, got list"):
        ops.selective_state_step(**{**arguments, "A": [1.0]})
    with pytest.raises(TypeError, match=f"{OP}: x must be a torch.Tensor, got list"):
        ops.selective_state_step(**{**arguments, "x": [1.0]})
