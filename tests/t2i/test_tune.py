"""t2i tune: what wins, what cannot, and that nothing measured is lost."""

from __future__ import annotations

import json

import pytest
import torch
from backends import backends
from typer.testing import CliRunner

from t2i import tune as tuner
from t2i.cli import app
from t2i_kernels import tuning

SECONDS = {1: 3.0, 2: 1.0, 3: 0.1, 4: 0.2}


def problem(size=32, wrong=(), failing=()):
    """A call whose answer and time depend on the option N of "kernel"."""

    def make(device):
        def call():
            n = tuning.choose("kernel", torch.zeros(1))["N"]
            if n in failing:
                raise RuntimeError("out of resources")
            return torch.tensor([2.0 if n in wrong else 1.0])

        return call

    return tuner.Problem("kernel", size, make, dict(N=tuple(SECONDS)))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(tuning.INTERPRETED, "kernel", dict(N=1))


def clock(call):
    call()
    return SECONDS[tuning.choose("kernel", torch.zeros(1))["N"]]


def run(file, *chosen, clock=clock):
    tuner.tune("cpu", file, chosen=list(chosen), clock=clock, report=lambda line: None)
    return json.loads(file.read_text()) if file.exists() else None


def test_the_fastest_wins(tmp_path):
    assert run(tmp_path / "new/tuned.json", problem()) == {"kernel": {"32": {"N": 3}}}
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new/tuned.json"]


def test_wrong_or_failing_ones_cannot_win(tmp_path):
    found = run(tmp_path / "tuned.json", problem(wrong=[3], failing=[4]))
    assert found == {"kernel": {"32": {"N": 2}}}


def test_nothing_runs(tmp_path):
    assert run(tmp_path / "tuned.json", problem(wrong=[2, 3, 4], failing=[])) == {
        "kernel": {"32": {"N": 1}}
    }


def test_an_interrupted_run_goes_on(tmp_path):
    file = tmp_path / "tuned.json"

    def interrupted(call):
        raise KeyboardInterrupt

    run(file, problem())
    with pytest.raises(KeyboardInterrupt):
        run(file, problem(), problem(size=64), clock=interrupted)
    assert run(file, problem(size=64)) == {"kernel": {"32": {"N": 3}, "64": {"N": 3}}}


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["tune"])
    assert isinstance(result.exception, RuntimeError)
    assert "torch finds none" in str(result.exception)


@pytest.mark.parametrize("backend", [p for p in backends("vq_nearest") if p.values[0] == "triton"])
def test_real_problems(tmp_path, backend):
    """Each problem's kernel takes each of its options."""
    chosen = tuner.problems(small=True)
    lines = []
    tuner.tune(
        "cpu", tmp_path / "t.json", chosen=chosen, clock=lambda call: 1.0, report=lines.append
    )
    assert [line for line in lines if line.startswith("  ")] == []  # of what failed
    found = json.loads((tmp_path / "t.json").read_text())
    for p in chosen:
        assert found[p.kernel][str(p.size)] in list(p.configs())
