"""The functions under upstream names compute what their formulas say, gradients included.

Judge: loops over time in float64, written here from the papers.
"""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from ssm.compat import causal_conv1d, mamba_ssm
from tests.tolerances import Tolerance, assert_close

EXACT = Tolerance(1e-10, 1e-10, "the same sums in float64, in another order")


def draw(*shape, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).requires_grad_()


def recurrence(u, delta, A, B, C, D, z, h):
    """One row and one step at a time: u, delta, z (D, L), A (D, N), B, C (D, N, L), h (D, N)."""
    outputs = []
    for t in range(u.shape[-1]):
        h = torch.exp(delta[:, t, None] * A) * h + (delta[:, t] * u[:, t])[:, None] * B[..., t]
        y = (h * C[..., t]).sum(-1)
        y = y if D is None else y + D * u[:, t]
        outputs.append(y if z is None else y * z[:, t] / (1 + torch.exp(-z[:, t])))
    return torch.stack(outputs, -1), h


def per_channel(matrix, row, dim, seqlen):
    """B or C in any form of upstream as (D, N, L)."""
    if matrix.ndim == 2:
        return matrix[:, :, None].expand(-1, -1, seqlen)
    matrix = matrix[row] if matrix.ndim == 4 else matrix[row][None]
    return matrix.repeat_interleave(dim // matrix.shape[0], 0)


def same_with_gradients(got, want, inputs):
    """Compare results, and the gradients of one weighted sum of them."""
    got, want = ([t] if torch.is_tensor(t) else list(t) for t in (got, want))
    weights = [torch.randn_like(t) for t in want]
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_close(f"result {index}", one, other, EXACT)
    inputs = [t for t in inputs if t is not None]
    ours = torch.autograd.grad(
        sum((g * w).sum() for g, w in zip(got, weights, strict=True)), inputs
    )
    theirs = torch.autograd.grad(
        sum((g * w).sum() for g, w in zip(want, weights, strict=True)), inputs
    )
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(f"gradient {index}", one, other, EXACT)


@pytest.mark.parametrize("form", ["constant", "variable", "grouped"])
@pytest.mark.parametrize("full", [True, False])
def test_selective_scan_fn(form, full):
    batch, dim, dstate, seqlen = 2, 6, 3, 7
    shape = {
        "constant": (dim, dstate),
        "variable": (batch, dstate, seqlen),
        "grouped": (batch, 2, dstate, seqlen),
    }[form]
    u, delta, B, C = draw(batch, dim, seqlen), draw(batch, dim, seqlen), draw(*shape), draw(*shape)
    A = (-torch.rand(dim, dstate, dtype=torch.float64)).requires_grad_()
    D, z, bias = (draw(dim), draw(batch, dim, seqlen), draw(dim)) if full else (None,) * 3
    got = mamba_ssm.selective_scan_fn(u, delta, A, B, C, D, z, bias, full, True)
    rows = []
    for row in range(batch):
        dt = delta[row] if bias is None else F.softplus(delta[row] + bias[:, None])
        matrices = [per_channel(m, row, dim, seqlen) for m in (B, C)]
        gate = None if z is None else z[row]
        rows.append(recurrence(u[row], dt, A, *matrices, D, gate, torch.zeros_like(A)))
    want = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    same_with_gradients(got, want, (u, delta, A, B, C, D, z, bias))
    alone = mamba_ssm.selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=full)
    assert torch.equal(alone, got[0])


def ssd_rows(x, dt, A, B, C, D, z, h):
    """With a state per head: x, z (L, H, P), dt (L, H), B, C (L, G, N), h (H, P, N)."""
    nheads = x.shape[1]
    B, C = (m.repeat_interleave(nheads // m.shape[1], 1) for m in (B, C))
    outputs = []
    for t in range(x.shape[0]):
        drive = (dt[t, :, None] * x[t])[..., None] * B[t, :, None]
        h = torch.exp(dt[t] * A)[:, None, None] * h + drive
        y = (h * C[t, :, None]).sum(-1)
        y = y if D is None else y + (D if D.ndim == 2 else D[:, None]) * x[t]
        outputs.append(y if z is None else y * F.silu(z[t]))
    return torch.stack(outputs), h


def ssd_inputs(batch=2, seqlen=9, nheads=4, headdim=3, ngroups=2, dstate=5):
    x, z = (draw(batch, seqlen, nheads, headdim) for _ in range(2))
    dt, bias = draw(batch, seqlen, nheads), draw(nheads)
    A = (-torch.rand(nheads, dtype=torch.float64)).requires_grad_()
    B, C = (draw(batch, seqlen, ngroups, dstate) for _ in range(2))
    return x, dt, A, B, C, z, bias, draw(batch, nheads, headdim, dstate)


@pytest.mark.parametrize("skip", ["none", "head", "channel"])
def test_mamba_chunk_scan_combined(skip):
    x, dt, A, B, C, z, bias, state = ssd_inputs()
    D = {"none": None, "head": draw(4), "channel": draw(4, 3)}[skip]
    limit = (0.05, 1.5)
    got = mamba_ssm.mamba_chunk_scan_combined(
        x, dt, A, B, C, 4, D, z, bias, state, None, None, True, limit, True
    )
    steps = F.softplus(dt + bias).clamp(*limit)
    rows = [ssd_rows(x[r], steps[r], A, B[r], C[r], D, z[r], state[r]) for r in range(x.shape[0])]
    want = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    same_with_gradients(got, want, (x, dt, A, B, C, D, z, bias, state))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("ends", [[0, 4, 4, 9], [0, 0, 4, 9, 9]], ids=["inside", "at_the_ends"])
def test_mamba_chunk_scan_combined_varlen(ends, with_state):
    """Sequences without a step: the state of the row enters, and leaves, those that have some."""
    x, dt, A, B, C, _, _, state = ssd_inputs(batch=1)
    state = state if with_state else None
    filled = [i for i, (begin, end) in enumerate(pairwise(ends)) if begin < end]
    seq_idx = torch.tensor([[filled[0]] * 4 + [filled[1]] * 5], dtype=torch.int32)
    arguments = {"initial_states": state, "seq_idx": seq_idx, "cu_seqlens": torch.tensor(ends)}
    got = mamba_ssm.mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        4,
        dt_softplus=True,
        **arguments,
        return_varlen_states=True,
        return_final_states=True,
    )
    zero, steps = torch.zeros(4, 3, 5, dtype=torch.float64), F.softplus(dt)
    outputs, states = [], []
    for index, (begin, end) in enumerate(pairwise(ends)):
        entering = state[0] if with_state and index == filled[0] else zero
        if begin == end:
            states.append(entering)
            continue
        part = slice(begin, end)
        y, h = ssd_rows(x[0, part], steps[0, part], A, B[0, part], C[0, part], None, None, entering)
        outputs.append(y)
        states.append(h)
    want = torch.cat(outputs)[None], states[filled[-1]][None], torch.stack(states)
    same_with_gradients(got, want, (x, dt, A, B, C, state))
    out, varlen = mamba_ssm.mamba_chunk_scan_combined(
        x, dt, A, B, C, 4, dt_softplus=True, **arguments, return_varlen_states=True
    )
    assert torch.equal(out, got[0])
    assert torch.equal(varlen, got[2])


def conv_rows(x, weight, bias, before=None):
    """Sum the last W inputs of each step: x (B, D, L), weight (D, W)."""
    width = weight.shape[1]
    front = x.new_zeros(*x.shape[:2], width - 1) if before is None else before
    line = torch.cat([front, x], 2)
    y = sum(weight[:, k, None] * line[:, :, k : k + x.shape[2]] for k in range(width))
    y = y if bias is None else y + bias[:, None]
    return y, line[:, :, line.shape[2] - (width - 1) :]


def rms(x, weight, eps, size=None):
    groups = x.unflatten(-1, (-1, size or x.shape[-1]))
    return (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight


@pytest.mark.parametrize(
    ("norm", "project", "before", "mlp"),
    [
        (True, True, True, 0),
        (True, False, False, 2),
        (False, True, False, 0),
        (False, False, False, 2),
    ],
)
def test_mamba_split_conv1d_scan_combined(norm, project, before, mlp):
    batch, seqlen, nheads, headdim, ngroups, dstate, width = 2, 8, 4, 3, 2, 5, 4
    dim, rest = nheads * headdim, 2 * ngroups * dstate
    zxbcdt = draw(batch, seqlen, 2 * mlp + 2 * dim + rest + nheads)
    weight, bias = draw(dim + rest, width), draw(dim + rest)
    dt_bias, D, state = draw(nheads), draw(nheads), draw(batch, nheads, headdim, dstate)
    A = (-torch.rand(nheads, dtype=torch.float64)).requires_grad_()
    norm_weight = draw(dim) if norm else None
    out_weight, out_bias = (draw(6, mlp + dim), draw(6)) if project else (None, None)
    limit = (0.1, 2.0)
    got = mamba_ssm.mamba_split_conv1d_scan_combined(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D,
        4,
        state,
        dt_limit=limit,
        return_final_states=True,
        rmsnorm_weight=norm_weight,
        rmsnorm_eps=1e-3,
        outproj_weight=out_weight,
        outproj_bias=out_bias,
        headdim=headdim,
        ngroups=ngroups,
        norm_before_gate=before,
    )
    gate, up, z, xBC, dt = zxbcdt.split([mlp, mlp, dim, dim + rest, nheads], -1)
    xBC = F.silu(conv_rows(xBC.transpose(1, 2), weight, bias)[0]).transpose(1, 2)
    x, B, C = xBC.split([dim, rest // 2, rest // 2], -1)
    steps = F.softplus(dt + dt_bias).clamp(*limit)
    heads = [t.unflatten(-1, (nheads, headdim)) for t in (x, z)]
    B, C = (m.unflatten(-1, (ngroups, dstate)) for m in (B, C))
    rows = [ssd_rows(heads[0][r], steps[r], A, B[r], C[r], D, None, state[r]) for r in range(batch)]
    y, final = (torch.stack(parts) for parts in zip(*rows, strict=True))
    y = y.flatten(-2)
    if not norm:
        y = y * F.silu(z)
    elif before:
        y = rms(y, norm_weight, 1e-3, dim // ngroups) * F.silu(z)
    else:
        y = rms(y * F.silu(z), norm_weight, 1e-3, dim // ngroups)
    y = torch.cat([F.silu(gate) * up, y], -1)
    y = y if out_weight is None else y @ out_weight.T + out_bias
    inputs = (zxbcdt, weight, bias, dt_bias, A, D, state, norm_weight, out_weight, out_bias)
    same_with_gradients(got, (y, final), inputs)


@pytest.mark.parametrize(
    ("norms", "given"), [(False, ""), (True, ""), (False, "B"), (False, "C"), (False, "BC")]
)
def test_mamba_inner_fn(norms, given):
    batch, dim, seqlen, dstate, rank, width = 2, 6, 7, 3, 2, 4
    xz = draw(batch, 2 * dim, seqlen)
    weight, bias = draw(dim, 1, width), draw(dim)
    rows = rank + (2 - len(given)) * dstate
    x_proj, dt_proj, out_proj = draw(rows, dim), draw(dim, rank), draw(5, dim)
    out_bias, D, dt_bias = draw(5), draw(dim), draw(dim)
    A = (-torch.rand(dim, dstate, dtype=torch.float64)).requires_grad_()
    B = draw(dim, dstate) if "B" in given else None
    C = draw(batch, dstate, seqlen) if "C" in given else None
    biases = [None if letter in given else draw(dstate) for letter in "BC"]
    weights = [draw(dstate), draw(dstate), draw(dim)] if norms else [None] * 3
    got = mamba_ssm.mamba_inner_fn(
        xz, weight, bias, x_proj, dt_proj, out_proj, out_bias, A, B, C, D, dt_bias, *biases, True,
        0, *weights, 1e-3,
    )  # fmt: skip
    inputs = [xz, weight, bias, x_proj, dt_proj, out_proj, out_bias, A, B, C, D, dt_bias]
    x, z = xz.chunk(2, 1)
    x = F.silu(conv_rows(x, weight[:, 0], bias)[0])
    projected = x.transpose(1, 2) @ x_proj.T
    parts = list(projected.split([rank, *[dstate] * (2 - len(given))], -1))
    dt, matrices = parts.pop(0) @ dt_proj.T, []
    for matrix, shift, norm in zip((B, C), biases, weights, strict=False):
        if matrix is None:
            matrix = parts.pop(0) + shift
            matrix = (matrix if norm is None else rms(matrix, norm, 1e-3)).transpose(1, 2)
        matrices.append(matrix)
    dt = dt if weights[2] is None else rms(dt, weights[2], 1e-3)
    steps = F.softplus(dt + dt_bias).transpose(1, 2)
    rows = [
        recurrence(
            x[r],
            steps[r],
            A,
            *(per_channel(m, r, dim, seqlen) for m in matrices),
            D,
            z[r],
            torch.zeros_like(A),
        )[0]
        for r in range(batch)
    ]
    want = torch.stack(rows).transpose(1, 2) @ out_proj.T + out_bias
    same_with_gradients(got, want, [*inputs, *biases, *weights])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_every_negative_row_is_skipped(dtype):
    rows, x = torch.tensor([3, -100, -1], dtype=dtype), draw(3, 4)
    with torch.no_grad():
        window, weight, state = draw(5, 4, 3), draw(4, 4), draw(5, 4, 2)
        update = partial(causal_conv1d.causal_conv1d_update, weight=weight)
        alone = update(x[:1], window.clone(), conv_state_indices=rows[:1])
        got = update(x, window, conv_state_indices=rows)
        assert not got[1:].any()
        assert torch.equal(got[:1], alone)
        given = x.abs(), -draw(4, 2).abs(), draw(3, 2), draw(3, 2)
        before = state.clone()
        y = mamba_ssm.selective_state_update(state, x, *given, state_batch_indices=rows)
        assert not y[1:].any()
        assert torch.equal(torch.arange(5)[(state != before).flatten(1).any(1)], rows[:1].long())
        with pytest.raises(ValueError, match="state_indices"):
            update(x, window, conv_state_indices=torch.tensor([3, 2**32, 1]))


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_selective_state_update(heads, indices):
    batch, nheads, dim, dstate, rows = 2, 4, 3, 5, 5 if indices else 2
    lead = (nheads, dim) if heads else (dim,)
    with torch.no_grad():
        shapes = [(rows, *lead, dstate), *((batch, *lead),) * 3]
        state, x, z, dt = (draw(*shape) for shape in shapes)
        A, D, bias = -torch.rand(*lead, dstate, dtype=torch.float64), draw(*lead), draw(*lead)
        shape = (batch, 2, dstate) if heads else (batch, dstate)
        B, C, before = draw(*shape), draw(*shape), state.clone()
        chosen = torch.tensor([3, 1]) if indices else None
        got = mamba_ssm.selective_state_update(
            state, x, dt, A, B, C, D, z, bias, True, state_batch_indices=chosen
        )
        if heads:
            B, C = (m.repeat_interleave(nheads // 2, 1) for m in (B, C))
        B, C = B[..., None, :], C[..., None, :]
        old = before[chosen] if indices else before
        steps = F.softplus(dt + bias)[..., None]
        h = torch.exp(steps * A) * old + steps * x[..., None] * B
        want = ((h * C).sum(-1) + D * x) * F.silu(z)
        after = before.clone()
        after[chosen if indices else slice(None)] = h
    assert_close("out", got, want, EXACT)
    assert_close("state", state, after, EXACT)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d_fn(activation):
    x, weight, bias, before = draw(2, 6, 9), draw(6, 4), draw(6), draw(2, 6, 3)
    room = torch.empty(2, 6, 3, dtype=torch.float64)
    got = causal_conv1d.causal_conv1d_fn(x, weight, bias, None, before, True, activation=activation)
    y, final = conv_rows(x, weight, bias, before)
    want = (y if activation is None else F.silu(y)), final
    same_with_gradients(got, want, (x, weight, bias, before))
    with torch.no_grad():
        _, written = causal_conv1d.causal_conv1d_fn(
            x, weight, bias, None, before, True, room, activation
        )
    assert written is room
    assert torch.equal(room, got[1])


def test_causal_conv1d_fn_packed():
    x, weight = draw(1, 6, 9), draw(6, 4)
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1, -1]], dtype=torch.int32)
    got = causal_conv1d.causal_conv1d_fn(x, weight, seq_idx=seq_idx)
    parts = [conv_rows(x[:, :, part], weight, None)[0] for part in (slice(0, 4), slice(4, 7))]
    want = torch.cat([*parts, torch.zeros_like(x[:, :, 7:])], 2)
    same_with_gradients(got, want, (x, weight))


@pytest.mark.parametrize("circular", [False, True])
def test_causal_conv1d_update(circular):
    with torch.no_grad():
        x, weight, bias = draw(2, 6, 11), draw(6, 4), draw(6)
        window, got = torch.zeros(2, 6, 5, dtype=torch.float64), []
        for begin, end in ((0, 1), (1, 4), (4, 11)):
            seen = torch.full((2,), begin) if circular else None
            part = x[:, :, begin:end]
            got.append(
                causal_conv1d.causal_conv1d_update(
                    part[..., 0] if end == 1 else part, window, weight, bias, "silu", seen
                ).reshape(2, 6, -1)
            )
        want = F.silu(conv_rows(x, weight, bias)[0])
        line = x[:, :, 6:]
        order = (torch.arange(6, 11) % 5).argsort() if circular else torch.arange(5)
    assert_close("out", torch.cat(got, 2), want, EXACT)
    assert_close("window", window, line[:, :, order], EXACT)


def test_causal_conv1d_varlen_states():
    x = torch.randn(9, 4)
    got = causal_conv1d.causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9]), 3)
    want = torch.zeros(3, 4, 3)
    want[0, :, 1:], want[2] = x[:2].T, x[6:9].T
    assert torch.equal(got, want)


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize("extras", ["none", "residual", "rowscale", "branch"])
def test_layer_norm_fn(extras, is_rms):
    x, weight, bias = draw(3, 4, 6), draw(6), draw(6)
    residual = None if extras == "none" else draw(3, 4, 6)
    rowscale = draw(3, 4) if extras == "rowscale" else None
    x1, weight1, bias1 = (draw(3, 4, 6), draw(6), draw(6)) if extras == "branch" else (None,) * 3
    arguments = (x, weight, bias, residual, x1, weight1, bias1, 1e-3, 0.0, rowscale, True, False)
    if is_rms:
        got = mamba_ssm.rms_norm_fn(*arguments)
    else:
        got = mamba_ssm.layer_norm_fn(*arguments)

    total = x if rowscale is None else x * rowscale[..., None]
    total = total if x1 is None else total + x1
    total = total if residual is None else total + residual

    def norm(weight, bias):
        centred = total if is_rms else total - total.mean(-1, keepdim=True)
        return rms(centred, weight, 1e-3) + bias

    want = [norm(weight, bias), *([norm(weight1, bias1)] if extras == "branch" else []), total]
    same_with_gradients(got, want, (x, weight, bias, residual, rowscale, x1, weight1, bias1))


def test_layer_norm_fn_dropout():
    x, x1, weight = torch.randn(3, 500, dtype=torch.float64), torch.randn(3, 500), torch.ones(500)
    y, total, mask, mask1 = mamba_ssm.layer_norm_fn(
        x, weight, None, x1=x1.double(), dropout_p=0.25, prenorm=True, return_dropout_mask=True
    )
    want = torch.where(mask, x / 0.75, 0.0) + torch.where(mask1, x1.double() / 0.75, 0.0)
    assert_close("sum", total, want, EXACT)
    assert_close("y", y, F.layer_norm(want, (500,), eps=1e-6), EXACT)
    assert 0.6 < mask.double().mean() < 0.9
    assert not torch.equal(mask, mask1)
    _, mask, mask1 = mamba_ssm.layer_norm_fn(x, weight, None, return_dropout_mask=True)
    assert mask is None
    assert mask1 is None


def test_what_dropout_drops_may_be_infinite():
    x = torch.full((50, 4), torch.inf)
    _, total, mask, _ = mamba_ssm.layer_norm_fn(
        x, torch.ones(4), None, dropout_p=0.5, prenorm=True, return_dropout_mask=True
    )
    assert 0 < mask.float().mean() < 1
    assert torch.equal(total, torch.where(mask, torch.inf, 0.0))


@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("residual", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("extras", [False, True])
def test_layer_norm_fn_dtypes(extras, residual, residual_in_fp32):
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    stream = None if residual is None else torch.randn(3, 6, dtype=residual)
    y, total = mamba_ssm.layer_norm_fn(
        x,
        torch.ones(6),
        None,
        stream,
        x1=x if extras else None,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
    )
    assert y.dtype == torch.bfloat16
    assert total.dtype == residual or (
        residual is None and total.dtype == (torch.float32 if residual_in_fp32 else x.dtype)
    )


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("is_rms", [False, True])
def test_gated_norm_functions(is_rms, before):
    x, z, weight, bias = draw(4, 6), draw(4, 6), draw(6), draw(6)
    arguments = (x, weight, bias, z, 1e-3, 3, before)
    function = mamba_ssm.rmsnorm_fn if is_rms else mamba_ssm.layernorm_fn
    got = function(*arguments)
    gated = x if before else x * F.silu(z)
    groups = gated.unflatten(-1, (2, 3))
    centred = gated if is_rms else (groups - groups.mean(-1, keepdim=True)).flatten(-2)
    want = rms(centred, weight, 1e-3, 3) + bias
    same_with_gradients(got, want * F.silu(z) if before else want, (x, z, weight, bias))


def test_norm_modules():
    x, z = draw(2, 6), draw(2, 6)
    norm = mamba_ssm.RMSNorm(6, eps=1e-3, dtype=torch.float64)
    y, total = norm(x, residual=z, prenorm=True)
    same_with_gradients((y, total), (rms(x + z, norm.weight, 1e-3), x + z), (x, z))
    gated = mamba_ssm.LayerNormGated(6, eps=1e-3, dtype=torch.float64)
    want = F.layer_norm(x, (6,), gated.weight, gated.bias, 1e-3) * F.silu(z)
    same_with_gradients(gated(x, z), want, (x, z))
    dropping = mamba_ssm.RMSNorm(6, dropout_p=0.5, dtype=torch.float64)
    assert torch.equal(dropping.eval()(x), dropping(x))
    assert not torch.equal(dropping.train()(x), dropping.eval()(x))
