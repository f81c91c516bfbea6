"""Where checkpoints come from and what loading costs: pickles, shards, the hub, dtypes, memory.

Judge: the tensors that were written, and the memory that the kernel of Linux counts.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.utils.safetensors_file import SafetensorsFile
from ssm.utils.saving import parse_size

LARGE = MambaConfig(d_model=512, n_layer=8, vocab_size=4096, ssm_cfg={"layer": "Mamba2"})


def load(path, *args, **kwargs):
    return MambaLMHeadModel.from_pretrained(path, *args, **kwargs)


@pytest.mark.parametrize("format", ["safetensors", "hf"])
def test_shards(tmp_path, format):
    torch.manual_seed(0)
    # The first tensor is too large for a file by itself.
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=3, vocab_size=200))
    model.save_pretrained(tmp_path, format=format, max_shard_size="6KB")
    files = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sum(path.stat().st_size for path in files) > index["metadata"]["total_size"]
    assert {path.name for path in files} == set(index["weight_map"].values())
    for path in files:
        names = list(load_file(path))
        assert path.stat().st_size < 8000 or len(names) == 1
        assert [index["weight_map"][name] for name in names] == [path.name] * len(names)
    again = load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    model.save_pretrained(tmp_path, format=format)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("3KB", 3000), ("2MB", 2 * 10**6), ("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("1mib", 2**20)],
)
def test_units_of_shards(text, size):
    assert parse_size(text) == size


def test_tensors_of_a_pickle_become_tensors_of_their_own(tmp_path):
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=16, tie_embeddings=False)
    model = MambaLMHeadModel(config)
    model.save_pretrained(tmp_path, format="mamba_ssm")
    tensors = model.state_dict()
    # Two names of one storage, and a part of a larger one.
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    name = "backbone.layers.0.mixer.D"
    tensors[name] = torch.arange(100.0)[: len(tensors[name])]
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = load(tmp_path)
    for key, value in found.state_dict().items():
        assert torch.equal(value, tensors[key])
        held = value.untyped_storage().nbytes()
        assert held == value.nbytes
    with torch.no_grad():
        found.lm_head.weight.zero_()
    assert torch.equal(found.backbone.embedding.weight, tensors["backbone.embedding.weight"])


def test_parts_of_a_file_and_tensors_without_elements(tmp_path):
    held = {"a": torch.arange(12.0).view(4, 3), "none": torch.zeros(0, 3), "one": torch.tensor(2.0)}
    save_file(held, tmp_path / "file")
    file = SafetensorsFile(tmp_path / "file")
    assert torch.equal(file.read("a", 1, 3), held["a"][1:3])
    assert torch.equal(file.read("a", 3, 9, dtype=torch.float64), held["a"][3:].double())
    for name in ("none", "one"):
        for dtype in (torch.float32, torch.bfloat16):
            found = file.read(name, dtype=dtype)
            assert found.dtype == dtype
            assert torch.equal(found, held[name].to(dtype))


def test_dtype_auto_goes_back_as_it_was_stored(tmp_path):
    torch.manual_seed(0)
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=40))
    model.save_pretrained(tmp_path, format="hf")
    path = tmp_path / "model.safetensors"
    stored = {n: t.bfloat16() for n, t in load_file(path).items()}
    save_file(stored, path)
    low = load(tmp_path, dtype="auto")
    mixer = low.backbone.layers[0].mixer
    assert mixer.A_log.dtype == torch.float32
    low.save_pretrained(tmp_path / "back", format="hf")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in stored.items())
    # What no bfloat16 can hold any more stays float32.
    with torch.no_grad():
        mixer.A_log += 1e-6
    low.save_pretrained(tmp_path / "trained", format="hf")
    back = load_file(tmp_path / "trained/model.safetensors")
    assert back["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert back["backbone.layers.0.mixer.D"].dtype == torch.bfloat16


def test_meta_device_reads_no_tensor(tmp_path):
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=40))
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with open(path, "r+b") as file:  # the same size, and nothing in it
        file.truncate(header)
        file.truncate(header + 2 * 1)
    with pytest.raises(ValueError, match="an end of file in tensor"):
        load(tmp_path, device="meta")
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    empty = load(tmp_path, device="meta", dtype="auto")
    assert all(p.device.type == "meta" for p in empty.parameters())
    assert empty.lm_head.weight is empty.backbone.embedding.weight
    assert empty.lm_head.weight.dtype == torch.bfloat16
    assert empty.backbone.layers[0].mixer.A_log.dtype == torch.float32


MEASURE = """
import resource, sys, torch
from ssm.models.lm import MambaLMHeadModel
def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
path, dtype, way = sys.argv[1:]
torch.randn(8, 8) @ torch.randn(8, 8)
MambaLMHeadModel.from_pretrained(path, device="meta")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmRSS")
if way == "twice":
    kept = {n: t.clone() for n, t in MambaLMHeadModel.from_pretrained(path).state_dict().items()}
else:
    kept = MambaLMHeadModel.from_pretrained(path, dtype=dtype)
print(memory("VmHWM") - before)
"""


def peak(path, dtype="auto", way="once"):
    """Return by how many bytes the memory of a fresh process rises while it loads."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", MEASURE, str(path), dtype, way]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="no /proc: the peak cannot be measured"
)
def test_memory_peaks_at_little_more_than_the_checkpoint(tmp_path):
    model = MambaLMHeadModel(LARGE)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="9MB")
    model.save_pretrained(tmp_path / "pickle", format="mamba_ssm")
    model.save_pretrained(tmp_path / "low", dtype=torch.bfloat16)
    assert size > 4e7
    assert peak(tmp_path / "one") < 1.2 * size
    assert peak(tmp_path / "shards") < 1.2 * size
    assert peak(tmp_path / "pickle") < 1.2 * size
    assert peak(tmp_path / "low") < 1.2 * size / 2
    assert peak(tmp_path / "low", "float32") < 1.2 * size  # of the model, twice the checkpoint
    model.save_pretrained(tmp_path / "pickle", format="mamba_ssm", dtype=torch.bfloat16)
    assert peak(tmp_path / "pickle", "float32") < 1.2 * size
    assert peak(tmp_path / "one", way="twice") > 1.8 * size  # the measure can see a second copy


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (None, TypeError, "directory must be a str or a path, got None$"),
        (5, TypeError, "directory must be a str or a path, got 5$"),
        (b"x", TypeError, "directory must be a str or a path, got b'x'$"),
        ("", ValueError, "directory must have a name, got ''$"),
    ],
)
def test_names_that_are_none(tmp_path, monkeypatch, name, kind, message):
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=40))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=f"^save_pretrained: {message}"):
        model.save_pretrained(name)
    assert not os.listdir()
    model.save_pretrained(".")
    with pytest.raises(kind, match=f"^from_pretrained: {message}"):
        load(name)
    load(".")


def hub_cache(cache, model, name="models--some--model"):
    """Lay a model out as huggingface_hub keeps what it has downloaded."""
    snapshot = cache / name / "snapshots" / ("0" * 40)
    blobs = cache / name / "blobs"
    blobs.mkdir(parents=True)
    model.save_pretrained(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    (cache / name / "refs").mkdir()
    (cache / name / "refs" / "main").write_text("0" * 40)


@pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)
@pytest.mark.parametrize("variable", [None, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_keeps_to_the_cache(tmp_path, monkeypatch, variable):
    model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=40))
    hub_cache(tmp_path, model)
    told = {"local_files_only": True}
    if variable is not None:
        told = {}
        monkeypatch.setenv(variable, "1")
    again = load("some/model", cache_dir=str(tmp_path), **told)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    reason = "local_files_only" if variable is None else f"{variable} is set"
    with pytest.raises(FileNotFoundError, match=rf"other/model must be in the cache.*{reason}"):
        load("other/model", cache_dir=str(tmp_path), **told)
