"""What tools/gpu_check.py trains: gradients of models against float64, steps that learn, times."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext

HEADS = {"num_heads": 4, "causal": True, "rotary_emb_dim": 32}
# Name -> what a config has besides its sizes.
MODELS = {
    "mamba1": {"ssm_cfg": {"layer": "Mamba1"}},
    "mamba2": {"ssm_cfg": {"layer": "Mamba2"}},
    "hybrid": {"ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [1], "attn_cfg": HEADS},
}
SIZES = {"d_model": 256, "n_layer": 2, "vocab_size": 100}
ROWS, LENGTH, SEEDS = 3, 200, 2
# How far gradients may be from float64: root mean square of the difference over that of the
# gradient, of the worst parameter. In float32 what the operators may add up to; in bfloat16 what
# the products of a projection round, in a forward and in a backward.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.1}
STEPS, RATE = 8, 1e-3

# A training step of the released models: rows of 2048 tokens, in mixed precision.
TIMED = {
    "mamba1_130m": {"ssm_cfg": {"layer": "Mamba1"}},
    "mamba2_130m": {"ssm_cfg": {"layer": "Mamba2"}},
}
TIMED_SIZES = {"d_model": 768, "n_layer": 24, "vocab_size": 50277}
TIMED_ROWS, TIMED_LENGTH, REPEATS = 8, 2048, 5


def check(report, device: str) -> None:
    """Compare gradients, learn a few steps, and time steps of training size."""
    for name in MODELS:
        for kind in ("plain", "padded", "packed"):
            for dtype in BOUNDS:
                item = f"training/{name}/{kind}/{dtype}"
                report.run(item, compare, name, kind, dtype, device)
        report.run(f"training/{name}/learns", learn, name, device)
    for name in TIMED:
        report.run(f"training/{name}/step", time_step, name, device, "ssm")
        if upstream() is not None:
            report.run(f"training/{name}/step/mamba_ssm", time_step, name, device, "mamba_ssm")


def build(options: dict, sizes: dict):
    """Return a model in float32 on the CPU, the same for the same arguments."""
    import torch

    from ssm.models.config import MambaConfig
    from ssm.models.lm import MambaLMHeadModel

    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(**sizes, **options))


def batch(kind: str) -> tuple:
    """Return tokens, keyword arguments of the model, and which outputs count."""
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH), generator=generator)
    keep = torch.ones_like(tokens)
    if kind == "padded":
        for row in range(ROWS):
            keep[row, : 17 * row] = 0
        return tokens, {"attention_mask": keep}, keep.bool()
    if kind == "packed":
        ends = torch.tensor([0, 1, 70, 71, 300, ROWS * LENGTH])
        return tokens.view(1, -1), {"cu_seqlens": ends}, keep.view(1, -1).bool()
    return tokens, {}, keep.bool()


def gradients_of(model, kind: str, device: str, dtype: str | None = None) -> dict:
    """Return loss and gradients by name, in float64 on the CPU."""
    import torch

    tokens, arguments, counts = (to(device, part) for part in batch(kind))
    with autocast(device, dtype):
        logits = model(tokens, **arguments).logits
    counts = counts[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1][counts].to(torch.promote_types(logits.dtype, torch.float32)),
        tokens[:, 1:][counts],
    )
    loss.backward()
    found = {n: p.grad.double().cpu() for n, p in model.named_parameters()}
    return {"loss": loss.detach().double().cpu(), **found}


def to(device: str, part):
    """Return a tensor, or a dictionary of them, on a device."""
    if isinstance(part, dict):
        return {name: value.to(device) for name, value in part.items()}
    return part.to(device)


def autocast(device: str, dtype: str | None):
    """Return the context of mixed precision in a dtype; None and float32 are as they are."""
    import torch

    if dtype in (None, "float32"):
        return nullcontext()
    return torch.autocast(device, getattr(torch, dtype))


def compare(name: str, kind: str, dtype: str, device: str) -> dict:
    """Return how far the gradients are from those of the reference in float64, or raise."""
    from ssm.utils import dispatch
    from tools.gpu_peers import difference

    model = build(MODELS[name], SIZES)
    with dispatch.use_backend("python"):
        want = gradients_of(copy.deepcopy(model).double(), kind, "cpu")
    got = gradients_of(model.to(device), kind, device, dtype)
    far = {n: difference(got[n], value) for n, value in want.items()}
    worst = max(far, key=lambda n: far[n] if far[n] == far[n] else float("inf"))
    if not far[worst] <= BOUNDS[dtype]:
        raise AssertionError(f"{worst} is {far[worst]:.3g} from float64, beyond {BOUNDS[dtype]}")
    return {"difference": far[worst], "worst": worst}


def learn(name: str, device: str) -> dict:
    """Return the loss before and after a few steps in bfloat16; raise if it does not fall."""
    import torch

    model = build(MODELS[name], SIZES).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    tokens, losses = to(device, batch("plain")[0]), []
    for _ in range(STEPS):
        losses.append(step(model, optimizer, tokens, device))
    losses = torch.stack(losses).tolist()
    if not losses[-1] < losses[0]:
        raise AssertionError(f"the loss must fall, got {losses}")
    return {"before": losses[0], "after": losses[-1]}


def step(model, optimizer, tokens, device: str):
    """Take one training step in bfloat16; return the loss, without waiting for it."""
    import torch

    with autocast(device, "bfloat16"):
        logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def upstream():
    """Return the model class and the config class of mamba_ssm, or None."""
    try:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    except Exception:  # an installation that does not load is none
        return None
    return MambaLMHeadModel, MambaConfig


def time_step(name: str, device: str, whose: str) -> dict:
    """Return milliseconds and tokens per second of a training step, and its memory."""
    import torch

    sizes, rows, length = TIMED_SIZES, TIMED_ROWS, TIMED_LENGTH
    if device == "cpu":
        sizes, rows, length = {**SIZES, "d_model": 64, "n_layer": 1}, 2, 32
    if whose == "ssm":
        model = build(TIMED[name], sizes).to(device)
    else:
        model_class, config_class = upstream()
        torch.manual_seed(0)
        model = model_class(config_class(**sizes, **TIMED[name]), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=device == "cuda")
    tokens = torch.randint(0, sizes["vocab_size"], (rows, length), device=device)
    for _ in range(2):
        step(model, optimizer, tokens, device)
    float(step(model, optimizer, tokens, device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(REPEATS):
        loss = step(model, optimizer, tokens, device)
    float(loss)
    took = (time.perf_counter() - started) / REPEATS
    found = {"ms": took * 1e3, "tokens_per_s": rows * length / took}
    if device == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found
