"""Calls at the edge of the contract, on every backend. Judge: the reference, or plain sense."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from ssm import ops
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.attention import MHA
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.ops.python import reference
from ssm.seq_meta import SeqMeta
from ssm.utils.dispatch import use_backend

BACKENDS = pytest.mark.parametrize("backend", ["python", "cpu"])


@BACKENDS
@pytest.mark.parametrize("channel_last", [False, True])
def test_all_steps_skipped(backend, channel_last):
    x = torch.full((2, 40, 70), torch.nan).requires_grad_()
    given = x.mT.contiguous().mT if channel_last else x
    weight = torch.randn(40, 4, requires_grad=True)
    meta = SeqMeta(mask=torch.zeros(2, 70, dtype=torch.bool))
    rate, B = -torch.rand(40, 3), torch.randn(2, 3, 70)
    with use_backend(backend):
        for y in (
            ops.dw_causal_conv(given, weight, seq_meta=meta),
            ops.selective_scan(given, given, rate, B, B, seq_meta=meta),
        ):
            assert (y == 0).all()
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert (dx == 0).all()


@BACKENDS
def test_more_sequences_than_steps(backend):
    meta = SeqMeta(cu_seqlens=torch.tensor([0, 0, 0, 0, 0, 2]))
    x, weight = torch.randn(1, 3, 2, requires_grad=True), torch.randn(3, 4)
    rate, B = -torch.rand(3, 5), torch.randn(1, 5, 2)
    with use_backend(backend):
        for y, alone in (
            (ops.dw_causal_conv(x, weight, seq_meta=meta), ops.dw_causal_conv(x, weight)),
            (
                ops.selective_scan(x, x, rate, B, B, seq_meta=meta),
                ops.selective_scan(x, x, rate, B, B),
            ),
        ):
            torch.testing.assert_close(y, alone)
            dx, wanted = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, alone))
            torch.testing.assert_close(dx, wanted)


@BACKENDS
@pytest.mark.parametrize("headdim", [1, 128, 1000])
def test_step_without_states(backend, headdim):
    state, x = torch.zeros(2, 3, headdim, 0), torch.randn(2, 3, headdim)
    nothing = torch.zeros(2, 0)
    D = torch.randn(3)
    with use_backend(backend):
        for _ in range(20):
            y = ops.selective_state_step(
                state, x, torch.rand(2, 3), -torch.rand(3), nothing, nothing, D
            )
    torch.testing.assert_close(y, D[:, None] * x)


@BACKENDS
@pytest.mark.parametrize(("rate", "dt"), [(-torch.inf, 0.5), (-1e38, 50.0), (-3.0, 1e30)])
@pytest.mark.parametrize("dstate", [1, 5, 16])
def test_decay_to_nothing(backend, rate, dt, dstate):
    state = torch.ones(2, 20, dstate)
    x, rates = torch.zeros(2, 20), torch.full((20, dstate), rate)
    ones = torch.ones(2, dstate)
    with use_backend(backend):
        y = ops.selective_state_step(
            state, x, torch.full((2, 20), dt), rates, ones, ones, softplus=False
        )
        whole, last = ops.selective_scan(
            x[:, :, None],
            torch.full((2, 20, 1), dt),
            rates,
            ones[:, :, None],
            ones[:, :, None],
            return_last_state=True,
            initial_state=torch.ones(2, 20, dstate),
        )
    # Without AVX-512 a decay ends at 2^-126.
    for found in (state, y, whole, last):
        assert (found.abs() <= 2.0**-120).all()


@BACKENDS
def test_lazily_negated_views(backend):
    weight = torch.imag(torch.tensor([1 + 1j, 1 + 2j, 1 + 3j]).conj())
    assert weight.is_neg()
    x = torch.tensor([[1.0, 2.0, 4.0]])
    with use_backend(backend), torch.no_grad():
        got = ops.fused_layer_norm(x, weight, None, prenorm=False)
        step = ops.selective_state_step(
            torch.zeros(1, 3, 2), x, x, weight[:, None].expand(3, 2), x[:, :2], x[:, 1:], weight
        )
    want = reference.fused_layer_norm(x, weight.clone(), None, prenorm=False)
    torch.testing.assert_close(got, want)
    plain = weight.clone()
    want = reference.selective_state_step(
        torch.zeros(1, 3, 2), x, x, plain[:, None].expand(3, 2), x[:, :2], x[:, 1:], plain
    )
    torch.testing.assert_close(step, want)


@BACKENDS
def test_lazily_negated_view_by_name(backend):
    numbers = torch.arange(1.0, 7.0).view(1, 3, 2)
    view = torch.complex(numbers, -numbers).conj().imag
    assert view.is_neg()
    x, rates = torch.ones(1, 3, 4), -torch.ones(3, 2)
    B = torch.ones(1, 2, 4)
    arguments = (x, x, rates, B, B)
    with use_backend(backend):
        y = ops.selective_scan(*arguments, initial_state=view)
        gated = ops.swiglu(view, numbers)
    torch.testing.assert_close(y, reference.selective_scan(*arguments, initial_state=numbers))
    torch.testing.assert_close(gated, reference.swiglu(numbers, numbers))


def test_kernels_refuse_lazily_negated_views():
    kernels = pytest.importorskip("ssm_kernels")
    # The last is one number; the others differ in the axis whose stride tells.
    for shape in ((3, 5), (1, 5), (3, 1), (1, 1)):
        numbers = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
        view = torch.complex(numbers, -numbers).conj().imag
        assert view.is_neg()
        for name, kind in (("gate", "an"), ("up", "an"), ("y", "a writable")):
            arguments = dict.fromkeys(("gate", "up"), numbers) | {"y": torch.empty(shape)}
            with pytest.raises(TypeError) as caught:
                kernels.swiglu_fwd(**{**arguments, name: view})
            assert str(caught.value) == (
                f"swiglu: {name} must be {kind} array or tensor with DLPack and at most 6 axes, "
                "got Tensor: a lazily negated view, without resolve_neg()"
            )
        # Other views of complex numbers have such strides too.
        y = torch.complex(numbers, numbers).imag
        kernels.swiglu_fwd(numbers, torch.complex(numbers, numbers).real, y=y)
        want = numbers * numbers * torch.sigmoid(numbers)
        torch.testing.assert_close(y, want)


@BACKENDS
def test_numbers_beyond_64_bits(backend):
    x, weight, rate = torch.ones(1, 3, 2, 2), torch.ones(2), -torch.ones(2)
    dt, B = torch.ones(1, 3, 2), torch.ones(1, 3, 1, 4)
    with use_backend(backend):
        y = ops.ssd_chunk_scan(x, dt, rate, B, B, 2**70)
        assert torch.equal(y, ops.ssd_chunk_scan(x, dt, rate, B, B, 3))
        assert 0 < ops.gated_norm(dt, weight, eps=2**70).max() < 1e-9
        assert 0 < ops.fused_layer_norm(dt, weight, None, None, True, 2**70, False).max() < 1e-9


@BACKENDS
def test_norm_of_many_axes(backend):
    x, weight = torch.randn(1, 2, 1, 2, 1, 2, 3, 5), torch.randn(5)
    with use_backend(backend):
        y, s = ops.fused_layer_norm(x, weight, None, residual=x)
        flat, _ = ops.fused_layer_norm(x.view(-1, 5), weight, None, residual=x.view(-1, 5))
        torch.testing.assert_close(y, flat.view(x.shape))
        torch.testing.assert_close(s, 2 * x)
        # Every option reaches what is computed.
        low, options = x.bfloat16(), {"is_rms": True, "eps": 0.5, "residual_in_fp32": False}
        y, s = ops.fused_layer_norm(low, weight, None, residual=low, **options)
        assert s.dtype == torch.bfloat16
        flat, _ = ops.fused_layer_norm(low.view(-1, 5), weight, None, low.view(-1, 5), **options)
        assert torch.equal(y, flat.view(x.shape))
        gate = {"is_rms": False, "eps": 0.5, "norm_before_gate": False}
        y = ops.gated_norm(x, weight, None, x, **gate)
        flat = ops.gated_norm(x.view(-1, 5), weight, None, x.view(-1, 5), **gate)
        assert torch.equal(y, flat.view(x.shape))


class Marked(torch.Tensor):
    """A subclass, which torch hands on from the arguments to the results."""


@BACKENDS
def test_subclasses_stay_what_they_are(backend):
    gate = torch.randn(2, 6)
    with use_backend(backend):
        y = ops.swiglu(gate.as_subclass(Marked))
        assert type(y) is Marked
        assert torch.equal(y.as_subclass(torch.Tensor), ops.swiglu(gate))


class Wrapped(torch.Tensor):
    """A subclass without data of its own: whoever reads it past the dispatcher finds none."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        inside = [a.inner if isinstance(a, cls) else a for a in args]
        return cls(function(*inside, **(kwargs or {})))


@BACKENDS
@pytest.mark.parametrize("which", [0, 1])
def test_subclasses_decide_what_operators_do(backend, which):
    given = torch.randn(2, 2, 6)
    wrapped = [Wrapped(t) if i == which else t for i, t in enumerate(given)]
    with use_backend(backend):
        y = ops.swiglu(*wrapped)
        assert type(y) is Wrapped
        assert torch.equal(y.inner, ops.swiglu(*given))


def test_overlapping_state_is_refused():
    state = torch.zeros(16).as_strided((2, 3, 4), (4, 4, 1))
    x, B = torch.randn(2, 3), torch.randn(2, 4)
    with (
        use_backend("cpu"),
        pytest.raises(ValueError, match=r"state must not overlap itself, got strides \(4, 4, 1\)"),
    ):
        ops.selective_state_step(state, x, x, -torch.rand(3, 4), B, B)


@BACKENDS
def test_more_threads_than_work(backend):
    x, weight = torch.randn(1, 4, 9), torch.randn(4, 3)
    threads = torch.get_num_threads()
    with use_backend(backend):
        want = ops.dw_causal_conv(x, weight)
        try:
            torch.set_num_threads(64)
            assert torch.equal(ops.dw_causal_conv(x, weight), want)
        finally:
            torch.set_num_threads(threads)


def _ssd(**changed):
    """Return valid arguments of ssd_chunk_scan, some of them replaced."""
    x, dt, matrix = torch.ones(2, 7, 4, 3), torch.ones(2, 7, 4), torch.ones(2, 7, 2, 5)
    given = {"X": x, "dt": dt, "A": -torch.ones(4), "B": matrix, "C": matrix, "chunk_size": 4}
    return {**given, **changed}


def _step(**changed):
    """Return valid arguments of selective_state_step, some of them replaced."""
    x, matrix = torch.ones(2, 4), torch.ones(2, 3)
    given = {"state": torch.ones(2, 4, 3), "x": x, "dt": x, "A": -torch.ones(4, 3)}
    return {**given, "B": matrix, "C": matrix, **changed}


def _norm(**changed):
    """Return valid arguments of gated_norm, some of them replaced."""
    return {"x": torch.ones(2, 6), "weight": torch.ones(6), **changed}


ROW = torch.ones(4)
META = SeqMeta(mask=torch.ones(2, 7, dtype=torch.bool))
MALFORMED = {
    "ssd_chunk_scan: dt must be a torch.Tensor, got NoneType": ("ssd_chunk_scan", _ssd(dt=None)),
    "ssd_chunk_scan: A must be a torch.Tensor, got ndarray": (
        "ssd_chunk_scan",
        _ssd(A=ROW.numpy()),
    ),
    "ssd_chunk_scan: D must be on cpu, got meta": ("ssd_chunk_scan", _ssd(D=ROW.to("meta"))),
    "ssd_chunk_scan: D must be dense, got sparse_coo": ("ssd_chunk_scan", _ssd(D=ROW.to_sparse())),
    "ssd_chunk_scan: dt_bias must have dtype float64, float32, bfloat16 or float16, got int64": (
        "ssd_chunk_scan",
        _ssd(dt_bias=ROW.long()),
    ),
    "ssd_chunk_scan: dt must have shape (B, L, H) = (2, 6, 4), got (2, 7, 4)": (
        "ssd_chunk_scan",
        _ssd(X=torch.ones(2, 6, 4, 3), seq_meta=META),
    ),
    "ssd_chunk_scan: dt_limit must be (low, high), got (0.0, None)": (
        "ssd_chunk_scan",
        _ssd(dt_limit=(0.0, None)),
    ),
    "ssd_chunk_scan: dt_limit must fit in float64, got an int beyond it": (
        "ssd_chunk_scan",
        _ssd(dt_limit=(0, 10**400)),
    ),
    "selective_state_step: state must not overlap itself, got stride 0 along axis 0": (
        "selective_state_step",
        _step(state=torch.ones(1, 4, 3).expand(2, 4, 3)),
    ),
    "selective_state_step: state_indices must be a torch.Tensor, got ndarray": (
        "selective_state_step",
        _step(state_indices=torch.tensor([1, 0], dtype=torch.int32).numpy()),
    ),
    "gated_norm: group_size must be at least 1, got 0": ("gated_norm", _norm(group_size=0)),
    "gated_norm: group_size must be at least 1, got -1": ("gated_norm", _norm(group_size=-1)),
    "gated_norm: group_size must be an int, got bool": ("gated_norm", _norm(group_size=True)),
    "gated_norm: eps must be a float, got NoneType": ("gated_norm", _norm(eps=None)),
    "gated_norm: eps must be positive, got nan": ("gated_norm", _norm(eps=float("nan"))),
    "gated_norm: z must be a torch.Tensor, got int": ("gated_norm", _norm(z=3)),
}


@BACKENDS
@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("sentence", MALFORMED)
def test_refusals_are_one_sentence_on_every_backend(sentence, with_gradients, backend):
    op, given = MALFORMED[sentence]
    given = {
        name: t.detach().requires_grad_()
        if with_gradients and name in ("X", "x") and isinstance(t, torch.Tensor)
        else t
        for name, t in given.items()
    }
    with use_backend(backend), pytest.raises((TypeError, ValueError)) as caught:
        getattr(ops, op)(**given)
    assert str(caught.value) == sentence


@BACKENDS
def test_state_that_is_a_negated_view(backend):
    state = torch.randn(2, 4, 3)
    view = torch.complex(torch.zeros_like(state), -state).conj().imag
    assert view.is_neg()
    y = ops.selective_state_step(**_step(state=view.clone()))
    with use_backend(backend):
        assert torch.allclose(ops.selective_state_step(**_step(state=view)), y)


@BACKENDS
def test_limits_may_be_any_numbers(backend):
    with use_backend(backend):
        want = ops.ssd_chunk_scan(**_ssd(dt_limit=(0.25, 1.0)))
        for low, high in ((Fraction(1, 4), 1), (np.float32(0.25), np.int64(1)), (0.25, True)):
            assert torch.equal(ops.ssd_chunk_scan(**_ssd(dt_limit=(low, high))), want)


@BACKENDS
def test_flags_may_be_any_truth_value(backend):
    x = torch.randn(2, 6)
    with use_backend(backend):
        y = ops.gated_norm(x, torch.ones(6), is_rms=0, norm_before_gate=1)
        torch.testing.assert_close(y, ops.gated_norm(x, torch.ones(6), is_rms=False))


@pytest.mark.parametrize(
    ("input_ids", "sentence"),
    [
        ([[1]], "must be a torch.Tensor, got list"),
        (torch.ones(1, 2), "must have dtype int64 or int32, got float32"),
        (torch.tensor([[0, 16]]), "must lie in [0, 16), got 16"),
        (torch.tensor([[-1, 0]], dtype=torch.int32), "must lie in [0, 16), got -1"),
    ],
)
def test_tokens_that_a_model_refuses(input_ids, sentence):
    model = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=16))
    state = model.allocate_state(1)
    held = [t.clone() for layer in state.key_value_memory_dict.values() for t in layer]
    with pytest.raises((TypeError, ValueError)) as caught:
        model(input_ids, state=state)
    assert str(caught.value) == f"MambaLMHeadModel: input_ids {sentence}"
    left = [t for layer in state.key_value_memory_dict.values() for t in layer]
    assert state.seqlen_offset == 0
    assert all(map(torch.equal, left, held))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Mamba1(8, layer_idx=0), "hidden_states"),
        (Mamba2(8, headdim=4, layer_idx=0), "hidden_states"),
        (MHA(8, 2, layer_idx=0, causal=True), "x"),
    ],
)
def test_what_is_no_tensor_or_state(module, name):
    owner = type(module).__name__
    with pytest.raises(TypeError) as caught:
        module(None)
    assert str(caught.value) == f"{owner}: {name} must be a torch.Tensor, got NoneType"
    with pytest.raises(TypeError) as caught:
        module(torch.randn(1, 2, 8), attention_mask=[[1, 1]])
    assert str(caught.value) == f"{owner}: attention_mask must be a torch.Tensor, got list"
    with pytest.raises(TypeError) as caught:
        module(torch.randn(1, 2, 8), inference_params="state")
    sentence = "inference_params must have a key_value_memory_dict, got str"
    assert str(caught.value) == f"{owner}: {sentence}"
