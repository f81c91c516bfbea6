"""Derivatives of ``torch.func`` and the forward mode: what plain torch can do, operators can.

Judges: the backward of autograd, itself judged elsewhere, through the identity ``w . (J v) =
(w J) . v``; differences of gradients for a second derivative; single calls for ``torch.vmap``.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from ssm import ops
from ssm.modules.attention import MHA
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.modules.mlp import GatedMLP
from ssm.ops import projection
from ssm.utils.dispatch import use_backend
from tests.tolerances import Tolerance, assert_close

CLOSE = Tolerance(1e-10, 1e-10, "float64, other orders of the same sums")
DIFFERENCES = Tolerance(1e-5, 1e-5, "central differences, h = 1e-6, in float64")
SINGLE = Tolerance(1e-4, 1e-4, "float32, sums over 2 x 5 x 512 products relative to the largest")
B, L, D, N, H, P, G, Q, C = 2, 5, 6, 4, 4, 3, 2, 2, 3

# Operator -> call of it with tensors, shapes of the tensors; a negative first number: negative.
CALLS = {
    "selective_scan": (
        lambda *t: ops.selective_scan(*t, softplus=True, return_last_state=True),
        [(B, D, L), (B, D, L), (-D, N), (B, N, L), (B, N, L), (D,), (B, D, L), (D,)],
    ),
    "ssd_chunk_scan": (
        lambda X, dt, A, b, c, D, z, h, bias: ops.ssd_chunk_scan(
            *(X, dt, A, b, c, 2, D, z, None, h),
            dt_bias=bias,
            softplus=True,
            return_final_states=True,
        ),
        [
            *((B, L, H, P), (B, L, H), (-H,), (B, L, G, N), (B, L, G, N), (H,)),
            *((B, L, H, P), (B, H, P, N), (H,)),
        ],
    ),
    "ssd_chunk_cumsum": (
        lambda dt, A, bias: ops.ssd_chunk_cumsum(dt, A, Q, dt_bias=bias, softplus=True),
        [(B, L, H), (-H,), (H,)],
    ),
    "ssd_chunk_state": (
        ops.ssd_chunk_state,
        [(B, L, H, P), (B, L, G, N), (B, H, C, Q), (-B, H, C, Q)],
    ),
    "ssd_state_passing": (
        lambda s, a, h: ops.ssd_state_passing(s, a, initial_states=h),
        [(B, C, H, P, N), (-B, H, C, Q), (B, H, P, N)],
    ),
    "ssd_bmm_chunk": (lambda c, b: ops.ssd_bmm_chunk(c, b, Q), [(B, L, G, N), (B, L, G, N)]),
    "ssd_chunk_output": (
        lambda CB, x, dt, a, c, h, D, z: ops.ssd_chunk_output(CB, x, dt, a, c, h, D=D, z=z),
        [
            *((B, C, G, Q, Q), (B, L, H, P), (B, H, C, Q), (-B, H, C, Q), (B, L, G, N)),
            *((B, C, H, P, N), (H,), (B, L, H, P)),
        ],
    ),
    "dw_causal_conv": (
        lambda x, w, bias, h: ops.dw_causal_conv(
            x, w, bias, initial_state=h, return_final_state=True
        ),
        [(B, D, L), (D, 4), (D,), (B, D, 3)],
    ),
    "fused_layer_norm": (ops.fused_layer_norm, [(B, L, D), (D,), (D,), (B, L, D)]),
    "gated_norm": (ops.gated_norm, [(B, L, D), (D,), (D,), (B, L, D)]),
    "swiglu": (ops.swiglu, [(B, L, D), (B, L, D)]),
    # The state is an input that is written to: a copy is.
    "selective_state_step": (
        lambda s, *t: (ops.selective_state_step(s := s.clone(), *t), s),
        [(B, D, N), (B, D), (B, D), (-D, N), (B, N), (B, N), (D,), (B, D), (D,)],
    ),
    "dw_causal_conv_step": (
        lambda x, s, *t: (ops.dw_causal_conv_step(x, s := s.clone(), *t), s),
        [(B, D), (B, D, 3), (D, 4), (D,)],
    ),
}
parametrize_calls = pytest.mark.parametrize("op", CALLS)


def draw(op):
    call, shapes = CALLS[op]
    torch.manual_seed(0)
    tensors = [torch.randn([abs(n) for n in s], dtype=torch.float64) for s in shapes]
    signed = [-t.abs() if s[0] < 0 else t for t, s in zip(tensors, shapes, strict=True)]
    return (lambda *t: as_tuple(call(*t))), tuple(signed)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def noise(tensors):
    return tuple(torch.randn_like(t) for t in tensors)


def dot(left, right):
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def backward(call, inputs, weights):
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(dot(call(*leaves), weights), leaves)


def duals(call, inputs, tangents):
    with forward_ad.dual_level():
        found = call(*map(forward_ad.make_dual, inputs, tangents))
        return tuple(forward_ad.unpack_dual(y).tangent for y in found)


def test_every_operator_is_here():
    assert set(CALLS) == set(ops.__all__)


@parametrize_calls
@pytest.mark.parametrize(
    "forwards", [lambda *a: jvp(*a)[1], duals], ids=["torch.func.jvp", "dual_level"]
)
def test_forward_mode(op, forwards):
    call, inputs = draw(op)
    tangents, weights = noise(inputs), noise(call(*inputs))
    want = dot(backward(call, inputs, weights), tangents)
    got = dot(weights, forwards(call, inputs, tangents))
    assert abs(float(want)) > 1e-3
    assert_close("w J v", got, want, CLOSE)


@parametrize_calls
@pytest.mark.parametrize("axes", [(0, -1), (0, 1), (-2, -1)], ids=str)
def test_fake_results_lie_in_memory_as_real_ones(op, axes):
    """torch.compile plans with the strides of fakes: for inputs that are dense in another order."""
    call, inputs = draw(op)
    lies = [t.transpose(*axes).contiguous().transpose(*axes) if t.dim() > 1 else t for t in inputs]

    def strides(given):
        leaves = [t.detach().requires_grad_() for t in given]
        outputs = call(*leaves)
        gradients = torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
        return [(t.dtype, t.shape, t.stride()) for t in (*outputs, *gradients)]

    want = strides(lies)
    with FakeTensorMode() as mode:
        assert strides([mode.from_tensor(t) for t in lies]) == want


@parametrize_calls
def test_gradient_of_torch_func(op):
    call, inputs = draw(op)
    weights = noise(call(*inputs))
    got = grad(lambda *t: dot(call(*t), weights), argnums=tuple(range(len(inputs))))(*inputs)
    for g, w in zip(got, backward(call, inputs, weights), strict=True):
        assert_close("gradient", g, w, CLOSE)


@parametrize_calls
def test_second_derivative(op):
    call, inputs = draw(op)
    direction, weights = noise(inputs), noise(call(*inputs))

    def gradient(*tensors):  # of a square: it is not constant for a linear operator either
        square = lambda *t: dot([y * y for y in call(*t)], weights)  # noqa: E731
        return grad(square, argnums=tuple(range(len(inputs))))(*tensors)

    _, got = jvp(gradient, inputs, direction)
    step = 1e-6
    above = gradient(*(t + step * d for t, d in zip(inputs, direction, strict=True)))
    below = gradient(*(t - step * d for t, d in zip(inputs, direction, strict=True)))
    for g, a, b in zip(got, above, below, strict=True):
        scale = 1 + float(g.abs().max())
        assert_close("second", g / scale, (a - b) / (2 * step * scale), DIFFERENCES)


@parametrize_calls
@pytest.mark.parametrize("follows", [False, True])
def test_vmap(op, follows):
    """A batch of calls is the calls one by one, and so are its gradients."""
    call, inputs = draw(op)
    stacked = [torch.stack([t, 0.5 * t]).requires_grad_(follows) for t in inputs]
    got = vmap(call)(*stacked)
    single = [call(*(t[i] for t in stacked)) for i in range(2)]
    for g, *w in zip(got, *single, strict=True):
        assert_close("output", g, torch.stack(w), CLOSE)
    if follows:
        weights = noise(got)
        got = torch.autograd.grad(dot(got, weights), stacked)
        want = sum(dot(y, [w[i] for w in weights]) for i, y in enumerate(single))
        for g, w in zip(got, torch.autograd.grad(want, stacked), strict=True):
            assert_close("gradient", g, w, CLOSE)


@parametrize_calls
def test_nested_vmap(op):
    """Gradients are followed from inside two levels."""
    call, inputs = draw(op)
    stacked = [torch.stack([t, 0.5 * t]).unsqueeze(1).requires_grad_() for t in inputs]
    got = vmap(vmap(call))(*stacked)
    want = vmap(call)(*(t.squeeze(1) for t in stacked))
    weights = noise(want)
    gradients = torch.autograd.grad(dot([y.squeeze(1) for y in got], weights), stacked)
    for g, w in zip(gradients, torch.autograd.grad(dot(want, weights), stacked), strict=True):
        assert_close("gradient", g, w, CLOSE)


@parametrize_calls
def test_gradient_per_sample(op):
    call, inputs = draw(op)
    stacked = tuple(torch.stack([t, 0.5 * t]) for t in inputs)
    loss = lambda *t: dot(call(*t), call(*t))  # noqa: E731
    got = vmap(grad(loss))(*stacked)
    want = [grad(loss)(*(t[i] for t in stacked)) for i in range(2)]
    assert_close("gradient", got, torch.stack(want), CLOSE)


@pytest.mark.parametrize("op", ["selective_scan", "dw_causal_conv", "swiglu"])
def test_compiled_forward_mode(op):
    call, inputs = draw(op)
    tangents = noise(inputs)
    torch._dynamo.reset()  # each operator is the first of its trace
    compiled = torch.compile(lambda *t: jvp(call, t, tangents)[1], backend="eager")
    for g, w in zip(compiled(*inputs), jvp(call, inputs, tangents)[1], strict=True):
        assert_close("tangent", g, w, CLOSE)


MODULES = {
    "mamba1": lambda width: Mamba1(width),
    "mamba2": lambda width: Mamba2(width, d_state=8, headdim=8, chunk_size=4),
    "mlp": lambda width: GatedMLP(width),
    "mha": lambda width: MHA(width, 4, num_heads_kv=2, rotary_emb_dim=8, d_conv=3),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("width", "dtype"), [(32, torch.float64), (512, torch.float32)], ids=["small", "projected"]
)
def test_modules(name, width, dtype):
    """Weights wide enough are multiplied in our own way, which must not lose a tangent."""
    torch.manual_seed(0)
    module = MODULES[name](width).to(dtype)
    parameters = {n: p.detach() for n, p in module.named_parameters()}
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
    x = torch.randn(2, L, width, dtype=dtype)
    call = lambda parameters: functional_call(module, parameters, (x,))  # noqa: E731
    weights = torch.randn_like(call(parameters))
    want = torch.autograd.grad((module(x) * weights).sum(), list(module.parameters()))
    # torch has a forward mode of attention in its plain form only.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangent = jvp(call, (parameters,), (tangents,))
        gradient = grad(lambda parameters: (call(parameters) * weights).sum())(parameters)
    tolerance = CLOSE if dtype == torch.float64 else SINGLE
    for (n, g), w in zip(gradient.items(), want, strict=True):
        scale = 1 + float(w.abs().max())
        assert_close(n, g / scale, w / scale, tolerance)
    parts = [(w * t).sum() for w, t in zip(want, tangents.values(), strict=True)]
    scale = 1 + sum(float(p.abs()) for p in parts)
    assert_close("w J v", (weights * tangent).sum() / scale, sum(parts) / scale, tolerance)


def test_projection_keeps_tangents():
    linear = torch.nn.Linear(512, 1024)
    x, tangent = torch.randn(3, 512), torch.randn(3, 512)
    with forward_ad.dual_level():
        y = projection.project(linear, forward_ad.make_dual(x, tangent))
        got = forward_ad.unpack_dual(y).tangent
    assert_close("tangent", got, tangent @ linear.weight.T, SINGLE)


def test_a_forced_backend_yields():
    """A backend that is forced has no forward mode either; wrong zeros would be worse."""
    call, inputs = draw("swiglu")
    tangents = noise(inputs)
    with use_backend("python"):
        (want,) = jvp(call, inputs, tangents)[1]
    with use_backend("auto"):
        (got,) = jvp(call, inputs, tangents)[1]
    assert torch.equal(got, want)
