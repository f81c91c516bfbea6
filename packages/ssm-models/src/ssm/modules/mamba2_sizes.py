"""Which sizes and ranges a Mamba2 block can be built with."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

_TRIES = 1 << 12  # of a search that looks for sizes to propose: a moment, whatever the sizes


def check_arguments(
    *,
    d_model,
    d_state,
    d_conv,
    headdim,
    expand,
    ngroups,
    d_ssm,
    chunk_size,
    conv_init,
    A_init_range,
    dt_min,
    dt_max,
    dt_init_floor,
    dt_limit,
    norm_eps=1e-5,
    multipliers=None,
) -> int:
    """Check the arguments of ``Mamba2`` that can be wrong.

    Args:
        d_model: int.
        d_state: int.
        d_conv: int.
        headdim: int, divides d_ssm.
        expand: number.
        ngroups: int, divides d_ssm / headdim.
        d_ssm: int, at most expand * d_model, or None for that.
        chunk_size: int.
        conv_init: number or None.
        A_init_range: two positive numbers in order.
        dt_min: number.
        dt_max: number, at least dt_min.
        dt_init_floor: number.
        dt_limit: two numbers in order, the first one finite.
        norm_eps: positive number.
        multipliers: five numbers or None.

    Returns:
        d_inner, the channels inside.

    Raises:
        ValueError: a value is out of its range, or sizes do not divide each other; where d_ssm is
            no multiple of headdim the message names the nearest sizes that go together.
        TypeError: a value has the wrong Python type.
    """
    sizes = {
        "d_model": d_model,
        "d_state": d_state,
        "d_conv": d_conv,
        "headdim": headdim,
        "ngroups": ngroups,
        "chunk_size": chunk_size,
    }
    if d_ssm is not None:
        sizes["d_ssm"] = d_ssm
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"Mamba2: {name} must be an int, got {value!r}")
    scales = {"expand": expand, "dt_min": dt_min, "dt_max": dt_max, "dt_init_floor": dt_init_floor}
    scales["norm_eps"] = norm_eps
    if conv_init is not None:
        scales["conv_init"] = conv_init
    for name, value in scales.items():
        if not _is_number(value):
            raise TypeError(f"Mamba2: {name} must be a number, got {value!r}")
    for name, value in {**sizes, **scales}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"Mamba2: {name} must be positive, got {value!r}")
    if dt_max < dt_min:
        raise ValueError(f"Mamba2: dt_max must be at least dt_min = {dt_min}, got {dt_max}")
    low, high = _pair("A_init_range", A_init_range)
    if not 0 < low <= high < math.inf:
        raise ValueError(
            f"Mamba2: A_init_range must be (low, high) with 0 < low <= high, got {A_init_range}"
        )
    if multipliers is not None:
        listed = isinstance(multipliers, (tuple, list)) and all(map(_is_number, multipliers))
        if not listed or len(multipliers) != 5:
            raise TypeError(f"Mamba2: multipliers must be five numbers, got {multipliers!r}")
        if not all(map(math.isfinite, multipliers)):
            raise ValueError(f"Mamba2: multipliers must be finite, got {multipliers}")
    low, high = _pair("dt_limit", dt_limit)
    if not (-math.inf < low < math.inf and low <= high):
        raise ValueError(
            f"Mamba2: dt_limit must be (low, high) with a finite low <= high, got {dt_limit}"
        )

    d_inner = _inner(expand, d_model)
    if d_ssm is not None and d_ssm > d_inner:
        raise ValueError(f"Mamba2: d_ssm must be at most expand * d_model = {d_inner}, got {d_ssm}")
    channels = d_inner if d_ssm is None else d_ssm
    if channels % headdim or not channels:
        nearest = _nearest_sizes(d_model, expand, d_ssm, headdim)
        raise ValueError(
            f"Mamba2: d_ssm must be a multiple of headdim = {headdim}, got {channels} "
            f"(nearest valid: {nearest})"
        )
    if (channels // headdim) % ngroups:
        raise ValueError(
            f"Mamba2: ngroups must divide d_ssm / headdim = {channels // headdim} heads, "
            f"got {ngroups}"
        )
    return d_inner


def _inner(expand, d_model) -> int:
    return round(expand * d_model)


def _nearest_sizes(d_model, expand, d_ssm, headdim) -> str:
    """Say which neighbours of the sizes would do, each with the others as they are."""
    if d_ssm is None:
        channels, name = _inner(expand, d_model), "d_model"
        widths = _widths(d_model, expand, headdim)
    else:
        channels, name = d_ssm, "d_ssm"
        below = d_ssm // headdim * headdim
        highest = _inner(expand, d_model)
        widths = [width for width in (below, below + headdim) if 0 < width <= highest]
    found = [(name, widths), ("headdim", _neighbours(headdim, _divisors(channels)))]
    return ", ".join(f"{name} {' or '.join(map(str, v))}" for name, v in found if v)


def _widths(d_model: int, expand, headdim: int) -> list[int]:
    """Return the nearest widths below and above d_model whose channels headdim divides."""
    heads = _inner(expand, d_model) // headdim
    below = range(heads, max(0, heads - _TRIES), -1)
    above = range(heads + 1, heads + _TRIES)
    found = [
        next((d for n in below for d in _sources(expand, n * headdim, -1)), None),
        next((d for n in above for d in _sources(expand, n * headdim, 1)), None),
    ]
    return [d for d in found if d is not None and d <= d_model + headdim]


def _sources(expand, channels: int, order: int) -> list[int]:
    """Return widths that have this number of channels; the first or last of them come first."""
    half = Fraction(order, 2)
    edge = math.ceil((channels - half) / Fraction(expand))
    return [
        d
        for d in range(edge - 2 * order, edge + 3 * order, order)
        if d > 0 and _inner(expand, d) == channels
    ]


def _divisors(number: int) -> list[int]:
    """Return the divisors of a number in order, of a huge one only those that are found soon."""
    small = [d for d in range(1, min(math.isqrt(number), _TRIES) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _neighbours(value: int, ordered: list[int]) -> list[int]:
    """Return the nearest of the numbers below and above a value that is none of them."""
    place = bisect.bisect(ordered, value)
    return ordered[max(0, place - 1) : place + 1] if place else ordered[:1]


def _pair(name: str, value) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(_is_number, value)):
        raise TypeError(f"Mamba2: {name} must be two numbers, got {value!r}")
    return tuple(value)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
