"""Checkpoints: whole or not there, checked, and no more of them than asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import t2i.train.checkpoint as module
from t2i.train.checkpoint import (
    Checkpoint,
    CorruptCheckpoint,
    load_checkpoint,
    load_latest,
    rng_state,
    save_checkpoint,
    set_rng_state,
)

CPU = torch.device("cpu")


def checkpoint(step: int) -> Checkpoint:
    weight = torch.full((2, 3), float(step))
    channels_last = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    weights = {"weight": weight, "tied": weight, "kernel": channels_last}
    state = {"a": [1, (2.5, "x")], "moments": {0: torch.arange(3)}}
    return Checkpoint(step, 10 * step, {"model": weights, "ema": {}}, state, {"lr": 1e-3})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path):
    written = checkpoint(3)
    read = load_checkpoint(save_checkpoint(tmp_path, written))
    assert (read.step, read.position, read.config) == (3, 30, {"lr": 1e-3})
    assert read.weights.keys() == written.weights.keys()
    for name, tensor in written.weights["model"].items():
        assert torch.equal(read.weights["model"][name], tensor)
    assert read.state["a"] == written.state["a"]
    assert torch.equal(read.state["moments"][0], torch.arange(3))


def test_only_the_last_are_kept(tmp_path):
    for step in (1, 2, 9, 10, 11):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    path, latest = load_latest(tmp_path)
    assert path.name == "step-00000011" and latest.step == 11


def test_none_is_none(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("write", ["save_file", "_sha256", "_flush"])
def test_a_half_written_one_is_never_read(tmp_path, monkeypatch, write):
    save_checkpoint(tmp_path, checkpoint(1))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, write, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, checkpoint(2))
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2  # something is left
    reports = []
    assert load_latest(tmp_path, reports.append)[1].step == 1 and not reports
    save_checkpoint(tmp_path, checkpoint(2))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_reported_and_passed_over(tmp_path, file, damage):
    save_checkpoint(tmp_path, checkpoint(1))
    path = save_checkpoint(tmp_path, checkpoint(2)) / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    reports = []
    assert load_latest(tmp_path, reports.append)[1].step == 1
    assert len(reports) == 1 and "step-00000002" in reports[0] and "damaged" in reports[0]


def test_all_damaged_is_an_error_not_a_new_start(tmp_path):
    for step in (1, 2):
        (save_checkpoint(tmp_path, checkpoint(step)) / "state.pt").unlink()
    with pytest.raises(CorruptCheckpoint, match="none of the 2 checkpoints"):
        load_latest(tmp_path, lambda _: None)


def test_a_damaged_newest_does_not_displace_the_good_one(tmp_path):
    save_checkpoint(tmp_path, checkpoint(100))
    (save_checkpoint(tmp_path, checkpoint(200)) / "state.pt").unlink()
    # The run goes on from 100 and comes to 150; keep=1 must keep that one.
    save_checkpoint(tmp_path, checkpoint(150), keep=1)
    assert names(tmp_path) == ["step-00000150"]
    # And to the same step again.
    (tmp_path / "step-00000150" / "state.pt").unlink()
    save_checkpoint(tmp_path, checkpoint(150), keep=1)
    assert load_latest(tmp_path)[1].step == 150


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT_VERSION", 99)
    path = save_checkpoint(tmp_path, checkpoint(1))
    monkeypatch.undo()
    with pytest.raises(CorruptCheckpoint, match="format 99, this t2i reads 1"):
        load_checkpoint(path)


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            random.random(),
            random.gauss(0, 1),
        )

    random.gauss(0, 1)  # of which Python keeps a second one for later
    np.random.randn(1)
    state = Checkpoint(1, 0, {}, {"rng": rng_state(CPU)})
    expected = draw()
    draw()
    set_rng_state(load_checkpoint(save_checkpoint(tmp_path, state)).state["rng"], CPU)
    assert draw() == expected
