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
    "nested": (
        lambda data: struct.pack("<Q", 100000) + b"[" * 100000,
        "a damaged header .maximum recursion depth",
    ),
    "a twin": (
        lambda data: data.replace(b"backbone.layers.0.", b"backbone.layers.1."),
        "a name stands there twice",
    ),
    "metadata": (
        with_header(lambda header: header.update(__metadata__=["pt"])),
        "a __metadata__ that is no object of strings",
    ),
    "a number in the metadata": (
        with_header(lambda header: header.update(__metadata__={"format": 3})),
        "a __metadata__ that is no object of strings",
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


def twice(path):
    """Put a tensor into two shards, of which the index names the right one."""
    first, second = (next(path.glob(f"model-0000{n}-*")) for n in (1, 2))
    name, tensor = next(iter(load_file(second).items()))
    save_file({**load_file(first), name: tensor + 1}, first)


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
    "twice": (twice, ValueError, "must name every tensor of model-00001.* got none for backbone"),
    "a list of names": (
        lambda path: (path / INDEX).write_text('{"weight_map": ["a"]}'),
        ValueError,
        "JSON index with a weight_map, got TypeError",
    ),
    "no name": (
        lambda path: (path / INDEX).write_text('{"weight_map": {}}'),
        ValueError,
        "JSON index with a weight_map, got TypeError",
    ),
    "a twin": (
        lambda path: (path / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        ValueError,
        f"{INDEX} must be a JSON file, got a name stands there twice: 'a'",
    ),
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


@pytest.mark.parametrize("size", [0, -1, True, 1.5, None, "0KB", "3 parsecs"])
def test_bad_shard_size(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size must be a number of bytes"):
        model().save_pretrained(tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


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
    message = r"must be a whole file of tensors, got a pickle that asks for \S+\.mkdir$"
    text = refused(tmp_path, message, file="a.bin" if sharded else "pytorch_model.bin")
    assert "weights_only" not in text
    assert not (tmp_path / "owned").exists()


def test_pickle_with_a_damaged_byte(tmp_path):
    """The program in a pickle fails in many ways, in words of its own."""
    model().save_pretrained(tmp_path, format="mamba_ssm")
    path = tmp_path / "pytorch_model.bin"
    data, complaints = path.read_bytes(), []
    for index in range(64, 400, 7):
        path.write_bytes(data[:index] + bytes([data[index] ^ 0xC4]) + data[index + 1 :])
        try:
            load(tmp_path)
        except Exception as error:
            complaints.append((type(error), str(error)))
    assert len(complaints) > 20
    assert {kind for kind, _ in complaints} == {ValueError}
    assert all(str(path) in sentence and "\n" not in sentence for _, sentence in complaints)


# Damage of the bytes of a pickle -> what must be said.
PICKLES = {
    "empty": (lambda data: b"", "an end of file inside of it"),
    "text": (lambda data: b"version https://git-lfs.github.com", "a pickle that is none of tensor"),
    "truncated": (lambda data: data[:-1], "an end of file inside of the archive"),
    "truncated far": (lambda data: data[: len(data) // 2], "an end of file inside of the archive"),
    "oversized": (lambda data: data + b"\0" * 3, "3 bytes behind its end"),
    "twice": (lambda data: data + b"PK" * 20000, "40000 bytes behind its end"),
}


@pytest.mark.parametrize("damage", PICKLES)
def test_damaged_pickle(tmp_path, damage):
    change, message = PICKLES[damage]
    model().save_pretrained(tmp_path, format="mamba_ssm")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(change(path.read_bytes()))
    text = refused(tmp_path, f"must be a whole file of tensors, got {message}", file=path.name)
    assert "weights_only" not in text


def test_truncated_file_of_an_old_torch(tmp_path):
    model().save_pretrained(tmp_path, format="mamba_ssm")
    path = tmp_path / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    load(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    refused(tmp_path, "must be a whole file of tensors, got an end of file", file=path.name)


def test_tensor_without_data(tmp_path):
    model().save_pretrained(tmp_path, format="mamba_ssm")
    path = tmp_path / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({**tensors, NORM: tensors[NORM].to("meta")}, path)
    refused(tmp_path, f"must hold the data of {NORM}, got a tensor on the meta", file=path.name)


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


def test_two_spellings_of_one_tensor(tmp_path):
    model().save_pretrained(tmp_path, format="hf")
    tensors = load_file(tmp_path / WEIGHTS)
    embedding = tensors["backbone.embeddings.weight"]
    save_file({**tensors, "backbone.embedding.weight": embedding.clone()}, tmp_path / WEIGHTS)
    refused(tmp_path, r"must hold backbone\.embeddings\.weight once, got it as .* and as ")


@pytest.mark.parametrize("format", ["safetensors", "hf"])
def test_second_copy_of_a_tied_weight(tmp_path, format):
    model().save_pretrained(tmp_path, format=format)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "backbone.embedding.weight" if format == "safetensors" else "backbone.embeddings.weight"
    head = tensors[name].clone()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / WEIGHTS)
    assert torch.equal(load(tmp_path).lm_head.weight, head)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / WEIGHTS)
    refused(tmp_path, rf"must hold lm_head\.weight equal to {name} if the config ties them")
    save_file({**tensors, "lm_head.weight": head[:-1]}, tmp_path / WEIGHTS)
    refused(tmp_path, "must hold lm_head.weight equal to")
    del tensors[name]
    save_file({**tensors, "lm_head.weight": head}, tmp_path / WEIGHTS)
    assert torch.equal(load(tmp_path).backbone.embedding.weight, head)
