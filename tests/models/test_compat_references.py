"""Upstream's ``*_ref`` functions: the results of their namesakes, without a compiled kernel.

Judges: the namesakes, judged in test_compat_functions.py, and loops over the formulas.
"""

import pytest
import torch
import torch.nn.functional as F

from ssm.compat import causal_conv1d, mamba_ssm
from ssm.utils import dispatch
from tests.tolerances import Tolerance, assert_close

CLOSE = Tolerance(1e-10, 1e-10, "float64, other orders of the same sums")
B, L, D, N, H, P, G, W, R = 2, 7, 6, 4, 4, 3, 2, 4, 2
DIM = H * P


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def negative(*shape):
    return -draw(*shape).abs()


# Name -> namesake, arguments by position, by keyword.
CALLS = {
    "selective_scan_ref": lambda: (
        mamba_ssm.selective_scan_fn,
        [draw(B, D, L), draw(B, D, L), negative(D, N), draw(B, N, L), draw(B, N, L), draw(D)],
        {"z": draw(B, D, L), "delta_bias": draw(D), "delta_softplus": True}
        | {"return_last_state": True},
    ),
    "mamba_inner_ref": lambda: (
        mamba_ssm.mamba_inner_fn,
        [draw(B, 2 * D, L), draw(D, 1, W), draw(D), draw(R + 2 * N, D), draw(D, R), draw(5, D)]
        + [draw(5), negative(D, N)],
        {"D": draw(D), "delta_bias": draw(D), "B_proj_bias": draw(N), "delta_softplus": True},
    ),
    "selective_state_update_ref": lambda: (
        mamba_ssm.selective_state_update,
        [draw(B, H, P, N), draw(B, H, P), draw(B, H, P), negative(H, P, N), draw(B, G, N)]
        + [draw(B, G, N), draw(H, P), draw(B, H, P), draw(H, P), True],
        {},
    ),
    "ssd_chunk_scan_combined_ref": lambda: (
        mamba_ssm.mamba_chunk_scan_combined,
        [draw(B, L, H, P), draw(B, L, H), negative(H), draw(B, L, G, N), draw(B, L, G, N), 3],
        {"D": draw(H, P), "z": draw(B, L, H, P), "dt_bias": draw(H), "dt_softplus": True},
    ),
    "mamba_split_conv1d_scan_ref": lambda: (
        mamba_ssm.mamba_split_conv1d_scan_combined,
        [draw(B, L, 2 * DIM + 2 * G * N + H), draw(DIM + 2 * G * N, W), None, draw(H)]
        + [negative(H), draw(H), 3],
        {"dt_limit": (0.1, 2.0), "rmsnorm_weight": draw(DIM), "outproj_weight": draw(5, DIM)}
        | {"outproj_bias": draw(5), "headdim": P, "ngroups": G, "norm_before_gate": False}
        | {"rmsnorm_eps": 1e-3, "activation": "silu"},
    ),
    "rms_norm_gated_ref": lambda: (
        mamba_ssm.rmsnorm_fn,
        [draw(B, L, D), draw(D), draw(D), draw(B, L, D), 1e-3, 3, False],
        {},
    ),
    "causal_conv1d_ref": lambda: (
        causal_conv1d.causal_conv1d_fn,
        [draw(B, D, L), draw(D, W), draw(D)],
        {"initial_states": draw(B, D, W - 1), "return_final_states": True, "activation": "silu"},
    ),
    "causal_conv1d_update_ref": lambda: (
        causal_conv1d.causal_conv1d_update,
        [draw(B, D), draw(B, D, W), draw(D, W), draw(D), "silu"],
        {"cache_seqlens": torch.tensor([1, 6], dtype=torch.int32)},
    ),
    "causal_conv1d_varlen_states_ref": lambda: (
        causal_conv1d.causal_conv1d_varlen_states,
        [draw(L, D), torch.tensor([0, 2, 2, L]), 3],
        {},
    ),
}


def offered(name):
    return getattr(mamba_ssm, name, None) or getattr(causal_conv1d, name)


def copied(values):
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in values]


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("name", CALLS)
def test_equals_its_namesake_without_kernels(name, monkeypatch):
    torch.manual_seed(0)
    namesake, args, kwargs = CALLS[name]()
    mine, theirs = copied(args), copied(args)
    want = as_tuple(namesake(*theirs, **kwargs))
    asked, choose = [], dispatch._choose
    monkeypatch.setattr(dispatch, "_table", vars(dispatch._choices))
    dispatch._table.clear()
    monkeypatch.setattr(dispatch, "_choose", lambda *a: asked.append(a[2]) or choose(*a))
    got = as_tuple(offered(name)(*mine, **kwargs))
    assert set(asked) <= {"python"}
    assert asked or name == "causal_conv1d_varlen_states_ref"
    for g, w in zip(got, want, strict=True):
        assert_close(name, g, w, CLOSE)
    for g, w in zip(mine, theirs, strict=True):  # states are updated in place
        if isinstance(g, torch.Tensor):
            assert_close("argument", g, w, CLOSE)


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norms_with_masks(is_rms, upcast, dtype):
    torch.manual_seed(0)
    x, x1, residual = (draw(B, L, D).to(dtype) for _ in range(3))
    weight, bias, weight1 = draw(D).to(dtype), draw(D).to(dtype), draw(D).to(dtype)
    mask, mask1 = torch.rand(B, L, D) < 0.7, torch.rand(B, L, D) < 0.7
    p = 0.3
    function = mamba_ssm.rms_norm_ref if is_rms else mamba_ssm.layer_norm_ref
    out, out1, total = function(
        *(x, weight, bias, residual, x1, weight1, None, 1e-3, p, None, True, mask, mask1, upcast)
    )
    want = torch.where(mask, x.double(), 0) / (1 - p)
    want = want + torch.where(mask1, x1.double(), 0) / (1 - p) + residual.double()
    assert out.dtype == out1.dtype == dtype
    assert total.dtype == (torch.float32 if upcast and dtype == torch.bfloat16 else dtype)
    centred = want if is_rms else want - want.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    rounded = Tolerance(1.5e-2, 1.5e-2, "x and x1 rounded to bfloat16 behind dropout, and outputs")
    tolerance = CLOSE if dtype == torch.float64 else rounded
    assert_close("sum", total, want, tolerance)
    assert_close("out", out, normed * weight.double() + bias.double(), tolerance)
    assert_close("out1", out1, normed * weight1.double(), tolerance)


def test_upcast_rounds_no_sum():
    x, residual, ones = draw(B, L, D).bfloat16(), draw(B, L, D).bfloat16(), torch.ones(D)
    for upcast in (False, True):
        _, total = mamba_ssm.rms_norm_ref(x, ones, None, residual, prenorm=True, upcast=upcast)
        want = x.float() + residual.float()
        assert torch.equal(total, want if upcast else want.bfloat16())


def test_norms_scale_rows_and_draw_masks():
    torch.manual_seed(0)
    x, weight, scale = draw(B, L, D), draw(D), draw(B, L)
    out, total = mamba_ssm.rms_norm_ref(x, weight, None, rowscale=scale, prenorm=True)
    assert_close("sum", total, x * scale[..., None], CLOSE)
    want = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert_close("out", out, want, CLOSE)
    ones = torch.ones(B, 500, D, dtype=torch.float64)
    _, total = mamba_ssm.layer_norm_ref(ones, weight, None, dropout_p=0.25, prenorm=True)
    assert set(total.unique().tolist()) == {0.0, 1 / 0.75}
    with pytest.raises(ValueError, match="dropout_p must lie in"):
        mamba_ssm.layer_norm_ref(ones, weight, None, dropout_p=1.0, dropout_mask=ones.bool())


def test_segsum():
    x = draw(2, 5)
    got = mamba_ssm.segsum(x)
    for i in range(5):
        for j in range(5):
            want = x[:, j + 1 : i + 1].sum(-1) if j <= i else torch.full((2,), -torch.inf)
            assert_close("stretch", got[:, i, j], want, CLOSE)
    assert mamba_ssm.segsum(x[:, :0]).shape == (2, 0, 0)


@pytest.mark.parametrize("groups", [H, G])
@pytest.mark.parametrize(("length", "block"), [(7, 3), (6, 3), (5, 64), (1, 1)])
def test_ssd_minimal_discrete(groups, length, block):
    torch.manual_seed(0)
    X, A = draw(B, length, H, P), negative(B, length, H)
    b, c, state = draw(B, length, groups, N), draw(B, length, groups, N), draw(B, H, P, N)
    leaves = [t.requires_grad_() for t in (X, A, b, c, state)]
    per_head = [t.repeat_interleave(H // groups, dim=2) for t in (b, c)]
    h, outputs = state, []
    for t in range(length):
        h = A[:, t].exp()[..., None, None] * h
        h = h + X[:, t, :, :, None] * per_head[0][:, t, :, None]
        outputs.append((h * per_head[1][:, t, :, None]).sum(-1))
    want = [torch.stack(outputs, 1), h]
    got = mamba_ssm.ssd_minimal_discrete(X, A, b, c, block, state[:, None])
    weights = [torch.randn_like(w) for w in want]
    gradients = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights, strict=True)), leaves)
        for ys in (got, want)
    ]
    for g, w in zip((*got, *gradients[0]), (*want, *gradients[1]), strict=True):
        assert_close("minimal", g, w, CLOSE)
    y, last = mamba_ssm.ssd_minimal_discrete(X, A, b, c, block)
    zero = mamba_ssm.ssd_minimal_discrete(X, A, b, c, block, torch.zeros_like(state))
    assert torch.equal(y, zero[0])
    assert torch.equal(last, zero[1])


def test_ssd_minimal_discrete_is_the_scan():
    """As upstream checks it: the scan with step sizes, and x and the rates multiplied by them."""
    x, dt, rate = draw(B, L, H, P), F.softplus(draw(B, L, H)), negative(H)
    b, c = draw(B, L, G, N), draw(B, L, G, N)
    want = mamba_ssm.mamba_chunk_scan_combined(x, dt, rate, b, c, 4)
    got, _ = mamba_ssm.ssd_minimal_discrete(x * dt[..., None], rate * dt, b, c, 4)
    assert_close("scan", got, want, CLOSE)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"X": [1.0]}, TypeError, "X must be a torch.Tensor, got list"),
        ({"A": None}, TypeError, "A must be a torch.Tensor, got NoneType"),
        ({"A": torch.ones(1, 3)}, ValueError, "A must have shape"),
        ({"X": torch.ones(1, 3, 2)}, ValueError, "X must have shape"),
        ({"block_len": 0}, ValueError, "block_len must be at least 1, got 0"),
        ({"block_len": 2.0}, TypeError, "block_len must be an int, got float"),
        ({"B": torch.ones(1, 4, 1, 4)}, ValueError, "B must"),
        ({"initial_states": torch.ones(1, 2, 2, 5)}, ValueError, "initial_states must"),
    ],
)
def test_ssd_minimal_discrete_refuses(change, error, sentence):
    given = {"X": torch.ones(1, 3, 2, 2), "A": -torch.ones(1, 3, 2), "block_len": 2}
    given |= {"B": torch.ones(1, 3, 1, 4), "C": torch.ones(1, 3, 1, 4)}
    with pytest.raises(error, match=sentence):
        mamba_ssm.ssd_minimal_discrete(**{**given, **change})
