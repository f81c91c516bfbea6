"""Checks of the numbers that modules and models are built and called with."""

from __future__ import annotations

import math
from numbers import Real

import torch


def check_int(owner: str, name: str, value: object, lowest: int = 1) -> None:
    """Refuse what is no size.

    Args:
        owner: class or function name for messages.
        name: the argument.
        value: its value.
        lowest: 1, or 0 where none is allowed.

    Raises:
        TypeError: no int.
        ValueError: below lowest.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < lowest:
        rule = "be positive" if lowest else "not be negative"
        raise ValueError(f"{owner}: {name} must {rule}, got {value}")


def check_dtype(owner: str, dtype: object) -> None:
    """Refuse what parameters and states cannot be made of.

    Args:
        owner: class or function name for messages.
        dtype: of parameters or states; None stands for a default.

    Raises:
        TypeError: no dtype.
        ValueError: not floating point.
    """
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{owner}: dtype must be a torch.dtype, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"{owner}: dtype must be floating point, got {dtype}")


def check_number(owner: str, name: str, value: object) -> None:
    """Refuse what is no number.

    Args:
        owner: class or function name for messages.
        name: the argument.
        value: its value.

    Raises:
        TypeError: no int and no float.
        ValueError: an int that no float can hold.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{owner}: {name} must be finite, got an int beyond all floats") from None


def check_positive(owner: str, name: str, value: object) -> None:
    """Refuse what is no positive, finite number.

    Args:
        owner: class or function name for messages.
        name: the argument.
        value: its value.

    Raises:
        TypeError: no int and no float.
        ValueError: not above 0, or not finite.
    """
    check_number(owner, name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{owner}: {name} must be positive, got {value!r}")
