"""What Mamba1 and Mamba2 compute and hold in a wider dtype than that of their activations.

Judge: docs/numerics.md, read off the arguments of the operators, and the same values in float32.
"""

import pytest
import torch
import torch.nn.functional as F

from ssm import ops
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2

MIXERS = {"mamba1": (Mamba1, {}), "mamba2": (Mamba2, {"headdim": 4})}
each_mixer = pytest.mark.parametrize("name", MIXERS)


def mixer(name, dtype, **kwargs):
    kind, settings = MIXERS[name]
    return kind(8, d_state=8, dtype=dtype, **settings, **kwargs)


def watch(monkeypatch, op, position):
    """Return the list that will hold the positional argument of each call of an operator."""
    seen, function = [], getattr(ops, op)

    def watched(*args, **kwargs):
        seen.append(args[position])
        return function(*args, **kwargs)

    monkeypatch.setattr(ops, op, watched)
    return seen


@each_mixer
@pytest.mark.parametrize(
    ("dtype", "asked"),
    [
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_recurrent_states_are_of_the_wider_dtype(name, dtype, asked):
    conv_state, ssm_state = mixer(name, dtype).allocate_inference_cache(2, 0, asked)
    assert (conv_state.dtype, ssm_state.dtype) == (asked, torch.float64)


@each_mixer
def test_decay_rates_are_float32_behind_a_cast_of_the_module(name, monkeypatch):
    m = mixer(name, torch.float32).to(torch.bfloat16)
    scan = watch(monkeypatch, "selective_scan" if name == "mamba1" else "ssd_chunk_scan", 2)
    step = watch(monkeypatch, "selective_state_step", 3)
    state = m.allocate_state(1)
    with torch.no_grad():
        for length in (3, 1):
            m(torch.randn(1, length, 8, dtype=torch.bfloat16), state=state)
    (of_scan,), (of_step,) = scan, step
    for A in (of_scan, of_step):
        assert A.dtype == torch.float32
        assert torch.equal(A, -torch.exp(m.A_log.float()))


def test_a_limited_step_adds_its_bias_in_float32(monkeypatch):
    m = mixer("mamba2", torch.bfloat16, dt_limit=(0.0, 1.0))
    seen = watch(monkeypatch, "selective_state_step", 2)
    with torch.no_grad():
        m.in_proj.weight.zero_()  # so that only the bias is left
        m(torch.randn(1, 1, 8, dtype=torch.bfloat16), state=m.allocate_state(1))
    (dt,) = seen
    torch.testing.assert_close(dt[0], F.softplus(m.dt_bias).detach(), rtol=1e-6, atol=0)
