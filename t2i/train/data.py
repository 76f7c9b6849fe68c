"""The order of the data and its random changes, as functions of a position and nothing else.

Sample p of a run, counted from 0 over all epochs, is entry p mod n of the permutation of epoch
p div n. What augmentation does to it follows from (seed, epoch, sample). So one integer says where
a run is, and a resumed run sees what the interrupted one would have seen. Reading a memory-mapped
array of small images takes a fraction of a millisecond: no worker processes are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from .distributed import rank, world_size

T = TypeVar("T")
_ORDER, _SAMPLE, _GROUP = 1, 2, 3  # keep the streams of random numbers apart


class DataOrder:
    """Which samples come when.

    Args:
        indices: the samples, e.g. those of a split; [n].
        seed: of the order and of the changes.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, indices: np.ndarray | list[int], seed: int):
        self.indices = np.asarray(indices, dtype=np.int64)
        if not len(self.indices):
            raise ValueError("there are no samples to train on: is the train split empty?")
        self.seed = seed
        self._epoch, self._permutation = -1, self.indices

    def __call__(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(samples, epochs), int64 [count] each, at positions start, start + 1, ..."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self.indices))
        samples = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self._samples_of(int(epoch))[places[here]]
        return samples, epochs

    def generators(self, samples: np.ndarray, epochs: np.ndarray) -> list[np.random.Generator]:
        """The source of the random changes to each sample."""
        return [
            np.random.default_rng((_SAMPLE, self.seed, epoch, sample))
            for sample, epoch in zip(samples.tolist(), epochs.tolist(), strict=True)
        ]

    def _samples_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.default_rng((_ORDER, self.seed, epoch))
            self._epoch, self._permutation = epoch, rng.permutation(self.indices)
        return self._permutation


def local_batch(
    order: DataOrder, position: int, batch_size: int
) -> tuple[np.ndarray, list[np.random.Generator]]:
    """This rank's part of the batch at ``position``, and the generator of each of its samples.

    Raises:
        ValueError: the batch cannot be split evenly.
    """
    share = _share(batch_size)
    samples, epochs = order(position + rank() * share, share)
    return samples, order.generators(samples, epochs)


class LengthGroups(Generic[T]):
    """Batches of items of similar length, so that little of a batch is padding.

    ``GROUP`` batches are drawn together, sorted by length, cut, and come in random order: every
    sample still comes once an epoch, and a batch is a function of its position.

    Args:
        order: of the samples.
        batch_size: over all ranks; positions are multiples of it, others count as the last one.
        draw: (sample, its generator) -> item.
        length: of an item.

    Raises:
        ValueError: a batch cannot be split evenly among the ranks.
    """

    GROUP = 8

    def __init__(
        self,
        order: DataOrder,
        batch_size: int,
        draw: Callable[[int, np.random.Generator], T],
        length: Callable[[T], int],
    ):
        self.order, self.batch_size, self.draw, self.length = order, batch_size, draw, length
        self.share = _share(batch_size)
        self._group, self._batches = -1, []

    def __call__(self, position: int) -> list[T]:
        """This rank's part of the batch at ``position``."""
        group, batch = divmod(position // self.batch_size, self.GROUP)
        if group != self._group:
            self._group, self._batches = group, self._batches_of(group)
        return self._batches[batch][rank() * self.share :][: self.share]

    def _batches_of(self, group: int) -> list[list[T]]:
        count = self.GROUP * self.batch_size
        samples, epochs = self.order(group * count, count)
        generators = self.order.generators(samples, epochs)
        items = [self.draw(*pair) for pair in zip(samples.tolist(), generators, strict=True)]
        items.sort(key=self.length)
        shuffled = np.random.default_rng((_GROUP, self.order.seed, group)).permutation(self.GROUP)
        return [items[i * self.batch_size :][: self.batch_size] for i in shuffled.tolist()]


def _share(batch_size: int) -> int:
    """Samples of a batch on each rank."""
    if batch_size % world_size():
        raise ValueError(f"optim.batch_size={batch_size}: expected a multiple of {world_size()}")
    return batch_size // world_size()


def augmented(
    images: np.ndarray, generators: list[np.random.Generator], *, flip: float, shift: int
) -> np.ndarray:
    """Mirror and move images uint8 [B, H, W, 3]; the edge is repeated.

    ``flip`` is a probability; both offsets are uniform in [-shift, shift].
    """
    _, height, width, _ = images.shape
    out = np.empty_like(images)
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    for i, rng in enumerate(generators):
        mirrored = rng.random() < flip
        top, left = rng.integers(0, 2 * shift + 1, size=2)
        image = padded[i, top : top + height, left : left + width]
        out[i] = image[:, ::-1] if mirrored else image
    return out


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` of the rows, evenly spaced: of a sorted set, some of every kind."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows[places.round().astype(np.int64)]
