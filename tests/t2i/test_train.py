"""Training runs: what a step does, and that an interrupted run ends as an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_LM, TINY_TOKENIZER

from t2i.train.checkpoint import load_latest
from t2i.train.config import LMTraining, TokenizerTraining, load_config
from t2i.train.lm import load_trained_lm, train_lm
from t2i.train.tokenizer import load_image_tokenizer, train_tokenizer

torch.set_num_threads(1)
STEPS = 7  # crosses the end of the first epoch: 21 samples, 8 a step


@pytest.fixture
def tokenizer_changes(dataset):
    # Every term is on, and joins at another step.
    return [
        *TINY_TOKENIZER,
        f"data.path={dataset}",
        f"run.steps={STEPS}",
        "run.log_every=2",
        "run.evaluate_every=3",
        "run.draw_every=4",
        "loss.l1=0.5",
        "loss.gan=0.1",
        "loss.gan_from=0.4",
        "loss.gan_channels=8",
    ]


@pytest.fixture
def lm_changes(tokens, tokenizer_run):
    return [
        *TINY_LM,
        f"data.path={tokens}",
        f"data.tokenizer={tokenizer_run}",
        f"run.steps={STEPS}",
        "run.log_every=2",
        "run.evaluate_every=3",
        "run.draw_every=4",
        "loss.label_smoothing=0.1",
        "optim.accumulate=2",
    ]


def run_tokenizer(changes, folder, *more, resume=False):
    changes = [*changes, f"run.folder={folder}", *more]
    return train_tokenizer(load_config(TokenizerTraining(), overrides=changes), resume=resume)


def run_lm(changes, folder, *more, resume=False):
    changes = [*changes, f"run.folder={folder}", *more]
    return train_lm(load_config(LMTraining(), overrides=changes), resume=resume)


def final_state(folder: Path) -> tuple:
    """Weights, optimizer, generators and metrics of a run; times left out."""
    _, checkpoint = load_latest(folder / "checkpoints")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        line.pop("seconds_per_step", None)
    return checkpoint.step, checkpoint.position, checkpoint.weights, checkpoint.state, metrics


def assert_same(a, b, where="state"):
    """Equal to the bit, through containers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("kind", ["tokenizer", "lm"])
def test_resumed_run_equals_uninterrupted_run(kind, tmp_path, request, monkeypatch):
    changes = request.getfixturevalue(f"{kind}_changes")
    run = run_tokenizer if kind == "tokenizer" else run_lm
    run(changes, tmp_path / "whole")

    # Stop after step 3 as max_hours does, then as if killed after step 6: the work since the
    # checkpoint of step 5 is lost, its metrics are there already.
    stopped = run(changes, tmp_path / "parts", "run.max_hours=1e-9", "run.checkpoint_every=1")
    assert stopped.step == 1 and stopped.stopped_by == "run.max_hours"

    class Killed(BaseException):
        pass

    import t2i.train.loop as loop

    save, saves = loop.save_checkpoint, []

    def save_then_die(folder, checkpoint, keep):
        saves.append(checkpoint.step)
        if checkpoint.step == 6:
            raise Killed
        return save(folder, checkpoint, keep)

    monkeypatch.setattr(loop, "save_checkpoint", save_then_die)
    with pytest.raises(Killed):
        run(changes, tmp_path / "parts", "run.checkpoint_every=1", resume=True)
    assert saves == [2, 3, 4, 5, 6]
    monkeypatch.undo()
    assert run(changes, tmp_path / "parts", resume=True).step == STEPS

    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
