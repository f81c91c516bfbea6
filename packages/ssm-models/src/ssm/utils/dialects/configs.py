"""A config by its table: from a foreign one to ours, and back."""

from __future__ import annotations

import difflib
import math
from typing import Any

from ssm.models.config import MambaConfig, check_integers
from ssm.utils.dialects.canonical import canonical, difference
from ssm.utils.dialects.table import REQUIRED, Dialect, Values

# More than any model has; lists of blocks are made before the tensors are counted.
MOST_BLOCKS = 1_000_000


def decode(value: Any, path: str = "") -> Any:
    """Replace ``{"__float__": "Infinity"}``, as transformers writes it, by the number.

    Args:
        value: of a JSON file.
        path: of the value in the file, for messages.

    Returns:
        The same with numbers.

    Raises:
        ValueError: what stands for a number is none; the message names the field.
    """
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            text = value["__float__"]
            try:
                return float(text)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"from_pretrained: {path} must be a number, got {text!r}"
                ) from error
        return {key: decode(inner, f"{path}.{key}".strip(".")) for key, inner in value.items()}
    if isinstance(value, list):
        return [decode(inner, f"{path}.{index}") for index, inner in enumerate(value)]
    return value


def read_values(dialect: Dialect, values: Values, generic: frozenset[str]) -> MambaConfig:
    """Make our config of a foreign one.

    Args:
        dialect: of the config.
        values: the JSON object, numbers decoded.
        generic: fields that a config of any family may hold, without effect.

    Returns:
        Ours; what has no meaning here stands in its ``foreign``.

    Raises:
        ValueError: a field is not known, is missing, contradicts another, or asks for what is not
            supported; the message names the field.
        TypeError: a value has the wrong type.
    """
    check_integers(dialect.name, values)
    full = _fill(dialect, values, generic)
    for condition, missing in dialect.refused:
        if _computed(dialect, missing, condition, full):
            raise ValueError(f"{dialect.name}: config must do without {missing}, got one with it")
    for name, allowed in dialect.fixed.items():
        if full[name] not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise ValueError(f"{dialect.name}: {name} must be {choice}, got {full[name]!r}")
    for name, compute in dialect.agree.items():
        if full.get(name) is None:
            continue
        wanted = _computed(dialect, name, compute, full)
        if difference(wanted, full[name]):
            raise ValueError(
                f"{dialect.name}: {name} must be {wanted!r} by the other fields, got {full[name]!r}"
            )
    ours: Values = {}
    for path, value in dialect.ours.items():
        _put(ours, path, value)
    for entry in dialect.fields:
        _put(ours, entry.ours, full[entry.name])
    for path, compute in dialect.derive.items():
        _put(ours, path, _computed(dialect, path, compute, full))
    meaning = {entry.name for entry in dialect.fields}
    meaning |= {*dialect.emit, *dialect.defaults, *dialect.agree}
    meaning -= dialect.kept
    rest = {n: v for n, v in values.items() if dialect.legacy.get(n, n) not in meaning}
    ours["foreign"] = {"model_type": dialect.name, **rest}
    return MambaConfig.from_dict(ours)


def write_values(dialect: Dialect, config: MambaConfig, generic: frozenset[str]) -> Values:
    """Make a foreign config of ours.

    Args:
        dialect: to be written.
        config: ours.
        generic: as in ``read_values``.

    Returns:
        The JSON object.

    Raises:
        ValueError: the format cannot say what the config says; the message names what.
    """
    form = canonical(config, used=False)
    layer = form["ssm_cfg"].get("layer")
    if layer not in (None, dialect.ours.get("ssm_cfg.layer", layer)):
        raise _cannot_say(dialect, "another ssm_cfg.layer")
    source = config.foreign if config.foreign.get("model_type") == dialect.name else {}
    values = {**source, "architectures": [dialect.architecture], "model_type": dialect.name}
    try:
        for entry in dialect.fields:
            values[entry.name] = _get(form, entry.ours)
        for name, compute in dialect.emit.items():
            values[name] = compute(form)
        wanted = canonical(config)
        lost = difference(wanted, canonical(read_values(dialect, values, generic)))
        kept = {name: source[name] for name in dialect.kept & set(source)}
        if kept and not difference(
            wanted, canonical(read_values(dialect, {**values, **kept}, generic))
        ):
            values |= kept
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        # A part that the family always has is not in the config, or a value is out of its range.
        text = str(error) if isinstance(error, ValueError) else "a part of it missing"
        raise _cannot_say(dialect, text) from error
    if lost:
        raise _cannot_say(dialect, f"another {', '.join(lost)}")
    return values


def _cannot_say(dialect: Dialect, what: str) -> ValueError:
    return ValueError(
        f"save_pretrained: format {dialect.name} must be able to say what the config says, got "
        + what
    )


def _computed(dialect: Dialect, what: str, compute, full: Values):
    """Call a function of a table; a value of a wrong type may fail anywhere in it."""
    try:
        return compute(full)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{dialect.name}: the fields behind {what} must be of the right types, got {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{dialect.name}: {error}") from error


def _fill(dialect: Dialect, values: Values, generic: frozenset[str]) -> Values:
    """Return all fields under their present names, defaults included."""
    known = dialect.known()
    full: Values = {}
    for name, value in values.items():
        if name not in known | generic and not name.startswith("_"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it if it changes no result"
            raise ValueError(f"{dialect.name}: field must be a known one, got {name!r} ({hint})")
        if name in dialect.ignored and _holds_nan(value):
            raise ValueError(f"{dialect.name}: {name} must be without NaN, got {value!r}")
        present = dialect.legacy.get(name, name)
        if present in full and difference(full[present], value):
            raise ValueError(
                f"{dialect.name}: {name} must be {full[present]!r} as {present}, got {value!r}"
            )
        full[present] = value
    defaults = {entry.name: entry.default for entry in dialect.fields}
    defaults |= dialect.defaults
    defaults |= {name: allowed[0] for name, allowed in dialect.fixed.items()}
    for name, value in defaults.items():
        if full.setdefault(name, value) is REQUIRED:
            raise ValueError(f"{dialect.name}: config must hold {name}, got none")
        if full[name] is not None or name not in dialect.nullable:
            _check_kind(f"{dialect.name}: {name}", full[name], value)
    for entry in dialect.fields:
        blocks = full[entry.name] if entry.ours == "n_layer" else 0
        if isinstance(blocks, int) and blocks > MOST_BLOCKS:
            raise ValueError(
                f"{dialect.name}: {entry.name} must be at most {MOST_BLOCKS}, got {blocks}"
            )
    return full


def _holds_nan(value) -> bool:
    if isinstance(value, list):
        return any(map(_holds_nan, value))
    return isinstance(value, float) and math.isnan(value)


def _check_kind(what: str, value, default) -> None:
    """Refuse a value of another kind than the default of its field."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{what} must be a bool, got {value!r}")
    elif isinstance(default, (int, float)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"{what} must be a finite number, got {value!r}")
        if isinstance(default, int) and value < 0:
            raise ValueError(f"{what} must not be negative, got {value!r}")


def _put(values: Values, path: str, value: Any) -> None:
    head, _, rest = path.partition(".")
    if not rest:
        values[head] = value
    else:
        values.setdefault(head, {})[rest] = value


def _get(values: Values, path: str) -> Any:
    for name in path.split("."):
        values = values[name]
    return values
