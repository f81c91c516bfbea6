"""Checkpoints: bitwise round trips, and one clear error for every damage.

Judge: the tensors that were saved.
"""

import builtins
import json
import os
import pickle
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.utils import weights

IDS = torch.tensor([[1, 2, 3]])


MAMBA2 = {"layer": "Mamba2", "headdim": 4, "dt_limit": [0.0, float("inf")]}


def model(dtype=None, **kwargs) -> MambaLMHeadModel:
    return MambaLMHeadModel(MambaConfig(d_model=8, n_layer=2, vocab_size=11, **kwargs), dtype=dtype)


def load(path, *args, **kwargs):
    return MambaLMHeadModel.from_pretrained(path, *args, **kwargs)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint directory, and the model that was saved there."""
    m = model()
    m.save_pretrained(tmp_path)
    return tmp_path, m


def rewrite(path, change, **kwargs):
    """Change the tensors of a saved checkpoint."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", **kwargs)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    return all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("format", ["safetensors", "mamba_ssm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", [{}, MAMBA2])
def test_round_trip_is_bitwise(tmp_path, format, dtype, tied, mixer):
    m = model(dtype, tie_embeddings=tied, d_intermediate=4, ssm_cfg={"d_state": 3, **mixer})
    m.save_pretrained(tmp_path / "new" / "folder", format=format)
    again = load(tmp_path / "new" / "folder", dtype="auto")
    assert equal(again, m)
    assert again.config == m.config
    assert not again.training
    assert (again.lm_head.weight is again.backbone.embedding.weight) == tied
    assert torch.equal(again(IDS).logits, m(IDS).logits)


def test_files_are_those_of_state_spaces(saved):
    path, m = saved
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    m.save_pretrained(path, format="mamba_ssm")
    assert sorted(os.listdir(path)) == ["config.json", "pytorch_model.bin"]
    tensors = torch.load(path / "pytorch_model.bin", weights_only=True)
    assert list(tensors) == list(m.state_dict())
    assert json.loads((path / "config.json").read_text())["d_model"] == 8


def test_dtype_and_what_stays_float32(saved):
    path, m = saved
    for dtype in (torch.bfloat16, "bfloat16"):
        low = load(path, dtype=dtype)
        assert low.backbone.embedding.weight.dtype == torch.bfloat16
        mixer, exact = low.backbone.layers[0].mixer, m.backbone.layers[0].mixer
        for name in ("A_log", "D"):
            assert torch.equal(getattr(mixer, name), getattr(exact, name))
            assert getattr(mixer, name).dtype == torch.float32
        assert torch.equal(mixer.dt_proj.bias, exact.dt_proj.bias)
    assert load(path, torch_dtype=torch.float64).lm_head.weight.dtype == torch.float64
    assert load(path, "cpu", torch.float16).lm_head.weight.dtype == torch.float16


def test_stored_bfloat16_recurrence_is_raised_to_float32(saved):
    path, _ = saved
    rewrite(path, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    m = load(path, dtype="auto")
    assert m.backbone.embedding.weight.dtype == torch.bfloat16
    assert m.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert load(path).backbone.embedding.weight.dtype == torch.float32


def test_recurrence_of_mamba2_stays_float32(tmp_path):
    m = model(ssm_cfg=MAMBA2)
    weights.save_pretrained(m, tmp_path, dtype=torch.bfloat16)
    low = load(tmp_path, dtype="auto").backbone.layers[1].mixer
    assert low.in_proj.weight.dtype == low.norm.weight.dtype == torch.bfloat16
    for name in ("A_log", "D", "dt_bias"):
        assert torch.equal(getattr(low, name), getattr(m.backbone.layers[1].mixer, name))
        assert getattr(low, name)._no_weight_decay


def test_save_in_another_dtype_leaves_the_model_alone(tmp_path):
    m = model()
    weights.save_pretrained(m, tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["backbone.embedding.weight"].dtype == torch.bfloat16
    assert tensors["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert m.backbone.embedding.weight.dtype == torch.float32


def test_loaded_model_trains_and_keeps_its_marks(saved):
    m = load(saved[0])
    m(IDS).logits.sum().backward()
    mixer = m.backbone.layers[0].mixer
    assert mixer.A_log._no_weight_decay
    assert mixer.dt_proj.bias._no_reinit
    assert all(p.grad is not None and p.device.type == "cpu" for p in m.parameters())


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load(saved[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("present", [[], ["config.json"], ["model.safetensors"]])
def test_missing_file_is_named_with_what_was_sought(saved, present):
    path, _ = saved
    for name in {"config.json", "model.safetensors"} - set(present):
        (path / name).unlink()
    wanted = "config.json" if "config.json" not in present else "model.safetensors or pytorch_model"
    with pytest.raises(FileNotFoundError, match=wanted) as error:
        load(path)
    assert str(path) in str(error.value)


def test_missing_directory_lists_what_was_sought(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere must be .*config\.json .*safetensors"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("nowhere")


def test_hub_name_needs_huggingface_hub(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RuntimeError, match=r"some/model .*huggingface_hub must be installed"):
        load("some/model")


def test_hub_name_is_downloaded_by_huggingface_hub(saved, monkeypatch):
    path, m = saved
    asked, given = [], []

    def snapshot_download(name, **where):
        asked.append((name, where["revision"], "model.safetensors" in where["allow_patterns"]))
        given.append(where)
        if name == "some/gone":
            raise OSError("404")
        return str(path)

    hub = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert equal(load("some/model", revision="v2"), m)
    assert asked == [("some/model", "v2", True)]
    settings = {"cache_dir": str(path), "token": "secret", "local_files_only": True}
    load("some/model", **settings)
    assert {key: given[-1][key] for key in settings} == settings
    for value, offline in (("1", True), (" Yes ", True), ("on", True), ("0", False), ("", False)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        load("some/model")
        assert given[-1]["local_files_only"] is offline
    # A kind of weights is asked for where there is none of those before it.
    m.save_pretrained(path, format="mamba_ssm")
    given.clear()
    assert equal(load("some/model"), m)
    patterns = [where["allow_patterns"] for where in given]
    assert len(patterns) == 3
    assert not any("pytorch_model.bin" in found for found in patterns[:-1])
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or pytorch_model"):
        load("some/model")
    with pytest.raises(RuntimeError, match="some/gone cannot be downloaded: 404"):
        load("some/gone")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
@pytest.mark.parametrize("format", ["safetensors", "mamba_ssm"])
def test_truncated_file_is_named(tmp_path, size, format):
    model().save_pretrained(tmp_path, format=format)
    (path,) = (p for p in tmp_path.iterdir() if p.suffix != ".json")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="must be a whole") as error:
        load(tmp_path)
    assert str(path) in str(error.value)


def test_pickle_that_runs_code_is_refused(tmp_path):
    model().save_pretrained(tmp_path, format="mamba_ssm")

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"x": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must be a whole file of tensors"):
        load(tmp_path)
    assert not (tmp_path / "owned").exists()
    torch.save({"x": 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a dict of tensors"):
        load(tmp_path)


def test_names_that_do_not_fit_are_listed_with_the_nearest(saved):
    path, _ = saved

    def rename(tensors):
        tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
        tensors["backbone.norm_f.weight"] = torch.zeros(9)

    rewrite(path, rename)
    with pytest.raises(ValueError, match=r"must hold the tensors of its config\.json") as error:
        load(path)
    text = str(error.value)
    assert "no floating point" not in text
    near = "backbone.embedding.weight (nearest backbone.embeddings.weight)"
    assert f"missing {near}; unexpected backbone.embeddings.weight (nearest backbone." in text
    assert "wrong shape backbone.norm_f.weight (9,) for (8,)" in text


def test_at_most_ten_names_are_listed(saved):
    path, _ = saved
    rewrite(path, lambda tensors: tensors.update({f"x{i}": torch.zeros(1) for i in range(25)}))
    with pytest.raises(ValueError, match="and 15 more") as error:
        load(path)
    assert str(error.value).count("x") < 25


def test_integer_tensors_are_refused(saved):
    path, _ = saved
    rewrite(path, lambda tensors: tensors.update({"backbone.norm_f.weight": torch.ones(8).int()}))
    with pytest.raises(
        ValueError, match=r"no floating point in backbone\.norm_f\.weight torch\.int32"
    ):
        load(path, dtype="auto")


def test_tied_weights_that_differ_are_refused(saved):
    path, m = saved
    tensors = {**load_file(path / "model.safetensors"), "lm_head.weight": torch.zeros(16, 8)}
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight equal to backbone\.embedding\.weight"):
        load(path)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    assert equal(load(path), m)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json must be a JSON file"),
        ('{"d_modle": 8}', r"got 'd_modle' \(did you mean 'd_model'\?\) in .*config\.json"),
        ('{"model_type": "mmaba"}', r"got 'mmaba' \(did you mean 'mamba'\?\) in .*config\.json"),
    ],
)
def test_bad_config_is_named(saved, text, message):
    (saved[0] / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(saved[0])


def test_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    path, m = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def half(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        m.save_pretrained(path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_failed_shard_leaves_the_old_checkpoint(saved, monkeypatch):
    path, m = saved
    m.save_pretrained(path, max_shard_size="2KB")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    assert len(before) > 4
    written = []

    def fail_late(tensors, target, metadata):
        if len(written) == 2:
            raise OSError("disk full")
        written.append(save_file({n: t + 1 for n, t in tensors.items()}, target, metadata))

    monkeypatch.setattr(weights, "save_file", fail_late)
    with pytest.raises(OSError, match="disk full"):
        m.save_pretrained(path, max_shard_size="2KB")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_interrupted_save_leaves_no_old_weights_beside_new_ones(saved, monkeypatch):
    path, m = saved

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        m.save_pretrained(path, max_shard_size="2KB")
    with pytest.raises(FileNotFoundError):
        MambaLMHeadModel.from_pretrained(path)


def copied(m):
    return pickle.loads(pickle.dumps(m))


@pytest.mark.parametrize("copy", [lambda m: m, copied, deepcopy])
@pytest.mark.parametrize("way", ["assign", "to_empty", "without lm_head"])
def test_loading_ties_again(tmp_path, copy, way):
    want = model()
    state = {name: value.clone() for name, value in want.state_dict().items()}
    m = copy(MambaLMHeadModel(want.config, device="meta"))
    if way == "to_empty":
        m.to_empty(device="cpu")
    if way == "without lm_head":
        del state["lm_head.weight"]
    m.load_state_dict(state, assign=way != "to_empty", strict=way != "without lm_head")
    assert m.lm_head.weight is m.backbone.embedding.weight
    with torch.no_grad():
        m.lm_head.weight += 1
    m.save_pretrained(tmp_path)
    assert equal(load(tmp_path), m)


@pytest.mark.parametrize("format", ["safetensors", "mamba_ssm"])
def test_two_weights_that_the_config_ties_are_not_saved(tmp_path, format):
    m = model()
    state = {name: value.clone() for name, value in m.state_dict().items()}
    m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.detach().clone())
    m.save_pretrained(tmp_path / "equal", format=format)
    assert equal(load(tmp_path / "equal"), m)
    state["lm_head.weight"] += 1
    m.load_state_dict(state)
    assert torch.equal(m.lm_head.weight, state["lm_head.weight"])
    with pytest.raises(ValueError, match=r"^save_pretrained: lm_head.weight must be backbone.emb"):
        m.save_pretrained(tmp_path / "new", format=format)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rows", [11, 16])
def test_loading_leaves_a_replaced_head(rows):
    m = model()
    m.lm_head = torch.nn.Linear(8, rows, bias=False)
    state = {name: value.clone() for name, value in m.state_dict().items()}
    for assign in (False, True):
        m.load_state_dict(state, assign=assign)
        assert torch.equal(m.lm_head.weight, state["lm_head.weight"])
    m.lm_head = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, rows, bias=False))
    m.load_state_dict(m.state_dict())
    assert hasattr(m.lm_head, "parametrizations")


def test_saved_files_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        model().save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}


def test_rejects_bad_arguments(saved):
    path, m = saved
    with pytest.raises(ValueError, match="dtype must be a float dtype or 'auto', got float23"):
        load(path, dtype="float23")
    with pytest.raises(ValueError, match="torch_dtype must not be given beside dtype"):
        load(path, dtype=torch.float32, torch_dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"format must be one of safetensors, mamba_ssm, hf, .* got 'gguf'"
    ):
        m.save_pretrained(path, format="gguf")
