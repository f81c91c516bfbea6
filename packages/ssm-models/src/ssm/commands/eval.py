"""``ssm-models eval``: perplexity of a text."""

from __future__ import annotations

import json
import math
import time

import torch

from ssm.commands.options import DTYPES
from ssm.models.lm import MambaLMHeadModel
from ssm.text import ByteVocabulary, load_vocabulary, read_bytes
from ssm.training import evaluate
from ssm.utils import dispatch
from ssm.utils.hub import find_directory


def add(commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("eval", help="perplexity of a text file")
    parser.add_argument("text", metavar="TEXT", help="text file in UTF-8")
    parser.add_argument(
        "--model", required=True, metavar="SRC", help="directory, or name on the Hugging Face hub"
    )
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="float32")
    parser.add_argument("--max-tokens", type=int, help="read only that many tokens (default: all)")
    parser.add_argument(
        "--chunk", type=int, default=1024, help="tokens per call; changes memory, not the result"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments) -> None:
    """Print the mean cross entropy of a text, the state carried all through it."""
    for name in ("chunk", "max_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"eval: {name.replace('_', '-')} must be positive, got {value}")
    directory = find_directory(arguments.model)
    content = read_bytes(arguments.text, "eval")
    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = MambaLMHeadModel.from_pretrained(directory, dtype=dtype)
    vocabulary = load_vocabulary(directory, model.config.vocab_size)
    tokens = _encode(vocabulary, content, arguments.text)[: arguments.max_tokens]
    if tokens.numel() < 2:
        raise ValueError(f"eval: text must have two tokens or more, got {tokens.numel()}")
    if int(tokens.max()) >= model.config.padded_vocab_size:
        raise ValueError(
            f"eval: tokens must be below {model.config.padded_vocab_size}, the vocabulary of the "
            f"model, got {int(tokens.max())}"
        )
    # Of the text that is predicted, which is all of it but the first token.
    size = len(vocabulary.decode(tokens[1:]).encode("utf-8"))
    if isinstance(vocabulary, ByteVocabulary):
        size = tokens.numel() - 1
    start = time.perf_counter()
    with torch.no_grad():
        nats = evaluate(model, tokens, arguments.chunk)
    seconds = time.perf_counter() - start
    result = {
        "tokens": tokens.numel() - 1,
        "nats_per_token": nats,
        "perplexity": math.exp(nats) if nats < 700 else math.inf,
        "bits_per_byte": nats * (tokens.numel() - 1) / size / math.log(2) if size else None,
        "seconds": seconds,
        "backend": dispatch.get_available_backend(),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"perplexity {result['perplexity']:.4f} over {result['tokens']} tokens")
    print(f"{nats:.4f} nats per token", end="")
    print(f", {result['bits_per_byte']:.4f} bits per byte" if size else "")


def _encode(vocabulary, content: bytes, path: str) -> torch.Tensor:
    """Return (L,) tokens; a vocabulary of bytes takes any file."""
    if isinstance(vocabulary, ByteVocabulary):
        return vocabulary.encode(content)
    try:
        return vocabulary.encode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"eval: {path} must be UTF-8 text, got {error.reason}") from None
