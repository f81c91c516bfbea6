"""The probes of the machine's limits: they run, count per thread, and refuse in one sentence."""

import pytest
from ssm_kernels import _cpu

NAMES = ["fma", "exp", "copy", "copy_streamed"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_rate_is_plausible(name, threads):
    rate = _cpu._ceiling(name, threads, 0.01, 1 << 18)
    assert 1e7 < rate < 1e14


def test_multiply_adds_outrun_exponentials():
    # An exponential holds at least six of them.
    assert _cpu._ceiling("fma", 1, 0.02) > 3 * _cpu._ceiling("exp", 1, 0.02)


def test_copy_of_nearly_nothing_runs():
    assert _cpu._ceiling("copy", 2, 0.001, 2 * 512) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sin", 1, 0.1), "ceiling: name must be fma, exp, copy or copy_streamed, got sin"),
        (("fma", 0, 0.1), "ceiling: threads must be at least 1, got 0"),
        (("fma", 1, 0.0), r"ceiling: seconds must be in \(0, 60\], got 0"),
        (("fma", 1, float("nan")), r"ceiling: seconds must be in \(0, 60\], got nan"),
        (("copy", 2, 0.1, 1023), "ceiling: bytes must be at least 512 per thread, got 1023"),
        (("copy", 2, 0.1), "ceiling: bytes must be at least 512 per thread, got 0"),
    ],
)
def test_rejects(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        _cpu._ceiling(*arguments)
