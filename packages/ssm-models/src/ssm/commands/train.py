"""``ssm-models train``: a byte-level model from a text file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ssm.commands.options import DTYPES, check_directory
from ssm.commands.ranks import group_of
from ssm.distributed.collectives import rank_of
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.text import BYTE_VOCAB_SIZE, ByteVocabulary, read_bytes
from ssm.training import STATE_FILE, Progress, TrainOptions, evaluate, train
from ssm.utils import dispatch
from ssm.utils.freed_memory import keep_freed_memory

LAYERS = {"mamba1": "Mamba1", "mamba2": "Mamba2"}


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("train", help="train a byte-level model on a text file")
    parser.add_argument("text", metavar="TEXT", help="text file, any language")
    parser.add_argument("--out", required=True, metavar="DIR", help="where checkpoints go")
    parser.add_argument("--layer", choices=tuple(LAYERS), default="mamba1")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--d-state", type=int, help="default 16 for mamba1, 128 for mamba2")
    parser.add_argument("--headdim", type=int, help="channels per head of mamba2 (default 64)")
    parser.add_argument("--expand", type=int, default=2, help="channels per unit of width")
    parser.add_argument("--d-intermediate", type=int, default=0, help="width of an MLP per block")
    parser.add_argument(
        "--attn-layers",
        type=_indices,
        default=[],
        metavar="I,J,...",
        help="blocks, counted from 0, that get attention in place of --layer",
    )
    parser.add_argument("--attn-heads", type=int, help="default: d_model / 64, at least 1")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--grad-clip", type=float, default=1.0, help="0 is no limit")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="tail of TEXT held out")
    parser.add_argument("--eval-every", type=int, default=250, help="steps; 0 is at the end only")
    parser.add_argument("--checkpoint-every", type=int, default=250, help="as --eval-every")
    parser.add_argument("--resume", action="store_true", help=f"go on from DIR/{STATE_FILE}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights written to DIR; training itself is in float32",
    )
    parser.add_argument("--sample-bytes", type=int, default=300, help="length of the final sample")
    parser.add_argument(
        "--context-parallel",
        type=int,
        default=1,
        metavar="N",
        help="processes that share each sequence (started here, or by torchrun)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.set_defaults(run=run)


def run(arguments) -> None:
    """Train on a text file, write checkpoints, end with a sample."""
    ranks = arguments.context_parallel
    if ranks < 1:
        raise ValueError(f"train: context-parallel must be positive, got {ranks}")
    # What can be refused is, before other processes are started.
    _check_out(Path(arguments.out), arguments.resume)
    job = _prepare(arguments)
    with group_of(ranks, _run_other, arguments) as group:
        last = _train(arguments, *job, group)
        if rank_of(group):
            return
    _finish(arguments, *job, last)


def _check_out(out: Path, resume: bool) -> None:
    """Refuse a place that cannot be written, or that holds another run, which it would replace."""
    check_directory("train", "out", out)
    if not resume and (out / STATE_FILE).exists():
        raise ValueError(
            f"train: out must be another directory, or --resume be given, got {out} with the "
            f"{STATE_FILE} of a run"
        )


def _run_other(arguments, group) -> None:
    """Train as a rank that this command has started."""
    _train(arguments, *_prepare(arguments), group)


def _prepare(arguments):
    """Return (model, tokens, held-out tokens or None, options)."""
    tokens, val_tokens = _split(arguments)
    options = TrainOptions(
        **{name: getattr(arguments, name) for name in TrainOptions.__dataclass_fields__}
    )
    torch.manual_seed(arguments.seed)
    return MambaLMHeadModel(make_config(arguments)), tokens, val_tokens, options


def _train(arguments, model, tokens, val_tokens, options, group):
    """Train; the first rank reports. Returns the last report, None if there was nothing to do."""
    keep_freed_memory()
    reporter = None
    if not rank_of(group):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        reporter = Reporter(options, arguments.json)
        held_out = 0 if val_tokens is None else val_tokens.numel()
        reporter.header(parameters, tokens.numel(), held_out)
    last = train(
        model,
        tokens,
        options,
        val_tokens=val_tokens,
        out=arguments.out,
        resume=arguments.resume,
        save_dtype=getattr(torch, arguments.dtype),
        report=reporter,
        context_group=group,
    )
    if reporter is not None:
        reporter.finish()
    return last


def _finish(arguments, model, tokens, val_tokens, options, last) -> None:
    """Show the held-out loss and a sample."""
    val_loss = None if last is None else last.val_loss
    if val_loss is None and val_tokens is not None:
        val_loss = evaluate(model, val_tokens)
    model.eval()
    vocabulary = ByteVocabulary()
    generated = model.generate(
        vocabulary.encode("\n")[None],
        max_new_tokens=arguments.sample_bytes,
        top_k=0,
        temperature=0.8,
        seed=arguments.seed,
    )
    sample = vocabulary.decode(generated[0, 1:])
    if arguments.json:
        print(
            json.dumps({"done": True, "val_loss": val_loss, "sample": sample, "out": arguments.out})
        )
        return
    if val_loss is not None:
        print(f"held-out loss {val_loss:.4f} nats per byte")
    print(f"checkpoint in {arguments.out}; a sample:\n{sample}")


def make_config(arguments) -> MambaConfig:
    """Return the shape of the model that the options ask for.

    Raises:
        ValueError: options that do not go together.
    """
    mixer = {"layer": LAYERS[arguments.layer], "expand": arguments.expand}
    if arguments.d_state is not None:
        mixer["d_state"] = arguments.d_state
    if arguments.headdim is not None:
        if arguments.layer != "mamba2":
            raise ValueError(
                f"train: headdim must go with --layer mamba2, got --layer {arguments.layer}"
            )
        mixer["headdim"] = arguments.headdim
    return MambaConfig(
        d_model=arguments.d_model,
        n_layer=arguments.n_layer,
        d_intermediate=arguments.d_intermediate,
        vocab_size=BYTE_VOCAB_SIZE,
        ssm_cfg=mixer,
        attn_layer_idx=arguments.attn_layers,
        attn_cfg=_attention(arguments) if arguments.attn_layers else {},
    )


def _attention(arguments) -> dict:
    """Return the arguments of the attention: those of the released hybrids, at this width."""
    d_model, num_heads = arguments.d_model, arguments.attn_heads
    if num_heads is None:
        num_heads = max(1, d_model // 64)
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"train: attn-heads must divide d-model = {d_model}, got {num_heads}")
    head_dim = d_model // num_heads
    return {
        "num_heads": num_heads,
        "head_dim": head_dim,
        "causal": True,
        "d_conv": 4,
        "qkv_proj_bias": False,
        "out_proj_bias": False,
        # Half of each head is rotated, in pairs.
        "rotary_emb_dim": head_dim // 4 * 2,
    }


def _indices(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers like 1,3, got {text!r}") from None


class Reporter:
    """Shows training: a line that is overwritten on a terminal, else one line now and then.

    Args:
        options: of the run.
        as_json: one JSON object per step, on stdout.
    """

    def __init__(self, options: TrainOptions, as_json: bool) -> None:
        self._steps = options.steps
        self._json = as_json
        self._live = sys.stderr.isatty() and not as_json
        self._every = max(1, options.steps // 20)
        self._seconds = self._tokens = 0.0
        self._per_step = options.batch * options.seqlen

    def header(self, parameters: int, tokens: int, val_tokens: int) -> None:
        """Say what will be trained on what, and which backend serves."""
        backend = dispatch.get_available_backend()
        if self._json:
            values = {"parameters": parameters, "train_bytes": tokens, "val_bytes": val_tokens}
            print(json.dumps({**values, "backend": backend}), flush=True)
            return
        print(
            f"{parameters} parameters, {tokens} bytes to train on, {val_tokens} held out, "
            f"backend {backend}",
            flush=True,
        )

    def __call__(self, progress: Progress) -> None:
        """Show one step."""
        if self._json:
            print(json.dumps(vars(progress)), flush=True)
            return
        self._seconds += self._per_step / progress.tokens_per_second
        self._tokens += self._per_step
        speed = self._tokens / self._seconds
        left = (self._steps - progress.step) * self._seconds * self._per_step / self._tokens
        line = f"step {progress.step}/{self._steps}  loss {progress.loss:.4f}"
        if progress.val_loss is not None:
            line += f"  held-out {progress.val_loss:.4f}"
        line += f"  {speed:.0f} tokens/s"
        if self._live:
            print(f"\r{line}  {left:.0f} s left\x1b[K", end="", file=sys.stderr, flush=True)
        is_due = progress.step % self._every == 0 or progress.step == self._steps
        if progress.val_loss is not None or (is_due and not self._live):
            self.finish()
            print(line, flush=True)

    def finish(self) -> None:
        """Clear the live line."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _split(arguments):
    """Return (tokens to train on, held-out tail or None)."""
    if not 0 <= arguments.val_fraction < 1:
        raise ValueError(f"train: val-fraction must lie in [0, 1), got {arguments.val_fraction}")
    tokens = ByteVocabulary().encode(read_bytes(arguments.text))
    held_out = int(tokens.numel() * arguments.val_fraction)
    if held_out < 2:
        return tokens, None
    return tokens[:-held_out], tokens[-held_out:]
