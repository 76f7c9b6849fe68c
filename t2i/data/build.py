"""Draws a dataset folder from a list of pictures to be; the two builders say what is in the list.

Pictures are drawn in parts, each a file in ``parts-KEY``. The key follows from the inputs: a call
that was killed goes on behind its last part, and one with other inputs starts anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .dataset import FORMAT_VERSION, SPLITS
from .files import (
    concatenate,
    damaged_files,
    finish,
    read_info,
    read_jsonl,
    write_array,
    write_jsonl,
)

PART = 256  # pictures


class Rejected(ValueError):
    """A picture that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Entry:
    """A picture to be: its name for messages, its line of ``pairs.jsonl``, where it comes from."""

    name: str
    pair: dict
    source: Any


@dataclass
class Summary:
    """What became of the entries: ``images`` is how many were kept; each of ``rejected`` has a
    ``file`` and a ``reason``. ``built`` is False where the dataset was there already."""

    images: int
    rejected: list[dict] = field(default_factory=list)
    built: bool = True

    def __str__(self) -> str:
        done = "built" if self.built else "up to date"
        return f"{done}: {self.images} pictures, {len(self.rejected)} rejected"


def build_dataset(
    path: Path,
    entries: Sequence[Entry],
    draw: Callable[[Any], Image.Image],
    *,
    size: int,
    info: dict,
    inputs: object = None,
    rejected: Sequence[dict] = (),
    progress: bool = True,
    report: Callable[[str], None] = print,
) -> Summary:
    """Write the dataset folder ``path``, unless it is there already and intact.

    Args:
        draw: source -> RGB picture of ``size`` pixels a side. Whatever it raises rejects the
            picture, under its name; nothing else stops.
        info: for ``dataset.json``; ``name`` says what the set is.
        inputs: what else a picture depends on, JSON; part of the key.
        rejected: entries that were found wanting before.
        report: told of each rejected entry.

    Raises:
        FileExistsError: ``path`` holds a dataset of another name, which this would replace.
        ValueError: every picture was rejected.
    """
    key = _key([info, inputs, [entry.pair for entry in entries], list(rejected)])
    with contextlib.suppress(FileNotFoundError):
        old = read_info(path, "dataset.json", FORMAT_VERSION, verify=False)
        if old["name"] != info["name"]:
            raise FileExistsError(
                f"{path} holds the dataset {old['name']!r}: delete it, or name another folder"
            )
        if old["inputs_sha256"] == key and not damaged_files(path, old):
            return Summary(old["images"], read_jsonl(path / "rejected.jsonl"), built=False)
    for entry in rejected:
        report(f"rejected {entry['file']}: {entry['reason']}")
    parts = path / f"parts-{key[:16]}"
    parts.mkdir(parents=True, exist_ok=True)
    rejected, pairs, images = list(rejected), [], []
    with (
        ThreadPoolExecutor(_cores()) as pool,
        progress_bar(progress, info["name"], len(entries)) as advance,
    ):
        for start in range(0, len(entries), PART):
            part = entries[start : start + PART]
            drawn, reasons = _part(parts / f"{start:08d}", part, draw, size, pool)
            for entry, reason in zip(part, reasons, strict=True):
                if reason is None:
                    pairs.append(entry.pair)
                else:
                    rejected.append({"file": entry.name, "reason": reason})
                    report(f"rejected {entry.name}: {reason}")
            images.append(drawn)
            advance(len(part))
    if not pairs:
        raise ValueError(f"{path}: no usable picture among {len(rejected)}, see the reasons above")
    # From here on the folder is in neither state; without its description it counts as unfinished.
    (path / "dataset.json").unlink(missing_ok=True)
    concatenate(path / "images.npy", images)
    write_jsonl(path / "pairs.jsonl", pairs)
    write_jsonl(path / "rejected.jsonl", rejected)
    counts = {split: sum(pair["split"] == split for pair in pairs) for split in SPLITS}
    info = {**info, "size": size, "images": len(pairs), "rejected": len(rejected), "splits": counts}
    info["inputs_sha256"] = key
    files = ["images.npy", "pairs.jsonl", "rejected.jsonl"]
    finish(path, "dataset.json", info, files, FORMAT_VERSION)
    for leftover in path.glob("parts-*"):
        shutil.rmtree(leftover)
    return Summary(len(pairs), rejected)


def _part(name, entries, draw, size, pool) -> tuple[np.ndarray, list[str | None]]:
    """(pictures, reason of rejection or None of each entry), drawn or read."""
    images_file, reasons_file = name.with_suffix(".npy"), name.with_suffix(".jsonl")
    if not reasons_file.exists():  # written last
        drawn = list(pool.map(lambda entry: _attempt(draw, entry.source, size), entries))
        images = [image for image, _ in drawn if image is not None]
        write_array(images_file, np.array(images, dtype=np.uint8).reshape(-1, size, size, 3))
        write_jsonl(reasons_file, ({"reason": reason} for _, reason in drawn))
    reasons = [line["reason"] for line in read_jsonl(reasons_file)]
    return np.load(images_file, mmap_mode="r"), reasons


def _attempt(draw, source, size) -> tuple[np.ndarray | None, str | None]:
    try:
        image = draw(source)
    except Rejected as error:
        return None, str(error)
    except Exception as error:  # decoders raise all kinds; none may end the build
        return None, f"{type(error).__name__}: {error}"
    assert image.mode == "RGB" and image.size == (size, size)
    return np.asarray(image), None


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _cores() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def progress_bar(show: bool, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar; the function it gives is told how many more are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)
