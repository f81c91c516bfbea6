"""MambaConfig: its JSON form and what it refuses.

Judge: the keys of the state-spaces checkpoints.
"""

import json

import pytest

from ssm.models.config import MambaConfig


def test_defaults_are_those_of_the_api():
    assert MambaConfig().to_dict() == {
        "d_model": 2560,
        "d_intermediate": 0,
        "n_layer": 64,
        "vocab_size": 50277,
        "ssm_cfg": {},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": True,
    }


def test_json_round_trip(tmp_path):
    config = MambaConfig(d_model=8, n_layer=2, ssm_cfg={"d_state": 4}, norm_epsilon=1e-6)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert MambaConfig.from_json(path) == config
    assert json.loads(config.to_json())["norm_epsilon"] == 1e-6


def test_old_files_with_fewer_fields_load():
    config = MambaConfig.from_dict({"d_model": 768, "n_layer": 24, "vocab_size": 50277})
    assert config.tie_embeddings
    assert config.padded_vocab_size == 50280


def test_configs_do_not_share_their_dicts():
    first = MambaConfig()
    first.ssm_cfg["d_state"] = 1
    assert MambaConfig().ssm_cfg == {}


def test_rejects_an_unknown_field_and_proposes_the_nearest():
    with pytest.raises(
        ValueError, match=r"^MambaConfig: field must be one of d_model, .*"
    ) as error:
        MambaConfig.from_dict({"d_modle": 8})
    assert str(error.value).endswith("got 'd_modle' (did you mean 'd_model'?)")


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"d_model": 0}, ValueError, "MambaConfig: d_model must be positive, got 0"),
        ({"n_layer": -1}, ValueError, "MambaConfig: n_layer must not be negative, got -1"),
        ({"n_layer": 2.5}, TypeError, "MambaConfig: n_layer must be an int, got 2.5"),
        ({"ssm_cfg": []}, TypeError, r"MambaConfig: ssm_cfg must be a dict, got \[\]"),
        ({"rms_norm": 1}, TypeError, "MambaConfig: rms_norm must be a bool, got 1"),
        (
            {"n_layer": 2, "attn_layer_idx": [2]},
            ValueError,
            "attn_layer_idx must be below 2, got 2",
        ),
        ({"d_model": 10**5000}, ValueError, "d_model must be an integer of at most 64 bits"),
        ({"logits_multiplier": -(2**70)}, ValueError, "logits_multiplier must be an integer of"),
        ({"norm_epsilon": 0}, ValueError, "norm_epsilon must be positive, got 0"),
        ({"norm_epsilon": "x"}, TypeError, "norm_epsilon must be a float, got 'x'"),
    ],
)
def test_rejects_bad_values(values, kind, message):
    with pytest.raises(kind, match=message):
        MambaConfig.from_dict(values)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"d_model": "wide"}', '{"d_model": 8, "d_model": 8}']
)
def test_rejects_a_damaged_file_by_name(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        MambaConfig.from_json(path)
