"""DDP and FSDP2 of the language model against one process that sees the whole batch.

Run by tests/models/test_distributed.py on every rank. float64 to 1e-10.
"""

import tempfile

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ssm.distributed.collectives import rank_of
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.training import parameter_groups

BATCH, LENGTH, VOCAB, STEPS = 4, 6, 16, 3
MODELS = {
    "hybrid": {
        "d_intermediate": 8,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 4},
        "attn_layer_idx": [1],
        "attn_cfg": {"num_heads": 2, "d_conv": 4, "rotary_emb_dim": 2},
    },
    "mamba1": {"ssm_cfg": {"layer": "Mamba1", "d_state": 4}, "tie_embeddings": False},
}


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def build(settings):
    torch.manual_seed(0)
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=VOCAB, **settings)
    return MambaLMHeadModel(config, dtype=torch.float64)


def loss_of(model, ids):
    logits = model(ids[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(model, rows, steps=STEPS):
    """A few steps of AdamW, with the weight decay of `ssm-models train`."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
        optimizer.zero_grad()
        loss = loss_of(model, ids[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def own_rows(group):
    count = BATCH // group.size()
    return slice(rank_of(group) * count, (rank_of(group) + 1) * count)


def check(group, wrap):
    for settings in MODELS.values():
        whole, parallel = build(settings), wrap(build(settings))
        train(whole, slice(None))
        train(parallel, own_rows(group))
        names = dict(whole.named_parameters())
        for name, parameter in parallel.named_parameters():
            if isinstance(parameter, DTensor):
                parameter = parameter.full_tensor()
            close(parameter.detach(), names[name.removeprefix("module.")].detach())


def case_ddp(group):
    check(group, DistributedDataParallel)


def case_fsdp(group):
    def wrap(model):
        for layer in model.backbone.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return model

    check(group, wrap)


def case_fsdp_generates(group):
    """A sharded model is called like any other: with a state, and to generate."""
    whole, parallel = build(MODELS["hybrid"]), build(MODELS["hybrid"])
    for layer in parallel.backbone.layers:
        fully_shard(layer)
    fully_shard(parallel)
    prompt = torch.randint(VOCAB, (2, 3))
    assert torch.equal(
        parallel.generate(prompt, max_length=8), whole.generate(prompt, max_length=8)
    )


def case_fsdp_saves(group):
    """Shards are refused; the whole state dict is saved as docs/distributed.md says."""
    for settings in MODELS.values():
        whole, parallel = build(settings), build(settings)
        for layer in parallel.backbone.layers:
            fully_shard(layer)
        fully_shard(parallel)
        with tempfile.TemporaryDirectory() as folder:
            with pytest.raises(
                ValueError, match=r"^save_pretrained: model must hold whole .*DTensor"
            ):
                parallel.save_pretrained(folder)
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state_dict = get_model_state_dict(parallel, options=options)
            if rank_of(group) == 0:
                gathered = MambaLMHeadModel(whole.config, device="meta")
                gathered.load_state_dict(state_dict, assign=True)
                gathered.save_pretrained(folder)
                loaded = MambaLMHeadModel.from_pretrained(folder, dtype=torch.float64)
                for name, value in whole.state_dict().items():
                    assert torch.equal(loaded.state_dict()[name], value), name
