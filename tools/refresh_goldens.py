#!/usr/bin/env python3
"""Write the goldens: arguments, outputs and gradients of every operator, with their hashes.

Usage: tools/refresh_goldens.py [--output DIR]

For each small case of tests/cases.py one file, DIR/ops/<op>/<case>.safetensors, and
DIR/manifest.json with seeds, hashes and versions. Arguments are rounded to float32 first; outputs
and gradients come from ``ssm.ops.python.reference`` in float64 on these rounded arguments and are
rounded once. The same machine and the same versions give the same bytes.

For each checkpoint DIR/models/<name>/ also its loss on DIR/models/sonnets.txt, held_out.json, and
what it writes by itself, greedy.json.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import grid
from tools.checkout import ROOT, find_packages

SEED = 20240531
HELD_OUT_TEXT = "sonnets.txt"
PROMPT = "ROMEO:\n"
GREEDY_TOKENS = 200
# Goldens are read in every test run and live in the history for ever.
FILE_LIMIT = 64 << 10
TOTAL_LIMIT = 3 << 19
SOURCE = "ssm.ops.python.reference in float64, from arguments in float32"

# Operator -> the flag that asks for all outputs, and the names of the outputs.
OUTPUTS = {
    "selective_scan": ("return_last_state", ("y", "last_state")),
    "ssd_chunk_scan": ("return_final_states", ("y", "final_states")),
    "ssd_chunk_cumsum": (None, ("dt_out", "dA_cumsum")),
    "ssd_chunk_state": (None, ("states",)),
    "ssd_state_passing": (None, ("states_in", "final_states")),
    "ssd_bmm_chunk": (None, ("CB",)),
    "ssd_chunk_output": (None, ("y",)),
    "dw_causal_conv": ("return_final_state", ("y", "final_state")),
    "fused_layer_norm": (None, ("y", "sum")),
    "gated_norm": (None, ("y",)),
    "swiglu": (None, ("y",)),
    # These update a state in place: the updated state is the second output.
    "selective_state_step": (None, ("y", "state")),
    "dw_causal_conv_step": (None, ("y", "conv_state")),
}
IN_PLACE = {"selective_state_step": "state", "dw_causal_conv_step": "conv_state"}


class Fault(Exception):
    """A reason to stop; its text is the whole message."""


def call(op: str, function, arguments: dict) -> dict:
    """Return the outputs of an operator by name.

    Args:
        op: name of the operator.
        function: the implementation to call.
        arguments: tensors and flags by name; a state that is updated in place is copied first.

    Returns:
        Output name -> tensor.
    """
    flag, names = OUTPUTS[op]
    arguments = dict(arguments, **({flag: True} if flag else {}))
    if op not in IN_PLACE:
        outputs = function(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(names, outputs, strict=True))
    state = arguments[IN_PLACE[op]].clone()
    y = function(**{**arguments, IN_PLACE[op]: state})
    return dict(zip(names, (y, state), strict=True))


def gradients(op: str, function, arguments: dict, weights: dict) -> dict:
    """Return the gradients of sum(output * weight) over all outputs, by argument name.

    Zero where an argument reaches no output, as in a call without steps.
    """
    import torch

    leaves = {n: a.detach().clone().requires_grad_() for n, a in arguments.items() if is_float(a)}
    outputs = call(op, function, {**arguments, **leaves})
    loss = sum((output * weights[name]).sum() for name, output in outputs.items())
    loss.backward()
    return {n: torch.zeros_like(a) if a.grad is None else a.grad for n, a in leaves.items()}


def is_float(value) -> bool:
    """Return whether a value is a tensor of floats."""
    return hasattr(value, "is_floating_point") and value.is_floating_point()


def place_of(op: str, case) -> str:
    """Return the folder of a row and the name in it: operators that share a row add their own."""
    row = next((row for row, ops in grid.SEVERAL.items() if op in ops), op)
    return f"{row}/{case}" if row == op else f"{row}/{op}_{case}"


def encode(op: str, case) -> bytes:
    """Return the file of one case."""
    import torch
    from safetensors.torch import save

    from ssm.ops.python import reference
    from tests.cases import make
    from tests.tensors import tensors

    function = getattr(reference, op)
    given = make(case, SEED)
    narrow = tensors(given, torch.float32)
    wide = {n: a.double() if is_float(a) else a for n, a in narrow.items()}
    stored, flags = {}, {}
    for name, value in narrow.items():
        if name == "seq_meta" and value is not None:
            for part, array in given[name].items():
                stored[f"argument.seq_meta.{part}"] = torch.from_numpy(array)
        elif isinstance(value, torch.Tensor):
            stored[f"argument.{name}"] = value
        elif name in inspect.signature(function).parameters:
            flags[name] = value
    with torch.no_grad():
        outputs = call(op, function, wide)
    stored |= {f"output.{name}": value.float() for name, value in outputs.items()}
    if op not in IN_PLACE:
        generator = torch.Generator().manual_seed(SEED)
        weights = {n: torch.randn(o.shape, generator=generator) for n, o in outputs.items()}
        stored |= {f"weight.{name}": value for name, value in weights.items()}
        wide_weights = {name: value.double() for name, value in weights.items()}
        for name, value in gradients(op, function, wide, wide_weights).items():
            stored[f"gradient.{name}"] = value.float()
    # One key: safetensors writes several in an order that changes from process to process.
    metadata = {"flags": json.dumps(flags, sort_keys=True)}
    return save({n: t.contiguous() for n, t in stored.items()}, metadata)


def refresh(folder: Path) -> dict:
    """Write all goldens into a folder; return the manifest.

    Raises:
        Fault: all files together are too large.
    """
    import numpy
    import safetensors
    import torch

    from tests.cases import CASES

    found = {}
    for op in sorted(OUTPUTS):
        for case in CASES[op]:
            data = encode(op, case)
            if len(data) < FILE_LIMIT:
                found[f"ops/{place_of(op, case)}.safetensors"] = (op, str(case), data)
    total = sum(len(data) for _, _, data in found.values())
    if total > TOTAL_LIMIT:
        raise Fault(f"all goldens must take at most {TOTAL_LIMIT} bytes, got {total}")
    manifest = {
        "generator": "tools/refresh_goldens.py",
        "source": SOURCE,
        "versions": {
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "safetensors": safetensors.__version__,
            "torch": torch.__version__,
        },
        "goldens": [
            {
                "file": name,
                "op": op,
                "case": case,
                "seed": SEED,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            for name, (op, case, data) in found.items()
        ],
    }
    for stale in folder.glob("ops/*/*.safetensors"):
        if stale.relative_to(folder).as_posix() not in found:
            stale.unlink()
    for name, (_, _, data) in found.items():
        write(folder / name, data)
    write(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def refresh_models(folder: Path) -> None:
    """Write held_out.json and greedy.json beside every checkpoint, both on the reference."""
    import torch

    from ssm.models.lm import MambaLMHeadModel
    from ssm.text import load_vocabulary, read_bytes
    from ssm.training import evaluate
    from ssm.utils import dispatch

    for config in sorted(folder.glob("models/*/config.json")):
        model = MambaLMHeadModel.from_pretrained(str(config.parent), dtype=torch.float64)
        vocabulary = load_vocabulary(config.parent, model.config.vocab_size)
        tokens = vocabulary.encode(read_bytes(folder / "models" / HELD_OUT_TEXT))
        with dispatch.use_backend("python"):
            loss = evaluate(model, tokens)
            text, logits = continue_greedily(model, vocabulary)
        found = {
            "text": HELD_OUT_TEXT,
            "nats_per_byte": round(loss, 6),
            "source": "ssm.training.evaluate on the reference operators in float64",
        }
        write(config.with_name("held_out.json"), (json.dumps(found, indent=1) + "\n").encode())
        found = {
            "prompt": PROMPT,
            "text": text,
            "source": "the likeliest byte each time, and the logits after the last, "
            "on the reference operators in float64",
            "logits": [round(logit, 6) for logit in logits.tolist()],
        }
        write(config.with_name("greedy.json"), (json.dumps(found, indent=1) + "\n").encode())


def continue_greedily(model, vocabulary):
    """Return the text that a model continues PROMPT with, and the logits (V,) after it.

    Raises:
        Fault: a byte is not the likeliest by a pass over the whole text, or the text is no UTF-8.
    """
    import torch

    prompt = vocabulary.encode(PROMPT)
    tokens = model.generate(prompt[None], max_new_tokens=GREEDY_TOKENS)[0]
    text = tokens[len(prompt) :]
    # What is kept must not depend on the state that the decoding carried.
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0, len(prompt) - 1 :, : vocabulary.vocab_size]
    if not torch.equal(logits[:-1].argmax(-1), text):
        raise Fault("a checkpoint must write the same text step by step and whole, got two texts")
    if not torch.equal(vocabulary.encode(vocabulary.decode(text)), text):
        raise Fault("a checkpoint must continue the prompt with UTF-8, got other bytes")
    return vocabulary.decode(text), logits[-1]


def write(path: Path, data: bytes) -> None:
    """Write a file so that an interruption leaves the one before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_bytes(data)
    draft.replace(path)


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="refresh_goldens", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "goldens", metavar="DIR", help="default: goldens/"
    )
    arguments = parser.parse_args()
    find_packages()
    import torch

    # Sums over blocks of work depend on how many threads share them.
    torch.set_num_threads(1)
    try:
        manifest = refresh(arguments.output)
        refresh_models(arguments.output)
    except (Fault, OSError) as fault:
        print(f"refresh_goldens: {fault}", file=sys.stderr)
        return 1
    files = manifest["goldens"]
    total = sum((arguments.output / golden["file"]).stat().st_size for golden in files)
    print(f"{len(files)} goldens, {total / 1024:.0f} KiB, in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
