"""Checkpoints that are whole or not there: a folder a step, renamed into place when written."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_checkpoint(
    folder: Path, step: int, weights: dict[str, dict[str, Tensor]], state: Any, keep: int
) -> None:
    """Write ``folder/<step>``: a .safetensors for each of ``weights`` and ``state.pt``.

    Older ones than the last ``keep`` are removed once the new one is in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".part-{step:08d}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for name, tensors in weights.items():
        save_file(
            {k: t.detach().contiguous() for k, t in tensors.items()}, part / f"{name}.safetensors"
        )
    torch.save(state, part / "state.pt")
    for file in part.iterdir():
        _sync(file)
    final = folder / f"{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    _sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest last."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def load_checkpoint(folder: Path, names: tuple[str, ...]) -> tuple[int, dict, Any] | None:
    """(step, weights, state) of the newest checkpoint that can be read; None if there is none.

    A damaged one is reported and the one before it is taken.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            weights = {name: load_file(path / f"{name}.safetensors") for name in names}
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # each library has its own for a damaged file
            warnings.warn(f"checkpoint {path} cannot be read and is skipped: {error}", stacklevel=2)
            continue
        return int(path.name), weights, state
    return None


def _sync(path: Path) -> None:
    """Make the system write a file or a folder out before its name changes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
