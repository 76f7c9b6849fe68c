"""Image features of many pictures."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.data.tokens import to_float

from .efficientnet import EfficientNetLite0

BATCH = 64
SIDE = 128  # pictures are enlarged to this side: the network was trained on larger ones


@torch.no_grad()
def image_features(
    network: EfficientNetLite0, images: np.ndarray, *, title: str = "", progress: bool = False
) -> Tensor:
    """Pooled features fp32 [N, 1280] of uint8 [N, S, S, 3]."""
    from rich.progress import track

    network = network.to(memory_format=torch.channels_last)
    features = []
    starts = range(0, len(images), BATCH)
    for first in track(starts, title, disable=not progress, transient=True):
        pixels = to_float(torch.from_numpy(np.array(images[first : first + BATCH])))
        pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        features.append(network(pixels.clamp(-1, 1).contiguous(memory_format=torch.channels_last)))
    return torch.cat(features)
