"""decode_step in plain PyTorch. Slow: it unpacks all weights in every call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decode_attention.reference import decode_attention, rotate
from ..linear.packed import PANEL, packed_bytes
from ..linear.reference import linear


def decode_step(
    x: Tensor,
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
    last: int,
) -> Tensor:
    layers, kv_heads, head_dim = k_cache.shape[0], k_cache.shape[3], k_cache.shape[4]
    dim, padded = x.shape[-1], -(-ffn_dim // PANEL) * PANEL
    heads_of_qkv = [heads, kv_heads, kv_heads]
    weights, vectors = _Reader(weights), _Reader(vectors)

    def matrix(x: Tensor, rows: int) -> Tensor:
        size = packed_bytes(rows, x.shape[-1], weight_type)
        return linear(x, weights.take(size), rows, weight_type)

    def normalise(channels: int):
        weight = vectors.take(channels)
        if norm == "layernorm":
            bias = vectors.take(channels)
            return lambda x: F.layer_norm(x, (channels,), weight, bias, norm_eps)
        return lambda x: F.rms_norm(x, (channels,), weight, norm_eps)

    def normalise_heads(count: int):
        if qk_norm == "none":
            return lambda x: x
        if qk_norm == "head":
            return normalise(head_dim)
        whole = normalise(count * head_dim)
        return lambda x: whole(x.flatten(-2)).unflatten(-1, (-1, head_dim))

    x = x.clone()
    for i in range(layers):
        attention_norm = normalise(dim)
        q_norm, k_norm = normalise_heads(heads), normalise_heads(kv_heads)
        ffn_norm = normalise(dim)
        qkv = matrix(attention_norm(x), sum(heads_of_qkv) * head_dim)
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).split(heads_of_qkv, dim=-2)
        q, k = q_norm(q), k_norm(k)
        cos, sin = rotary_cos, rotary_sin
        if cos is not None and not positions_from_start:
            q, k = (_rotate_at(t, cos, sin, seqlens, rotary_interleaved) for t in (q, k))
            cos = sin = None
        y = decode_attention(
            q, k, v, k_cache[i], v_cache[i],
            None if k_scale is None else k_scale[i], None if v_scale is None else v_scale[i],
            seqlens, start, cos, sin, rotary_interleaved, -1, 0.0, head_dim**-0.5,
        )  # fmt: skip
        x = x + matrix(y.flatten(-2), dim)
        gate, up = matrix(ffn_norm(x), 2 * padded).chunk(2, dim=-1)
        x = x + matrix((F.silu(gate) * up)[..., :ffn_dim], dim)
    return matrix(normalise(dim)(x[:, x.shape[1] - last :]), outputs)


class _Reader:
    """Hands out what a tensor holds, from its beginning on."""

    def __init__(self, data: Tensor):
        self.data = data

    def take(self, count: int) -> Tensor:
        taken, self.data = self.data[:count], self.data[count:]
        return taken


def _rotate_at(x, cos, sin, seqlens, interleaved) -> Tensor:
    positions = seqlens.long()[:, None] + torch.arange(x.shape[1])
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < len(cos):
        raise IndexError(
            f"decode_step: positions {int(positions.min())} to {int(positions.max())} are not all "
            f"in rotary_cos, which has {len(cos)}"
        )
    return rotate(x, cos[positions], sin[positions], interleaved)
