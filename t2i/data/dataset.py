"""A set of pictures with captions, as a folder that is mapped into memory.

``images.npy``: uint8 [N, S, S, 3]. ``pairs.jsonl``: one line an image with ``caption``, ``split``
and what else the set knows (``label``, ``style``, ``tags``). ``dataset.json``: counts, checksums,
sources and their licences; it is written last and marks the folder as complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
SPLITS = ("train", "unseen_pairs", "unseen_labels")


class ImageTextDataset:
    """Read-only view of a dataset folder, or of one split of it.

    Raises:
        FileNotFoundError: no dataset at ``path``, or an unfinished one.
        ValueError: another version, an unknown split, or with ``verify`` a wrong checksum.
    """

    def __init__(self, path: str | Path, split: str | None = None, *, verify: bool = False):
        self.path = Path(path)
        self.info = read_info(self.path, "dataset.json", FORMAT_VERSION, verify=verify)
        self.pairs = read_jsonl(self.path / "pairs.jsonl")
        self.images = np.load(self.path / "images.npy", mmap_mode="r")
        self.rows = np.arange(len(self.pairs))
        if split is not None:
            if split not in SPLITS:
                raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
            self.rows = np.array(
                [i for i, pair in enumerate(self.pairs) if pair["split"] == split], dtype=np.int64
            )

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


def write_dataset(path: Path, images: np.ndarray, pairs: list[dict], info: dict) -> None:
    """Write a dataset folder; ``dataset.json`` last."""
    path.mkdir(parents=True, exist_ok=True)
    write_array(path / "images.npy", images)
    write_jsonl(path / "pairs.jsonl", pairs)
    splits = {s: sum(pair["split"] == s for pair in pairs) for s in SPLITS}
    finish(path, "dataset.json", {**info, "images": len(pairs), "splits": splits},
           ["images.npy", "pairs.jsonl"], FORMAT_VERSION)  # fmt: skip


def finish(path: Path, name: str, info: dict, files: list[str], version: int) -> None:
    """Write the description that marks a folder as complete, with the checksums of its files."""
    sums = {file: sha256(path / file) for file in files}
    write_text(
        path / name,
        json.dumps({"format_version": version, **info, "sha256": sums}, indent=2) + "\n",
    )


def read_info(path: Path, name: str, version: int, *, verify: bool) -> dict:
    if not (path / name).exists():
        raise FileNotFoundError(f"{path} holds no finished {name}")
    info = json.loads((path / name).read_text())
    if info.get("format_version") != version:
        raise ValueError(
            f"{path / name}: format version {info.get('format_version')}, expected {version}"
        )
    if verify:
        for file, expected in info["sha256"].items():
            if sha256(path / file) != expected:
                raise ValueError(f"{path / file} does not match its checksum in {name}")
    return info


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_jsonl(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_array(path: Path, array: np.ndarray) -> None:
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        np.save(f, array)
    os.replace(part, path)
