"""draw_tokens in plain PyTorch: the references of decode_step and draw, in turns."""

from __future__ import annotations

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
    weights: Tensor,
    vectors: Tensor,
    weight_type: str,
    heads: int,
    ffn_dim: int,
    outputs: int,
    norm: str,
    norm_eps: float,
    qk_norm: str,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    seqlens: Tensor,
    start: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    positions_from_start: bool,
) -> Tensor:
    drawn = torch.empty(len(codes), count, dtype=torch.int64)
    for i in range(count):
        x = embedding[codes][:, None]
        logits = decode_step(
            x if guidance is None else torch.cat([x, x]), weights, vectors, weight_type, heads,
            ffn_dim, outputs, norm, norm_eps, qk_norm, k_cache, v_cache, k_scale, v_scale,
            seqlens + i, start, rotary_cos, rotary_sin, rotary_interleaved, positions_from_start, 1,
        )  # fmt: skip
        scales = None if guidance is None else guidance[:, i : i + 1]
        codes = draw(logits, seeds, positions + i, scales, temperature, top_k, top_p)[:, 0]
        drawn[:, i] = codes
    return drawn
