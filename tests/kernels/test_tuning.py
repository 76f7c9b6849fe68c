"""Which launch options a kernel gets: by architecture and size, shipped or tuned."""

from __future__ import annotations

import pytest
import torch

from t2i_kernels import tuning


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setitem(
        tuning.TABLE, "kernel",
        {80: {128: dict(N=1), 512: dict(N=2)}, 90: {512: dict(N=3)}, tuning.AMD: {128: dict(N=4)}},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "size", "expected"),
    [(80, 128, 1), (80, 64, 1), (80, 129, 2), (86, 512, 2), (90, 512, 3), (120, 4096, 3),
     (90, 100, 1), ("gfx942", 100, 4), ("gfx942", 512, 2)],
)  # fmt: skip
def test_lookup(table, architecture, size, expected):
    """The next larger size; what an architecture does not have is that of those before it."""
    assert tuning.lookup("kernel", architecture, size) == dict(N=expected)


def test_tuned_sizes_go_first(table):
    """For all sizes that the shipped ones would have served."""
    tuned = {512: dict(N=9)}
    found = [tuning.lookup("kernel", 90, size, tuned)["N"] for size in (64, 128, 200, 512, 4096)]
    assert found == [1, 1, 9, 9, 9]


def test_options_of_a_block(monkeypatch):
    monkeypatch.setitem(tuning.INTERPRETED, "kernel", dict(N=1))
    x = torch.zeros(1)
    with pytest.raises(KeyError), tuning.use("kernel", dict(N=2)):
        assert tuning.choose("kernel", x) == dict(N=2)
        raise KeyError
    assert tuning.choose("kernel", x) == dict(N=1)


def test_files(tmp_path):
    assert tuning.read_tuned(tmp_path / "none.json") == {}
    file = tmp_path / "tuned.json"
    file.write_text('{"kernel": {"128": {"N": 4}}}')
    assert tuning.read_tuned(file) == {"kernel": {128: dict(N=4)}}
    for text in ("{", "[]", '{"kernel": {"many": {}}}'):
        damaged = tmp_path / f"{len(text)}.json"
        damaged.write_text(text)
        with pytest.raises(ValueError, match="damaged .*delete it, and run t2i tune again"):
            tuning.read_tuned(damaged)
