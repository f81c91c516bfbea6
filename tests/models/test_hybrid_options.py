"""What the published hybrids need of the modules: factors, inner norms, blocks of another kind.

Judge: the same model with the factors multiplied into its weights, and plain PyTorch.
"""

import pytest
import torch
import torch.nn.functional as F

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.modules.block import Block
from ssm.modules.mamba1 import Mamba1
from ssm.modules.mamba2 import Mamba2
from ssm.modules.mlp import MLP, GatedMLP
from ssm.modules.norm import RMSNorm, WeightlessRMSNorm
from ssm.modules.parallel import ParallelMixer

MAMBA2 = {"layer": "Mamba2", "headdim": 4, "d_state": 5, "ngroups": 2}
ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 2}
FACTORS = {
    "ssm_in_multiplier": 1.5,
    "ssm_out_multiplier": 0.5,
    "attention_in_multiplier": 0.75,
    "attention_out_multiplier": 1.25,
}
MULTIPLIERS = [0.5, 2.0, 0.25, 1.5, 0.75]
PARALLEL = {
    "ssm_cfg": {**MAMBA2, "multipliers": MULTIPLIERS},
    "attn_layer_idx": [0, 1, 2],
    "attn_cfg": ATTENTION,
    "parallel_cfg": FACTORS,
    "d_intermediate": 12,
    "mlp_cfg": {"multiple_of": 1, "gate_multiplier": 1.5, "out_multiplier": 0.5, "bias": True},
    "residual_in_fp32": False,
}
ONE_PER_BLOCK = {
    "ssm_cfg": MAMBA2,
    "attn_layer_idx": [1],
    "attn_cfg": ATTENTION,
    "mlp_layer_idx": [2],
    "d_intermediate": 12,
    "mlp_cfg": {"layer": "MLP"},
}
NORMED = {"ssm_cfg": {"d_state": 5, "bcdt_norm": "learned"}, "attn_layer_idx": [1]}
KINDS = {
    "parallel": PARALLEL,
    "one per block": ONE_PER_BLOCK,
    "learned": {**NORMED, "attn_cfg": ATTENTION},
    "weightless": {"ssm_cfg": {"d_state": 5, "bcdt_norm": "weightless"}},
    "scaled": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_multiplier": 0.25},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
IDS = torch.randint(20, (2, 11), generator=torch.Generator().manual_seed(0))


def lm(kind, dtype=torch.float64):
    torch.manual_seed(0)
    config = MambaConfig(d_model=8, n_layer=3, vocab_size=20, **KINDS[kind])
    model = MambaLMHeadModel(config, {"initializer_range": 0.5}, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def close(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@each_kind
@torch.no_grad()
def test_state_continues_cut_anywhere(kind, tmp_path):
    model = lm(kind)
    whole = model(IDS).logits
    for cuts in ([11], [1] * 11, [4, 1, 6]):
        state = model.allocate_state(2)
        parts = [model(part, state=state).logits for part in IDS.split(cuts, dim=1)]
        close(torch.cat(parts, dim=1), whole)
    state = model.allocate_state(2)
    model(IDS[:, :6], state=state)
    state.save(tmp_path / "state")
    again = type(state).load(tmp_path / "state")
    close(model(IDS[:, 6:], state=again).logits, whole[:, 6:])
    assert torch.equal(model.generate(IDS, max_new_tokens=3)[:, :11], IDS)


@each_kind
@torch.no_grad()
def test_padding_and_packing(kind):
    model = lm(kind)
    whole = model(IDS).logits
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], dim=1)
    mask = torch.arange(14).expand(2, -1) >= 3
    close(model(padded, attention_mask=mask).logits[:, 3:], whole)
    packed = torch.cat([IDS[:1, :4], IDS[1:]], dim=1)
    logits = model(packed, cu_seqlens=torch.tensor([0, 4, 15])).logits
    close(logits[:, :4], whole[:1, :4])
    close(logits[:, 4:], whole[1:])


@each_kind
def test_every_parameter_has_a_gradient(kind):
    model = lm(kind).train()
    model(IDS).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_factors_are_those_of_the_weights():
    model = lm("parallel")
    want = model(IDS).logits
    plain = {**PARALLEL, "ssm_cfg": MAMBA2, "parallel_cfg": {}}
    plain["mlp_cfg"] = {"multiple_of": 1, "bias": True}
    folded = MambaLMHeadModel(
        MambaConfig(d_model=8, n_layer=3, vocab_size=20, **plain), dtype=torch.float64
    ).eval()
    folded.load_state_dict(model.state_dict())
    widths = [16, 16, 10, 10, 4]  # z, x, B, C, dt
    factors = torch.cat([torch.full((n,), f) for n, f in zip(widths, MULTIPLIERS, strict=True)])
    for layer in folded.backbone.layers:
        ssm, attention = layer.mixer.ssm, layer.mixer.attention
        ssm.in_proj.weight.mul_(factors[:, None]).mul_(FACTORS["ssm_in_multiplier"])
        ssm.out_proj.weight.mul_(FACTORS["ssm_out_multiplier"])
        attention.in_proj.weight.mul_(FACTORS["attention_in_multiplier"])
        attention.out_proj.weight.mul_(FACTORS["attention_out_multiplier"])
        attention.out_proj.bias.mul_(FACTORS["attention_out_multiplier"])
        layer.mlp.fc1.weight[12:] *= 1.5
        layer.mlp.fc1.bias[12:] *= 1.5
        layer.mlp.fc2.weight.mul_(0.5)
        layer.mlp.fc2.bias.mul_(0.5)
    close(folded(IDS).logits, want)
    assert not torch.allclose(want, lm("one per block")(IDS).logits)


@torch.no_grad()
def test_factors_of_stream_embedding_and_logits():
    model = lm("scaled")
    want = model(IDS).logits
    folded = MambaLMHeadModel(
        MambaConfig(d_model=8, n_layer=3, vocab_size=20, tie_embeddings=False), dtype=torch.float64
    ).eval()
    folded.load_state_dict(model.state_dict())
    folded.backbone.embedding.weight.mul_(3.0)
    folded.lm_head.weight.mul_(0.25)
    for layer in folded.backbone.layers:
        layer.mixer.out_proj.weight.mul_(0.5)
    close(folded(IDS).logits, want)


@pytest.mark.parametrize("norm", ["learned", "weightless"])
@torch.no_grad()
def test_inner_norms_of_mamba1(norm):
    torch.manual_seed(0)
    mixer = Mamba1(8, d_state=5, dt_rank=3, bcdt_norm=norm, bcdt_norm_eps=1e-3, dtype=torch.float64)
    names = [n for n, _ in mixer.named_parameters() if "_norm" in n]
    assert names == (["dt_norm.weight", "B_norm.weight", "C_norm.weight"] * (norm == "learned"))
    for name in names:
        mixer.get_parameter(name).uniform_(0.5, 2)
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    delta, B, C = mixer._select(x)
    dt, *rest = F.linear(x, mixer.x_proj.weight).split([3, 5, 5], dim=-1)
    weights = [mixer.get_parameter(name) for name in names] or [None] * 3
    dt, *rest = [
        F.rms_norm(part, part.shape[-1:], weight, 1e-3)
        for part, weight in zip((dt, *rest), weights, strict=True)
    ]
    close(delta, F.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias))
    close(B, rest[0])
    close(C, rest[1])


def test_weightless_norm():
    x = torch.randn(3, 7, dtype=torch.float64)
    close(WeightlessRMSNorm(1e-3)(x), F.rms_norm(x, (7,), None, 1e-3))
    assert WeightlessRMSNorm()(x.bfloat16()).dtype == torch.bfloat16


def test_epsilon_of_the_norm_of_mamba2():
    assert Mamba2(8, headdim=4, norm_eps=1e-3).norm.eps == 1e-3


@pytest.mark.parametrize(
    ("activation", "function"), [("relu2", lambda x: x.relu() ** 2), ("silu", F.silu)]
)
def test_mlp_without_a_gate(activation, function):
    mlp = MLP(6, 9, activation, bias=True, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    close(mlp(x), mlp.fc2(function(mlp.fc1(x))))
    assert mlp.fc1.weight.shape == (9, 6)


def test_block_of_an_mlp_alone():
    block = Block(6, torch.nn.Identity, lambda dim: MLP(dim, 9), RMSNorm, fused_add_norm=True)
    assert block.mixers() == []
    assert sorted(n for n, _ in block.named_parameters()) == [
        "mlp.fc1.weight",
        "mlp.fc2.weight",
        "norm2.weight",
    ]
    x = torch.randn(1, 2, 6)
    hidden, residual = block(x)
    close(residual, x)
    close(hidden, block.mlp(block.norm2(x)), 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba1(8, bcdt_norm="yes"), "bcdt_norm must be None, 'learned' or 'weightless'"),
        (lambda: Mamba1(8, bcdt_norm_eps=0.0), "bcdt_norm_eps must be positive, got 0.0"),
        (lambda: Mamba2(8, headdim=4, norm_eps=-1), "norm_eps must be positive, got -1"),
        (lambda: Mamba2(8, headdim=4, multipliers=[1.0] * 4), "multipliers must be five numbers"),
        (
            lambda: Mamba2(8, headdim=4, multipliers=[float("nan")] * 5),
            "multipliers must be finite, got",
        ),
        (lambda: GatedMLP(8, gate_multiplier=float("inf")), "gate_multiplier must be finite"),
        (lambda: MLP(8, 0), "hidden_features must be positive, got 0"),
        (lambda: MLP(8, 8, "gelu"), "activation must be one of relu2, silu, got 'gelu'"),
        (
            lambda: ParallelMixer(8, None, None, ssm_in_multiplier=float("nan")),
            "multiplier must be finite, got nan",
        ),
        (lambda: ParallelMixer(8, None, None, "1"), "multiplier must be a number, got '1'"),
        (lambda: Block(8, torch.nn.Identity), "mixer_cls must give a mixer if mlp_cls gives none"),
        (lambda: MambaConfig(n_layer=2, mlp_layer_idx=[2]), "mlp_layer_idx must be below 2, got 2"),
        (lambda: MambaConfig(mlp_layer_idx=[0]), "d_intermediate must be positive with mlp_layer"),
        (lambda: MambaConfig(logits_multiplier=0), "logits_multiplier must be positive, got 0"),
        (lambda: MambaConfig(parallel_cfg=3), "parallel_cfg must be a dict, got 3"),
        (
            lambda: lm_of(parallel_cfg={"ssm_in": 1.0}, attn_layer_idx=[0], attn_cfg=ATTENTION),
            "parallel_cfg must hold arguments of ParallelMixer, got 'ssm_in'",
        ),
        (
            lambda: lm_of(mlp_cfg={"layer": "Moe"}, d_intermediate=4),
            r"mlp_cfg\['layer'\] must be one of GatedMLP, MLP, got 'Moe'",
        ),
        (
            lambda: lm_of(mlp_cfg={"hidden_features": 4}, d_intermediate=4),
            "mlp_cfg must hold arguments of GatedMLP, got 'hidden_features'",
        ),
    ],
)
def test_rejects(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def lm_of(**kwargs):
    return MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=20, **kwargs))
