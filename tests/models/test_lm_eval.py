"""The adapter for lm_eval, against a stand-in for its base class.

Judge: the logits of the model, token by token, and its own generation.
"""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ssm.models.config import MambaConfig
from ssm.models.lm import MambaLMHeadModel
from ssm.text import ByteVocabulary

TRAINED = Path(__file__).resolve().parents[2] / "goldens/models/tinyshakespeare-mamba1"


class Base:
    """What the adapter inherits: the rank, and a hook that remembers answers."""

    def __init__(self):
        self.remembered = []
        self.cache_hook = SimpleNamespace(
            add_partial=lambda kind, args, answer: self.remembered.append((kind, args, answer))
        )


@pytest.fixture
def adapter(monkeypatch):
    """The module, imported with a stand-in for lm_eval; it is as before afterwards."""
    registered = {}
    names = {
        "lm_eval": ModuleType("lm_eval"),
        "lm_eval.api": ModuleType("lm_eval.api"),
        "lm_eval.api.model": ModuleType("lm_eval.api.model"),
        "lm_eval.api.registry": ModuleType("lm_eval.api.registry"),
    }
    names["lm_eval.api.model"].LM = Base
    names["lm_eval.api.registry"].register_model = lambda name: (
        lambda cls: registered.update({name: cls})
    )
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "ssm.integrations.lm_eval", raising=False)
    module = importlib.import_module("ssm.integrations.lm_eval")
    yield SimpleNamespace(module=module, registered=registered)
    sys.modules.pop("ssm.integrations.lm_eval", None)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = MambaConfig(
        d_model=16,
        n_layer=2,
        vocab_size=256,
        ssm_cfg={"layer": "Mamba2", "headdim": 8, "d_state": 8},
        attn_layer_idx=[1],
        attn_cfg={"num_heads": 2},
    )
    model = MambaLMHeadModel(config, initializer_cfg={"initializer_range": 1.0})
    return model.eval()


def asked(*args):
    return SimpleNamespace(args=args)


def likelihood(model, tokens, first):
    """Sum log p(token) from position ``first`` on, one prefix at a time."""
    total, greedy = 0.0, True
    for end in range(first, len(tokens)):
        with torch.no_grad():
            row = model(torch.tensor([tokens[:end]])).logits[0, -1].double()
        total += float(row.log_softmax(-1)[tokens[end]])
        greedy &= int(row.argmax()) == tokens[end]
    return total, greedy


@pytest.mark.parametrize("batch_size", [1, "3"])
def test_loglikelihood(adapter, model, batch_size):
    lm = adapter.module.SSMLM(model, batch_size=batch_size)
    best = ByteVocabulary().decode(model.generate(torch.tensor([list(b"ab")]), max_new_tokens=1)[0])
    pairs = [("To be", " or not"), ("", "x"), ("a ", "b"), ("ab", best[2:] or "c"), ("x" * 30, "y")]
    answers = lm.loglikelihood([asked(*pair) for pair in pairs])
    for (context, continuation), (got, is_greedy) in zip(pairs, answers, strict=True):
        tokens = list((context + continuation).encode())
        first = len(context.rstrip())
        if not context:
            tokens, first = [10, *tokens], 1
        want, greedy = likelihood(model, tokens, first)
        assert abs(got - want) < 1e-4 * abs(want)
        assert is_greedy == greedy
    assert len(lm.remembered) == len(pairs)
    assert {args: answer for _, args, answer in lm.remembered} == dict(
        zip(pairs, answers, strict=True)
    )


def test_rolling_likelihood_carries_the_state(adapter, model):
    text = "All the world's a stage."
    want, _ = likelihood(model, [10, *text.encode()], 1)
    for chunk in (1000, 7):
        lm = adapter.module.SSMLM(model, chunk=chunk)
        (got,) = lm.loglikelihood_rolling([asked(text)])
        assert abs(got - want) < 1e-4 * abs(want)
    assert adapter.module.SSMLM(model).loglikelihood_rolling([asked("")]) == [0.0]


def test_generation_stops_before_the_stop(adapter):
    lm = adapter.module.SSMLM(str(TRAINED), max_gen_toks=20)
    prompt = torch.tensor([list(b"To be")])
    whole = ByteVocabulary().decode(lm.model.generate(prompt, max_new_tokens=20)[0, 5:])
    settings = {"until": [], "do_sample": False, "temperature": 0.0}
    assert lm.generate_until([asked("To be", settings)]) == [whole]
    stop = whole[9:12]
    before = whole[: whole.index(stop)]
    assert before
    assert lm.generate_until([asked("To be", {"until": ["\0never", stop]})]) == [before]
    assert lm.generate_until([asked("To be", {"until": stop, "max_gen_toks": 3})]) == [whole[:3]]
    sampled = {"until": stop, "do_sample": True, "temperature": 1.5, "max_gen_toks": 20}
    assert stop not in lm.generate_until([asked("To be", sampled)])[0]


class Pieces:
    """A tokenizer whose tokens are numbers of given texts, of which the first ends an answer."""

    eos_token_id = 0

    def __init__(self, texts):
        self.texts = texts

    def encode(self, text):
        return torch.ones(len(text), dtype=torch.int64)

    def decoder(self):
        return self

    def push(self, token):
        return self.texts[token]

    def flush(self):
        return ""


@pytest.mark.parametrize(
    ("pieces", "until", "answer"),
    [
        # The last piece holds both stops; the one that begins first counts.
        (["one", " two. three\n"], ["\n", "."], "one two"),
        (["one", " two. three\n"], [".", "\n"], "one two"),
        (["one", " two"], [], "one two"),
    ],
)
def test_where_an_answer_ends(adapter, model, monkeypatch, pieces, until, answer):
    lm = adapter.module.SSMLM(model, tokenizer=Pieces(["<end>", *pieces]))
    tokens = [*range(1, len(pieces) + 1), 0]
    stream = [torch.tensor([token]) for token in tokens]
    monkeypatch.setattr(MambaLMHeadModel, "stream", lambda *_, **__: iter(stream))
    assert lm.generate_until([asked("x", {"until": until})]) == [answer]


def test_checkpoint_and_registration(adapter, model, tmp_path):
    model.save_pretrained(tmp_path)
    adapter.module.register()
    cls = adapter.registered["ssm"]
    lm = cls(pretrained=str(tmp_path), batch_size="2", max_batch_size=None, device="cpu")
    (answer,) = lm.loglikelihood([asked("a", "b")])
    (want,) = adapter.module.SSMLM(model).loglikelihood([asked("a", "b")])
    assert answer == pytest.approx(want, abs=1e-5)


def test_rejects_bad_arguments(adapter, model):
    for name in ("batch_size", "max_gen_toks", "chunk"):
        with pytest.raises(ValueError, match=f"SSMLM: {name} must be a positive number, got 0"):
            adapter.module.SSMLM(model, **{name: 0})
    with pytest.raises(ValueError, match="batch_size must be a positive number, got 'auto'"):
        adapter.module.SSMLM(model, batch_size="auto")
    other = MambaLMHeadModel(MambaConfig(d_model=8, n_layer=1, vocab_size=300))
    with pytest.raises(ValueError, match="tokenizer must be given beside a model"):
        adapter.module.SSMLM(other)


def test_without_lm_eval_the_import_works_and_the_use_says_what_is_missing():
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from ssm.integrations import lm_eval\n"
        "for use in (lambda: lm_eval.SSMLM('x'), lm_eval.register):\n"
        "    try: use()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "/usr/bin"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert result.stdout.count("SSMLM: lm_eval must be installed (pip install lm_eval)") == 2
    assert not result.stderr
    program = (
        "import runpy, sys; sys.modules['lm_eval'] = None\n"
        "runpy.run_module('ssm.integrations.lm_eval', run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("SSMLM: lm_eval must be installed (pip install lm_eval), got ")
