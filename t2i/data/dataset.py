"""A set of pictures with captions, as a folder that is mapped into memory.

``images.npy``: uint8 [N, S, S, 3]. ``pairs.jsonl``: one line an image with ``caption``, ``split``
and what else the set knows (``label``, ``style``, ``tags``). ``dataset.json``: counts, checksums,
sources and their licences; it is written last and marks the folder as complete.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from .files import read_info, read_jsonl

FORMAT_VERSION = 1
SPLITS = ("train", "unseen_pairs", "unseen_labels")


class ImageTextDataset:
    """Read-only view of a dataset folder, or of one split of it.

    ``images`` and ``pairs`` are those of the whole set; ``rows`` are the indices of the split, over
    which ``len`` and ``[]`` go.

    Raises:
        FileNotFoundError: no dataset at ``path``, or an unfinished one.
        ValueError: another version, an unknown split, or with ``verify`` a wrong checksum.
    """

    def __init__(self, path: str | Path, split: str | None = None, *, verify: bool = False):
        self.path = Path(path)
        self.info = read_info(
            self.path, "dataset.json", FORMAT_VERSION, verify=verify, maker="t2i data"
        )
        self.pairs = read_jsonl(self.path / "pairs.jsonl")
        self.images = np.load(self.path / "images.npy", mmap_mode="r")
        self.rows = rows_of(self.pairs, split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict]:
        """(image uint8 [S, S, 3], pair)."""
        row = self.rows[index]
        return self.images[row], self.pairs[row]

    @property
    def image_size(self) -> int:
        return self.images.shape[1]

    @property
    def checksum(self) -> str:
        """SHA-256 of the images."""
        return self.info["sha256"]["images.npy"]


def rows_of(pairs: list[dict], split: str | None) -> np.ndarray:
    """Indices int64 of the pairs of a split, of all for None."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return np.array([i for i, p in enumerate(pairs) if split in (None, p["split"])], dtype=np.int64)


def plain_caption(label: str, style: str | None) -> str:
    """What a picture is called: "shark, twemoji style"."""
    return f"{label}, {style} style" if style else label


def unit_hash(text: str) -> float:
    """A number in [0, 1) that looks random and is the same on every machine: splits follow it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
