"""Broken checkpoints: one sentence that names the file and the tensor or field, and no model.

Judge: the exception type and the sentence that each damage must give.
"""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.utils import dialects
from ssm.utils.dialects.configs import read_values
from tests.families import FAMILIES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def model(**kwargs):
    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=8, n_layer=2, vocab_size=16, **kwargs))


def load(path, **kwargs):
    return MambaLMHeadModel.from_pretrained(path, **kwargs)


def refused(path, message, kind=ValueError, file=WEIGHTS):
    """Expect one sentence of one exception type, with the name of the file."""
    with pytest.raises(kind, match=message) as error:
        load(path)
    assert type(error.value) is kind
    assert str(path / file) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500
    return str(error.value)


def with_header(change):
    """Return a function that rewrites the JSON header of a safetensors file."""

    def rewrite(data):
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return rewrite


def entry(**values):
    return with_header(lambda header: header["backbone.norm_f.weight"].update(values))


# Damage of the bytes of a safetensors file -> what must be said.
DAMAGED = {
    "empty": (lambda data: b"", "0 bytes, in which no header has room"),
    "text": (lambda data: b"version https://git-lfs.github.com", "no header has room"),
    "half a header": (lambda data: data[:40], "no header has room"),
    "truncated": (lambda data: data[:-1], r"an end of file in tensor \S+"),
    "truncated far": (lambda data: data[: len(data) // 2], r"an end of file in tensor \S+"),
    "oversized": (lambda data: data + b"\0" * 3, "3 bytes behind the last tensor"),
    "no JSON": (lambda data: data[:8] + b"x" + data[9:], "a damaged header"),
    "a list": (with_header(lambda header: [1]), "a header that is no JSON object"),
    "a twin": (
        lambda data: data.replace(b"backbone.layers.0.", b"backbone.layers.1."),
        "a name stands there twice",
    ),
    "shape": (entry(shape=[9]), r"32 bytes for tensor backbone\.norm_f\.weight of F32 \(9,\)"),
    "negative": (entry(shape=[-8]), r"a damaged entry of tensor backbone\.norm_f\.weight"),
    "dtype": (entry(dtype="F33"), r"a damaged entry of tensor backbone\.norm_f\.weight \('F33'\)"),
    "offsets": (entry(data_offsets=[0, 32]), r"tensor \S+ at byte 0 of the data, not at \d+"),
    "outside": (entry(data_offsets=[10**9, 10**9 + 32]), r"tensor backbone\.norm_f\.weight"),
    "no offsets": (entry(data_offsets=None), r"a damaged entry of tensor backbone\.norm_f\.weight"),
    "an entry": (
        with_header(lambda header: header.update({"backbone.norm_f.weight": 3})),
        r"a damaged entry of tensor backbone\.norm_f\.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_safetensors(tmp_path, damage):
    change, message = DAMAGED[damage]
    model().save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(change(data))
    refused(tmp_path, rf"must be a whole safetensors file, got .*{message}")


def test_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    from ssm.utils import weights

    model().save_pretrained(tmp_path)
    plan = weights.plan_reading

    def plan_and_cut(*args):
        found = plan(*args)
        os.truncate(tmp_path / WEIGHTS, (tmp_path / WEIGHTS).stat().st_size - 9)
        return found

    monkeypatch.setattr(weights, "plan_reading", plan_and_cut)
    refused(tmp_path, r"an end of file in tensor lm_head|an end of file in tensor backbone")


def in_index(**shards):
    """Return a function that sends tensors to other shards."""

    def change(path):
        index = json.loads((path / INDEX).read_text())
        for name, shard in shards.items():
            index["weight_map"][name] = shard
        (path / INDEX).write_text(json.dumps(index))

    return change


def removed(path):
    """Remove a shard that the index names."""
    next(path.glob("model-00002-*")).unlink()


def surplus(path):
    """Put a tensor into a shard behind the back of the index."""
    shard = next(path.glob("model-00001-*"))
    save_file({**load_file(shard), "stray": torch.zeros(2)}, shard)


NORM = "backbone.norm_f.weight"
SHARDED = {
    "parent": (in_index(**{NORM: "../other.safetensors"}), ValueError, NORM),
    "absolute": (in_index(**{NORM: "/etc/passwd"}), ValueError, "got '/etc/passwd' for"),
    "folder": (in_index(**{NORM: "a\\b.safetensors"}), ValueError, "name files beside it"),
    "number": (in_index(**{NORM: 3}), ValueError, f"got 3 for {NORM}"),
    "elsewhere": (
        in_index(**{NORM: "model-00001-of-00004.safetensors"}),
        ValueError,
        f"must hold {NORM}, as {INDEX} says",
    ),
    "unknown": (in_index(ghost="model-00001-of-00004.safetensors"), ValueError, "must hold ghost"),
    "removed": (removed, FileNotFoundError, "model-00002-of-00004.safetensors, which"),
    "surplus": (surplus, ValueError, "must name every tensor of model-00001.* got none for stray"),
    "no map": (
        lambda path: (path / INDEX).write_text("{}"),
        ValueError,
        "JSON index with a weight",
    ),
    "a list": (
        lambda path: (path / INDEX).write_text("[1]"),
        ValueError,
        "JSON index with a weigh",
    ),
}


@pytest.mark.parametrize("damage", SHARDED)
def test_bad_index(tmp_path, damage):
    change, kind, message = SHARDED[damage]
    model().save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    change(tmp_path)
    with pytest.raises(kind, match=message) as error:
        load(tmp_path)
    assert type(error.value) is kind
    assert str(tmp_path) in str(error.value)


class Attack:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickle_that_runs_code(tmp_path, sharded):
    model().save_pretrained(tmp_path, format="mamba_ssm")
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "x": Attack(tmp_path / "owned")}, tmp_path / "pytorch_model.bin")
    if sharded:
        (tmp_path / "pytorch_model.bin").rename(tmp_path / "a.bin")
        where = {"weight_map": dict.fromkeys(tensors, "a.bin")}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(where))
    refused(
        tmp_path, "must be a whole file of tensors", file="a.bin" if sharded else "pytorch_mode"
    )
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("format", ["safetensors", "hf"])
def test_missing_surplus_and_wrong_tensors(tmp_path, format):
    model().save_pretrained(tmp_path, format=format)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["backbone.norm_g.weight"] = tensors.pop(NORM)
    tensors["backbone.layers.1.mixer.D"] = torch.zeros(3)
    tensors |= {f"stray.{n}": torch.zeros(1) for n in range(30)}
    save_file(tensors, tmp_path / WEIGHTS)
    text = refused(tmp_path, f"missing {NORM} .nearest backbone.norm_g.weight.; unexpected")
    assert "wrong shape backbone.layers.1.mixer.D (3,) for (16,)" in text
    assert text.count("stray.") == 9
    assert "and 21 more" in text


def config_of(case):
    """Return a config.json as transformers would write it, without transformers."""
    name, fields = FAMILIES[case]
    return {"model_type": name, **fields}


# Case of FAMILIES, changed fields -> what must be said.
CONFIGS = [
    (
        "mamba",
        {"hiden_size": 3},
        r"field must be a known one, got 'hiden_size' \(did you mean 'hid",
    ),
    ("mamba", {"d_inner": 65}, "d_inner must be 64 by the other fields, got 65"),
    ("mamba", {"quantization_config": {}}, "config must do without quantization_config"),
    ("mamba", {"text_config": {}}, r"got 'text_config' .remove it if it changes no result."),
    ("mamba", {"d_model": 31}, "d_model must be 32 by the other fields, got 31"),
    ("mamba", {"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', got 'gelu'"),
    ("mamba", {"hidden_size": "32"}, "hidden_size must be a finite number, got '32'"),
    ("mamba", {"hidden_size": 32.5}, "must be an int, got 32.5|d_model|dt_rank"),
    ("mamba", {"vocab_size": None}, "vocab_size must be a finite number, got None"),
    ("mamba", {"use_bias": 1}, "use_bias must be a bool, got 1"),
    ("falcon_h1", {"mlp_multipliers": [1.0]}, "the fields behind mlp_cfg.out_multiplier must be"),
    ("bamba", {"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
    ("mamba2", {"time_step_limit": [float("nan"), 1.0]}, r"dt_limit must be \(low, high\)"),
    ("mamba2", {"time_step_limit": [0.0, {"__float__": "NaN"}]}, r"dt_limit must be \(low, high\)"),
    ("mamba2", {"time_step_limit": [1.0, 0.1]}, r"dt_limit must be \(low, high\)"),
    ("mamba2", {"time_step_limit": "none"}, "dt_limit must be two numbers, got 'none'"),
    ("mamba2", {"num_heads": 7}, "num_heads head_dim that is not expand hidden_size"),
    ("mamba2", {"n_groups": 3}, "ngroups must divide d_ssm / headdim = 8 heads, got 3"),
    (
        "mamba2",
        {"layer_norm_epsilon": float("nan")},
        "layer_norm_epsilon must be a finite number, got nan",
    ),
    ("bamba", {"mamba_d_head": 9}, "mamba_d_head that is not mamba_expand hidden_size"),
    ("bamba", {"attn_layer_indices": [7]}, "attn_layer_idx must be below 3, got 7"),
    ("bamba", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type must be 'default', got 'yarn'"),
    ("granitemoehybrid", {"num_local_experts": 4}, "without experts .num_local_experts"),
    ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types of another number"),
    ("granitemoehybrid", {"layer_types": ["mamba", "mamba", "x"]}, "layer types must be of .*'x'"),
    ("granitemoehybrid", {"residual_multiplier": 0.0}, "residual_multiplier must be positive"),
    ("jamba", {"num_experts": 16}, "jamba: config must do without experts .num_experts"),
    ("nemotron_h", {"hybrid_override_pattern": "ME*-"}, "without experts .blocks of type moe"),
    ("nemotron_h", {"num_hidden_layers": 4}, "num_hidden_layers must be 5 by the other fields"),
    ("nemotron_h", {"mamba_n_groups": 4}, "n_groups must be 2 as n_groups, got 4"),
    ("falcon_h1", {"mamba_d_ssm": 48}, "mamba_d_head that is not mamba_d_ssm"),
    ("falcon_h1", {"ssm_multipliers": [1.0, 2.0]}, "multipliers must be five numbers"),
    ("falcon_h1", {"projectors_bias": True}, "a bias in one of the two projections"),
]


@pytest.mark.parametrize(("case", "change", "message"), CONFIGS)
def test_bad_config(tmp_path, case, change, message):
    model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config_of(case), **change}))
    refused(tmp_path, message, file="config.json")


@pytest.mark.parametrize("case", FAMILIES)
def test_every_case_is_understood_without_transformers(case):
    values = config_of(case)
    config = read_values(dialects.find(values), values, dialects.GENERIC)
    MambaLMHeadModel(config, device="meta")


@pytest.mark.parametrize("name", ["zamba", "zamba2", "mamba3", "llama", "mixtral", 3])
def test_other_families_are_refused_by_name(tmp_path, name):
    model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    refused(tmp_path, rf"model_type must .* got {name!r}", file="config.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "config must be a dict, got list"),
        ("[" * 100000, "must be a JSON file"),
        ('{"ssm_cfg": {"layer": "Mamba3"}}', "must be one of Mamba1, Mamba2, got 'Mamba3'"),
        ('{"ssm_cfg": {"layer": ["Mamba2"]}}', "must be one of Mamba1, Mamba2"),
        ('{"ssm_cfg": {"d_stat": 3}}', r"got 'd_stat' \(did you mean 'd_state'\?\)"),
        ('{"ssm_cfg": {"layer": "Mamba2", "dt_limit": [NaN, 1]}}', "dt_limit must be"),
        ('{"d_model": null}', "d_model must be an int, got None"),
        ('{"attn_layer_idx": [0], "mlp_layer_idx": [0]}', "must not name blocks of attn_layer_idx"),
        (
            '{"architectures": ["MambaForCausalLM"], "hidden_sise": 8}',
            "mamba: field must be a known",
        ),
    ],
)
def test_bad_state_spaces_config(tmp_path, text, message):
    model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, message, file="config.json")
