"""What tools/gpu_check.py decodes: with CUDA graphs, without, and by one forward pass; timed."""

from __future__ import annotations

import statistics
import time

# Name -> layer, sizes and dtype: the shapes of the released 130M models, which decode from graphs
# best, and small ones in the other dtypes.
MODELS = {
    "mamba1_130m": ("Mamba1", {"d_model": 768, "n_layer": 24, "vocab_size": 50277}, "bfloat16"),
    "mamba2_130m": ("Mamba2", {"d_model": 768, "n_layer": 24, "vocab_size": 50277}, "bfloat16"),
    "hybrid_130m": (
        "Mamba2",
        {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "attn_layer_idx": [6, 18]},
        "bfloat16",
    ),
    "mamba1_float32": ("Mamba1", {"d_model": 256, "n_layer": 4, "vocab_size": 1000}, "float32"),
    "mamba2_float16": ("Mamba2", {"d_model": 256, "n_layer": 4, "vocab_size": 1000}, "float16"),
}
BATCHES = (1, 64)
# So that attention outgrows its first graph, of a room of 256 tokens.
PROMPT, NEW, REPEATS = 254, 64, 3
# A rehearsal on the CPU wants the same code, not the same work.
SMALLER = {"d_model": 64, "n_layer": 1, "vocab_size": 100}
ATTENTION = {"num_heads": 4, "causal": True, "rotary_emb_dim": 16}
# How far scores may be from those of one forward pass, in the root mean square: a state of float32
# stands for products that round to the type of the model.
BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def check(report, device: str) -> None:
    """Decode with every model at every batch size."""
    for name in MODELS:
        for batch in BATCHES:
            report.run(f"decoding/{name}/b{batch}", compare, name, batch, device)


def compare(name: str, batch: int, device: str) -> dict:
    """Return milliseconds per token with graphs and without, or raise what differs."""
    import torch

    from ssm.models.config import MambaConfig
    from ssm.models.lm import MambaLMHeadModel
    from ssm.state import CACHE_AXES
    from ssm.utils.decoding_graph import release, why_not
    from tools.gpu_peers import difference

    layer, sizes, dtype = MODELS[name]
    is_hybrid = "attn_layer_idx" in sizes
    if device == "cpu":
        sizes = {**SMALLER, "n_layer": 2, "attn_layer_idx": [1]} if is_hybrid else SMALLER
    new = 4 if device == "cpu" else NEW
    torch.manual_seed(0)
    options = {"attn_cfg": ATTENTION} if is_hybrid else {}
    config = MambaConfig(**sizes, **options, ssm_cfg={"layer": layer})
    model = MambaLMHeadModel(config, device=device, dtype=getattr(torch, dtype)).eval()
    texts = torch.randint(0, sizes["vocab_size"], (2, batch, PROMPT), device=device)
    reason = why_not(model, model.allocate_state(batch))
    if device == "cuda" and reason is not None:
        raise AssertionError(f"decoded without a graph: {reason}")

    def decode(ids, graphs: bool, tokens=None):
        state = model.allocate_state(batch)
        options = {"state": state, "return_dict_in_generate": True, "output_scores": True}
        found = model.generate(
            ids, max_new_tokens=new, cg=graphs, teacher_outputs=tokens, **options
        )
        held = [t for each in state.key_value_memory_dict.values() for t in each]
        # Of the cache of an attention what holds tokens.
        held = [t[:, : PROMPT + new - 1] if t.dim() == CACHE_AXES else t for t in held]
        return [found.sequences, torch.stack(found.scores, 1), *held]

    # Twice the first text: the second and third call reuse the graph of the first.
    for ids in (texts[0], texts[1], texts[0]):
        expected = decode(ids, False)
        # Attention sums in another order in a graph: rounding may decide for another token.
        found = decode(ids, True, expected[0] if is_hybrid else None)
        names = ["tokens", "scores"] + ["states"] * (len(found) - 2)
        for what, got, want in zip(names, found, expected, strict=True):
            if is_hybrid and got.is_floating_point():
                if not (far := difference(got, want)) <= BOUNDS[dtype]:
                    raise AssertionError(f"{what} are {far:.3g} from those without a graph")
            elif not torch.equal(got, want):
                raise AssertionError(f"{what}: other bits with a graph")
    with torch.no_grad():
        whole = model(found[0][:, :-1]).logits[:, PROMPT - 1 :]
    far = difference(found[1], whole[..., : found[1].shape[-1]])
    if not far <= BOUNDS[dtype]:
        raise AssertionError(f"scores are {far:.3g} from those of one forward pass")

    def milliseconds(graphs: bool) -> float:
        times = []
        for _ in range(REPEATS):
            _wait(device)
            started = time.perf_counter()
            model.generate(texts[0], max_new_tokens=new, cg=graphs)
            _wait(device)
            times.append((time.perf_counter() - started) * 1e3 / new)
        return statistics.median(times)

    found = {"difference": far, "ms_per_token": milliseconds(True)}
    found["without_graph"] = milliseconds(False)
    release(model)
    return found


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
