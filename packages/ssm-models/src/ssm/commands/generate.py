"""``ssm-models generate`` and ``ssm-models chat``: text from a checkpoint."""

from __future__ import annotations

import json
import sys
import time

import torch

from ssm.commands.options import DTYPES
from ssm.models.lm import MambaLMHeadModel
from ssm.text import load_vocabulary
from ssm.utils import dispatch
from ssm.utils.hub import find_directory


def add(commands) -> None:
    """Declare both commands."""
    _add_generate(commands)
    _add_chat(commands)


def _add_sampling(parser) -> None:
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


def _load(arguments):
    directory = find_directory(arguments.model)
    model = MambaLMHeadModel.from_pretrained(
        directory,
        dtype="auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
    )
    return model, load_vocabulary(directory, model.config.vocab_size)


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
