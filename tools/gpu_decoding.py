"""What tools/gpu_check.py decodes: models with CUDA graphs and without, compared and timed."""

from __future__ import annotations

import statistics
import time

# Name -> layer, sizes and dtype: the shapes of the released 130M models, which decode from graphs
# best, and small ones in the other dtypes.
MODELS = {
    "mamba1_130m": ("Mamba1", {"d_model": 768, "n_layer": 24, "vocab_size": 50277}, "bfloat16"),
    "mamba2_130m": ("Mamba2", {"d_model": 768, "n_layer": 24, "vocab_size": 50277}, "bfloat16"),
    "mamba1_float32": ("Mamba1", {"d_model": 256, "n_layer": 4, "vocab_size": 1000}, "float32"),
    "mamba2_float16": ("Mamba2", {"d_model": 256, "n_layer": 4, "vocab_size": 1000}, "float16"),
}
BATCHES = (1, 64)
PROMPT, NEW, REPEATS = 32, 64, 3
# A rehearsal on the CPU wants the same code, not the same work.
SMALLER = {"d_model": 64, "n_layer": 1, "vocab_size": 100}


def check(report, device: str) -> None:
    """Decode with every model at every batch size."""
    for name in MODELS:
        for batch in BATCHES:
            report.run(f"decoding/{name}/b{batch}", compare, name, batch, device)


def compare(name: str, batch: int, device: str) -> dict:
    """Return milliseconds per token with graphs and without, or raise what differs."""
    import torch

    try:
        from ssm.models.config import MambaConfig
        from ssm.models.lm import MambaLMHeadModel
        from ssm.utils.decoding_graph import release, why_not
    except ModuleNotFoundError as error:  # the operators need less than the models
        return {"skipped": f"{error.name} is not installed"}

    layer, sizes, dtype = MODELS[name]
    sizes = SMALLER if device == "cpu" else sizes
    new = 4 if device == "cpu" else NEW
    torch.manual_seed(0)
    config = MambaConfig(**sizes, ssm_cfg={"layer": layer})
    model = MambaLMHeadModel(config, device=device, dtype=getattr(torch, dtype)).eval()
    texts = torch.randint(0, sizes["vocab_size"], (2, batch, PROMPT), device=device)
    reason = why_not(model, model.allocate_state(batch))
    if device == "cuda" and reason is not None:
        raise AssertionError(f"decoded without a graph: {reason}")

    def decode(ids, graphs: bool):
        state = model.allocate_state(batch)
        options = {"state": state, "return_dict_in_generate": True, "output_scores": True}
        found = model.generate(ids, max_new_tokens=new, cg=graphs, **options)
        held = [t for each in state.key_value_memory_dict.values() for t in each]
        return [found.sequences, torch.stack(found.scores, 1), *held]

    # Twice the first text: the second and third call reuse the graph of the first.
    for ids in (texts[0], texts[1], texts[0]):
        names = ("tokens", "scores", *("states" for _ in range(2 * sizes["n_layer"])))
        for what, got, want in zip(names, decode(ids, True), decode(ids, False), strict=True):
            if not torch.equal(got, want):
                raise AssertionError(f"{what}: other bits with a graph")

    def milliseconds(graphs: bool) -> float:
        times = []
        for _ in range(REPEATS):
            _wait(device)
            started = time.perf_counter()
            model.generate(texts[0], max_new_tokens=new, cg=graphs)
            _wait(device)
            times.append((time.perf_counter() - started) * 1e3 / new)
        return statistics.median(times)

    found = {"ms_per_token": milliseconds(True), "without_graph": milliseconds(False)}
    release(model)
    return found


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
