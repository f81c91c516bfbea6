"""MHA as tests build it, and its formula: loops over heads and steps, turns by complex numbers."""

import cmath

import pytest
import torch

from ssm.modules.attention import MHA
from ssm.state import State

WIDTH, LENGTH = 8, 7
# Every option alone and all together; num_heads * head_dim differs from the width in the last.
VARIANTS = {
    "plain": {},
    "grouped": {"num_heads_kv": 2},
    "one_key_head": {"num_heads_kv": 1, "qkv_proj_bias": False, "out_proj_bias": False},
    "conv": {"d_conv": 3},
    "conv_one": {"d_conv": 1},
    "rotary": {"rotary_emb_dim": 2},
    "mlp": {"mlp_dim": 256},
    "all": {
        "num_heads_kv": 2,
        "head_dim": 6,
        "d_conv": 4,
        "rotary_emb_dim": 4,
        "rotary_emb_base": 50.0,
        "mlp_dim": 10,
        "softmax_scale": 0.7,
    },
    "interleaved": {"head_dim": 4, "rotary_emb_dim": 4, "rotary_emb_interleaved": True},
}
SOME = ("plain", "conv", "all")
each_variant = pytest.mark.parametrize("variant", VARIANTS)
some_variants = pytest.mark.parametrize("variant", SOME)


def mha(variant="all", dtype=torch.float64, **kwargs) -> MHA:
    settings = {"num_heads": 4, "causal": True, **VARIANTS[variant], **kwargs}
    return MHA(WIDTH, dtype=dtype, **settings)


def inputs(batch=2, length=LENGTH, dtype=torch.float64):
    return torch.randn(batch, length, WIDTH, dtype=dtype)


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def turned(head, position, dim, base, interleaved):
    """One head (P,) with its first dim features turned, pair by pair."""
    head, half = list(head), dim // 2
    for i in range(half):
        one, other = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turn = cmath.exp(1j * position * base ** (-2 * i / dim))
        a, b = head[one], head[other]
        head[one] = a * turn.real - b * turn.imag
        head[other] = a * turn.imag + b * turn.real
    return torch.stack(head)


def by_hand(m, x, positions=None, variant=None):
    """The layer for one row (L, D): every head and every step by itself."""
    settings = VARIANTS[variant]
    length, heads, keys, size = len(x), m.num_heads, m.num_heads_kv, m.head_dim
    positions = range(length) if positions is None else positions
    rows = x @ m.in_proj.weight.T + (0 if m.in_proj.bias is None else m.in_proj.bias)
    qkv, mlp = rows[:, : (heads + 2 * keys) * size], rows[:, (heads + 2 * keys) * size :]
    if m.d_conv:
        padded = torch.cat([qkv.new_zeros(m.d_conv - 1, qkv.shape[1]), qkv])
        weight = m.conv1d.weight[:, 0]
        windows = [padded[t : t + m.d_conv].T for t in range(length)]
        qkv = torch.stack([(w * weight).sum(-1) + m.conv1d.bias for w in windows])
    qkv = qkv.reshape(length, -1, size)
    if m.rotary_emb_dim:
        base = settings.get("rotary_emb_base", 10000.0)
        rule = (m.rotary_emb_dim, base, settings.get("rotary_emb_interleaved", False))
        qkv = torch.stack(
            [
                torch.stack(
                    [
                        turned(qkv[t, h], positions[t], *rule) if h < heads + keys else qkv[t, h]
                        for h in range(heads + 2 * keys)
                    ]
                )
                for t in range(length)
            ]
        )
    scale = settings.get("softmax_scale", size**-0.5)
    out = []
    for t in range(length):
        parts = []
        for h in range(heads):
            key = heads + h // (heads // keys)
            seen = range(t + 1 if m.causal else length)
            weights = [torch.exp(scale * (qkv[t, h] @ qkv[s, key])) for s in seen]
            mixed = sum(w * qkv[s, key + keys] for w, s in zip(weights, seen, strict=True))
            parts.append(mixed / sum(weights))
        if m.mlp_dim:
            up, gate = mlp[t].chunk(2)
            parts.append(up * gate / (1 + torch.exp(-gate)))
        out.append(torch.cat(parts))
    y = torch.stack(out) @ m.out_proj.weight.T
    return y if m.out_proj.bias is None else y + m.out_proj.bias


def assert_same_state(got, want, rows=slice(None), key=0):
    """Compare what a later token can read: filled slots, the window, the lengths."""
    got, want = got.key_value_memory_dict[key], want.key_value_memory_dict[key]
    lengths = want[-1][rows]
    assert torch.equal(got[-1][rows], lengths)
    for a, b, length in zip(got[0][rows], want[0][rows], lengths.tolist(), strict=True):
        close(a[:length], b[:length])
    for a, b in zip(got[1:-1], want[1:-1], strict=True):
        close(a[rows][..., 1:], b[rows][..., 1:])


def assert_same_row(state, row, alone):
    picked = tuple(t[row : row + 1] for t in state.key_value_memory_dict[0])
    assert_same_state(State({0: picked}), alone)


def compiled(m):
    torch.compiler.reset()
    return torch.compile(m, fullgraph=True, backend="aot_eager")


RAGGED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1]]).bool()
