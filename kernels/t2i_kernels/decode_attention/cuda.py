"""The CUDA backend: csrc/cuda/decode_attention.cuh, by csrc/bindings/decode_attention_cuda.cpp.

A row whose new tokens have no slots or no positions gets NaN, and its cache stays as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import LIBRARY
from .counters import lend_counters

LIBRARY.define(
    "decode_attention_cuda(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_cache,"
    " Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor seqlens, Tensor start,"
    " Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, int window, float softcap,"
    " float scale, Tensor(e!) counters) -> Tensor out"
)


def decode_attention(q: Tensor, k_new: Tensor, v_new: Tensor, k_cache: Tensor, *rest) -> Tensor:
    (batch, tokens, heads, dim), (_, slots, kv_heads, _) = q.shape, k_cache.shape
    # As csrc/cuda/decode_attention.h says: a block has 64 KB of keys, and at least 8 queries of
    # those that share them. Where one has all keys there is nothing to combine.
    splits = slots * (128 if dim > 64 else 64) * k_cache.element_size() > 64 << 10
    tiles = -(-tokens * (heads // max(kv_heads, 1)) // 8)
    counters = lend_counters(q, batch * kv_heads * tiles if splits else 0)
    return torch.ops.t2i.decode_attention_cuda(q, k_new, v_new, k_cache, *rest, counters)
