"""The training loop: batches, learning rate, optimizer, held-out loss, checkpoints, resumption."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssm.distributed.collectives import rank_of, summed
from ssm.distributed.context import copy_parameters, own_steps, sum_gradients
from ssm.utils.files import write_file
from ssm.utils.tensor_files import load_torch_file
from ssm.utils.weights import save_pretrained

STATE_FILE = "training.pt"
# What may differ between the two halves of a resumed run without changing its trajectory.
FREE_OPTIONS = ("eval_every", "checkpoint_every")


@dataclass(frozen=True)
class TrainOptions:
    """What decides the course of a training run, together with the model and the tokens.

    Args:
        steps: optimizer steps.
        batch: B, sequences per step.
        seqlen: L, tokens per sequence.
        lr: highest learning rate.
        warmup: steps of linear rise to it; a cosine to a tenth follows.
        weight_decay: of AdamW, for matrices only (see ``parameter_groups``).
        grad_clip: largest norm of the gradient; 0 is no limit.
        eval_every: steps between measurements of the held-out loss; 0 measures at the end only.
        checkpoint_every: steps between checkpoints; 0 writes at the end only.
        seed: of the batches.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int = 1000
    batch: int = 16
    seqlen: int = 256
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eval_every: int = 0
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "seqlen", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train: {name} must be positive, got {getattr(self, name)}")
        for name in (
            "warmup",
            "weight_decay",
            "grad_clip",
            "eval_every",
            "checkpoint_every",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train: {name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"train: seed must be below 2**32, got {self.seed}")


@dataclass(frozen=True)
class Progress:
    """One report of ``train``: after every step, and with ``val_loss`` after a measurement.

    Args:
        step: steps done.
        loss: mean cross entropy of the step's batch, nats per token.
        lr: learning rate of the step.
        grad_norm: norm of the gradient before clipping.
        tokens_per_second: of the steps since the last report.
        val_loss: held-out loss, nats per token, or None.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    val_loss: float | None = None


def train(
    model: nn.Module,
    tokens: Tensor,
    options: TrainOptions,
    *,
    val_tokens: Tensor | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_dtype: torch.dtype | None = None,
    report: Callable[[Progress], None] | None = None,
    context_group=None,
) -> Progress | None:
    """Train a language model on a sequence of tokens.

    The batch of a step depends on the seed and the number of the step alone, so that a run that was
    stopped and resumed goes through bitwise the same values as one that was not.

    Args:
        model: ``MambaLMHeadModel``; trained in place, in its own dtype.
        tokens: (T,) int, T > seqlen.
        options: everything else that decides the result.
        val_tokens: (T,) int, held-out text, T > 1.
        out: directory for checkpoints: the model as ``save_pretrained`` writes it, and training.pt
            with all that a resumption needs.
        resume: continue from out/training.pt.
        save_dtype: of the model files in out; None keeps the model dtype. Training is not rounded.
        report: called after every step.
        context_group: ranks that take a part of every sequence each (see docs/distributed.md). All
            train with the same arguments, from the parameters of the first rank, which alone
            measures and writes.

    Returns:
        The last report; None if the resumed run was complete already.

    Raises:
        ValueError: too few tokens, or training.pt belongs to another run; the message says why.
        FileNotFoundError: resume, and there is no training.pt.
    """
    if tokens.dim() != 1 or tokens.numel() <= options.seqlen:
        raise ValueError(
            f"train: tokens must be more than seqlen = {options.seqlen}, got {tokens.numel()}"
        )
    if val_tokens is not None and val_tokens.numel() < 2:
        raise ValueError(f"train: val_tokens must be at least 2, got {val_tokens.numel()}")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay), lr=options.lr, betas=(0.9, 0.95)
    )
    digest = hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()
    out = None if out is None else Path(out)
    first = 0
    if resume:
        if out is None:
            raise ValueError("train: out must be given to resume, got None")
        first = _load(out / STATE_FILE, model, optimizer, options, digest)
    if out is not None:
        # A place that cannot be written must be known before the work, not after it.
        out.mkdir(parents=True, exist_ok=True)
    is_first = rank_of(context_group) == 0
    if context_group is not None:
        copy_parameters(model, context_group)
    model.train()
    progress = None
    for step in range(first, options.steps):
        start = time.perf_counter()
        loss, grad_norm, lr = _step(model, optimizer, tokens, options, step, context_group)
        seconds = time.perf_counter() - start
        done = step + 1
        last = done == options.steps
        val_loss = None
        if is_first and val_tokens is not None and (last or _is_due(done, options.eval_every)):
            val_loss = evaluate(model, val_tokens)
        speed = options.batch * options.seqlen / seconds
        progress = Progress(done, loss, lr, grad_norm, speed, val_loss)
        if report is not None:
            report(progress)
        if not math.isfinite(loss):
            raise ValueError(f"train: loss must stay finite, got {loss} at step {done}")
        if is_first and out is not None and (last or _is_due(done, options.checkpoint_every)):
            _save(out, model, optimizer, options, digest, done, save_dtype)
    return progress


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, chunk: int = 1024) -> float:
    """Return the mean cross entropy (nats per token) over one long text, state carried throughout.

    Args:
        model: language model; its training mode is restored.
        tokens: (T,) int, T > 1; the first is given, T - 1 are predicted.
        chunk: tokens per call; changes memory and speed, not the result beyond rounding.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    state = model.allocate_state(1)
    inputs, targets = tokens[:-1].to(device), tokens[1:].to(device)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, inputs.numel(), chunk):
        part = slice(start, start + chunk)
        logits = model(inputs[None, part], state=state).logits[0].float()
        total += F.cross_entropy(logits, targets[part], reduction="sum").double().cpu()
    model.train(was_training)
    return float(total) / targets.numel()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split parameters for AdamW: matrices decay; A_log, D, biases, norms and marked ones do not.

    Args:
        model: parameters with ``_no_weight_decay = True`` never decay, nor do those whose names a
            module lists in ``no_weight_decay``, as FSDP puts unmarked parameters in their place.
        weight_decay: of the first group.

    Returns:
        Two groups for a torch optimizer, in the order of ``named_parameters``.
    """
    named = {
        id(getattr(module, name))
        for module in model.modules()
        for name in getattr(module, "no_weight_decay", ())
    }
    decay, keep = [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        marked = getattr(parameter, "_no_weight_decay", False) or id(parameter) in named
        (keep if marked or parameter.dim() < 2 else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]


def learning_rate(step: int, options: TrainOptions) -> float:
    """Return the rate of step ``step`` (from 0): linear warmup, then a cosine to a tenth of lr."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    past = (step - options.warmup) / max(1, options.steps - options.warmup)
    lowest = 0.1 * options.lr
    return lowest + 0.5 * (options.lr - lowest) * (1 + math.cos(math.pi * min(1.0, past)))


def sample_batch(tokens: Tensor, options: TrainOptions, step: int) -> tuple[Tensor, Tensor]:
    """Return (inputs, targets), each (B, L): windows at random places, known by seed and step."""
    # A prime far above any number of steps keeps the streams of two seeds apart.
    generator = torch.Generator().manual_seed(options.seed * 1_000_000_007 + step)
    last = tokens.numel() - options.seqlen
    starts = torch.randint(0, last, (options.batch, 1), generator=generator)
    windows = tokens[starts + torch.arange(options.seqlen + 1)]
    return windows[:, :-1], windows[:, 1:]


def _step(model, optimizer, tokens, options, step, context_group):
    device = next(model.parameters()).device
    inputs, targets = (part.to(device) for part in sample_batch(tokens, options, step))
    lr = learning_rate(step, options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    if context_group is None:
        logits = model(inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
    else:
        # Targets were shifted before the cut: the last one of a part is the next part's first.
        part = own_steps(options.seqlen, context_group)
        logits = model(inputs[:, part], context_group=context_group).logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, targets[:, part].flatten(), reduction="sum")
        loss = loss / targets.numel()
        loss.backward()
        sum_gradients(model, context_group)
        loss = summed(loss, context_group)
    limit = options.grad_clip or math.inf
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    return loss.item(), grad_norm.item(), lr


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(out, model, optimizer, options, digest, step, save_dtype) -> None:
    """Write training.pt, then the model files; each file appears whole or not at all."""
    saved = {
        "step": step,
        "tokens_sha256": digest,
        "options": asdict(options),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_file(out / STATE_FILE, lambda path: torch.save(saved, path))
    save_pretrained(model, out, dtype=save_dtype)


def _load(path: Path, model, optimizer, options, digest) -> int:
    """Restore a run; returns the steps that it has done."""
    if not path.is_file():
        raise FileNotFoundError(f"train: {path} must exist to resume, got none")
    saved = load_torch_file(path, "train")
    try:
        step, old = saved["step"], saved["options"]
        if saved["tokens_sha256"] != digest:
            raise ValueError(f"train: text must be that of {path} to resume, got another")
        for name, value in asdict(options).items():
            if name not in FREE_OPTIONS and old[name] != value:
                raise ValueError(f"train: {name} must be {old[name]} to resume {path}, got {value}")
        weights, moments = saved["model"], saved["optimizer"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"train: {path} must be a training checkpoint, lacks {error}") from error
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise ValueError(f"train: model must have the shape of {path} to resume, got another")
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    return step
