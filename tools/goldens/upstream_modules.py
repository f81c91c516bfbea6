"""Upstream's modules and language models, run on random parameters of their own making."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tools.goldens.files import SEED, Fault
from tools.goldens.operators import draw_weights
from tools.goldens.upstream_loading import Upstream

# Greedy tokens are compared exactly, so the likeliest must be ahead by more than any rounding.
MARGIN = 1e-3


def module_tensors(upstream: Upstream, golden) -> dict:
    """Return what the file of a module holds.

    Args:
        upstream: loaded code.
        golden: an entry of ``tests.golden_cases.MODULES``.

    Returns:
        Name -> tensor: ``parameter.``, ``argument.``, ``output.``, ``weight.``, ``gradient.``; with
        a prompt also ``output.stepped`` and ``output.state.N``, what the state holds at the end.
    """
    torch.manual_seed(SEED)
    module = _spread(_build(upstream, golden.kind, golden.config))
    parameters = _narrow(module.named_parameters(), "parameter")
    width = golden.config.get("embed_dim") or golden.config["d_model"]
    rng = np.random.default_rng(SEED)
    names = ("hidden_states", "residual") if golden.kind == "Block" else ("hidden_states",)
    shape = (golden.batch, golden.seqlen, width)
    given = {n: torch.from_numpy(rng.standard_normal(shape)).float() for n in names}
    module = module.to(upstream.device, upstream.dtype())

    def run(inputs: dict) -> dict:
        found = module(*inputs.values())
        return dict(zip(names, found, strict=True)) if len(names) > 1 else {"y": found}

    tensors = parameters | {f"argument.{n}": t for n, t in given.items()}
    tensors |= _pass(upstream, module, run, given)
    if golden.prompt:
        tensors |= _stepped(upstream, module, given["hidden_states"], golden.prompt)
    return tensors


def model_tensors(upstream: Upstream, golden) -> dict:
    """Return what the file of a language model holds.

    Args:
        upstream: loaded code.
        golden: an entry of ``tests.golden_cases.MODELS``.

    Returns:
        Name -> tensor: as of a module, with ``argument.input_ids``, ``output.logits`` of a pass
        over them, ``output.tokens`` behind them and ``output.scores``, the logits of those.

    Raises:
        Fault: two tokens are about as likely, so that rounding would choose.
    """
    torch.manual_seed(SEED)
    model = _spread(_build(upstream, "LM", golden.config))
    parameters = _narrow(model.state_dict().items(), "parameter")
    rng = np.random.default_rng(SEED)
    shape = (golden.batch, golden.prompt)
    input_ids = torch.from_numpy(rng.integers(0, golden.config["vocab_size"], shape))
    model = model.to(upstream.device, upstream.dtype())
    tokens = input_ids.to(upstream.device)
    found = _pass(upstream, model, lambda _: {"logits": model(tokens).logits}, {})
    params = _inference_params(upstream, golden.batch, golden.prompt + golden.new_tokens)
    fed, scores = tokens, []
    with torch.no_grad(), upstream.arithmetic():
        for _ in range(golden.new_tokens):
            if golden.stepwise:
                logits = model(fed, inference_params=params, num_last_tokens=1).logits[:, -1]
                params.seqlen_offset += fed.shape[1]
            else:
                logits = model(tokens).logits[:, -1]
            logits = logits[:, : golden.config["vocab_size"]]
            scores.append(logits)
            fed = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, fed], dim=1)
    best = torch.stack(scores).topk(2).values
    margin = (best[..., 0] - best[..., 1]).min().item()
    if margin < MARGIN:
        raise Fault(f"{golden} must choose its tokens by {MARGIN} or more, got {margin:.2g}")
    found["output.tokens"] = tokens[:, golden.prompt :]
    found["output.scores"] = torch.stack(scores, 1)
    return {**parameters, "argument.input_ids": input_ids, **found}


def _build(upstream: Upstream, kind: str, config: dict) -> nn.Module:
    """Return a module of upstream in float32, on the path that the device has functions for."""
    files = upstream.files
    if kind == "LM":
        config = files["config_mamba"].MambaConfig(
            **{**config, "ssm_cfg": _cpu_cfg(upstream, config)}
        )
        return files["mixer_seq_simple"].MambaLMHeadModel(config)
    if kind == "Block":
        defaults = vars(files["config_mamba"].MambaConfig())
        names = ("d_model", "d_intermediate", "attn_layer_idx", "attn_cfg", "rms_norm",
                 "residual_in_fp32", "fused_add_norm")  # fmt: skip
        settings = {name: {**defaults, **config}[name] for name in names}
        return files["mixer_seq_simple"].create_block(
            **settings, ssm_cfg=_cpu_cfg(upstream, config), layer_idx=0
        )
    made = {"Mamba": "mamba_simple", "Mamba2": "mamba2", "MHA": "mha"}[kind]
    if kind != "MHA" and upstream.on_cpu:
        config = {**config, _FUSED[kind]: False}
    return getattr(files[made], kind)(**config, layer_idx=0)


# The flag of each mixer that asks for one fused kernel in place of its parts.
_FUSED = {"Mamba": "use_fast_path", "Mamba2": "use_mem_eff_path"}


def _cpu_cfg(upstream: Upstream, config: dict) -> dict:
    """Return the arguments of the mixers, without the fused path on a CPU."""
    cfg = dict(config.get("ssm_cfg", {}))
    if upstream.on_cpu:
        cfg[_FUSED["Mamba2" if cfg.get("layer") == "Mamba2" else "Mamba"]] = False
    return cfg


def _spread(module: nn.Module) -> nn.Module:
    """Add noise to all parameters: some start as ones or zeros, which would hide a mistake."""
    rng = np.random.default_rng(SEED)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = 0.1 * rng.standard_normal(tuple(parameter.shape))
            parameter += torch.from_numpy(noise).float()
    return module


def _narrow(named, kind: str) -> dict:
    return {f"{kind}.{name}": tensor.detach().clone() for name, tensor in named}


def _pass(upstream: Upstream, module: nn.Module, run, given: dict) -> dict:
    """Return outputs of a whole pass, their weights, and the gradients of inputs and parameters."""
    leaves = {n: t.to(upstream.device, upstream.dtype()).requires_grad_() for n, t in given.items()}
    with upstream.arithmetic():
        outputs = run(leaves)
        weights = draw_weights(outputs)
        sum((outputs[n] * w.to(outputs[n])).sum() for n, w in weights.items()).backward()
    found = {f"output.{n}": t.detach() for n, t in outputs.items()}
    found |= {f"weight.{n}": t for n, t in weights.items()}
    for name, leaf in (*leaves.items(), *module.named_parameters()):
        found[f"gradient.{name}"] = leaf.grad
    return found


def _stepped(upstream: Upstream, module: nn.Module, hidden_states, prompt: int) -> dict:
    """Return outputs and state where a prompt is read at once and the rest token by token."""
    params = _inference_params(upstream, *hidden_states.shape[:2])
    x, found = hidden_states.to(upstream.device, upstream.dtype()), []
    with torch.no_grad(), upstream.arithmetic():
        for part in (x[:, :prompt], *x[:, prompt:].split(1, dim=1)):
            if part.shape[1]:
                found.append(module(part, inference_params=params))
                params.seqlen_offset += part.shape[1]
    state = [t for t in params.key_value_memory_dict[0] if t is not None]
    return {
        "output.stepped": torch.cat(found, 1),
        **{f"output.state.{i}": tensor for i, tensor in enumerate(state)},
    }


def _inference_params(upstream: Upstream, batch: int, seqlen: int):
    return upstream.files["generation"].InferenceParams(max_seqlen=seqlen, max_batch_size=batch)
