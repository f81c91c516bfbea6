"""Calls at the edge of the contract, on every backend. Judge: the reference, or plain sense."""

import pytest
import torch

from ssm import ops
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
def test_norm_of_many_axes(backend):
    x, weight = torch.randn(1, 2, 1, 2, 1, 2, 3, 5), torch.randn(5)
    with use_backend(backend):
        y, s = ops.fused_layer_norm(x, weight, None, residual=x)
        flat, _ = ops.fused_layer_norm(x.view(-1, 5), weight, None, residual=x.view(-1, 5))
    torch.testing.assert_close(y, flat.view(x.shape))
    torch.testing.assert_close(s, 2 * x)


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
