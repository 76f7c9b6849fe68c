"""The order of training data: every sample once an epoch, as a function of the position alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import t2i.train.data as data
from t2i.train.data import DataOrder, LengthGroups, augmented

SAMPLES = np.arange(100, 196)  # 96: three groups of eight batches of four


def groups(seed=0, batch_size=4):
    # A sample is as long as its draw says, so lengths differ between epochs.
    return LengthGroups(
        DataOrder(SAMPLES, seed),
        batch_size,
        draw=lambda sample, rng: (sample, int(rng.integers(1, 30))),
        length=lambda item: item[1],
    )


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_order_has_every_sample_once_an_epoch(epoch):
    samples, epochs = DataOrder(SAMPLES, seed=3)(epoch * 96, 96)
    assert sorted(samples) == list(SAMPLES) and set(epochs) == {epoch}
    assert list(samples) != list(DataOrder(SAMPLES, seed=3)((epoch + 1) * 96, 96)[0])
    assert list(samples) != list(DataOrder(SAMPLES, seed=4)(epoch * 96, 96)[0])


def test_order_may_be_read_in_any_pieces():
    order = DataOrder(SAMPLES, seed=0)
    whole, _ = order(0, 300)
    pieces = np.concatenate([order(start, 7)[0] for start in range(0, 294, 7)])
    assert (pieces == whole[:294]).all()


def test_groups_have_every_sample_once_an_epoch():
    batches = groups()
    for epoch in range(3):
        starts = range(epoch * 96, (epoch + 1) * 96, 4)
        drawn = Counter(sample for start in starts for sample, _ in batches(start))
        assert drawn == Counter(SAMPLES.tolist())


def test_a_batch_depends_on_its_position_alone():
    inorder, batches = groups(), groups()
    wanted = {start: inorder(start) for start in range(0, 288, 4)}
    for start in np.random.default_rng(0).permutation(list(wanted)).tolist():
        assert batches(start) == wanted[start]
    assert [groups(seed=1)(start) for start in wanted] != list(wanted.values())


def test_groups_pad_less_and_come_in_random_order():
    def padding(batches):
        return sum(max(n) * len(n) - sum(n) for n in batches)

    grouped = [[n for _, n in groups()(start)] for start in range(0, 960, 4)]
    order = DataOrder(SAMPLES, 0)
    plain = []
    for start in range(0, 960, 4):
        generators = order.generators(*order(start, 4))
        plain.append([int(rng.integers(1, 30)) for rng in generators])
    assert sorted(sum(grouped, [])) == sorted(sum(plain, []))
    assert padding(grouped) < padding(plain) / 3
    # Short ones first every time would be a rhythm in the gradient.
    first = [sorted(range(8), key=lambda i: sum(grouped[g * 8 + i])) for g in range(30)]
    assert len({tuple(order) for order in first}) > 20


def test_ranks_share_a_batch(monkeypatch):
    wanted = [groups()(start) for start in range(0, 96, 4)]
    monkeypatch.setattr(data, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        parts.append([groups()(start) for start in range(0, 96, 4)])
    assert [a + b for a, b in zip(*parts, strict=True)] == wanted
    assert {len(batch) for batch in parts[0]} == {2}
    with pytest.raises(ValueError, match="optim.batch_size=3: expected a multiple of 2"):
        groups(batch_size=3)


def test_augmentation_moves_and_mirrors_each_image_its_own_way():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    order = DataOrder(np.arange(40), 0)
    generators = order.generators(np.arange(40), np.zeros(40, dtype=np.int64))
    out = augmented(images, generators, flip=0.5, shift=2)
    found = Counter()
    for before, after in zip(images, out, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)), mode="edge")
        ways = [
            (mirrored, top, left)
            for mirrored in (False, True)
            for top in range(5)
            for left in range(5)
            if (padded[top : top + 8, left : left + 8][:, :: -1 if mirrored else 1] == after).all()
        ]
        assert len(ways) == 1
        found[ways[0]] += 1
    assert {way[0] for way in found} == {False, True} and len(found) > 15
    assert (augmented(images, generators, flip=0, shift=0) == images).all()
    assert (augmented(images, generators, flip=1, shift=0) == images[:, :, ::-1]).all()
