"""``ssm-models inspect``: what a checkpoint is, from its headers."""

from __future__ import annotations

import json
import math
from collections import Counter

from ssm.models.lm import MambaLMHeadModel
from ssm.utils.checkpoint import Checkpoint, open_checkpoint, plan_reading
from ssm.utils.hub import find_directory
from ssm.utils.weights import build_on_meta


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("inspect", help="family, sizes and dtypes; reads no tensor")
    parser.add_argument("model", metavar="SRC", help="directory, or name on the Hugging Face hub")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def describe(checkpoint: Checkpoint) -> dict:
    """Return what is known of a checkpoint, after checking that names and shapes fit its config.

    Args:
        checkpoint: opened.

    Returns:
        A dict that can be written as JSON.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    config, entries = checkpoint.config, checkpoint.tensors.entries
    model = build_on_meta(MambaLMHeadModel, checkpoint)
    plan_reading(checkpoint, {name: tuple(t.shape) for name, t in model.state_dict().items()})
    dtypes: Counter[str] = Counter()
    for entry in entries.values():
        dtypes[str(entry.dtype).removeprefix("torch.")] += math.prod(entry.shape)
    attention, mlps = len(set(config.attn_layer_idx)), len(set(config.mlp_layer_idx))
    beside = config.parallel_cfg is not None
    layer = config.ssm_cfg.get("layer", "Mamba1")
    blocks = {layer: config.n_layer - mlps - (0 if beside else attention)}
    blocks |= {"attention": attention, "MLP alone": mlps}
    return {
        "family": checkpoint.dialect.name,
        "config": str(checkpoint.path),
        "files": [
            {"name": file.path.name, "bytes": file.path.stat().st_size}
            for file in checkpoint.tensors.files
        ],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stored_numbers": dict(dtypes),
        "tensors": len(entries),
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "vocab_size": config.vocab_size,
        "tie_embeddings": config.tie_embeddings,
        "blocks": {name: count for name, count in blocks.items() if count},
    }


def run(arguments) -> None:
    """Print what a checkpoint is."""
    checkpoint = open_checkpoint(find_directory(arguments.model))
    found = describe(checkpoint)
    entries = checkpoint.tensors.entries
    listed = {
        name: [str(entry.dtype).removeprefix("torch."), list(entry.shape)]
        for name, entry in entries.items()
    }
    if arguments.json:
        print(json.dumps({**found, "shapes": listed} if arguments.tensors else found, indent=2))
        return
    total = sum(file["bytes"] for file in found["files"])
    print(f"{'family':<12}{found['family']}")
    print(f"{'config':<12}{found['config']}")
    print(f"{'files':<12}{len(found['files'])}, {total / 1e6:.1f} MB, {found['tensors']} tensors")
    numbers = ", ".join(f"{count} {dtype}" for dtype, count in found["stored_numbers"].items())
    print(f"{'parameters':<12}{found['parameters']} ({numbers})")
    print(f"{'blocks':<12}{', '.join(f'{n} {name}' for name, n in found['blocks'].items())}")
    print(f"{'width':<12}{found['d_model']}, vocabulary {found['vocab_size']}")
    if arguments.tensors:
        for name, (dtype, shape) in listed.items():
            print(f"  {name} {dtype} {tuple(shape)}")
