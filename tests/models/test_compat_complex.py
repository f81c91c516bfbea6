"""The scan of Mamba-1 under its upstream names with complex matrices.

Judge: the recurrence step by step in complex128; twice the real part of what is read.
"""

import pytest
import torch
import torch.nn.functional as F

from ssm.compat import mamba_ssm
from tests.tolerances import Tolerance, assert_close

BATCH, DIM, DSTATE, SEQLEN = 2, 4, 3, 9
EXACT = Tolerance(1e-10, 1e-10, "the same sums in float64, in another order")
SINGLE = Tolerance(2e-5, 2e-5, "sums of 300 steps in float32; the angles are in float64")


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def draw_matrix(form, seqlen=SEQLEN):
    """B or C in a form of upstream; one that varies with the step is pairs of real numbers."""
    if form == "constant":
        return draw(DIM, DSTATE, dtype=torch.complex128)
    shape = (BATCH, DSTATE) if form == "variable" else (BATCH, 2, DSTATE)
    return draw(*shape, 2 * seqlen)


def draw_rates():
    real = -torch.rand(DIM, DSTATE, dtype=torch.float64)
    return torch.complex(real, torch.randn_like(real) * 3).requires_grad_()


def per_channel(matrix, seqlen):
    """B or C as (B, D, N, L), complex."""
    if matrix.ndim == 2:
        return matrix[None, :, :, None].expand(BATCH, -1, -1, seqlen)
    matrix = matrix[:, None] if matrix.ndim == 3 else matrix
    matrix = torch.complex(matrix[..., ::2], matrix[..., 1::2])
    return matrix.repeat_interleave(DIM // matrix.shape[1], 1)


def recurrence(u, dt, A, B, C, D=None, z=None):
    h, outputs = torch.zeros(BATCH, DIM, DSTATE, dtype=torch.complex128), []
    B, C = per_channel(B, u.shape[2]), per_channel(C, u.shape[2])
    for t in range(u.shape[2]):
        h = torch.exp(dt[..., t, None] * A) * h + (dt * u)[..., t, None] * B[..., t]
        y = 2 * (h * C[..., t]).sum(2).real
        outputs.append(y if D is None else y + D * u[..., t])
    y = torch.stack(outputs, 2)
    return (y if z is None else y * F.silu(z)), h


def gradients(out, state, inputs):
    """Gradients of one weighted sum of an output and a complex state."""
    torch.manual_seed(3)  # and shapes alone: randn_like would go by strides
    total = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
    if state is not None:
        weight = torch.randn(state.shape, dtype=state.dtype)
        total = total + (state * weight).real.sum()
    return torch.autograd.grad(total, inputs)


def compare(got, want):
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        if one.is_complex():
            one, other = torch.view_as_real(one), torch.view_as_real(other)
        assert_close(f"tensor {index}", one, other, EXACT)


@pytest.mark.parametrize("form_c", ["constant", "variable", "grouped"])
@pytest.mark.parametrize("form_b", ["constant", "variable", "grouped"])
@pytest.mark.parametrize("full", [True, False])
def test_complex_scan(form_b, form_c, full):
    torch.manual_seed(0)
    u, delta, A = draw(BATCH, DIM, SEQLEN), draw(BATCH, DIM, SEQLEN), draw_rates()
    B, C = draw_matrix(form_b), draw_matrix(form_c)
    D, z, bias = (draw(DIM), draw(BATCH, DIM, SEQLEN), draw(DIM)) if full else (None,) * 3
    got = mamba_ssm.selective_scan_fn(u, delta, A, B, C, D, z, bias, full, True)
    dt = F.softplus(delta + bias[:, None]) if full else delta
    want = recurrence(u, dt, A, B, C, D, z)
    assert got[1].dtype == torch.complex128
    compare(got, want)
    inputs = [t for t in (u, delta, A, B, C, D, z, bias) if t is not None]
    compare(gradients(*got, inputs), gradients(*want, inputs))
    alone = mamba_ssm.selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=full)
    assert torch.equal(alone, got[0])


@pytest.mark.parametrize("variable", ["BC", "B", "C", ""])
def test_complex_inner(variable):
    torch.manual_seed(1)
    rank, width = 2, 3
    xz, conv, bias = draw(BATCH, 2 * DIM, SEQLEN), draw(DIM, 1, 4), draw(DIM)
    project = draw(rank + 2 * DSTATE * len(variable), DIM)
    widen, out_weight, A = draw(DIM, rank), draw(width, DIM), draw_rates()
    given = {m: None if m in variable else draw_matrix("constant") for m in "BC"}
    inputs = [xz, conv, bias, project, widen, out_weight, None, A, given["B"], given["C"]]
    got = mamba_ssm.mamba_inner_fn(*inputs, delta_softplus=True)
    x, z = xz.chunk(2, 1)
    x = F.silu(F.conv1d(x, conv, bias, padding=3, groups=DIM)[..., :SEQLEN])
    parts = torch.einsum("rd,bdl->brl", project, x)
    dt = F.softplus(torch.einsum("dr,brl->bdl", widen, parts[:, :rank]))
    projected = iter(parts[:, rank:].split(2 * DSTATE, 1))
    for letter in variable:  # rows: real and imaginary part of each state in turn
        pairs = next(projected).unflatten(1, (DSTATE, 2))
        given[letter] = torch.stack([pairs[:, :, 0], pairs[:, :, 1]], 3).flatten(2)
    y, _ = recurrence(x, dt, A, given["B"], given["C"], None, z)
    want = torch.einsum("ed,bdl->ble", out_weight, y)
    compare([got], [want])
    inputs = [t for t in inputs if t is not None]
    compare(gradients(got, None, inputs), gradients(want, None, inputs))


def test_complex_scan_in_float32_keeps_its_angles():
    """Over 300 steps the state turns by hundreds of radians."""
    torch.manual_seed(2)
    u, delta = torch.randn(BATCH, DIM, 300), torch.rand(BATCH, DIM, 300)
    A = torch.complex(torch.full((DIM, DSTATE), -0.05), torch.randn(DIM, DSTATE) * 3)
    B, C = (draw_matrix("variable", 300).detach().float() for _ in "BC")
    got, state = mamba_ssm.selective_scan_fn(u, delta, A, B, C, return_last_state=True)
    wide = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (A, B, C))
    want, want_state = recurrence(u.double(), delta.double(), *wide)
    assert (got.dtype, state.dtype) == (torch.float32, torch.complex64)
    scale = want.abs().max()
    assert_close("out", got.double() / scale, want / scale, SINGLE)
    found, wanted = (torch.view_as_real(t.to(torch.complex128)) for t in (state, want_state))
    assert_close("state", found / wanted.abs().max(), wanted / wanted.abs().max(), SINGLE)


def test_complex_scan_of_nothing():
    u, A = draw(BATCH, DIM, 0), draw_rates()
    B, C = draw_matrix("variable", 0), draw_matrix("constant")
    out, state = mamba_ssm.selective_scan_fn(u, u, A, B, C, return_last_state=True)
    assert out.shape == (BATCH, DIM, 0)
    assert torch.equal(state, torch.zeros(BATCH, DIM, DSTATE, dtype=torch.complex128))


ONES = torch.ones(BATCH, DIM, SEQLEN)
RATES = -torch.ones(DIM, DSTATE, dtype=torch.complex64)
PAIRS = torch.ones(BATCH, DSTATE, 2 * SEQLEN)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"B": torch.ones(BATCH, DSTATE, SEQLEN)},
            ValueError,
            r"B must have shape \(D, N\) = \(4, 3\), \(B, N, 2 L\) = \(2, 3, 18\) or "
            r"\(B, G, N, 2 L\) beside a complex A, got \(2, 3, 9\)",
        ),
        ({"C": torch.ones(BATCH, 3, DSTATE, 2 * SEQLEN)}, ValueError, r"C must have shape .* got"),
        ({"C": PAIRS.cfloat()}, ValueError, "C must be real, with pairs .*, got complex64"),
        ({"u": torch.ones(DIM, SEQLEN)}, ValueError, r"u must have 3 axes, got shape \(4, 9\)"),
        ({"A": RATES[0]}, ValueError, r"A must have 2 axes, got shape \(3,\)"),
        ({"delta": None}, TypeError, "delta must be a torch.Tensor, got NoneType"),
        ({"B": None}, TypeError, "B must be a torch.Tensor, got NoneType"),
    ],
)
def test_rejects_what_fits_no_complex_scan(changes, error, sentence):
    arguments = {"u": ONES, "delta": ONES, "A": RATES, "B": PAIRS, "C": PAIRS, **changes}
    with pytest.raises(error, match=f"^selective_scan_fn: {sentence}"):
        mamba_ssm.selective_scan_fn(**arguments)
