"""Model <-> files: config.json beside model.safetensors or pytorch_model.bin, state-spaces keys."""

from __future__ import annotations

import difflib
import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssm.models.config import MambaConfig
from ssm.utils.files import write_file

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
BIN_FILE = "pytorch_model.bin"
TIED = ("lm_head.weight", "backbone.embedding.weight")
# Rounding these to 8 bits changes the recurrence; they stay float32 in every model dtype.
FP32_NAMES = ("A_log", "D", "dt_bias", "dt_proj.bias")
MOST_NAMES = 10


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

    Args:
        cls: model class; called as ``cls(config, device=..., dtype=...)``.
        pretrained_model_name: directory, or name on the Hugging Face hub (needs
            ``huggingface_hub``).
        device: where the parameters shall live; None is the CPU.
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
        ValueError: a file is damaged, or names or shapes in it do not fit the config.
        RuntimeError: a hub name, and ``huggingface_hub`` is not installed or cannot get it.
    """
    if torch_dtype is not None:
        if dtype is not None:
            raise ValueError("from_pretrained: torch_dtype must not be given beside dtype")
        dtype = torch_dtype
    dtype = _dtype(dtype)
    directory = Path(pretrained_model_name).expanduser()
    if not directory.is_dir():
        directory = _download(
            str(pretrained_model_name),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
    config = read_config(directory)
    tensors, path = read_tensors(directory)
    # Shapes without storage: what the file must hold is known before anything is allocated.
    model = cls(config, device="meta")
    if config.tie_embeddings:
        _untie(tensors, path)
    _compare(model, tensors, path)
    for name in list(tensors):
        tensors[name] = _convert(name, tensors[name], device, dtype)
    _assign(model, tensors)
    return model.eval()


def save_pretrained(
    model,
    save_directory: str | Path,
    *,
    format: str = "safetensors",
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and the weights, each to a temporary name that is renamed when complete.

    Args:
        model: with ``config`` and the state-spaces key layout.
        save_directory: made if absent. The weights file of the other format, which the new one
            replaces, is removed.
        format: "safetensors", or "bin" for the pytorch_model.bin that mamba_ssm reads.
        dtype: of the file, A_log, D and the bias of the step sizes excepted; None keeps each
            tensor's own.

    Raises:
        ValueError: the format is not known.
        OSError: the directory cannot be written.
    """
    if format not in ("safetensors", "bin"):
        raise ValueError(f"save_pretrained: format must be 'safetensors' or 'bin', got {format!r}")
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: _convert(name, value.detach(), "cpu", dtype)
        for name, value in model.state_dict().items()
    }
    if format == "bin":
        name, other = BIN_FILE, SAFETENSORS_FILE
        write_file(directory / name, lambda path: torch.save(tensors, path))
    else:
        name, other = SAFETENSORS_FILE, BIN_FILE
        if model.config.tie_embeddings:
            # One storage under two names is refused by the format; the loader restores the tie.
            del tensors[TIED[0]]
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        write_file(directory / name, lambda path: save_file(tensors, path, {"format": "pt"}))
    text = model.config.to_json()
    write_file(directory / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    (directory / other).unlink(missing_ok=True)


def read_config(directory: Path) -> MambaConfig:
    """Read config.json of a checkpoint directory.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or in the format of transformers.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: {directory} must hold {CONFIG_FILE}, got none")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = {}
    if isinstance(values, dict) and "model_type" in values:
        raise ValueError(
            f"from_pretrained: {path} must be in the state-spaces format, "
            f"got model_type {values['model_type']!r} of transformers"
        )
    return MambaConfig.from_json(path)


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], Path]:
    """Read every tensor of a checkpoint directory to the CPU.

    Returns:
        (name -> tensor as stored, file it came from); safetensors is preferred over a pickle, and a
        pickle is read with ``weights_only=True``.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: the file is damaged or holds anything but tensors.
    """
    path = directory / SAFETENSORS_FILE
    if path.is_file():
        try:
            return load_file(path), path
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"from_pretrained: {path} must be a whole safetensors file, got {error}"
            ) from error
    path = directory / BIN_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"from_pretrained: {directory} must hold {SAFETENSORS_FILE} or {BIN_FILE}, got neither"
        )
    tensors = load_torch_file(path, "from_pretrained")
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"from_pretrained: {path} must hold a dict of tensors")
    return tensors, path


def load_torch_file(path: Path, owner: str):
    """Read a torch.save file with ``weights_only=True``.

    Raises:
        ValueError: the file is damaged or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, LookupError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{owner}: {path} must be a whole file of tensors, got {reason}"
        ) from error


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


def _convert(name: str, tensor: Tensor, device, dtype: torch.dtype | None) -> Tensor:
    dtype = tensor.dtype if dtype is None else dtype
    stem = name.split("mixer.")[-1]
    if stem in FP32_NAMES and dtype != torch.float64:
        dtype = torch.float32
    # Always a copy: what safetensors returns lies in the mapped file, at any alignment, and a file
    # that is cut short later would take the process with it.
    return tensor.to(device=device, dtype=dtype, copy=True)


def _untie(tensors: dict[str, Tensor], path: Path) -> None:
    """Drop the second name of a tied weight, after making sure that it says the same."""
    head, embedding = tensors.get(TIED[0]), tensors.get(TIED[1])
    if head is None:
        return
    if embedding is None:
        tensors[TIED[1]] = head
    elif head.shape != embedding.shape or not torch.equal(head, embedding):
        raise ValueError(
            f"from_pretrained: {path} must hold {TIED[0]} equal to {TIED[1]} if tie_embeddings, "
            "got different tensors"
        )
    del tensors[TIED[0]]


def _compare(model, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise unless names and shapes are those of the model."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del expected[TIED[0]]
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} for {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    integers = [f"{n} {t.dtype}" for n, t in tensors.items() if not t.is_floating_point()]
    faults = []
    if missing:
        faults.append("missing " + _list(_with_nearest(missing, unexpected)))
    if unexpected:
        faults.append("unexpected " + _list(unexpected))
    if wrong:
        faults.append("wrong shape " + _list(wrong))
    if integers:
        faults.append("no floating point in " + _list(integers))
    if faults:
        raise ValueError(
            f"from_pretrained: {path} must hold the tensors of its {CONFIG_FILE}, "
            f"got {'; '.join(faults)}"
        )


def _with_nearest(names: list[str], candidates: list[str]) -> list[str]:
    hints = []
    for name in names[:MOST_NAMES]:
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
        hints.append(f"{name} (nearest {near[0]})" if near else name)
    return hints + names[MOST_NAMES:]


def _list(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _assign(model, tensors: dict[str, Tensor]) -> None:
    """Make the tensors the parameters of a model on "meta", and keep the parameters' marks."""
    marks = {name: dict(parameter.__dict__) for name, parameter in model.named_parameters()}
    model.load_state_dict(tensors, assign=True, strict=False)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.__dict__.update(marks.get(name, {}))


def _download(name: str, **where) -> Path:
    """Return the local directory of a hub repository."""
    plausible = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not plausible:
        raise FileNotFoundError(
            f"from_pretrained: {name} must be a directory with {CONFIG_FILE} and "
            f"{SAFETENSORS_FILE} or {BIN_FILE}, got no such directory"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise RuntimeError(
            f"from_pretrained: {name} is no directory here, and to look for it on the hub "
            "huggingface_hub must be installed (pip install 'ssm-models[hub]')"
        ) from error
    wanted = [CONFIG_FILE, SAFETENSORS_FILE, BIN_FILE]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, **where))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(f"from_pretrained: {name} cannot be downloaded: {reason}") from error
