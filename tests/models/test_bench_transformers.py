"""tools/bench_transformers.py times what it says, and nothing that differs."""

import json
import sys

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from ssm.integrations import transformers as integration
from tools import bench_transformers, measure


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Models of two layers of width 32 and 64 words, timed for an instant."""
    for name in bench_transformers.MODELS:
        sizes = {"hidden_size": 32, "state_size": 8, "vocab_size": 64}
        if name == "mamba2":
            sizes |= {"num_heads": 8, "head_dim": 8, "chunk_size": 32}
        config = bench_transformers.MODELS[name]
        monkeypatch.setitem(bench_transformers.MODELS, name, {**config, **sizes})
    monkeypatch.setattr(bench_transformers, "LAYERS", 2)
    small = dict.fromkeys(bench_transformers.MODELS, (2, 1.5))
    workloads = dict.fromkeys(bench_transformers.WORKLOADS, small)
    monkeypatch.setattr(bench_transformers, "WORKLOADS", workloads)
    monkeypatch.setattr(measure, "BUDGET_S", 0.01)
    monkeypatch.setattr(bench_transformers, "first_calls", lambda names, threads: [])
    yield
    integration.disable()


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["bench_transformers", *map(str, options)])
    return bench_transformers.main()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_report(monkeypatch, capsys, tmp_path, name):
    path = tmp_path / "report.json"
    options = ("--model", name, "--iters", "1", "--threads", "1", "--json", path)
    if name == "mamba":
        options += ("--workload", "decode")  # a training step of plain transformers takes too long
    assert run(monkeypatch, *options) == 0
    report = json.loads(path.read_text())
    assert [item["tokens"] for item in report["agreement"]] == [True, True]
    tables = {table["workload"]: table for table in report["workloads"]}
    assert set(tables) == ({"decode"} if name == "mamba" else set(bench_transformers.WORKLOADS))
    for table in tables.values():
        assert [row["level"] for row in table["rows"]] == ["plain", *integration.LEVELS]
        assert table["rows"][0]["vs_plain"] == 1.0
        assert all(row["median_ms"] > 0 for row in table["rows"])
    out = capsys.readouterr().out
    assert f"== {name} :: decode :: 2 layers, wanted 1.5x ==" in out
    assert integration.status()["level"] is None


def test_differing_models_are_not_timed(monkeypatch, capsys):
    found = [{"model": "mamba", "level": "mixers", "logits": 1e-3, "tokens": True}]
    monkeypatch.setattr(bench_transformers, "agreement", lambda name: found)
    assert run(monkeypatch, "--model", "mamba") == 1
    assert "==" not in capsys.readouterr().out


def test_first_call():
    found = bench_transformers.first_call("mamba2", "prompt_4", "mixers")
    assert found["ratio"] == found["first_ms"] / found["median_ms"]
    assert integration.status()["level"] == "mixers"
