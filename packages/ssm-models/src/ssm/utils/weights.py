"""Model <-> files, in the formats of ``ssm.utils.dialects``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssm.modules.arguments import check_dtype
from ssm.utils import dialects
from ssm.utils.checkpoint import TIED, Checkpoint, different_twins, open_checkpoint, plan_reading
from ssm.utils.files import named_path, write_files
from ssm.utils.hub import BIN_FILE, CONFIG_FILE, SAFETENSORS_FILE, find_directory
from ssm.utils.saving import (
    FP32_NAMES,
    check_whole,
    choose_format,
    kept,
    parse_size,
    spread,
    tensors_to_write,
)
from ssm.utils.tensor_files import INDEX_ENDING

# Two tensors that should be one are compared in pieces of this size.
TWIN_BYTES = 1 << 20
# So many blocks are built in a second, so that the tensors that are missing can be named.
FEW_BLOCKS = 1000
# Names that this module may have written, and that a later save replaces.
OURS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def from_pretrained(
    cls,
    pretrained_model_name: str | Path,
    device=None,
    dtype: torch.dtype | str | None = None,
    *,
    torch_dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
):
    """Load a checkpoint completely, or raise and load nothing.

    Every tensor is read on its own, into the storage that the model keeps.

    Args:
        cls: model class; called as ``cls(config, device=..., dtype=...)``.
        pretrained_model_name: directory, or name on the Hugging Face hub (needs
            ``huggingface_hub``), in any format of docs/weights.md.
        device: where the parameters shall live; None is the CPU. "meta" reads no tensor.
        dtype: of the parameters; None is the default dtype, "auto" that of each stored tensor.
            A_log, D and the bias of the step sizes are float32 or better in any case.
        torch_dtype: another name of dtype.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept.
        local_files_only: never use the network.
        token: for private repositories.

    Returns:
        The model, in ``eval()`` mode.

    Raises:
        FileNotFoundError: the directory or a file in it is missing; the message lists what was
            sought.
        ValueError: a file is damaged, names or shapes in it do not fit the config, the config
            needs what is not here, or the name is empty.
        TypeError: pretrained_model_name is neither a str nor a path.
        RuntimeError: a hub name, and ``huggingface_hub`` is not installed or cannot get it.
    """
    if torch_dtype is not None:
        if dtype is not None:
            raise ValueError("from_pretrained: torch_dtype must not be given beside dtype")
        dtype = torch_dtype
    dtype = _dtype(dtype)
    directory = find_directory(
        pretrained_model_name,
        revision=revision,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
    )
    checkpoint = open_checkpoint(directory)
    # Shapes without storage: what the file must hold is known before anything is allocated.
    model = build_on_meta(cls, checkpoint)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    pieces, second = plan_reading(checkpoint, shapes)
    files = checkpoint.tensors
    on_meta = device is not None and torch.device(device).type == "meta"
    tensors, stored = {}, {}
    # File by file, so that of several pickles one is held at a time.
    order = {file.path: number for number, file in enumerate(files.files)}
    for name in sorted(pieces, key=lambda n: order[files.entries[pieces[n][0].name].path]):
        parts = pieces[name]
        kinds = [files.entries[piece.name].dtype for piece in parts]
        stored[name] = reduce(torch.promote_types, kinds)
        kind = kept(name, dtype or stored[name])
        if on_meta:
            tensors[name] = torch.empty(shapes[name], device="meta", dtype=kind)
        elif len(parts) == 1:
            tensors[name] = files.read(parts[0].name, device=device, dtype=kind)
        else:
            tensors[name] = torch.empty(shapes[name], device=device, dtype=kind)
            for piece in parts:
                rows = files.read(piece.name, piece.start, piece.stop, device, kind)
                tensors[name][piece.row : piece.row + len(rows)] = rows
        if name == TIED[1] and second is not None and not on_meta:
            _check_twins(checkpoint, parts[0].name, second)
        for piece in parts:
            files.release(piece.name)
    _assign(model, tensors, stored)
    return model.eval()


def save_pretrained(
    model,
    save_directory: str | Path,
    *,
    format: str = "safetensors",
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json and the weights, to temporary names that are renamed when all are complete.

    Args:
        model: with ``config``.
        save_directory: made if absent. The files of another format, which the new ones replace,
            are removed.
        format: "safetensors" for our own; "mamba_ssm" for the pytorch_model.bin and the config
            that mamba_ssm reads; "hf" for the family of transformers that the model belongs to,
            or the ``model_type`` of one, for instance "mamba2".
        dtype: of the file, A_log, D and the bias of the step sizes excepted; None keeps each
            tensor's own, and what loading has raised to float32 goes back where nothing is lost.
        max_shard_size: bytes, or a text like "5GB", after which another file of safetensors is
            begun.

    Raises:
        TypeError: dtype is none, or save_directory neither a str nor a path.
        ValueError: the format is not known or cannot say what the model is, dtype is not floating
            point, save_directory is empty, the model holds parts of parameters (docs/distributed.md
            says how to save it), or two weights that the config ties. Nothing is written then.
        OSError: the directory cannot be written.
    """
    directory = named_path("save_pretrained", save_directory)
    check_dtype("save_pretrained", dtype)
    dialect, values = choose_format(model.config, format)
    limit = parse_size(max_shard_size)
    check_whole(model)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tensors_to_write(model, dialect, dtype, keep_twin=format == "mamba_ssm")
    writes: dict[str, Callable[[Path], object]] = {}
    if format == "mamba_ssm":
        writes[BIN_FILE] = partial(torch.save, tensors)
    else:
        shards = spread(tensors, limit)
        for name, names in shards:
            part = {key: tensors[key].contiguous() for key in names}
            writes[name] = partial(save_file, part, metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            where = {key: name for name, names in shards for key in names}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            writes[SAFETENSORS_FILE + INDEX_ENDING] = partial(_write_json, index)
    if dialect is not dialects.STATE_SPACES:
        # What transformers loads a checkpoint as, unless it is told something else.
        key = "dtype" if "dtype" in values else "torch_dtype"
        values[key] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    writes[CONFIG_FILE] = partial(_write_json, values)
    held = (path for path in directory.iterdir() if OURS.fullmatch(path.name))
    replaced = [path for path in held if path.name not in writes]
    write_files({directory / name: write for name, write in writes.items()}, replaced)


def build_on_meta(cls, checkpoint: Checkpoint):
    """Build the model of a checkpoint without storage.

    Args:
        cls: model class.
        checkpoint: opened.

    Returns:
        The model on "meta".

    Raises:
        ValueError: the config asks for what cannot be built; the message names the file.
    """
    blocks, stored = checkpoint.config.n_layer, len(checkpoint.tensors.entries)
    if blocks > max(stored, FEW_BLOCKS):
        raise ValueError(
            f"from_pretrained: {checkpoint.path} must describe at most a block per tensor of "
            f"{checkpoint.tensors.path.name}, got {blocks} blocks for {stored} tensors"
        )
    try:
        return cls(checkpoint.config, device="meta")
    except (TypeError, ValueError, RuntimeError) as error:
        reason, *trace = str(error).strip().split("\n")
        if trace or isinstance(error, RuntimeError):  # torch's words, of a size beyond 64 bits
            raise ValueError(
                f"from_pretrained: {checkpoint.path} must describe tensors that can be addressed, "
                f"got {reason}"
            ) from error
        raise ValueError(f"{reason} in {checkpoint.path}") from error


def _write_json(values: dict, path: Path) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _dtype(dtype) -> torch.dtype | None:
    """Return the dtype asked for; None stands for "auto"."""
    if dtype is None:
        return torch.get_default_dtype()
    if isinstance(dtype, str):
        if dtype == "auto":
            return None
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"from_pretrained: dtype must be a float dtype or 'auto', got {dtype}")
    return dtype


def _check_twins(checkpoint: Checkpoint, first: str, second: str) -> None:
    """Make sure, piece by piece, that a weight under two names is one."""
    files = checkpoint.tensors
    rows, *rest = files.entries[first].shape
    step = max(1, TWIN_BYTES // max(1, math.prod(rest) * files.entries[first].dtype.itemsize))
    for start in range(0, rows, step):
        a, b = (files.read(name, start, start + step) for name in (first, second))
        if not torch.equal(a, b):
            raise ValueError(different_twins(checkpoint, first, second))
    files.release(second)


def _assign(model, tensors: dict[str, Tensor], stored: dict[str, torch.dtype]) -> None:
    """Make the tensors the parameters of a model on "meta", and keep the parameters' marks."""
    marks = {name: dict(parameter.__dict__) for name, parameter in model.named_parameters()}
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.__dict__.update(marks.get(name, {}))
        if name.endswith(FP32_NAMES):
            parameter._stored_dtype = stored[name]
