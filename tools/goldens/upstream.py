"""Goldens of upstream: the table of tests/golden_cases.py, run in upstream's own code."""

from __future__ import annotations

import json
from pathlib import Path

from tools.goldens import clone
from tools.goldens.files import SEED, Fault, digest, encode, versions, write, write_json
from tools.goldens.operators import IN_PLACE, draw_weights, gradients, is_float

FILE_LIMIT = 256 << 10
TOTAL_LIMIT = 8 << 20


def refresh(
    folder: Path, clones: dict, device: str, allow_other_commit: bool = False
) -> list[dict]:
    """Write the goldens of one kind of device into folder/upstream/<kind>/.

    Goldens that need a clone which is not given stay as they are.

    Args:
        folder: of the goldens.
        clones: Repository -> folder of its clone; a GPU uses installed packages beside MAMBA.
        device: "cpu" or "cuda:N".
        allow_other_commit: take clones at other commits; the manifest says which.

    Returns:
        What the manifest says of each golden.

    Raises:
        Fault: a clone is refused, something is not installed, or a file would be too large.
    """
    commits = {r: clone.check(r, path, allow_other_commit) for r, path in clones.items()}
    import torch

    from tests import golden_cases
    from tools.goldens import upstream_loading

    kind = device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise Fault(f"--device must be one of this machine, got {device}: there is no CUDA device")
    upstream = upstream_loading.load(clones, device)
    used = versions("einops", "numpy", "safetensors", "torch")
    if kind == "cuda":
        used |= versions("triton", "causal_conv1d", "flash_attn")
        commits |= {r: f"installed {used[r.package]}" for r in (clone.CONV, clone.ROTARY)}
    place = folder / "upstream" / kind
    kept, signatures = _kept(place)
    found, entries = {}, []
    for golden in golden_cases.ALL:
        if kind == "cuda" and not getattr(golden, "cuda", True):
            continue
        file, needed = f"{golden}.safetensors", repositories_of(golden)
        if not all(repository in commits for repository in needed):
            entries += [entry for entry in kept if entry["file"] == file]
            continue
        data = _file(upstream, golden)
        if len(data) >= FILE_LIMIT:
            raise Fault(f"{golden} must take less than {FILE_LIMIT} bytes, got {len(data)}")
        found[file] = data
        entries.append(
            {
                "file": file,
                "case": repr(golden),
                "seed": SEED,
                "upstream": {repository.name: commits[repository] for repository in needed},
                "sha256": digest(data),
            }
        )
    manifest = {
        "generator": "tools/refresh_goldens.py --mamba-repo",
        "device": kind if kind == "cpu" else torch.cuda.get_device_name(device),
        "arithmetic": upstream_loading.ARITHMETIC[kind],
        "versions": used,
        "goldens": entries,
        "signatures": dict(sorted({**signatures, **upstream.signatures}.items())),
    }
    listed = {entry["file"] for entry in entries}
    for stale in place.rglob("*.safetensors"):
        if stale.relative_to(place).as_posix() not in listed:
            stale.unlink()
    for file, data in found.items():
        write(place / file, data)
    write_json(place / "manifest.json", manifest)
    total = sum((place / file).stat().st_size for file in listed)
    if total > TOTAL_LIMIT:
        raise Fault(f"upstream's goldens must take at most {TOTAL_LIMIT} bytes, got {total}")
    return entries


def repositories_of(golden) -> tuple[clone.Repository, ...]:
    """Return the repositories whose code makes a golden."""
    function = getattr(golden, "function", "")
    if function.startswith("causal_conv1d"):
        return (clone.CONV,)
    if function.endswith((".mamba_inner_ref", ".mamba_split_conv1d_scan_ref")):
        return clone.MAMBA, clone.CONV
    config = getattr(golden, "config", {})
    if config.get("rotary_emb_dim") or config.get("attn_cfg", {}).get("rotary_emb_dim"):
        return clone.MAMBA, clone.ROTARY
    return (clone.MAMBA,)


def _kept(place: Path) -> tuple[list[dict], dict]:
    """Return a manifest's goldens whose files are there as it says, and its signatures."""
    path = place / "manifest.json"
    if not path.exists():
        return [], {}
    manifest = json.loads(path.read_text(encoding="utf-8"))
    files = {entry["file"]: place / entry["file"] for entry in manifest["goldens"]}
    entries = [
        entry
        for entry in manifest["goldens"]
        if files[entry["file"]].exists()
        and digest(files[entry["file"]].read_bytes()) == entry["sha256"]
    ]
    return entries, manifest.get("signatures", {})


def _file(upstream, golden) -> bytes:
    """Return the file of one golden."""
    from tests import golden_cases
    from tools.goldens import upstream_modules

    if isinstance(golden, golden_cases.ModuleGolden):
        return encode(upstream_modules.module_tensors(upstream, golden), {})
    if isinstance(golden, golden_cases.ModelGolden):
        return encode(upstream_modules.model_tensors(upstream, golden), {})
    return encode(*_function_tensors(upstream, golden))


def _function_tensors(upstream, golden) -> tuple[dict, dict]:
    """Return the tensors of a function's golden and its flags."""
    import torch

    from tests import golden_cases
    from tests.tensors import tensors
    from tools.goldens.upstream_functions import CUT_ON_CUDA, call, call_compat

    is_compat = isinstance(golden, golden_cases.CompatGolden)
    made = golden_cases.compat_arguments if is_compat else golden_cases.arguments
    call = call_compat if is_compat else call
    given = tensors(made(golden, SEED), torch.float32)
    flags = {n: v for n, v in given.items() if not isinstance(v, torch.Tensor)}
    narrow = {n: v for n, v in given.items() if n not in flags}
    stored = {f"argument.{name}": value for name, value in narrow.items()}
    wide = flags | {
        n: v.to(upstream.device, upstream.dtype()) if is_float(v) else v.to(upstream.device)
        for n, v in narrow.items()
    }
    with torch.no_grad():
        outputs = call(upstream, golden, wide)
    stored |= {f"output.{name}": value for name, value in outputs.items()}
    if is_compat or golden.op not in IN_PLACE:
        cut = () if upstream.on_cpu else CUT_ON_CUDA.get(golden.function, ())
        weights = draw_weights({n: o for n, o in outputs.items() if n not in cut})
        stored |= {f"weight.{name}": value for name, value in weights.items()}
        placed = {n: w.to(upstream.device, upstream.dtype()) for n, w in weights.items()}
        found = gradients(lambda leaves: call(upstream, golden, leaves), wide, placed)
        stored |= {f"gradient.{name}": value for name, value in found.items()}
    return stored, flags
