"""Files of weights, whoever wrote them, as plain state dicts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# Of containers around a state dict. What a wrapper puts in front of every name goes as well.
CONTAINERS = ("state_dict", "model", "module")
_WRAPPERS = re.compile(r"^((module|model|_orig_mod)\.)+")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises:
    FileNotFoundError: nothing at ``path``.
    ValueError: the file is damaged, or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error


def read_state_dict(path: Path, containers: Sequence[str] = CONTAINERS) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file out of its containers.

    Args:
        containers: names under which a torch file may keep its state dict, the preferred one first.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: not a file of plain tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        found = read_safetensors(path)
    else:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # a run's arguments
                found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} is not a file of plain tensors ({type(error).__name__}); pickled objects "
                "are not loaded: save its state dict alone and try again"
            ) from error
    for container in containers:
        if isinstance(found, dict) and isinstance(found.get(container), dict):
            found = found[container]
    tensors = found if isinstance(found, dict) else {}
    tensors = {name: value for name, value in tensors.items() if torch.is_tensor(value)}
    if not tensors:
        raise ValueError(f"{path} holds no state dict")
    return {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
