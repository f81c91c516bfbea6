"""`ssm-models train --context-parallel`: processes that the command starts, or that torchrun did.

Judge: the same command with one process.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from ssm.cli import main
from ssm.commands import ranks

SHAPE = "--layer mamba2 --attn-layers 1 --d-model 16 --headdim 8 --d-state 4 --n-layer 2"
RUN = "--steps 3 --batch 2 --seqlen 9 --warmup 1 --eval-every 2 --sample-bytes 4 --json"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("the state remembers, the gate forgets. " * 10)
    return str(path)


def arguments(text, out, *more):
    return ["train", text, "--out", str(out), *SHAPE.split(), *RUN.split(), *more]


def test_the_command_starts_its_ranks(text, tmp_path, capsys):
    assert main(arguments(text, tmp_path / "one")) == 0
    want = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    command = arguments(text, tmp_path / "two", "--context-parallel", "2")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    result = subprocess.run(
        [sys.executable, "-m", "ssm.cli", *command],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    got = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(got) == len(want) == 5  # a header, three steps, an end: one rank speaks
    for ours, theirs in zip(got[1:4], want[1:4], strict=True):
        assert (ours["val_loss"] is None) == (theirs["val_loss"] is None)
        for name in [name for name in ("loss", "grad_norm", "val_loss") if theirs[name]]:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )


def test_refusals(text, tmp_path, capsys, monkeypatch):
    def sentence(*more):
        assert main(arguments(text, tmp_path / "out", *more)) == 1
        return capsys.readouterr().err

    rule = "ssm-models: train: context-parallel must be"
    assert sentence("--context-parallel", "0") == f"{rule} positive, got 0\n"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert sentence("--context-parallel", "2") == f"{rule} the 4 processes of torchrun, got 2\n"
    monkeypatch.undo()
    # What is wrong with the run is said once, before any process starts.
    text_error = sentence("--context-parallel", "2", "--val-fraction", "2")
    assert text_error == "ssm-models: train: val-fraction must lie in [0, 1), got 2.0\n"
    assert not (tmp_path / "out").exists()


def leave(*_):
    os._exit(3)


def test_a_rank_that_does_not_start_is_noticed(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(ranks, "_other", leave)
    with (
        pytest.raises(RuntimeError, match=r"^train: rank 1 must start, got exit code 3$"),
        ranks.group_of(2, print),
    ):
        raise AssertionError("the group must not be entered")
    assert torch.get_num_threads() == threads
