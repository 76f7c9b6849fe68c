"""rotary in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decode_attention.reference import rotate


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    if positions is None:
        cos, sin = cos[: x.shape[-3]], sin[: x.shape[-3]]
    else:
        check_positions(positions, len(cos))
        cos, sin = cos[positions], sin[positions]
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    rows = x if x.dim() == 4 else x[None]
    return rotate(rows, cos, -sin if inverse else sin, interleaved).contiguous().view(x.shape)


def check_positions(positions: Tensor, rows: int) -> None:
    """Raises IndexError for a position outside tables of so many rows; on a device an assertion,
    without waiting for it."""
    if not positions.numel():
        return
    if positions.device.type != "cpu":
        inside = (positions >= 0) & (positions < rows)
        torch._assert_async(inside.all(), f"rotary: positions must be from 0 to {rows - 1}")
        return
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= rows:
        raise IndexError(
            f"rotary: positions from {low} to {high} are outside the tables, which have {rows}"
        )
