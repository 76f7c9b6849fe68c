"""Ridge alignment: does a picture agree with its caption more than with others?

A ridge map from image to text features is fitted on real pictures; a picture's caption is then
looked for among others by cosine. A map that had seen a concept would score its pictures by memory,
so the concepts are divided into folds: a picture is scored by the map that was fitted without its
fold, among the concepts of that fold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .metrics import RidgeMap, ranks

FOLDS = 5
PENALTY = 1.0
TAGS = 5  # of a concept, in its description
WITHIN = (1, 5, 10)


class RidgeAlignment:
    """Fitted on all pictures of a dataset.

    Args:
        pairs: of the dataset; [N].
        images: image features of its pictures [N, D].
        texts: texts -> features [M, E].

    Raises:
        ValueError: fewer than two concepts a fold.
    """

    def __init__(self, pairs: Sequence[dict], images: Tensor, texts) -> None:
        described = {concept(pair): description(pair) for pair in reversed(pairs)}
        names = sorted(described, key=lambda name: hashlib.sha256(name.encode()).digest())
        if len(names) < 2 * FOLDS:
            raise ValueError(f"{len(names)} concepts: expected at least {2 * FOLDS}")
        # Fold f has the concepts f, f + FOLDS, f + 2 FOLDS ... of this order.
        index = {name: i for i, name in enumerate(names)}
        self.concepts = torch.tensor([index[concept(pair)] for pair in pairs])
        self.texts = texts([described[name] for name in names])
        self.maps = []
        for fold in range(FOLDS):
            others = self.concepts % FOLDS != fold
            own = self.texts[self.concepts[others]]
            self.maps.append(RidgeMap.fit(images[others], own, PENALTY))

    @property
    def candidates(self) -> float:
        """Among how many concepts one is looked for, on average."""
        return len(self.texts) / FOLDS

    def ranks(self, rows: Tensor, images: Tensor) -> Tensor:
        """Rank [M], from 0, of the right concept for pictures with the features [M, D] that were
        drawn for the captions of ``rows``."""
        concepts = self.concepts[rows]
        found = torch.empty(len(rows), dtype=torch.int64)
        for fold, ridge in enumerate(self.maps):
            mine = concepts % FOLDS == fold
            similarity = ridge.similarity(images[mine], self.texts[fold::FOLDS])
            found[mine] = ranks(similarity, concepts[mine] // FOLDS)
        return found

    def __call__(self, rows: Tensor, images: Tensor) -> dict[str, float]:
        """Share of the pictures whose concept is found first, within five, within ten."""
        found = self.ranks(rows, images)
        return {f"top{k}": (found < k).double().mean().item() for k in WITHIN}

    def chance(self) -> dict[str, float]:
        """What pictures that have nothing to do with their captions would score."""
        return {f"top{k}": min(1.0, k / self.candidates) for k in WITHIN}


def concept(pair: dict) -> str:
    """What a picture shows, whatever its style and the skin tone."""
    return pair.get("base") or pair.get("label") or pair["caption"]


def description(pair: dict) -> str:
    """The text a concept is found by."""
    tags = ", ".join((pair.get("tags") or [])[:TAGS])
    return f"{concept(pair)}: {tags}" if tags else concept(pair)
