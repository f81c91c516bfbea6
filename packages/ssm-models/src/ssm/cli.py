"""The command ``ssm-models``: info, generate, chat, train."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

import ssm
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.text import BYTE_VOCAB_SIZE, ByteVocabulary, load_vocabulary, read_bytes
from ssm.training import STATE_FILE, Progress, TrainOptions, evaluate, train
from ssm.utils import dispatch

DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYERS = {"mamba1": "Mamba1"}
OPERATORS = (
    "selective_scan",
    "selective_state_step",
    "dw_causal_conv",
    "dw_causal_conv_step",
    "fused_layer_norm",
    "ssd_chunk_scan",
    "gated_norm",
    "swiglu",
    *dispatch.FILES,
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message: str) -> None:
        """Print one sentence and leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        Exit code: 0, or 1 after one sentence on stderr, or 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has left; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nssm-models: stopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        print(f"ssm-models: {text}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="ssm-models", description="Mamba language models on any machine.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    add = commands.add_parser("info", help="versions, backends and why; for bug reports")
    add.add_argument("--json", action="store_true", help="print one JSON object")
    add.set_defaults(run=run_info)
    _add_generate(commands)
    _add_chat(commands)
    _add_train(commands)
    return parser


def _add_sampling(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="1 is greedy, 0 no limit (default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="0 is no limit (default 0.95)")
    parser.add_argument("--min-p", type=float, default=0.0, help="0 is no limit (default)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off (default)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="float32")


def _add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="continue a prompt")
    _add_sampling(parser)
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a new line)")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run_generate)


def _add_chat(commands) -> None:
    parser = commands.add_parser("chat", help="talk line by line; the state is carried along")
    _add_sampling(parser)
    parser.add_argument("--max-new-tokens", type=int, default=400, help="per answer")
    parser.add_argument(
        "--stop", default="\n\n", help="text that ends an answer (default: blank line)"
    )
    parser.set_defaults(run=run_chat)


def _add_train(commands) -> None:
    parser = commands.add_parser("train", help="train a byte-level model on a text file")
    parser.add_argument("text", metavar="TEXT", help="text file, any language")
    parser.add_argument("--out", required=True, metavar="DIR", help="where checkpoints go")
    parser.add_argument("--layer", choices=tuple(LAYERS), default="mamba1")
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--expand", type=int, default=2, help="channels per unit of width")
    parser.add_argument("--d-intermediate", type=int, default=0, help="width of an MLP per block")
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
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.set_defaults(run=run_train)


def collect_info() -> dict:
    """Return what a bug report needs; every value can be written as JSON."""
    versions = {"ssm-models": ssm.__version__, "ssm-kernels": _kernels("__version__")}
    versions |= {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("safetensors", "numpy"):
        versions[name] = metadata.version(name)
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ("cpu", "cuda") if gpus else ("cpu",)
    return {
        "versions": versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "environment": {name: os.environ.get(name) for name in ("SSM_BACKEND", "SSM_ISA")},
        "backend": dispatch.get_available_backend(),
        "isa": _kernels("active_isa"),
        "source": str(Path(__file__).parent),
        "operators": [dispatch.why(op, device) for device in devices for op in OPERATORS],
    }


def _kernels(name: str) -> str | None:
    """Return what ssm_kernels says about itself under a name; None where it cannot be loaded."""
    try:
        value = getattr(importlib.import_module("ssm_kernels"), name)
        return value() if callable(value) else value
    except Exception:  # a broken backend must not break the report about it
        return None


def run_info(arguments) -> None:
    """Print versions, threads, backends and the reason per operator."""
    info = collect_info()
    if arguments.json:
        print(json.dumps(info, indent=2))
        return
    for name, version in info["versions"].items():
        print(f"{name:<14}{version or 'cannot be loaded'}")
    for name in ("platform", "source"):
        print(f"{name:<14}{info[name]}")
    print(f"{'threads':<14}{info['threads']} of {info['cores']} cores")
    print(f"{'gpus':<14}{', '.join(info['gpus']) or 'none'}")
    for name, value in info["environment"].items():
        print(f"{name:<14}{'not set' if value is None else value}")
    print(f"{'backend':<14}{info['backend']}, instruction set {info['isa'] or 'none'}")
    for line in info["operators"]:
        print(f"  {line}")


def run_generate(arguments) -> None:
    """Stream the continuation of a prompt to stdout."""
    model, vocabulary = _load(arguments)
    prompt = _encode(vocabulary, arguments.prompt, "generate: prompt")
    if not prompt.numel():
        raise ValueError("generate: prompt must not be empty, got ''")
    decoder, pieces, tokens = vocabulary.decoder(), [], []
    start = time.perf_counter()
    stream = model.stream(
        prompt[None],
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=vocabulary.eos_token_id,
        **_sampling(arguments),
    )
    # The call above has checked every option; a complaint must not follow half a line of output.
    if not arguments.json:
        _show(arguments.prompt)
    for token in stream:
        tokens.append(int(token))
        pieces.append(decoder.push(tokens[-1]))
        if not arguments.json:
            _show(pieces[-1])
    pieces.append(decoder.flush())
    seconds = time.perf_counter() - start
    speed = len(tokens) / seconds if tokens else 0.0
    if arguments.json:
        result = {
            "prompt": arguments.prompt,
            "text": "".join(pieces),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": speed,
            "backend": dispatch.get_available_backend(),
        }
        print(json.dumps(result))
        return
    _show(pieces[-1] + "\n")
    if sys.stderr.isatty():
        print(f"{len(tokens)} tokens, {speed:.0f} tokens/s", file=sys.stderr)


def run_chat(arguments) -> None:
    """Read lines from stdin, answer each; an end of file ends the talk."""
    model, vocabulary = _load(arguments)
    state, unseen = model.allocate_state(1), []
    sampling = _sampling(arguments)
    if sampling["seed"] is not None:
        sampling["generator"] = torch.Generator().manual_seed(sampling["seed"])
    del sampling["seed"]
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            _show("> ")
        line = sys.stdin.readline()
        if not line:
            return
        fed = torch.tensor([unseen + _encode(vocabulary, line, "chat: line").tolist()])
        unseen = _answer(model, vocabulary, fed, state, sampling, arguments)


def _answer(model, vocabulary, fed, state, sampling, arguments) -> list[int]:
    """Stream one answer; returns the tokens that the state has not seen yet."""
    decoder, text, token = vocabulary.decoder(), "", None
    stream = model.stream(
        fed,
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=vocabulary.eos_token_id,
        state=state,
        **sampling,
    )
    try:
        for tensor in stream:
            token = int(tensor)
            piece = decoder.push(token)
            text += piece
            _show(piece)
            if arguments.stop and text.endswith(arguments.stop):
                break
    finally:
        stream.close()
    rest = decoder.flush()
    _show(rest if (text + rest).endswith("\n") else rest + "\n")
    return [] if token is None else [token]


def run_train(arguments) -> None:
    """Train on a text file, write checkpoints, end with a sample."""
    tokens, val_tokens = _split(arguments)
    options = TrainOptions(
        **{name: getattr(arguments, name) for name in TrainOptions.__dataclass_fields__}
    )
    torch.manual_seed(arguments.seed)
    mixer = {
        "layer": LAYERS[arguments.layer],
        "d_state": arguments.d_state,
        "expand": arguments.expand,
    }
    config = MambaConfig(
        d_model=arguments.d_model,
        n_layer=arguments.n_layer,
        d_intermediate=arguments.d_intermediate,
        vocab_size=BYTE_VOCAB_SIZE,
        ssm_cfg=mixer,
    )
    model = MambaLMHeadModel(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    reporter = Reporter(options, arguments.json)
    reporter.header(parameters, tokens.numel(), 0 if val_tokens is None else val_tokens.numel())
    last = train(
        model,
        tokens,
        options,
        val_tokens=val_tokens,
        out=arguments.out,
        resume=arguments.resume,
        save_dtype=getattr(torch, arguments.dtype),
        report=reporter,
    )
    reporter.finish()
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


def _load(arguments):
    model = MambaLMHeadModel.from_pretrained(
        arguments.model,
        dtype="auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
    )
    return model, load_vocabulary(arguments.model, model.config.vocab_size)


def _encode(vocabulary, text: str, name: str) -> torch.Tensor:
    """Return (L,) tokens; ValueError for lone surrogates, which stand for bytes that are no UTF-8.

    Checked here because every vocabulary complains differently.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a} at position {error.start}"
        raise ValueError(f"{name} must be valid UTF-8 text, got {found}") from None
    return vocabulary.encode(text)


def _sampling(arguments) -> dict:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(arguments, name) for name in names}


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
