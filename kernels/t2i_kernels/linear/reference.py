"""linear in plain PyTorch: unpack, multiply."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .packed import quantize_inputs, unpack


def linear(x: Tensor, weights: Tensor, outputs: int, weight_type: str) -> Tensor:
    if weight_type in ("int8", "int4"):
        x = quantize_inputs(x)
    return F.linear(x, unpack(weights, outputs, x.shape[-1], weight_type))
