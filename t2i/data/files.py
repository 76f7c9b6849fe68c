"""Files that are written whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    part = _part(path)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_array(path: Path, array: np.ndarray) -> None:
    part = _part(path)
    with open(part, "wb") as f:
        np.save(f, array)
    os.replace(part, path)


def concatenate(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write arrays one behind the other as one, with no more than one of them in memory."""
    part = _part(path)
    shape = (sum(len(a) for a in arrays), *arrays[0].shape[1:])
    whole = np.lib.format.open_memmap(part, mode="w+", dtype=arrays[0].dtype, shape=shape)
    start = 0
    for array in arrays:
        whole[start : start + len(array)] = array
        start += len(array)
    whole.flush()
    del whole
    os.replace(part, path)


def finish(path: Path, name: str, info: dict, files: Sequence[str], version: int) -> None:
    """Write the description that marks a folder as complete, with the checksums of its files."""
    sums = {file: sha256(path / file) for file in files}
    write_json(path / name, {"format_version": version, **info, "sha256": sums})


def read_info(path: Path, name: str, version: int, *, verify: bool, maker: str = "") -> dict:
    """Read what ``finish`` wrote, and check it. ``maker`` is the command that makes such folders.

    Raises:
        FileNotFoundError: nothing was finished there.
        ValueError: another version, or with ``verify`` a file that is not the one described.
    """
    if not (path / name).exists():
        hint = f": {maker} makes one" if maker else ""
        raise FileNotFoundError(f"{path} holds no finished {name}{hint}")
    info = json.loads((path / name).read_text(encoding="utf-8"))
    if info.get("format_version") != version:
        raise ValueError(
            f"{path / name}: format version {info.get('format_version')}, expected {version}"
        )
    damaged = damaged_files(path, info) if verify else []
    if damaged:
        raise ValueError(
            f"{path}: {', '.join(damaged)} missing or not matching the checksum in {name}"
        )
    return info


def damaged_files(path: Path, info: dict) -> list[str]:
    """Names of the files of a folder that are missing or are not those described."""
    return [
        file
        for file, expected in info["sha256"].items()
        if not (path / file).exists() or sha256(path / file) != expected
    ]


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
