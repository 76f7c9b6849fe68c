"""Checkpoints of a training run: written whole or not at all, checked before they are used.

``FOLDER/step-00001000/`` holds one ``NAME.safetensors`` a module, ``state.pt`` with everything else
(optimizers, random number generators, running means), and ``checkpoint.json`` with the step, the
configuration and the checksum of every file. All of it is written under another name, flushed to
the disk and renamed: a folder with the final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT_VERSION = 1


class CorruptCheckpoint(ValueError):
    """Files that are missing, or are not those that were written."""


@dataclass
class Checkpoint:
    """Where a run is.

    Attributes:
        step: steps done.
        position: samples consumed; the place in the order of the data.
        weights: module name -> state dict.
        state: whatever ``torch.load(weights_only=True)`` reads: tensors, numbers, text, containers.
        config: of the run; JSON.
    """

    step: int
    position: int
    weights: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint, keep: int = 3) -> Path:
    """Write ``checkpoint`` into ``folder`` and remove all but the last ``keep``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover)
    final = folder / f"step-{checkpoint.step:08d}"
    part = folder / f".{final.name}"
    part.mkdir()
    for name, weights in checkpoint.weights.items():
        save_file(_independent(weights), part / f"{name}.safetensors")
    torch.save(checkpoint.state, part / "state.pt")
    description = {
        "format_version": FORMAT_VERSION,
        "step": checkpoint.step,
        "position": checkpoint.position,
        "config": checkpoint.config,
        "sha256": {file.name: _sha256(file) for file in sorted(part.iterdir())},
    }
    (part / "checkpoint.json").write_text(json.dumps(description, indent=2) + "\n")
    for path in (*part.iterdir(), part):
        _flush(path)
    if final.exists():  # damaged, or the run would not have come to this step again
        os.replace(final, folder / f"{part.name}-replaced")
    os.replace(part, final)
    _flush(folder)
    complete = _complete(folder)
    here = complete.index(final)
    # Those of later steps were damaged: the run came back to an earlier one and is behind them.
    for old in (*complete[:here], *complete[here + keep :], *folder.glob(".step-*")):
        shutil.rmtree(old)
    return final


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read one ``step-…`` folder, tensors on the CPU.

    Raises:
        CorruptCheckpoint: a file is missing, damaged or of another version.
    """
    path = Path(path)
    try:
        description = json.loads((path / "checkpoint.json").read_text())
        version = description["format_version"]
        if version != FORMAT_VERSION:
            raise CorruptCheckpoint(f"{path}: format {version}, this t2i reads {FORMAT_VERSION}")
        for name, checksum in description["sha256"].items():
            if _sha256(path / name) != checksum:
                raise CorruptCheckpoint(f"{path / name} is damaged: its checksum differs")
    except CorruptCheckpoint:
        raise
    except (OSError, KeyError, ValueError) as error:  # no file, no such entry, no JSON
        raise CorruptCheckpoint(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return Checkpoint(
        step=description["step"],
        position=description["position"],
        weights={file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))},
        state=torch.load(path / "state.pt", map_location="cpu", weights_only=True),
        config=description["config"],
    )


def load_latest(
    folder: str | Path, report: Callable[[str], None] = print
) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint in ``folder`` that is intact, None if there is none at all.

    ``report`` is told of each damaged one that is passed over.

    Raises:
        CorruptCheckpoint: there are checkpoints and every one is damaged: to start again in their
            place would be a surprise.
    """
    complete = _complete(Path(folder))
    for path in complete:
        try:
            return path, load_checkpoint(path)
        except CorruptCheckpoint as error:
            report(f"passing over a checkpoint: {error}")
    if complete:
        raise CorruptCheckpoint(f"none of the {len(complete)} checkpoints in {folder} is intact")
    return None


def seed_generators(seed: int) -> None:
    """Start every generator of ``rng_state``: what is not seeded differs from run to run."""
    torch.manual_seed(seed)  # of every device
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that training may draw from, as ``set_rng_state`` takes it."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _complete(folder: Path) -> list[Path]:
    """Folders with a checkpoint's final name, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _independent(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies that share no memory: safetensors refuses tied weights."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Ask the operating system to put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
