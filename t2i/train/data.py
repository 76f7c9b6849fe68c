"""The order of the training data as a function of the step, so that a run resumes from a number."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class Order:
    """Endless shuffled passes over ``n`` samples in batches.

    Nothing is advanced: batch ``i`` follows from (seed, i). A batch may span two passes.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1:
            raise ValueError("the training split is empty")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def batch(self, index: int) -> np.ndarray:
        """int64 [batch_size], which samples make up a batch."""
        positions = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        return np.array([self._epoch(p // self.n)[p % self.n] for p in positions.tolist()])

    def rng(self, index: int) -> np.random.Generator:
        """Random numbers for the augmentation of a batch."""
        return np.random.default_rng([self.seed, 1, index])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.n)
