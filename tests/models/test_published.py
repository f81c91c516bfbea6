"""Checkpoints as they are published outside of transformers: state-spaces, Codestral Mamba.

Judge: the configs and tensor names of those checkpoints, and the tensors that were written.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.utils import dialects
from ssm.utils.dialects.canonical import canonical, difference
from ssm.utils.dialects.configs import read_values, write_values
from tests.families import FAMILIES, needs_transformers
from tests.published_configs import RELEASED

# config.json as published, made small; behind it the tensors of a block that mamba_ssm makes of it.
MAMBA1 = {
    "norm.weight": (32,),
    "mixer.A_log": (64, 16),
    "mixer.D": (64,),
    "mixer.conv1d.weight": (64, 1, 4),
    "mixer.conv1d.bias": (64,),
    "mixer.in_proj.weight": (128, 32),
    "mixer.x_proj.weight": (2 + 32, 64),
    "mixer.dt_proj.weight": (64, 2),
    "mixer.dt_proj.bias": (64,),
    "mixer.out_proj.weight": (32, 64),
}
MAMBA2 = {
    "norm.weight": (32,),
    "mixer.dt_bias": (1,),
    "mixer.A_log": (1,),
    "mixer.D": (1,),
    "mixer.in_proj.weight": (64 * 2 + 128 * 2 + 1, 32),
    "mixer.conv1d.weight": (64 + 256, 1, 4),
    "mixer.conv1d.bias": (64 + 256,),
    "mixer.norm.weight": (64,),
    "mixer.out_proj.weight": (32, 64),
}
ATTENTION = {
    "norm.weight": (32,),
    "mixer.in_proj.weight": (3 * 3 * 16, 32),
    "mixer.conv1d.weight": (3 * 3 * 16, 1, 4),
    "mixer.conv1d.bias": (3 * 3 * 16,),
    "mixer.out_proj.weight": (32, 3 * 16),
}
PLAIN = {k: v for k, v in ATTENTION.items() if "conv1d" not in k}
MLP = {"norm2.weight": (32,), "mlp.fc1.weight": (2 * 128, 32), "mlp.fc2.weight": (32, 128)}
COMMON = {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "vocab_size": 50}
HEADS = {"causal": True, "head_dim": 16, "num_heads": 3, "out_proj_bias": False}
NEWER = {
    **COMMON,
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "tie_embeddings": True,
}
PUBLISHED = {
    "mamba": (
        {**COMMON, "d_model": 32, "n_layer": 2, "ssm_cfg": {}, "pad_vocab_size_multiple": 8},
        [MAMBA1, MAMBA1],
    ),
    "mamba2": (
        {**NEWER, "d_model": 32, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2"}},
        [MAMBA2],
    ),
    "mamba2attn": (
        {
            **NEWER,
            "d_model": 32,
            "n_layer": 3,
            "ssm_cfg": {"layer": "Mamba2"},
            "attn_layer_idx": [1],
            "attn_cfg": {**HEADS, "d_conv": 4, "qkv_proj_bias": False, "rotary_emb_dim": 8},
        },
        [MAMBA2, ATTENTION, MAMBA2],
    ),
    "transformerpp": (
        {
            **NEWER,
            "d_model": 32,
            "n_layer": 2,
            "d_intermediate": 100,
            "ssm_cfg": {"layer": "Mamba2"},
            "attn_layer_idx": [0, 1],
            "attn_cfg": {**HEADS, "qkv_proj_bias": False, "rotary_emb_dim": 16},
        },
        [{**PLAIN, **MLP}, {**PLAIN, **MLP}],
    ),
}

# Fields of upstream's MambaConfig, which refuses any other.
UPSTREAM = set(
    "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm "
    "residual_in_fp32 fused_add_norm pad_vocab_size_multiple tie_embeddings".split()
)


def load(path, *args, **kwargs):
    return MambaLMHeadModel.from_pretrained(path, *args, **kwargs)


def state_spaces_tensors(blocks):
    """Return the tensors of a published checkpoint, head and embedding being one."""
    random = torch.Generator().manual_seed(0)
    rows = {"backbone.embedding.weight": (56, 32), "backbone.norm_f.weight": (32,)}
    for number, block in enumerate(blocks):
        rows |= {f"backbone.layers.{number}.{name}": shape for name, shape in block.items()}
    tensors = {n: torch.randn(shape, generator=random).half() for n, shape in rows.items()}
    return {**tensors, "lm_head.weight": tensors["backbone.embedding.weight"]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_spaces_checkpoints(name, tmp_path):
    config, blocks = PUBLISHED[name]
    tensors = state_spaces_tensors(blocks)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = load(tmp_path, dtype="auto")
    state = model.state_dict()
    assert sorted(state) == sorted(tensors)
    for key, tensor in tensors.items():
        assert torch.equal(state[key], tensor.to(state[key].dtype)), key
    assert model.lm_head.weight is model.backbone.embedding.weight
    logits = load(tmp_path)(torch.arange(9)[None]).logits
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path / "back", format="mamba_ssm")
    back = torch.load(tmp_path / "back/pytorch_model.bin", weights_only=True)
    assert sorted(back) == sorted(tensors)
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key
    assert back["lm_head.weight"].data_ptr() == back["backbone.embedding.weight"].data_ptr()
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert {key: written[key] for key in config} == config
    assert set(written) <= UPSTREAM


def test_mamba_ssm_gets_a_model_of_transformers(tmp_path):
    name, fields = FAMILIES["mamba2"]
    values = {"model_type": name, **fields, "layer_norm_epsilon": 1e-5}
    torch.manual_seed(0)
    model = MambaLMHeadModel(read_values(dialects.find(values), values, dialects.GENERIC)).eval()
    model.save_pretrained(tmp_path, format="mamba_ssm")
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written) <= UPSTREAM
    assert not {"norm_eps", "multipliers", "bcdt_norm"} & set(written["ssm_cfg"])
    ids = torch.arange(9)[None]
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


def test_mamba_ssm_is_refused_what_it_cannot_say(tmp_path):
    config = MambaConfig(d_model=32, n_layer=1, vocab_size=50, norm_epsilon=1e-6)
    with pytest.raises(ValueError, match=r"mamba_ssm must be able .* got another norm_epsilon"):
        MambaLMHeadModel(config).save_pretrained(tmp_path, format="mamba_ssm")
    assert not list(tmp_path.iterdir())


def test_codestral_as_mistral_published_it(tmp_path):
    tensors = {f"model.{n}": t.float() for n, t in state_spaces_tensors([MAMBA2] * 2).items()}
    params = {"dim": 32, "n_layers": 2, "vocab_size": 56, "n_groups": 1, "tie_embeddings": False}
    params |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    (tmp_path / "params.json").write_text(
        json.dumps({**params, "pad_vocab_size_multiple": 1, "model_type": "mamba"})
    )
    text = (tmp_path / "params.json").read_text()
    tensors["model.lm_head.weight"] = tensors["model.lm_head.weight"] * 2
    save_file(tensors, tmp_path / "consolidated.safetensors")
    model = load(tmp_path)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors["model." + key]), key
    (tmp_path / "params.json").write_text(text.replace("{", '{"dim": 32, '))
    with pytest.raises(ValueError, match=r"params\.json must be a JSON .* twice: 'dim'"):
        load(tmp_path)
    model.save_pretrained(tmp_path / "hf", format="hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "mamba2"
    ids = torch.arange(9)[None]
    assert torch.equal(load(tmp_path / "hf")(ids).logits, model(ids).logits)


# Case of FAMILIES -> fields that are written as they were read, changes of ours -> the new value.
KEPT = {
    "mamba-wide": ({"expand": 2, "intermediate_size": 40}, {"d_model": 40}, {"expand": 2}),
    "falcon_mamba": ({"expand": 16, "intermediate_size": 64}, {}, {"expand": 16}),
    "nemotron_h-mixers": (
        {"intermediate_size": 48},
        {"d_intermediate": 56, "mlp_layer_idx": [2]},
        {"intermediate_size": 56},
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_fields_that_say_nothing_more_are_kept(case):
    fields, change, new = KEPT[case]
    name, usual = FAMILIES[case]
    dialect, values = dialects.FAMILIES[name], {"model_type": name, **usual, **fields}
    config = read_values(dialect, values, dialects.GENERIC)
    written = write_values(dialect, config, dialects.GENERIC)
    assert {key: written[key] for key in fields} == fields
    written = write_values(dialect, replace(config, **change), dialects.GENERIC)
    assert {key: written[key] for key in new} == new


def test_a_width_that_is_no_multiple_has_a_whole_factor():
    config = MambaConfig(d_model=32, n_layer=1, vocab_size=64, ssm_cfg={"expand": 1.25})
    written = write_values(dialects.FAMILIES["mamba"], config, dialects.GENERIC)
    assert (written["expand"], written["intermediate_size"]) == (1, 40)
    assert isinstance(written["expand"], int)


# head_dim 4 k, of which a part turns: every even number of features can be said.
@pytest.mark.parametrize("head_dim", [4, 12, 28, 36, 52, 60, 100, 196])
def test_every_part_of_a_head_can_be_written(head_dim):
    name, fields = FAMILIES["bamba"]
    dialect = dialects.FAMILIES[name]
    for turned in range(0, head_dim + 1, 2):
        rope = {"rope_type": "default", "partial_rotary_factor": (turned + 0.5) / (head_dim + 0.5)}
        values = {**fields, "head_dim": head_dim, "rope_parameters": rope}
        config = read_values(dialect, values, dialects.GENERIC)
        config.attn_cfg["rotary_emb_dim"] = turned
        written = write_values(dialect, config, dialects.GENERIC)
        again = read_values(dialect, written, dialects.GENERIC)
        assert again.attn_cfg["rotary_emb_dim"] == turned


# Case of FAMILIES -> fields of the rotary embedding -> (features that turn, base).
ROPE = [
    ("bamba", {}, (4, 10000.0)),
    ("bamba", {"rope_parameters": {"rope_theta": 50.0}}, (4, 50.0)),
    ("bamba", {"rope_parameters": {"partial_rotary_factor": 1.0}, "rope_theta": 9.0}, (8, 9.0)),
    ("bamba", {"rope_scaling": {"partial_rotary_factor": 0.25, "rope_theta": 7}}, (2, 7)),
    (
        "bamba",
        {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "default"}},
        (4, 10000.0),
    ),
    # These two turn whole heads, whatever part is said.
    ("falcon_h1", {"rope_parameters": {"partial_rotary_factor": 0.25}}, (8, 10000.0)),
    (
        "granitemoehybrid-rope",
        {"rope_parameters": {"partial_rotary_factor": 0.25}},
        (8, 10000.0),
    ),
]


@pytest.mark.parametrize(("case", "said", "meant"), ROPE)
def test_settings_of_the_rotary_embedding(case, said, meant):
    name, fields = FAMILIES[case]
    values = {**fields, **said}
    config = read_values(dialects.FAMILIES[name], values, dialects.GENERIC)
    attention = config.attn_cfg
    assert (attention["rotary_emb_dim"], attention["rotary_emb_base"]) == meant
    written = write_values(dialects.FAMILIES[name], config, dialects.GENERIC)
    again = read_values(dialects.FAMILIES[name], written, dialects.GENERIC).attn_cfg
    assert (again["rotary_emb_dim"], again["rotary_emb_base"]) == meant


@pytest.mark.parametrize("case", [case for case in ROPE if case[1]])
@needs_transformers
def test_settings_of_the_rotary_embedding_are_those_of_transformers(case):
    import transformers

    name, said, meant = case
    family, fields = FAMILIES[name]
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy({**fields, **said}))
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = model.model.rotary_emb.inv_freq
    assert found.tolist() == pytest.approx(
        [meant[1] ** (-i / meant[0]) for i in range(0, meant[0], 2)]
    )


# Case of FAMILIES -> a name that some writers store and no model has.
STORED_BESIDE = {
    "falcon_mamba": "backbone.layers.0.mixer.b_layernorm.weight",
    "bamba": "model.layers.1.self_attn.rotary_emb.inv_freq",
    "falcon_h1": "model.layers.1.self_attn.rotary_emb.inv_freq",
    "nemotron_h": "mtp.layers.0.norm.weight",
}


@pytest.mark.parametrize("case", STORED_BESIDE)
def test_buffers_that_some_writers_store_are_passed_over(case, tmp_path):
    name, fields = FAMILIES[case]
    values = {"model_type": name, **fields}
    model = MambaLMHeadModel(read_values(dialects.find(values), values, dialects.GENERIC))
    model.save_pretrained(tmp_path, format="hf")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert STORED_BESIDE[case] not in tensors
    save_file({**tensors, STORED_BESIDE[case]: torch.ones(3)}, path)
    again = load(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    save_file({**tensors, "model.layers.0.stray.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"unexpected .*stray\.weight"):
        load(tmp_path)


def test_pickles_in_shards(tmp_path):
    config, blocks = PUBLISHED["mamba"]
    tensors = state_spaces_tensors(blocks)
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-2.bin": names[7:]}
    for file, part in files.items():
        torch.save({name: tensors[name] for name in part}, tmp_path / file)
    where = {name: file for file, part in files.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    state = load(tmp_path).state_dict()
    assert all(torch.equal(state[name], tensors[name].float()) for name in tensors)


def test_names_that_share_a_storage_are_not_tied_by_it(tmp_path):
    config, blocks = PUBLISHED["mamba"]
    tensors = state_spaces_tensors(blocks)
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_embeddings": False}))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    model = load(tmp_path, dtype="auto")
    assert model.lm_head.weight.data_ptr() != model.backbone.embedding.weight.data_ptr()


@pytest.mark.parametrize("name", RELEASED)
def test_configs_of_released_models(name):
    values, millions = RELEASED[name]
    config = read_values(dialects.find(values), values, dialects.GENERIC)
    model = MambaLMHeadModel(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)
    written = write_values(dialects.find(values), config, dialects.GENERIC)
    again = read_values(dialects.find(written), written, dialects.GENERIC)
    assert not difference(canonical(again), canonical(config))
    assert again.attn_cfg.get("softmax_scale") == config.attn_cfg.get("softmax_scale")
