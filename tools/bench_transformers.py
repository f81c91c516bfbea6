#!/usr/bin/env python3
"""Time models of transformers with our kernels against the same models without them.

Usage: tools/bench_transformers.py [--model NAME] [--workload NAME] [--iters N] [--threads N]
                                   [--json FILE]

Models of the size of mamba-130m and mamba2-130m in float32, with random weights as the state-spaces
code draws them (transformers' own defaults amplify rounding a thousandfold). The rows of a workload
are plain (transformers alone) and the levels of ``ssm.integrations.transformers.enable``;
they are timed in turn within one run: compare ratios of one run, not times of two. ``wanted`` is
the least ratio to plain that this project asks of itself.

Before anything is timed, the logits of 512 tokens must agree to 1e-4 and 16 greedy tokens must be
equal; otherwise the exit status is 1. One training step differentiates the loss of 2 x 512 tokens;
the graph of plain transformers over a Mamba-1 layer is so large that this model is cut to fewer
layers for it, which every row says.

JSON (schema 1): an object with
    schema, threads, iters, isa, commit, modified, machine, versions as in tools/bench.py,
    load_average [before, after], agreement: a list of {model, level, logits, tokens};
    workloads: a list of {model, workload, layers, wanted, rows: a list of {level, median_ms,
    min_ms, max_ms, samples, vs_plain}};
    first_calls: a list of {model, workload, level, enable_ms, first_ms, median_ms, ratio}, each
    from a fresh process: what enabling the level takes, the first call of the model, and the
    median of the next five.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.checkout import find_packages

SCHEMA = 1
LAYERS = 24
_DRAWN = {"hidden_size": 768, "initializer_range": 0.02, "rescale_prenorm_residual": True}
# Model type -> its config; the sizes of state-spaces/mamba-130m and mamba2-130m.
MODELS = {
    "mamba": {**_DRAWN, "state_size": 16, "vocab_size": 50280},
    "mamba2": {
        **_DRAWN,
        "state_size": 128,
        "num_heads": 24,
        "head_dim": 64,
        "n_groups": 1,
        "chunk_size": 256,
        "vocab_size": 50288,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
# Workload -> model type -> (layers, least ratio to plain; None: none is asked for).
WORKLOADS = {
    "prefill_512": {"mamba": (LAYERS, 3.0), "mamba2": (LAYERS, 3.0)},
    "prompt_4": {"mamba": (LAYERS, None), "mamba2": (LAYERS, 5.0)},
    "decode": {"mamba": (LAYERS, 1.2), "mamba2": (LAYERS, 1.5)},
    "train_b2_l512": {"mamba": (1, 2.0), "mamba2": (LAYERS, 2.0)},
}
ATOL = 1e-4


def build(name: str, layers: int):
    """Return a model with random weights, in evaluation mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, num_hidden_layers=layers, **MODELS[name])
    return AutoModelForCausalLM.from_config(config).eval()


def work(model, workload: str) -> Callable[[], object]:
    """Return the call that a workload repeats."""
    import torch

    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (2, 512), generator=draw)
    if workload == "train_b2_l512":

        def train():
            model.zero_grad(set_to_none=True)
            model.train()(ids, labels=ids).loss.backward()

        return train
    if workload == "decode":
        with torch.no_grad():
            cache = model(ids[:1, :8], use_cache=True).cache_params
        inputs = {"input_ids": ids[:1, 8:9], "cache_params": cache}
    else:
        length = 4 if workload == "prompt_4" else 512
        inputs = {"input_ids": ids[:1, :length]}

    def infer():
        with torch.no_grad():
            model(**inputs, use_cache=True, logits_to_keep=1)

    return infer


def at(level: str, call: Callable[[], object]) -> Callable[[], object]:
    """Return the call at a level, "plain" for none."""
    from ssm.integrations import transformers as integration

    switch = integration.disable if level == "plain" else lambda: integration.enable(level)

    def called():
        switch()
        return call()

    return called


def levels() -> tuple[str, ...]:
    """List the rows of a table."""
    from ssm.integrations import transformers as integration

    return ("plain", *integration.LEVELS)


def agreement(name: str) -> list[dict]:
    """Compare logits and tokens of every level with plain transformers."""
    import torch

    model = build(name, LAYERS)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, model.config.vocab_size, (1, 512), generator=draw)

    def results():
        with torch.no_grad():
            logits = model(ids).logits
        options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
        return logits, model.generate(ids[:, :4], pad_token_id=0, **options)

    logits, tokens = at("plain", results)()
    found = []
    for level in levels()[1:]:
        got = at(level, results)()
        item = {"model": name, "level": level}
        item["logits"] = float((got[0] - logits).abs().max())
        item["tokens"] = torch.equal(got[1], tokens)
        found.append(item)
    at("plain", lambda: None)()
    return found


def time_workload(name: str, workload: str, iters: int) -> dict:
    """Time all levels of one workload."""
    from tools import measure

    layers, wanted = WORKLOADS[workload][name]
    call = work(build(name, layers), workload)
    timings = measure.interleave({level: at(level, call) for level in levels()}, iters)
    at("plain", lambda: None)()
    rows = [
        {
            "level": level,
            "median_ms": timing.median * 1e3,
            "min_ms": timing.best * 1e3,
            "max_ms": timing.worst * 1e3,
            "samples": timing.samples,
            "vs_plain": timings["plain"].median / timing.median,
        }
        for level, timing in timings.items()
    ]
    return {"model": name, "workload": workload, "layers": layers, "wanted": wanted, "rows": rows}


def first_call(name: str, workload: str, level: str) -> dict:
    """Time enabling and the first calls of a workload in this process, which must be fresh."""
    call, times = work(build(name, LAYERS), workload), []
    started = time.perf_counter()
    at(level, lambda: None)()
    enable_ms = (time.perf_counter() - started) * 1e3
    for _ in range(6):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    median = sorted(times[1:])[len(times[1:]) // 2]
    found = {"model": name, "workload": workload, "level": level, "enable_ms": enable_ms}
    return found | {"first_ms": times[0], "median_ms": median, "ratio": times[0] / median}


def first_calls(names: list[str], threads: int) -> list[dict]:
    """Measure the first prompt of every level in fresh processes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = []
    for name in names:
        for level in levels():
            words = [__file__, "--model", name, "--workload", "prompt_4", "--first-call", level]
            words += ["--threads", str(threads)]
            child = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, env=env
            )
            if child.returncode:
                raise RuntimeError(f"bench_transformers: a first call failed: {child.stderr}")
            found.append(json.loads(child.stdout))
    return found


def print_workload(table: dict) -> None:
    """Print one table."""
    wanted = "" if table["wanted"] is None else f", wanted {table['wanted']:.1f}x"
    print(f"\n== {table['model']} :: {table['workload']} :: {table['layers']} layers{wanted} ==")
    for row in table["rows"]:
        spread = f"{row['min_ms']:.1f} - {row['max_ms']:.1f}"
        print(
            f"{row['level']:<10}{row['median_ms']:>10.1f} ms{spread:>22}{row['vs_plain']:>8.2f}x"
            f"{row['samples']:>5} samples"
        )


def run(arguments: argparse.Namespace) -> int:
    """Check, time and print everything; return the exit status."""
    import torch
    import transformers

    from tools import measure

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.first_call:
        print(json.dumps(first_call(arguments.model, arguments.workload, arguments.first_call)))
        return 0
    report = {"schema": SCHEMA, "iters": arguments.iters, **measure.facts(arguments.threads)}
    report["versions"]["transformers"] = transformers.__version__
    report["load_average"] = [os.getloadavg()[0]]
    names = [arguments.model] if arguments.model else list(MODELS)
    chosen = [arguments.workload] if arguments.workload else list(WORKLOADS)
    print(
        f"{report['machine']['processor']}, {report['threads']} threads, {report['isa']}, torch "
        f"{report['versions']['torch']}, transformers {transformers.__version__}, load "
        f"{report['load_average'][0]:.1f}"
    )
    report["agreement"] = [item for name in names for item in agreement(name)]
    for item in report["agreement"]:
        print(
            f"{item['model']} at level {item['level']}: logits within {item['logits']:.1e}, tokens "
            f"{'equal' if item['tokens'] else 'DIFFER'}"
        )
        if item["logits"] > ATOL or not item["tokens"]:
            return 1
    report["workloads"] = []
    for name in names:
        for workload in chosen:
            table = time_workload(name, workload, arguments.iters)
            report["workloads"].append(table)
            print_workload(table)
    print("\nfirst call in a fresh process, prompt of 4 tokens")
    report["first_calls"] = first_calls(names, arguments.threads)
    for item in report["first_calls"]:
        print(
            f"{item['model']:<8}{item['level']:<10}{item['first_ms']:>9.1f} ms, then "
            f"{item['median_ms']:.1f} ms: {item['ratio']:.2f}x, enabled in "
            f"{item['enable_ms']:.0f} ms"
        )
    report["load_average"].append(os.getloadavg()[0])
    print(f"load average at the end: {report['load_average'][1]:.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def main() -> int:
    """Do what the command line says; return the exit status."""
    summary, _, details = __doc__.split("\n\n", 2)
    parser = argparse.ArgumentParser(
        prog="bench_transformers",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, help="default: all")
    parser.add_argument("--workload", choices=WORKLOADS, help="default: all")
    parser.add_argument("--iters", type=int, default=10, help="samples per row, default 10")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report")
    parser.add_argument("--first-call", metavar="LEVEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    find_packages()
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
