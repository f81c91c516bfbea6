"""``ssm-models convert``: from any format of checkpoints to one of those that are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ssm.commands.options import DTYPES, check_directory
from ssm.models.lm import MambaLMHeadModel
from ssm.utils.hub import find_directory

# Files that belong to the tokenizer or to generation, the same in every format.
BESIDE = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("convert", help="write a checkpoint in another format")
    parser.add_argument("source", metavar="SRC", help="directory, or name on the Hugging Face hub")
    parser.add_argument("target", metavar="DST", help="directory, new or empty")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="safetensors, mamba_ssm, hf, or a family like mamba2",
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the weights")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file (default 5GB)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments) -> None:
    """Convert one checkpoint."""
    source, target = find_directory(arguments.source), Path(arguments.target)
    check_directory("convert", "DST", target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"convert: DST must be a new or empty directory, got {target}")
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = MambaLMHeadModel.from_pretrained(source, dtype=dtype or "auto")
    model.save_pretrained(
        target, format=arguments.to, dtype=dtype, max_shard_size=arguments.max_shard_size
    )
    copied = [name for name in BESIDE if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    written = sorted(path.name for path in target.iterdir())
    if arguments.json:
        result = {"source": str(source), "target": str(target), "format": arguments.to}
        print(json.dumps({**result, "files": written}))
        return
    print(f"{source} -> {target} ({arguments.to}): {', '.join(written)}")
