"""What a file of weights consists of: its config, its tensors under its names, its shards."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from ssm.distributed.layout import shards_of
from ssm.models.config import OUR_FIELDS, MambaConfig
from ssm.models.lm import same_values
from ssm.modules.precision import at_least_fp32
from ssm.utils import dialects
from ssm.utils.checkpoint import TIED
from ssm.utils.dialects.canonical import canonical, difference
from ssm.utils.dialects.configs import write_values
from ssm.utils.dialects.names import pieces_of
from ssm.utils.hub import SAFETENSORS_FILE

# Rounding these to 8 bits changes the recurrence; they stay float32 in every model dtype.
FP32_NAMES = (".A_log", ".D", ".dt_bias", ".dt_proj.bias")
FORMATS = ("safetensors", "mamba_ssm", "hf")
# Arguments of mixers that mamba_ssm does not have.
OUR_ARGUMENTS = ("bcdt_norm", "bcdt_norm_eps", "norm_eps", "multipliers")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def kept(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a tensor has in a model or file of a dtype.

    Args:
        name: of our tensor.
        dtype: of the model.

    Returns:
        float32 or better for what the recurrence needs exactly, else dtype.
    """
    return at_least_fp32(dtype) if name.endswith(FP32_NAMES) else dtype


def choose_format(config: MambaConfig, format: str) -> tuple[dialects.Dialect, dict]:
    """Find the table for a format, and say in it what the config says.

    Args:
        config: ours.
        format: as in ``save_pretrained``.

    Returns:
        The table, and the values of config.json.

    Raises:
        ValueError: the format is not known or cannot say it.
    """
    if format == "safetensors":
        return dialects.STATE_SPACES, config.to_dict()
    if format == "mamba_ssm":
        values = {k: v for k, v in config.to_dict().items() if k not in OUR_FIELDS}
        values["ssm_cfg"] = {k: v for k, v in config.ssm_cfg.items() if k not in OUR_ARGUMENTS}
        lost = difference(canonical(config), canonical(MambaConfig(**values)))
        if lost:
            raise ValueError(
                "save_pretrained: format mamba_ssm must be able to say what the config says, "
                f"got another {', '.join(lost)}"
            )
        return dialects.STATE_SPACES, values
    if format in dialects.FAMILIES:
        families = [dialects.FAMILIES[format]]
    elif format == "hf":
        source = config.foreign.get("model_type")
        families = sorted(dialects.FAMILIES.values(), key=lambda family: family.name != source)
    else:
        choice = ", ".join((*FORMATS, *dialects.FAMILIES))
        raise ValueError(f"save_pretrained: format must be one of {choice}, got {format!r}")
    faults = []
    for family in families:
        try:
            return family, write_values(family, config, dialects.GENERIC)
        except ValueError as error:
            faults.append(str(error))
    if len(faults) == 1:
        raise ValueError(faults[0])
    reasons = [fault.partition("says, got ")[2] for fault in faults]
    pairs = zip((family.name for family in families), reasons, strict=True)
    raise ValueError(
        "save_pretrained: format hf must have a family for the config, got none: "
        + "; ".join(f"{name}: {reason}" for name, reason in pairs)
    )


def check_whole(model) -> None:
    """Refuse a model from which a file would not be what its config says.

    Args:
        model: with ``config``.

    Raises:
        ValueError: its parameters are parts of one rank, or the config ties two that differ.
    """
    rule = "save_pretrained: model must hold whole parameters, got"
    if next(shards_of(model), None) is not None:
        raise ValueError(
            f"{rule} those of one rank of process_group; load gather_state_dict(model) into a "
            "model without it, and save that"
        )
    state = model.state_dict()
    # A DTensor, by what it can do: its class is not in every build of torch.
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        raise ValueError(
            f"{rule} DTensor; load get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True)) into a model that is not sharded, and save that"
        )
    if model.config.tie_embeddings and not same_values(*(state[name] for name in TIED)):
        raise ValueError(
            f"save_pretrained: {TIED[0]} must be {TIED[1]} if the config ties them, got different "
            "tensors; model.tie_weights() before training makes them one"
        )


def tensors_to_write(
    model, dialect: dialects.Dialect, dtype: torch.dtype | None, keep_twin: bool
) -> dict[str, Tensor]:
    """Make the tensors of a file.

    Args:
        model: with ``config``.
        dialect: names them.
        dtype: as in ``save_pretrained``.
        keep_twin: also a tied lm_head, as a second name of one storage.

    Returns:
        Stored name -> tensor on the CPU.
    """
    state = model.state_dict()
    parameters = dict(model.named_parameters())
    if model.config.tie_embeddings and not keep_twin:
        # One storage under two names is refused by the format; the loader restores the tie.
        del state[TIED[0]]
    form = canonical(model.config)
    parts: dict[str, list] = {}
    done: dict[int, Tensor] = {}
    for name, value in state.items():
        ours = done.get(value.data_ptr())
        if ours is None:
            kind = dtype or getattr(parameters.get(name), "_stored_dtype", value.dtype)
            ours = _written(name, value.detach(), dtype, kind)
            if value.numel():
                done[value.data_ptr()] = ours
        for piece in pieces_of(dialect, form, name, tuple(value.shape)):
            rows = ours[piece.row : piece.row + piece.stop - piece.start]
            parts.setdefault(piece.name, []).append((piece.start, rows))
    found = {}
    for name, pieces in parts.items():
        pieces.sort(key=lambda pair: pair[0])
        rows = [tensor for _, tensor in pieces]
        if len(rows) > 1:
            found[name] = torch.cat(rows)
        else:
            # A part of a tensor shares its storage with the others, which the format refuses.
            is_part = rows[0].untyped_storage().nbytes() != rows[0].nbytes
            found[name] = rows[0].clone() if is_part else rows[0]
    return found


def _written(name: str, value: Tensor, dtype, stored: torch.dtype) -> Tensor:
    """Return a tensor as it goes into the file."""
    if dtype is not None:
        return value.to("cpu", kept(name, dtype))
    if stored == value.dtype:
        return value.cpu()
    rounded = value.to("cpu", stored)
    return rounded if torch.equal(rounded.to(value.dtype), value.cpu()) else value.cpu()


def parse_size(size: int | str) -> int:
    """Read a number of bytes.

    Args:
        size: an int, or a text like "5GB" or "100 MiB".

    Returns:
        The number.

    Raises:
        ValueError: it is neither, or not positive.
    """
    found = size
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", size.strip().upper())
        found = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(
            "save_pretrained: max_shard_size must be a number of bytes or a text like '5GB', "
            f"got {size!r}"
        )
    return found


def spread(tensors: dict[str, Tensor], limit: int) -> list[tuple[str, list[str]]]:
    """Spread tensors over files.

    Args:
        tensors: by name.
        limit: bytes of a file; a larger tensor has a file of its own.

    Returns:
        (file, names in it) in order.
    """
    groups: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= tensor.nbytes
    if len(groups) == 1:
        return [(SAFETENSORS_FILE, groups[0])]
    stem, ending = os.path.splitext(SAFETENSORS_FILE)
    return [
        (f"{stem}-{number:05}-of-{len(groups):05}{ending}", names)
        for number, names in enumerate(groups, 1)
    ]
