"""Configs that are refused: one sentence that names the file and the field, and no model.

Judge: the sentence that each fault must give.
"""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.utils import dialects
from ssm.utils.dialects.configs import read_values
from tests.families import FAMILIES


def model(**kwargs):
    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=8, n_layer=2, vocab_size=16, **kwargs))


def load(path, **kwargs):
    return MambaLMHeadModel.from_pretrained(path, **kwargs)


def refused(path, message, kind=ValueError, file="config.json"):
    """Expect one sentence of one exception type, with the name of the file."""
    with pytest.raises(kind, match=message) as error:
        load(path)
    assert type(error.value) is kind
    assert str(path / file) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500
    return str(error.value)


def config_of(case):
    """Return a config.json as transformers would write it, without transformers."""
    name, fields = FAMILIES[case]
    return {"model_type": name, **fields}


# As many digits as JSON may have and no float can hold.
HUGE = 10**400
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
    ("nemotron_h", {"time_step_limit": [float("nan"), 1.0]}, "time_step_limit must be without NaN"),
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
    ("bamba", {"partial_rotary_factor": 0.25}, "partial_rotary_factor must be 0.5, got 0.25"),
    (
        "bamba",
        {"rope_parameters": {"partial_rotary_factor": 1.5}},
        "partial_rotary_factor must be a number from 0 to 1, got 1.5",
    ),
    ("bamba", {"rope_parameters": True}, "rope_parameters must be a dict, got True"),
    (
        "granitemoehybrid",
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "rope_parameters must hold settings of .*rope_theta.*, got 'full_attention'",
    ),
    ("granitemoehybrid", {"num_local_experts": 4}, "without experts .num_local_experts"),
    ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types of another number"),
    ("granitemoehybrid", {"layer_types": ["mamba", "mamba", "x"]}, "layer types must be of .*'x'"),
    ("granitemoehybrid", {"residual_multiplier": 0.0}, "residual_multiplier must be positive"),
    (
        "jamba",
        {"mamba_inner_layernorms": False},
        "mamba_inner_layernorms must be True, got False",
    ),
    ("jamba", {"num_experts": 16}, "jamba: config must do without experts .num_experts"),
    ("nemotron_h", {"hybrid_override_pattern": "ME*-"}, "without experts .blocks of type moe"),
    ("nemotron_h", {"num_hidden_layers": 4}, "num_hidden_layers must be 5 by the other fields"),
    ("nemotron_h", {"mamba_n_groups": 4}, "n_groups must be 2 as n_groups, got 4"),
    ("falcon_h1", {"mamba_d_ssm": 48}, "mamba_d_head that is not mamba_d_ssm"),
    ("falcon_h1", {"ssm_multipliers": [1.0, 2.0]}, "multipliers must be five numbers"),
    ("falcon_h1", {"hidden_size": -1}, "falcon_h1: hidden_size must not be negative, got -1"),
    ("bamba", {"head_dim": "abc"}, "bamba: head_dim must be a positive int, got 'abc'"),
    ("falcon_h1", {"head_dim": 0}, "falcon_h1: head_dim must be a positive int, got 0"),
    (
        "mamba2",
        {"time_step_limit": [0.0, {"__float__": "abc"}]},
        r"from_pretrained: time_step_limit\.1 must be a number, got 'abc'",
    ),
    ("mamba", {"layer_norm_epsilon": {"__float__": None}}, "_epsilon must be a number, got None"),
    (
        "mamba2",
        {"time_step_limit": [HUGE, HUGE]},
        r"time_step_limit\.0 must be an integer of at mo",
    ),
    (
        "mamba2",
        {"time_step_limit": [math.inf] * 2},
        r"dt_limit must be \(low, high\) .* finite low",
    ),
    ("mamba2", {"time_step_limit": [-math.inf, 1.0]}, "with a finite low"),
    (
        "bamba",
        {"rope_parameters": {"rope_theta": 2**70}},
        r"bamba: rope_parameters\.rope_theta must be an integer of at most 64 bits, got one of 72",
    ),
    ("falcon_h1", {"ssm_in_multiplier": 2**63}, "ssm_in_multiplier must be an integer of at most"),
    ("mamba", {"layer_norm_epsilon": HUGE}, "layer_norm_epsilon must be an integer of at most 64"),
    ("jamba", {"num_hidden_layers": HUGE}, "num_hidden_layers must be an integer of at most 64 b"),
    *(
        (case, {"num_hidden_layers": blocks}, f"num_hidden_layers must be at most .*, got {blocks}")
        for case in ("mamba", "bamba", "jamba", "falcon_h1")
        for blocks in (10**8, 2**31, 2**62)
    ),
    ("falcon_h1", {"projectors_bias": True}, "a bias in one of the two projections"),
]


@pytest.mark.parametrize(("case", "change", "message"), CONFIGS)
def test_bad_config(tmp_path, case, change, message):
    model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config_of(case), **change}))
    refused(tmp_path, message)


@pytest.mark.parametrize("case", FAMILIES)
def test_every_case_is_understood_without_transformers(case):
    values = config_of(case)
    config = read_values(dialects.find(values), values, dialects.GENERIC)
    MambaLMHeadModel(config, device="meta")


@pytest.mark.parametrize("name", ["zamba", "zamba2", "mamba3", "llama", "mixtral", 3, ["bamba"]])
def test_other_families_are_refused_by_name(tmp_path, name):
    model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    rule = (
        "do without .*, which are not here" if str(name) in dialects.REFUSED else "be one of mamba,"
    )
    refused(tmp_path, rf"model_type must {rule}.* got {re.escape(repr(name))}")


def test_what_no_family_can_say_is_not_written(tmp_path):
    mixed = MambaLMHeadModel(
        MambaConfig(
            d_model=8, n_layer=2, vocab_size=16, attn_layer_idx=[0], attn_cfg={"num_heads": 2}
        )
    )
    with pytest.raises(ValueError, match="format hf must have a family for the config") as error:
        mixed.save_pretrained(tmp_path, format="hf")
    for family in dialects.FAMILIES:
        assert f"{family}: " in str(error.value)
    with pytest.raises(ValueError, match=r"format mamba must be able to say .* attn_cfg") as error:
        mixed.save_pretrained(tmp_path, format="mamba")
    assert "family for the config" not in str(error.value)
    with pytest.raises(ValueError, match=r"format bamba must be .* got another ssm_cfg\.layer$"):
        mixed.save_pretrained(tmp_path, format="bamba")
    assert not list(tmp_path.iterdir())


# Case of FAMILIES -> the field of its eps, and the argument that follows it inside of the blocks.
EPS = {
    "mamba2": ("layer_norm_epsilon", "norm_eps"),
    "bamba": ("rms_norm_eps", "norm_eps"),
    "granitemoehybrid": ("rms_norm_eps", "norm_eps"),
    "jamba": ("rms_norm_eps", "bcdt_norm_eps"),
    "nemotron_h": ("layer_norm_epsilon", "norm_eps"),
    "falcon_h1": ("rms_norm_eps", "norm_eps"),
}


@pytest.mark.parametrize("case", EPS)
def test_one_eps_is_that_of_every_norm(case):
    field, inner = EPS[case]
    values = {**config_of(case), field: 3e-4}
    config = read_values(dialects.find(values), values, dialects.GENERIC)
    assert (config.norm_epsilon, config.ssm_cfg[inner]) == (3e-4, 3e-4)


@pytest.mark.parametrize("case", ["bamba", "falcon_h1"])
def test_a_head_size_that_is_worked_out(case):
    values = {**config_of(case), "mamba_d_head": "auto"}
    worked_out, said = (
        read_values(dialects.find(given), given, dialects.GENERIC)
        for given in (values, config_of(case))
    )
    assert worked_out == replace(said, foreign=worked_out.foreign)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "config must be a dict, got list"),
        ("[" * 100000, "must be a JSON file"),
        ('{"d_model": 8, "d_model": 9}', "must be a JSON file, got a name .* twice: 'd_model'"),
        ('{"ssm_cfg": {"d_conv": 4, "d_conv": 3}}', "got a name stands there twice: 'd_conv'"),
        ('{"ssm_cfg": {"layer": "Mamba3"}}', "must be one of Mamba1, Mamba2, got 'Mamba3'"),
        ('{"ssm_cfg": {"layer": ["Mamba2"]}}', "must be one of Mamba1, Mamba2"),
        ('{"ssm_cfg": {"d_stat": 3}}', r"got 'd_stat' \(did you mean 'd_state'\?\)"),
        ('{"ssm_cfg": {"layer": "Mamba2", "dt_limit": [NaN, 1]}}', "dt_limit must be"),
        ('{"d_model": null}', "d_model must be an int, got None"),
        ('{"n_layer": 1000000000}', "at most a block per tensor .*, got 1000000000 blocks"),
        ('{"d_model": 10000000000}', "must describe tensors that can be addressed, got .*overflow"),
        (
            '{"d_model": 8, "vocab_size": 4611686018427387904}',
            "must describe tensors that can be addressed",
        ),
        (
            '{"d_model": 8, "vocab_size": 1180591620717411303424}',
            "vocab_size must be an integer of at most 64 bits, got one of 72 bits in",
        ),
        (
            f'{{"attn_layer_idx": [0], "attn_cfg": {{"num_heads": 4, "head_dim": {2**70}}}}}',
            r"attn_cfg\.head_dim must be an integer of at most 64 bits",
        ),
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
    refused(tmp_path, message)


MIXERS = {
    "attn_cfg": {"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}},
    "ssm_cfg": {"ssm_cfg": {"layer": "Mamba2", "headdim": 4}},
    "mlp_cfg": {"d_intermediate": 8},
}


@pytest.mark.parametrize("value", ["false", "true", 0, 1, None, []])
@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("attn_cfg", "causal"),
        ("attn_cfg", "qkv_proj_bias"),
        ("attn_cfg", "rotary_emb_interleaved"),
        ("ssm_cfg", "norm_before_gate"),
        ("ssm_cfg", "rmsnorm"),
        ("ssm_cfg", "conv_bias"),
        ("mlp_cfg", "bias"),
    ],
)
def test_switches_of_the_parts_are_bools(tmp_path, field, name, value):
    model(**MIXERS[field]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values[field] = {**values.get(field, {}), name: value}
    path.write_text(json.dumps(values))
    refused(tmp_path, rf"{field}\['{name}'\] must be a bool, got {re.escape(repr(value))} in")
