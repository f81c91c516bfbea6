"""The command line: what it prints, and one sentence with a nonzero exit code for bad input.

Judge: the library functions behind it, and a fresh process for what an import may print.
"""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

from ssm import cli
from ssm.commands.train import Reporter
from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.text import ByteVocabulary
from ssm.utils import dispatch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=256)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A checkpoint whose next token depends on all before it."""
    path = tmp_path_factory.mktemp("talker")
    torch.manual_seed(0)
    config = MambaConfig(d_model=8, n_layer=2, vocab_size=256, tie_embeddings=False)
    model = MambaLMHeadModel(config, {"initializer_range": 1.0})
    with torch.no_grad():
        model.lm_head.weight *= 8
    model.save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be. " * 20)
    return path


SMALL = ["--d-model", "8", "--n-layer", "1", "--batch", "2", "--seqlen", "8", "--sample-bytes", "5"]


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def our_env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_info_names_versions_and_reasons(capsys):
    assert run("info") == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "selective_scan on cpu: " in out
    assert run("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["threads"] == torch.get_num_threads()
    assert info["backend"] in ("python", "cpu", "cuda")
    assert len(info["operators"]) >= 6


def test_info_survives_a_broken_backend(monkeypatch, capsys):
    # The dispatch remembers what it could load; it must have tried before the kernels are hidden.
    for op in dispatch.OPERATORS:
        dispatch.why(op, "cpu")
    monkeypatch.setitem(sys.modules, "ssm_kernels", None)
    assert run("info") == 0
    assert "instruction set none" in capsys.readouterr().out


def test_generate_streams_what_the_library_generates(checkpoint, capsys):
    options = ["--max-new-tokens", 12, "--seed", 4, "--top-p", 0, "--temperature", 1]
    assert run("generate", "--model", checkpoint, "--prompt", "Ab", *options) == 0
    captured = capsys.readouterr()
    model, vocabulary = MambaLMHeadModel.from_pretrained(checkpoint), ByteVocabulary()
    want = model.generate(vocabulary.encode("Ab")[None], max_new_tokens=12, top_k=0, seed=4)[0]
    assert captured.out == vocabulary.decode(want) + "\n"
    assert captured.err == ""
    assert run("generate", "--model", checkpoint, "--prompt", "Ab", *options, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == want[2:].tolist()
    assert result["text"] == vocabulary.decode(want[2:])
    assert result["tokens_per_second"] > 0


def test_generate_ends_with_what_is_left_of_a_character(checkpoint, capsys, monkeypatch):
    tokens = [torch.tensor([97]), torch.tensor([0xC3])]  # the second begins a character
    monkeypatch.setattr(MambaLMHeadModel, "stream", lambda *_, **__: iter(tokens))
    assert run("generate", "--model", checkpoint, "--prompt", "x") == 0
    assert capsys.readouterr().out == "xa\ufffd\n"
    assert run("generate", "--model", checkpoint, "--prompt", "x", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == "a\ufffd"


def test_greedy_in_every_dtype(checkpoint, capsys, monkeypatch):
    used, stream = [], MambaLMHeadModel.stream
    monkeypatch.setattr(
        MambaLMHeadModel,
        "stream",
        lambda model, *a, **k: used.append(model.lm_head.weight.dtype) or stream(model, *a, **k),
    )
    for dtype in ("auto", "float64", "bfloat16"):
        options = ["--temperature", 0, "--max-new-tokens", 3, "--dtype", dtype]
        assert run("generate", "--model", checkpoint, *options) == 0
    assert used == [torch.float32, torch.float64, torch.bfloat16]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("temperature", [0, 1])
def test_chat_answers_each_line_from_one_state(talker, capsys, monkeypatch, temperature):
    options = ["--max-new-tokens", 4, "--temperature", temperature, "--top-p", 0, "--stop", ""]
    lines = ["hello\n", "you\n", "all\n"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(lines)))
    assert run("chat", "--model", talker, *options, "--seed", 5) == 0
    model, vocabulary = MambaLMHeadModel.from_pretrained(talker), ByteVocabulary()
    settings = {"top_k": 0, "temperature": temperature}
    settings["generator"] = torch.Generator().manual_seed(5)
    history, want = vocabulary.encode(""), ""
    for line in lines:
        history = torch.cat([history, vocabulary.encode(line)])
        history = model.generate(history[None], max_new_tokens=4, **settings)[0]
        answer = vocabulary.decode(history[-4:])
        want += answer if answer.endswith("\n") else answer + "\n"
    assert capsys.readouterr().out == want


def test_chat_feeds_the_last_token_of_an_answer_with_the_next_line(talker, capsys, monkeypatch):
    stream, heard, said = MambaLMHeadModel.stream, [], []

    def listening(self, ids, **settings):
        heard.append(ids[0].tolist())
        for token in stream(self, ids, **settings):
            said.append(int(token))
            yield token

    monkeypatch.setattr(MambaLMHeadModel, "stream", listening)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nyou\n"))
    assert run("chat", "--model", talker, "--max-new-tokens", 4, "--temperature", 0) == 0
    assert heard == [list(b"hello\n"), [said[3], *b"you\n"]]


def test_chat_stops_at_the_stop_text(checkpoint, capsys, monkeypatch):
    model, vocabulary = MambaLMHeadModel.from_pretrained(checkpoint), ByteVocabulary()
    free = model.generate(vocabulary.encode("x\n")[None], max_new_tokens=9)[0, 2:]
    stop = vocabulary.decode(free[:1])
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    run("chat", "--model", checkpoint, "--temperature", 0, "--max-new-tokens", 9, "--stop", stop)
    assert capsys.readouterr().out == stop + "\n"


def test_train_writes_a_checkpoint_and_a_sample(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("train", text, "--out", out, *SMALL, "--steps", 3, "--dtype", "bfloat16") == 0
    printed = capsys.readouterr()
    assert "held-out loss" in printed.out
    assert "tokens/s" in printed.out
    assert printed.err == ""
    model = MambaLMHeadModel.from_pretrained(out, dtype="auto")
    assert model.backbone.embedding.weight.dtype == torch.bfloat16
    assert run("generate", "--model", out, "--max-new-tokens", 2) == 0


def test_train_mamba2(text, tmp_path, capsys):
    options = ["--layer", "mamba2", "--headdim", 4, "--d-state", 8, "--steps", 2]
    assert run("train", text, "--out", tmp_path / "out", *SMALL, *options) == 0
    assert "held-out loss" in capsys.readouterr().out
    model = MambaLMHeadModel.from_pretrained(tmp_path / "out")
    mixer = model.backbone.layers[0].mixer
    assert (type(mixer).__name__, mixer.nheads, mixer.d_state) == ("Mamba2", 4, 8)
    assert run("generate", "--model", tmp_path / "out", "--max-new-tokens", 2) == 0


def test_train_hybrid(text, tmp_path, capsys):
    options = ["--n-layer", 4, "--attn-layers", "3,1", "--attn-heads", 2, "--steps", 2]
    mixer = ["--layer", "mamba2", "--headdim", 8, "--d-state", 4]
    assert run("train", text, "--out", tmp_path / "out", *SMALL, *options, *mixer) == 0
    assert "held-out loss" in capsys.readouterr().out
    model = MambaLMHeadModel.from_pretrained(tmp_path / "out")
    names = [type(layer.mixer).__name__ for layer in model.backbone.layers]
    assert names == ["Mamba2", "MHA", "Mamba2", "MHA"]
    attention = model.backbone.layers[1].mixer
    assert (attention.num_heads, attention.head_dim, attention.rotary_emb_dim) == (2, 4, 2)
    assert attention.causal
    assert run("generate", "--model", tmp_path / "out", "--max-new-tokens", 2) == 0


def test_train_json_and_resume(text, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SMALL, "--steps", 4, "--checkpoint-every", 2, "--json"]
    assert run("train", text, "--out", whole, *options) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["train_bytes"] + lines[0]["val_bytes"] == 420
    assert [line["step"] for line in lines[1:-1]] == [1, 2, 3, 4]
    assert lines[-1]["val_loss"] == lines[-2]["val_loss"] > 0
    assert len(lines[-1]["sample"]) > 0

    assert run("train", text, "--out", parts, *options) == 0
    capsys.readouterr()
    # Without --resume the run would start anew, and its first checkpoint replace the old ones.
    held = {path.name: path.read_bytes() for path in parts.iterdir()}
    assert run("train", text, "--out", parts, *options, "--seed", 7) == 1
    assert capsys.readouterr() == (
        "",
        "ssm-models: train: out must be another directory, or --resume be given, got "
        f"{parts} with the training.pt of a run\n",
    )
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == held
    assert run("train", text, "--out", parts, *options, "--resume") == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["sample"] == lines[-1]["sample"]
    assert again["val_loss"] == lines[-1]["val_loss"]


def test_interruption_can_be_resumed(text, tmp_path, monkeypatch, capsys):
    options = [*SMALL, "--steps", 4, "--checkpoint-every", 1, "--out", tmp_path / "out"]

    def stop(self, progress):
        if progress.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "__call__", stop)
        assert run("train", text, *options) == 130
    assert run("train", text, *options, "--resume") == 0
    assert "step 3/4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "{}/none.txt", "--out", "{}/o"], "none.txt, which does not exist"),
        (["train", "{}/empty.txt", "--out", "{}/o"], "empty.txt with 0 bytes"),
        (["train", "{}", "--out", "{}/o"], "text must be a file, got directory"),
        (
            ["train", "{}/short.txt", "--out", "{}/o"],
            "tokens must be more than seqlen = 256, got 10",
        ),
        (["train", "{}/short.txt", "--out", "{}/o", "--d-model", "0"], "d_model must be positive"),
        (["train", "{}/short.txt", "--out", "{}/o", "--steps", "0"], "steps must be positive"),
        (
            ["train", "{}/short.txt", "--out", "{}/o", "--val-fraction", "1"],
            "val-fraction must lie",
        ),
        (
            ["train", "{}/short.txt", "--out", "{}/o", "--resume", "--seqlen", "4"],
            "training.pt must exist to resume",
        ),
        (
            ["train", "{}/short.txt", "--out", "{}/o", "--layer", "mamba2", "--d-model", "16"],
            "d_ssm must be a multiple of headdim = 64, got 32 (nearest valid: d_model 32, headdim",
        ),
        (
            ["train", "{}/short.txt", "--out", "{}/o", "--headdim", "4"],
            "train: headdim must go with --layer mamba2, got --layer mamba1",
        ),
        (
            ["train", "{}/short.txt", "--out", "{}/o", "--attn-layers", "0", "--attn-heads", "3"],
            "train: attn-heads must divide d-model = 128, got 3",
        ),
        (
            ["train", "{}/short.txt", "--out", "{}/o", "--attn-layers", "1,4"],
            "attn_layer_idx must be below 4, got 4",
        ),
        (["train", "{}/short.txt", "--out", "{}/empty.txt"], "train: out must be a directory, got"),
        (["train", "{}/short.txt", "--out", "{}/empty.txt/o"], "/empty.txt/o with a file /"),
        (
            ["convert", "{}/good", "{}/empty.txt", "--to", "hf"],
            "convert: DST must be a directory, got",
        ),
        (["convert", "{}/good", "{}/empty.txt/o", "--to", "hf"], "/empty.txt/o with a file /"),
        (
            ["convert", "{}/good", "{}/bad", "--to", "hf"],
            "convert: DST must be a new or empty directory, got",
        ),
        (["generate", "--model", "{}/none"], "none must be a directory"),
        (["generate", "--model", "{}"], "must hold config.json, got none"),
        (["chat", "--model", "{}/bad"], "did you mean 'd_model'?"),
        (["generate", "--model", "{}/good", "--prompt", ""], "prompt must not be empty"),
        (["generate", "--model", "{}/good", "--top-p", "2"], "top_p must lie in [0, 1], got 2.0"),
        (["generate", "--model", "{}/good", "--max-new-tokens", "-1"], "not be negative, got -1"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("123456789" + "\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text('{"d_modle": 8}')
    config = MambaConfig(d_model=8, n_layer=1, vocab_size=256)
    MambaLMHeadModel(config).save_pretrained(tmp_path / "good")
    assert run(*(a.format(tmp_path) for a in arguments)) == 1
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("option", [("--top-p", 2), ("--max-new-tokens", -1), ("--top-k", -1)])
def test_generate_prints_nothing_before_the_options_are_checked(checkpoint, option, capsys):
    assert run("generate", "--model", checkpoint, "--prompt", "Ab", *option) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_text_that_is_not_utf8_is_one_sentence(checkpoint, capsys, monkeypatch):
    # Python hands over bytes of the command line that are no UTF-8 as lone surrogates.
    sentence = "must be valid UTF-8 text, got '\\udcff' at position 2\n"
    assert run("generate", "--model", checkpoint, "--prompt", "Ab\udcff") == 1
    assert capsys.readouterr() == ("", f"ssm-models: generate: prompt {sentence}")
    monkeypatch.setattr("sys.stdin", io.StringIO("Ab\udcff\n"))
    assert run("chat", "--model", checkpoint) == 1
    assert capsys.readouterr() == ("", f"ssm-models: chat: line {sentence}")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["generate"],
        ["train", "x", "--steps", "many", "--out", "y"],
        ["train", "x", "--out", "y", "--attn-layers", "1;3"],
    ],
)
def test_bad_usage_is_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_modules_run_and_importing_prints_nothing():
    code = "import ssm, ssm.cli, ssm.ops, ssm.training, ssm.models.lm"
    silent = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=our_env()
    )
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    done = subprocess.run(
        [sys.executable, "-m", "ssm", "generate", "--model", "/nowhere/at/all"],
        capture_output=True,
        text=True,
        env=our_env(),
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_live_line_goes_to_a_terminal_only(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run("train", text, "--out", tmp_path / "o", *SMALL, "--steps", 2) == 0
    assert "\rstep 1/2" in capsys.readouterr().err
