"""Which sizes and ranges a Mamba2 block can be built with."""

from __future__ import annotations

import math
from collections.abc import Callable


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
        channels, name, start = _inner(expand, d_model), "d_model", d_model
        widths = _neighbours(
            d_model,
            lambda d: _inner(expand, d) > 0 and _inner(expand, d) % headdim == 0,
            d_model + headdim,
        )
    else:
        channels, name, start = d_ssm, "d_ssm", d_ssm
        widths = _neighbours(d_ssm, lambda d: d % headdim == 0, _inner(expand, d_model))
    heads = _neighbours(headdim, lambda p: channels % p == 0, channels)
    found = [(name, [w for w in widths if w != start]), ("headdim", heads)]
    return ", ".join(f"{name} {' or '.join(map(str, v))}" for name, v in found if v)


def _neighbours(value: int, is_valid: Callable[[int], bool], highest: int) -> list[int]:
    """Return the nearest valid integer below and above, as far as there are any."""
    below = next((v for v in range(min(value, highest), 0, -1) if is_valid(v)), None)
    above = next((v for v in range(value + 1, highest + 1) if is_valid(v)), None)
    return [v for v in (below, above) if v is not None]


def _pair(name: str, value) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(map(_is_number, value)):
        raise TypeError(f"Mamba2: {name} must be two numbers, got {value!r}")
    return tuple(value)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
