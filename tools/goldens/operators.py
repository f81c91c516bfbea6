"""Goldens of every operator from our own reference, and how a golden's operator is called."""

from __future__ import annotations

import inspect
from pathlib import Path

from tools import grid
from tools.goldens.files import SEED, Fault, digest, encode, versions, write, write_json

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


def gradients(outputs_of, arguments: dict, weights: dict) -> dict:
    """Return the gradients of sum(output * weight), by argument name.

    Args:
        outputs_of: arguments -> output name -> tensor.
        arguments: tensors and flags by name; the float tensors get gradients.
        weights: output name -> tensor; outputs without a weight do not count.

    Returns:
        Argument name -> gradient; zero where an argument reaches no output, as in a call without
        steps.
    """
    import torch

    leaves = {n: a.detach().clone().requires_grad_() for n, a in arguments.items() if is_float(a)}
    outputs = outputs_of({**arguments, **leaves})
    sum((outputs[name] * weight).sum() for name, weight in weights.items()).backward()
    return {n: torch.zeros_like(a) if a.grad is None else a.grad for n, a in leaves.items()}


def is_float(value) -> bool:
    """Return whether a value is a tensor of floats."""
    return hasattr(value, "is_floating_point") and value.is_floating_point()


def draw_weights(outputs: dict) -> dict:
    """Return the float32 weight of every output in the loss, the same for the same shapes."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return {n: torch.randn(o.shape, generator=generator) for n, o in outputs.items()}


def place_of(op: str, case) -> str:
    """Return the folder of a row and the name in it: operators that share a row add their own."""
    row = next((row for row, ops in grid.SEVERAL.items() if op in ops), op)
    return f"{row}/{case}" if row == op else f"{row}/{op}_{case}"


def golden(op: str, case) -> bytes:
    """Return the file of one case."""
    import torch

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
        weights = draw_weights(outputs)
        stored |= {f"weight.{name}": value for name, value in weights.items()}
        wide_weights = {name: value.double() for name, value in weights.items()}
        found = gradients(lambda arguments: call(op, function, arguments), wide, wide_weights)
        stored |= {f"gradient.{name}": value.float() for name, value in found.items()}
    return encode(stored, flags)


def refresh(folder: Path) -> list[dict]:
    """Write all goldens of our reference into a folder.

    Returns:
        What the manifest says of each.

    Raises:
        Fault: all files together are too large.
    """
    from tests.cases import CASES

    found = {}
    for op in sorted(OUTPUTS):
        for case in CASES[op]:
            data = golden(op, case)
            if len(data) < FILE_LIMIT:
                found[f"ops/{place_of(op, case)}.safetensors"] = (op, str(case), data)
    total = sum(len(data) for _, _, data in found.values())
    if total > TOTAL_LIMIT:
        raise Fault(f"all goldens must take at most {TOTAL_LIMIT} bytes, got {total}")
    entries = [
        {"file": name, "op": op, "case": case, "seed": SEED, "sha256": digest(data)}
        for name, (op, case, data) in found.items()
    ]
    manifest = {
        "generator": "tools/refresh_goldens.py",
        "source": SOURCE,
        "versions": versions("numpy", "safetensors", "torch"),
        "goldens": entries,
    }
    for stale in folder.glob("ops/*/*.safetensors"):
        if stale.relative_to(folder).as_posix() not in found:
            stale.unlink()
    for name, (_, _, data) in found.items():
        write(folder / name, data)
    write_json(folder / "manifest.json", manifest)
    return entries
