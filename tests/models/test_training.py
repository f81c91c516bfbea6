"""Training: what a run does, and that a stopped and resumed one does the same.

Judge: the uninterrupted run, and the formulas of loss and schedule.
"""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.text import ByteVocabulary, load_vocabulary, read_bytes
from ssm.training import (
    TrainOptions,
    evaluate,
    learning_rate,
    parameter_groups,
    sample_batch,
    train,
)

TEXT = ByteVocabulary().encode("abcd" * 60)
OPTIONS = {"steps": 6, "batch": 2, "seqlen": 8, "lr": 1e-2, "warmup": 2}


def model() -> MambaLMHeadModel:
    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=256))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_loss_falls_and_is_reported():
    m, seen = model(), []
    options = TrainOptions(**{**OPTIONS, "steps": 40, "eval_every": 20})
    last = train(m, TEXT, options, val_tokens=TEXT[:50], report=seen.append)
    assert [p.step for p in seen] == list(range(1, 41))
    assert seen[0].loss > math.log(256) - 0.2
    assert last.loss < seen[0].loss - 1
    assert [p.step for p in seen if p.val_loss is not None] == [20, 40]
    assert last.val_loss == evaluate(m, TEXT[:50])
    assert all(p.tokens_per_second > 0 and p.grad_norm > 0 for p in seen)


def test_runs_are_reproducible():
    first, second, other = model(), model(), model()
    train(first, TEXT, TrainOptions(**OPTIONS))
    train(second, TEXT, TrainOptions(**OPTIONS))
    train(other, TEXT, TrainOptions(**OPTIONS, seed=1))
    assert same(first, second)
    assert not same(first, other)


def test_resume_is_bitwise_the_same(tmp_path):
    options = TrainOptions(**OPTIONS, checkpoint_every=2)
    whole = model()
    want = train(whole, TEXT, options)

    def stop_after_five(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(), TEXT, options, out=tmp_path, report=stop_after_five)
    torch.manual_seed(99)
    resumed, seen = MambaLMHeadModel(whole.config), []
    got = train(resumed, TEXT, options, out=tmp_path, resume=True, report=seen.append)
    assert [p.step for p in seen] == [5, 6]
    assert same(resumed, whole)
    assert (got.loss, got.grad_norm) == (want.loss, want.grad_norm)
    assert same(MambaLMHeadModel.from_pretrained(tmp_path), whole)
    assert train(resumed, TEXT, options, out=tmp_path, resume=True) is None


def test_checkpoint_holds_tensors_and_plain_values_only(tmp_path):
    train(model(), TEXT, TrainOptions(**OPTIONS), out=tmp_path, save_dtype=torch.bfloat16)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "training.pt"]
    saved = torch.load(tmp_path / "training.pt", weights_only=True)
    assert saved["step"] == 6
    assert saved["model"]["backbone.embedding.weight"].dtype == torch.float32
    written = MambaLMHeadModel.from_pretrained(tmp_path, dtype="auto")
    assert written.backbone.embedding.weight.dtype == torch.bfloat16


def test_a_failed_checkpoint_leaves_the_old_one(tmp_path, monkeypatch):
    m, options = model(), TrainOptions(**OPTIONS, checkpoint_every=3)
    before = {}

    def half(values, target):
        target.write_bytes(b"half")
        raise OSError("disk full")

    def fail_after_the_first(progress):
        if progress.step == 4:
            before.update({p.name: p.read_bytes() for p in tmp_path.iterdir()})
            monkeypatch.setattr(torch, "save", half)

    with pytest.raises(OSError, match="disk full"):
        train(m, TEXT, options, out=tmp_path, report=fail_after_the_first)
    assert "training.pt" in before
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_resume_refuses_another_run(tmp_path):
    options = TrainOptions(**OPTIONS)
    with pytest.raises(ValueError, match="train: out must be given to resume, got None"):
        train(model(), TEXT, options, resume=True)
    with pytest.raises(FileNotFoundError, match=r"training\.pt must exist to resume"):
        train(model(), TEXT, options, out=tmp_path, resume=True)
    train(model(), TEXT, options, out=tmp_path)

    def resume(text=TEXT, m=None, **change):
        changed = TrainOptions(**{**OPTIONS, **change})
        train(m or model(), text, changed, out=tmp_path, resume=True)

    resume(eval_every=3, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"lr must be 0\.01 to resume .*, got 0\.1"):
        resume(lr=0.1)
    other = {"steps": 7, "batch": 5, "seqlen": 5, "warmup": 1, "seed": 9}
    for name, value in {**other, "weight_decay": 0.5, "grad_clip": 0.5}.items():
        with pytest.raises(ValueError, match=f"{name} must be .* to resume .*, got {value}"):
            resume(**{name: value})
    for text in (TEXT[1:], torch.cat([TEXT[:-1], TEXT[-1:] ^ 1])):
        with pytest.raises(ValueError, match="text must be that of"):
            resume(text=text)
    with pytest.raises(ValueError, match="model must have the shape of"):
        resume(m=MambaLMHeadModel(MambaConfig(d_model=16, n_layer=1, vocab_size=256)))
    (tmp_path / "training.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"training\.pt must be a whole file"):
        resume()
    torch.save({"step": 1}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="must be a training checkpoint"):
        resume()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_evaluate_carries_the_state(chunk):
    m = model().double()
    logits = m(TEXT[None, :-1]).logits[0]
    want = F.cross_entropy(logits, TEXT[1:]).item()
    m.train()
    # The logits are rounded to float32 before the loss.
    assert evaluate(m, TEXT, chunk=chunk) == pytest.approx(want, rel=1e-6)
    assert m.training


@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_restores_the_mode(mode):
    m = model().train(mode)
    evaluate(m, TEXT)
    assert m.training is mode


def test_what_decays():
    m = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=16, d_intermediate=4))
    decay, keep = parameter_groups(m, 0.3)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0.0)
    names = {id(p): n.split(".layers.0.")[-1] for n, p in m.named_parameters()}
    assert {names[id(p)] for p in keep["params"]} == {
        *("mixer.A_log", "mixer.D", "mixer.conv1d.bias", "mixer.dt_proj.bias"),
        *("norm.weight", "norm2.weight", "backbone.norm_f.weight"),
    }
    assert len(decay["params"]) + len(keep["params"]) == len(names)


def test_frozen_parameters_are_left_out():
    m = model()
    m.backbone.embedding.weight.requires_grad_(False)
    m.backbone.layers[0].mixer.A_log.requires_grad_(False)
    found = {id(p) for group in parameter_groups(m, 0.3) for p in group["params"]}
    assert found == {id(p) for p in m.parameters() if p.requires_grad}
    before = m.backbone.embedding.weight.clone()
    train(m, TEXT, TrainOptions(**OPTIONS))
    assert torch.equal(m.backbone.embedding.weight, before)


def test_schedule():
    options = TrainOptions(steps=110, warmup=10, lr=1.0)
    assert learning_rate(0, options) == pytest.approx(0.1)
    assert learning_rate(9, options) == pytest.approx(1.0)
    assert learning_rate(10, options) == pytest.approx(1.0)
    assert learning_rate(60, options) == pytest.approx(0.55)
    assert learning_rate(110, options) == pytest.approx(0.1)
    assert learning_rate(150, options) == pytest.approx(0.1)


def test_batches_are_windows_that_depend_on_the_step():
    options = TrainOptions(batch=50, seqlen=3)
    tokens = torch.arange(6)
    inputs, targets = sample_batch(tokens, options, 0)
    assert inputs.shape == (50, 3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert set(inputs[:, 0].tolist()) == {0, 1, 2}
    assert targets.max() == 5
    assert torch.equal(sample_batch(tokens, options, 0)[0], inputs)
    assert not torch.equal(sample_batch(tokens, options, 1)[0], inputs)


def test_gradient_is_clipped():
    free, clipped = model(), model()
    seen = []
    once = {**OPTIONS, "steps": 1, "weight_decay": 0.0}
    train(free, TEXT, TrainOptions(**once, grad_clip=0.0), report=seen.append)
    train(clipped, TEXT, TrainOptions(**once, grad_clip=1e-12), report=seen.append)
    assert seen[0].grad_norm == seen[1].grad_norm > 1e-3
    start = model()

    def moved(m):
        return max(
            (a - b).abs().max() for a, b in zip(m.parameters(), start.parameters(), strict=True)
        )

    # AdamW divides by the gradient plus 1e-8, which only a clipped gradient is small against.
    assert moved(clipped) < 0.01 * moved(free)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "train: steps must be positive, got 0"),
        ({"lr": -1.0}, r"train: lr must be positive, got -1\.0"),
        ({"seed": 2**32}, r"train: seed must be below 2\*\*32, got 4294967296"),
        ({"warmup": -1}, "train: warmup must not be negative, got -1"),
    ],
)
def test_rejects_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**change)


def test_rejects_too_little_text():
    with pytest.raises(ValueError, match="tokens must be more than seqlen = 8, got 8"):
        train(model(), TEXT[:8], TrainOptions(**OPTIONS))
    with pytest.raises(ValueError, match="val_tokens must be at least 2, got 1"):
        train(model(), TEXT, TrainOptions(**OPTIONS), val_tokens=TEXT[:1])


def test_a_place_that_cannot_be_written_is_known_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    seen = []
    with pytest.raises(FileExistsError, match="file"):
        train(model(), TEXT, TrainOptions(**OPTIONS), out=tmp_path / "file", report=seen.append)
    assert seen == []


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint(tmp_path):
    m = model()
    with torch.no_grad():
        m.lm_head.weight[0] = torch.nan
    with pytest.raises(ValueError, match="loss must stay finite, got nan at step 1"):
        train(m, TEXT, TrainOptions(**OPTIONS, checkpoint_every=1), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bytes_round_trip_any_text():
    vocabulary, text = ByteVocabulary(), "A\n\u00e4\u20ac\U0001f600"
    tokens = vocabulary.encode(text)
    assert tokens.tolist() == list(text.encode())
    assert vocabulary.decode(tokens) == text
    decoder = vocabulary.decoder()
    pieces = [decoder.push(t) for t in tokens.tolist()]
    assert "".join(pieces) == text
    assert pieces[2:4] == ["", "\u00e4"]
    assert decoder.push(0xE2) == ""
    assert decoder.flush() == "\ufffd"
    assert vocabulary.encode("").shape == (0,)


def test_vocabulary_of_a_checkpoint(tmp_path):
    assert isinstance(load_vocabulary(tmp_path, 256), ByteVocabulary)
    with pytest.raises(FileNotFoundError, match=r"must hold tokenizer\.json .* of 50277"):
        load_vocabulary(tmp_path, 50277)


class FakeTokenizer:
    """Token 2i is half of a character that 2i + 1 completes; words are separated when decoded."""

    def __init__(self):
        self.longest = 0

    def get_vocab_size(self):
        return 8

    def token_to_id(self, token):
        return {"<|endoftext|>": 7, "</s>": 6}.get(token)

    def encode(self, text):
        return SimpleNamespace(ids=[int(c) for c in text])

    def decode(self, ids):
        self.longest = max(self.longest, len(ids))
        text = "".join(
            "\ufffd" if t % 2 == 0 and (i + 1 == len(ids) or ids[i + 1] != t + 1) else f" w{t}"
            for i, t in enumerate(ids)
        )
        return text.removeprefix(" ")


def test_tokenizer_file_is_read_by_tokenizers(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeError, match=r"tokenizer\.json needs the package tokenizers"):
        load_vocabulary(tmp_path, 8)
    fake = FakeTokenizer()
    module = SimpleNamespace(Tokenizer=SimpleNamespace(from_file=lambda path: fake))
    monkeypatch.setitem(sys.modules, "tokenizers", module)
    vocabulary = load_vocabulary(tmp_path, 8)
    assert (vocabulary.vocab_size, vocabulary.eos_token_id) == (8, 7)
    for named in ("</s>", {"content": "</s>", "lstrip": False}):
        settings = {"bos_token": "<s>", "eos_token": named}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_vocabulary(tmp_path, 8).eos_token_id == 6
    tokens = vocabulary.encode("101323")
    decoder = vocabulary.decoder()
    pieces = [decoder.push(t) for t in tokens.tolist()] + [decoder.flush()]
    assert pieces[:3] == ["w1", "", " w0 w1"]
    assert "".join(pieces) == vocabulary.decode(tokens)
    fake.longest = 0
    for t in [1, 3] * 50:
        decoder.push(t)
    assert fake.longest < 5


def test_text_files(tmp_path):
    path = tmp_path / "text"
    with pytest.raises(FileNotFoundError, match=r"text must be a file, got .*does not exist"):
        read_bytes(path)
    with pytest.raises(ValueError, match="text must be a file, got directory"):
        read_bytes(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"text must not be empty, got .* with 0 bytes"):
        read_bytes(path)
    path.write_bytes(b"\xff\x00")
    assert read_bytes(path) == b"\xff\x00"
