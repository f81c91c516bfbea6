"""From a name to a directory: one here, or a copy of a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from ssm.utils.files import named_path

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
BIN_FILE = "pytorch_model.bin"
# As Mistral publishes models.
PARAMS_FILE = "params.json"
CONSOLIDATED_FILE = "consolidated.safetensors"
# Small files beside the weights; with the pickles these are fetched only where there is no other.
BESIDE = (
    CONFIG_FILE,
    PARAMS_FILE,
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
WEIGHTS = (
    (SAFETENSORS_FILE, SAFETENSORS_FILE + ".index.json", "model-*-of-*.safetensors"),
    (CONSOLIDATED_FILE,),
    (BIN_FILE, BIN_FILE + ".index.json", "pytorch_model-*-of-*.bin"),
)
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def find_directory(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Path:
    """Return the directory of a checkpoint.

    Args:
        name: a directory, or a name on the hub (needs ``huggingface_hub``).
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept.
        local_files_only: never use the network; so it is too if HF_HUB_OFFLINE or
            TRANSFORMERS_OFFLINE is set to 1, true, yes or on.
        token: for private repositories.

    Returns:
        A directory that exists.

    Raises:
        FileNotFoundError: no such directory and no name of the hub, or not in its cache while the
            network may not be used.
        RuntimeError: ``huggingface_hub`` is not installed or cannot get the repository.
        TypeError: name is neither a str nor a path.
        ValueError: name is empty.
    """
    directory = named_path("from_pretrained", name).expanduser()
    if directory.is_dir():
        return directory
    name = str(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
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
    told = [variable for variable in OFFLINE if _is_set(variable)]
    where = {
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only or bool(told),
        "token": token,
    }
    try:
        for patterns in WEIGHTS:
            found = Path(snapshot_download(name, allow_patterns=[*BESIDE, *patterns], **where))
            if any(file for pattern in patterns for file in found.glob(pattern)):
                return found
    except Exception as error:
        if where["local_files_only"]:
            reason = f"{told[0]} is set" if told else "local_files_only"
            raise FileNotFoundError(
                f"from_pretrained: {name} must be in the cache of the hub if the network may not "
                f"be used ({reason}), got no such copy"
            ) from error
        reason = str(error).strip().split("\n")[0]
        raise RuntimeError(f"from_pretrained: {name} cannot be downloaded: {reason}") from error
    return found


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")
