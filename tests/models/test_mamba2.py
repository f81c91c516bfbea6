"""Mamba2: one recurrence however the sequence is cut, packed or padded.

Judge: the formulas of the paper spelled out, one step at a time, and the same module over the whole
sequence at once.
"""

import pytest
import torch
import torch.nn.functional as F

from ssm.modules.mamba2 import Mamba2

D_MODEL, LENGTH = 8, 7

# Every option of the constructor that changes what is computed.
OPTIONS = {
    "plain": {},
    "groups": {"ngroups": 2},
    "skip_per_channel": {"D_has_hdim": True},
    "gate_only": {"rmsnorm": False},
    "norm_first": {"norm_before_gate": True, "ngroups": 4},
    "beside_mlp": {"d_ssm": 8, "bias": True},
    "limited_steps": {"dt_limit": (0.02, 0.06)},
    "no_conv_bias": {"conv_bias": False, "d_conv": 1},
    "wide_conv": {"d_conv": 9, "chunk_size": 100},
    "one_head": {"headdim": 16, "d_state": 1},
    "thin_heads": {"headdim": 1, "chunk_size": 1, "expand": 1},
    "reference": {"use_mem_eff_path": False},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def mixer(dtype=torch.float64, **kwargs) -> Mamba2:
    settings = {"d_state": 5, "headdim": 4, "chunk_size": 3, **kwargs}
    m = Mamba2(D_MODEL, dtype=dtype, **settings)
    with torch.no_grad():
        # Initial ones would hide a wrong index.
        m.D.normal_()
        if m.rmsnorm:
            m.norm.weight.normal_()
    return m


def inputs(batch=2, length=LENGTH, dtype=torch.float64):
    return torch.randn(batch, length, D_MODEL, dtype=dtype)


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def by_hand(m, x):
    """The block of the paper for one row (L, d_model), a loop over time, heads and groups."""
    width = m.ngroups * m.d_state
    d_mlp = m.d_inner - m.d_ssm
    widths = [d_mlp, d_mlp, m.d_ssm, m.d_ssm, width, width, m.nheads]
    z0, x0, z, u, B, C, dt = m.in_proj(x).split(widths, -1)
    convolved = torch.cat([u, B, C], -1)
    padded = torch.cat([convolved.new_zeros(m.d_conv - 1, convolved.shape[1]), convolved])
    taps = m.conv1d.weight[:, 0].T
    bias = 0 if m.conv1d.bias is None else m.conv1d.bias
    h = x.new_zeros(m.nheads, m.headdim, m.d_state)
    ys = []
    for t in range(len(x)):
        now = F.silu((padded[t : t + m.d_conv] * taps).sum(0) + bias)
        u, B, C = now.split([m.d_ssm, width, width])
        step = torch.log1p(torch.exp(dt[t] + m.dt_bias)).clamp(*m.dt_limit)
        heads, states = [], []
        for head in range(m.nheads):
            group = slice(head // (m.nheads // m.ngroups) * m.d_state, None)
            b, c = B[group][: m.d_state], C[group][: m.d_state]
            channels = slice(head * m.headdim, (head + 1) * m.headdim)
            decay = torch.exp(-step[head] * torch.exp(m.A_log[head]))
            states.append(decay * h[head] + step[head] * torch.outer(u[channels], b))
            skip = m.D[channels] if m.D_has_hdim else m.D[head]
            heads.append(states[-1] @ c + skip * u[channels])
        h, y, gate = torch.stack(states), torch.cat(heads), F.silu(z[t])
        if not m.rmsnorm:
            y = y * gate
        else:
            y = y if m.norm_before_gate else y * gate
            groups = y.view(m.ngroups, -1)
            y = (groups / (groups.square().mean(1, keepdim=True) + 1e-5).sqrt()).flatten()
            y = y * m.norm.weight * (gate if m.norm_before_gate else 1)
        ys.append(torch.cat([F.silu(z0[t]) * x0[t], y]))
    return m.out_proj(torch.stack(ys)), h


@EVERY_OPTION
def test_matches_the_paper(options):
    m, x = mixer(**options), inputs()
    state = m.allocate_state(2)
    y = m(x, state=state)
    for row in range(2):
        want, last = by_hand(m, x[row])
        close(y[row], want)
        close(state.key_value_memory_dict[0][1][row], last)
    close(m(x), y)


@EVERY_OPTION
@pytest.mark.parametrize("with_grad", [False, True])
def test_chunked_equals_whole(options, with_grad):
    m, x = mixer(**options), inputs()
    whole = m.allocate_state(2)
    with torch.set_grad_enabled(with_grad):
        want = m(x, state=whole)
        for cut in range(LENGTH + 1):
            state = m.allocate_state(2)
            parts = [m(part, state=state) for part in x.split([cut, LENGTH - cut], dim=1)]
            close(torch.cat(parts, 1), want)
            for got, expected in zip(
                state.key_value_memory_dict[0], whole.key_value_memory_dict[0], strict=True
            ):
                close(got, expected)


@EVERY_OPTION
def test_step_equals_scan(options):
    m, x = mixer(**options), inputs()
    conv_state, ssm_state = m.allocate_inference_cache(2, 0)
    state = m.allocate_state(2)
    with torch.no_grad():
        want = m(x, state=state)
        got = [m.step(x[:, t : t + 1], conv_state, ssm_state)[0] for t in range(LENGTH)]
    close(torch.cat(got, 1), want)
    close(conv_state, state.key_value_memory_dict[0][0])
    close(ssm_state, state.key_value_memory_dict[0][1])
