"""Our modules and models, with upstream's parameters in them, against upstream's.

Judge: goldens/upstream, made by upstream's own code; see goldens/README.md.
"""

from types import SimpleNamespace

import pytest
import torch

from ssm.models.build import create_block
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.attention import MHA
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.utils import dispatch
from tests import golden_cases, goldens
from tests.upstream.judging import RUNS, compare, device_of, placed, tolerance_of

pytestmark = pytest.mark.goldens
OURS = {"Mamba": Mamba1, "Mamba2": Mamba2, "MHA": MHA}


def judges(table) -> list:
    return [
        pytest.param(made, golden, id=f"{made.folder.name}-{golden}")
        for made in goldens.upstream()
        for golden in table
    ]


def build(golden, kept, dtype, device):
    """Return our module with upstream's parameters, each under upstream's name."""
    if isinstance(golden, golden_cases.ModelGolden):
        module = MambaLMHeadModel(MambaConfig(**golden.config))
    elif golden.kind == "Block":
        module = create_block(MambaConfig(**golden.config), 0)
    else:
        module = OURS[golden.kind](**golden.config, layer_idx=0)
    parameters = placed(kept.parameters, dtype, device)
    module = module.to(device, dtype)
    module.load_state_dict(parameters, strict=True)
    return module


def inference_params(batch: int, seqlen: int) -> SimpleNamespace:
    """Return what upstream's models carry a state in."""
    return SimpleNamespace(
        max_seqlen=seqlen,
        max_batch_size=batch,
        seqlen_offset=0,
        batch_size_offset=0,
        key_value_memory_dict={},
        lengths_per_sample=None,
    )


def compare_pass(golden, kept, module, run, leaves, kind, dtype):
    """Compare outputs of a whole pass, and the gradients of inputs and of every parameter."""
    outputs = run()
    wanted = {n: kept.outputs[n] for n in kept.weights}
    compare(str(golden), outputs, wanted, tolerance_of(kind, "upstream", dtype), scaled=True)
    device = next(module.parameters()).device
    weights = placed(kept.weights, dtype, device)
    sum((outputs[n] * w).sum() for n, w in weights.items()).backward()
    found = {n: t.grad for n, t in (*leaves.items(), *module.named_parameters())}
    assert set(found) == set(kept.gradients)
    tolerance = tolerance_of(kind, "upstream_bwd", dtype)
    compare(f"{golden} gradient of", found, kept.gradients, tolerance, scaled=True)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize(("made", "golden"), judges(golden_cases.MODULES))
def test_module_matches_upstream(made, golden, backend, dtype):
    device = device_of(backend)
    kept, kind = made.read(golden), made.folder.name
    module = build(golden, kept, dtype, device)
    leaves = placed(kept.arguments, dtype, device)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def run():
        if golden.kind != "Block":
            return {"y": module(leaves["hidden_states"])}
        names = ("hidden_states", "residual")
        return dict(zip(names, module(*(leaves[n] for n in names)), strict=True))

    with dispatch.use_backend(backend):
        compare_pass(golden, kept, module, run, leaves, kind, dtype)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("protocol", ["inference_params", "step"])
@pytest.mark.parametrize(("made", "golden"), judges(g for g in golden_cases.MODULES if g.prompt))
def test_module_continues_as_upstream(made, golden, protocol, backend, dtype):
    device = device_of(backend)
    kept, kind = made.read(golden), made.folder.name
    module = build(golden, kept, dtype, device)
    x = placed(kept.arguments, dtype, device)["hidden_states"]
    params, parts = inference_params(golden.batch, golden.seqlen), []
    with torch.no_grad(), dispatch.use_backend(backend):
        for part in (x[:, : golden.prompt], *x[:, golden.prompt :].split(1, dim=1)):
            if protocol == "step" and params.seqlen_offset and part.shape[1]:
                parts.append(module.step(part, *params.key_value_memory_dict[0])[0])
            elif part.shape[1]:
                parts.append(module(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
    found = {"stepped": torch.cat(parts, 1)}
    for index, tensor in enumerate(params.key_value_memory_dict[0]):
        found[f"state.{index}"] = tensor
    wanted = {n: a for n, a in kept.outputs.items() if n not in kept.weights}
    assert len(wanted) == (2 if golden.kind == "MHA" else 3)
    compare(str(golden), found, wanted, tolerance_of(kind, "upstream", dtype), scaled=True)


@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize(("made", "golden"), judges(golden_cases.MODELS))
def test_model_matches_upstream(made, golden, backend, dtype):
    device = device_of(backend)
    kept, kind = made.read(golden), made.folder.name
    model = build(golden, kept, dtype, device)
    tokens = torch.from_numpy(kept.arguments["input_ids"]).to(device)
    with dispatch.use_backend(backend):
        compare_pass(golden, kept, model, lambda: {"logits": model(tokens).logits}, {}, kind, dtype)
        written = model.generate(
            tokens,
            max_new_tokens=golden.new_tokens,
            return_dict_in_generate=True,
            output_scores=True,
        )
    assert written.sequences[:, golden.prompt :].tolist() == kept.outputs["tokens"].tolist()
    # Columns that only pad the embedding are no tokens; ours say so with -inf.
    scores = torch.stack(written.scores, 1)[..., : golden.config["vocab_size"]]
    found = {"scores": scores}
    wanted = {"scores": kept.outputs["scores"]}
    compare(str(golden), found, wanted, tolerance_of(kind, "upstream", dtype), scaled=True)
