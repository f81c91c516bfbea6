#!/usr/bin/env python3
"""Stream text from the committed model, and say what served it and how fast.

`python3 tools/dev.py demo` builds what this needs and calls it. The reference operators, pure
PyTorch, are timed in the same run on a shorter generation and a prompt of the same length.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

MODEL = Path(__file__).resolve().parents[1] / "goldens/models/tinyshakespeare-mamba1"
PROMPT = "ROMEO:\n"
SEED = 7
# Enough for a stable ratio; the reference needs most of the demo's time, so no more than that.
COMPARED_TOKENS = 48
COMPARED_PROMPT = 512
REPEATS = 3


def kind_of(config) -> str:
    """Return what a model is, in words."""
    layer = config.ssm_cfg.get("layer", "Mamba1")
    attention = " with attention" if config.attn_layer_idx else ""
    return f"{layer[:-1]}-{layer[-1]}{attention}"


def write_text(model, vocabulary, length: int) -> tuple[str, float]:
    """Stream a sample to the terminal; return the text and the tokens per second."""
    decoder = vocabulary.decoder()
    text = [PROMPT]
    print(PROMPT, end="", flush=True)
    prompt = vocabulary.encode(PROMPT)[None]
    started = time.perf_counter()
    tokens = model.stream(
        prompt, max_new_tokens=length, top_k=0, top_p=0.95, temperature=0.8, seed=SEED
    )
    for token in tokens:
        piece = decoder.push(int(token))
        text.append(piece)
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print(decoder.flush(), flush=True)
    return "".join(text), length / seconds


def seconds_of(work: Callable[[], object]) -> float:
    """Return the median time of a few calls."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def compare(model, vocabulary, text: str) -> list[tuple[str, float, float]]:
    """Time generation and prefill; return (what, seconds here, seconds of the reference)."""
    import torch

    from ssm.utils import dispatch

    prompt = vocabulary.encode(PROMPT)[None]
    tokens = vocabulary.encode(text)
    long = tokens.repeat(-(-COMPARED_PROMPT // len(tokens)))[:COMPARED_PROMPT][None]
    works = {
        f"writing {COMPARED_TOKENS} bytes": lambda: model.generate(
            prompt, max_new_tokens=COMPARED_TOKENS
        ),
        f"reading {COMPARED_PROMPT} bytes": lambda: model(long),
    }
    rows = []
    with torch.inference_mode():
        for what, work in works.items():
            here = seconds_of(work)
            with dispatch.use_backend("python"):
                reference = seconds_of(work)
            rows.append((what, here, reference))
    return rows


def served_by(dispatch) -> dict[str, str]:
    """Return, for each backend that serves an operator, a line that names it and its operators."""
    operators: dict[str, list[str]] = {}
    for op in dispatch.COMPILED:
        backend = dispatch.why(op).split(": ", 1)[1].split(",")[0]
        operators.setdefault(backend, []).append(op)
    lines = {}
    for backend, names in operators.items():
        title = backend
        if backend == "cpu":
            import ssm_kernels

            title = f"cpu ({ssm_kernels.active_isa()})"
        only = "" if len(operators) == 1 else f" for {', '.join(names)}"
        lines[backend] = f"{title}{only}"
    return lines


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint directory")
    parser.add_argument("--bytes", type=int, default=400, help="how much to write (default 400)")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        print(
            f"demo: model must be a checkpoint directory, got none at {arguments.model}",
            file=sys.stderr,
        )
        return 1

    import torch

    from ssm.models.lm import MambaLMHeadModel
    from ssm.text import load_vocabulary
    from ssm.utils import dispatch

    model = MambaLMHeadModel.from_pretrained(str(arguments.model), dtype=torch.float32).eval()
    vocabulary = load_vocabulary(arguments.model, model.config.vocab_size)
    parameters = sum(p.numel() for p in model.parameters())
    size = f"{parameters / 1e6:.2f} million parameters"
    print(f"-- a {kind_of(model.config)}, {size}, sampling byte by byte\n")
    text, rate = write_text(model, vocabulary, arguments.bytes)
    backends = served_by(dispatch)
    print(f"\n-- served by {'; '.join(backends.values())}; {torch.get_num_threads()} threads")
    print(f"-- speed: {rate:.0f} tokens/s")
    if list(backends) == ["python"]:
        print(f"-- these are the reference operators: {dispatch.why('selective_scan')}")
        return 0
    for what, here, reference in compare(model, vocabulary, text):
        print(
            f"-- {what}: {here * 1e3:.1f} ms, reference operators {reference * 1e3:.1f} ms, "
            f"{reference / here:.1f} times faster"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
