"""The CUDA backend: csrc/cuda/vq_nearest.cuh, by csrc/bindings/vq_nearest_cuda.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import LIBRARY

# Of z and codebook ``invalid`` has the first row that is not finite, or -1.
LIBRARY.define(
    "vq_nearest_cuda(Tensor z, Tensor codebook, bool cosine, bool return_distance,"
    " bool return_counts) -> (Tensor indices, Tensor distance, Tensor counts, Tensor invalid)"
)


def vq_nearest(
    z: Tensor, codebook: Tensor, metric: str, return_distance: bool, return_counts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    cosine = metric == "cosine"
    *found, invalid = torch.ops.t2i.vq_nearest_cuda(
        z, codebook, cosine, return_distance, return_counts
    )
    for name, row in zip(("z", "codebook"), invalid < 0, strict=True):
        # Without waiting for the GPU.
        torch._assert_async(row, f"vq_nearest: {name} holds NaN or infinite values")
    return tuple(found)
