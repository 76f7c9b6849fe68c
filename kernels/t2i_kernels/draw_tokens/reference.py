"""draw_tokens in plain PyTorch: the references of decode_step and draw, in turns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..decode_step.reference import decode_step
from ..draw.reference import draw


def draw_tokens(
    codes: Tensor,
    embedding: Tensor,
    count: int,
    seeds: Tensor,
    positions: Tensor,
    guidance: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    *model: Any,
) -> Tensor:
    """``model``: the arguments of ``CACHE_SCHEMA`` of decode_step, of which one changes."""
    before, seqlens, behind = model[:13], model[13], model[14:]
    drawn = torch.empty(len(codes), count, dtype=torch.int64)
    for i in range(count):
        x = embedding[codes][:, None]
        x = x if guidance is None else torch.cat([x, x])
        logits = decode_step(x, *before, seqlens + i, *behind, 1)
        scales = None if guidance is None else guidance[:, i : i + 1]
        codes = draw(logits, seeds, positions + i, scales, temperature, top_k, top_p)[:, 0]
        drawn[:, i] = codes
    return drawn
