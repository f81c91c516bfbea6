"""Checkpoints of transformers: the same logits, and the same files when they are written back.

Judge: the models of transformers on the CPU, tiny and random, in float32.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from ssm.models.lm import MambaLMHeadModel
from ssm.utils import dialects
from ssm.utils.dialects.canonical import canonical, difference
from ssm.utils.dialects.configs import decode, read_values
from ssm.utils.saving import choose_format, tensors_to_write
from tests.families import FAMILIES, build, needs_transformers

pytestmark = needs_transformers
each_case = pytest.mark.parametrize("case", FAMILIES)
IDS = torch.randint(64, (2, 37), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Case -> (directory that transformers wrote, its model, ours loaded from there)."""
    made = {}

    def get(case):
        if case not in made:
            path = tmp_path_factory.mktemp(case)
            model = build(case)
            model.save_pretrained(path)
            made[case] = path, model, MambaLMHeadModel.from_pretrained(path)
        return made[case]

    return get


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


@each_case
@torch.no_grad()
def test_logits_equal_those_of_transformers(saved, case):
    _, theirs, ours = saved(case)
    want = theirs(IDS, use_cache=False).logits
    assert want.std() > 1e-3
    close(ours(IDS).logits, want)


@each_case
def test_written_tensors_have_storages_of_their_own(saved, case):
    """Some safetensors refuse parts of one storage, which fused tensors are cut into."""
    _, _, ours = saved(case)
    dialect, _ = choose_format(ours.config, "hf")
    written = tensors_to_write(ours, dialect, None, keep_twin=False).values()
    assert len({t.untyped_storage().data_ptr() for t in written}) == len(written)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in written)


@each_case
@torch.no_grad()
def test_state_continues_what_the_whole_text_gives(saved, case):
    _, _, ours = saved(case)
    whole = ours(IDS).logits
    state = ours.allocate_state(2)
    parts = [ours(part, state=state).logits for part in IDS.split([13, 1, 1, 17, 5], dim=1)]
    close(torch.cat(parts, dim=1), whole)


@each_case
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_whole_text(saved, case):
    _, _, ours = saved(case)
    got = ours.generate(IDS[:, :9], max_new_tokens=8)
    text = IDS[:, :9]
    for _ in range(8):
        text = torch.cat([text, ours(text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, text)


@each_case
def test_written_back_bit_for_bit(saved, case, tmp_path):
    path, _, ours = saved(case)
    ours.save_pretrained(tmp_path, format="hf")
    before = load_file(path / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert sorted(after) == sorted(before)
    assert all(
        torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in after
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == FAMILIES[case][0]
    assert (
        config["architectures"] == json.loads((path / "config.json").read_text())["architectures"]
    )
    assert MambaLMHeadModel.from_pretrained(tmp_path).config == ours.config


@each_case
@torch.no_grad()
def test_transformers_reads_what_we_write(saved, case, tmp_path):
    import transformers

    _, theirs, ours = saved(case)
    ours.save_pretrained(tmp_path, format="hf", max_shard_size="20KB")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(
        again.eval()(IDS, use_cache=False).logits, theirs(IDS, use_cache=False).logits
    )


# What a config must say to be none with experts, and to have a block of each kind that it can have.
LEAST = {
    "bamba": {"attn_layer_indices": [9]},
    "granitemoehybrid": {"num_local_experts": 0, "layer_types": ["mamba"] * 31 + ["attention"]},
    "jamba": {"num_experts": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"]},
}


NULL = {"num_key_value_heads": None}


@pytest.mark.parametrize(
    ("family", "said"),
    [
        *((family, {}) for family in dialects.FAMILIES),
        *((family, NULL) for family in ("bamba", "granitemoehybrid", "falcon_h1")),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_takes(family, said):
    import transformers

    said = {**LEAST.get(family, {}), **said}
    config = transformers.AutoConfig.for_model(family, **said)
    full = decode(json.loads(config.to_json_string(use_diff=False)))
    short = {"model_type": family, **said}
    forms = [
        canonical(read_values(dialects.find(values), values, dialects.GENERIC), used=False)
        for values in (full, short)
    ]
    assert not difference(*forms)


@pytest.mark.parametrize("family", dialects.FAMILIES)
def test_a_vocabulary_is_not_padded(family):
    values = {"model_type": family, **LEAST.get(family, {}), "vocab_size": 61}
    config = read_values(dialects.find(values), values, dialects.GENERIC)
    assert (config.vocab_size, config.pad_vocab_size_multiple) == (61, 1)


@pytest.mark.parametrize("case", ["mamba", "bamba-biased", "granitemoehybrid-rope"])
def test_model_that_was_saved_without_its_head(saved, case, tmp_path):
    _, theirs, ours = saved(case)
    theirs.base_model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if name.startswith(("backbone.", "model.", "lm_head."))]
    again = MambaLMHeadModel.from_pretrained(tmp_path)
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@each_case
def test_native_format_keeps_everything(saved, case, tmp_path):
    _, _, ours = saved(case)
    ours.save_pretrained(tmp_path)
    again = MambaLMHeadModel.from_pretrained(tmp_path)
    assert again.config == ours.config
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    again.save_pretrained(tmp_path / "hf", format="hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == FAMILIES[case][0]
