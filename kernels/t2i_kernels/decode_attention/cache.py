"""The keys and values of what was read so far: one contiguous buffer a layer, and a length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import allocate_large

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass
class KVCache:
    """Keys and values of a batch of rows, in slots [start, seqlens) of each row.

    Slots outside that range are never read and may hold anything. Going back is free: lower
    ``seqlens``. Slots before ``start`` are left padding; the token in slot ``start`` has
    position 0.

    ``decode_step`` takes one for all layers, whose buffers have one more dimension in front.

    An int8 cache keeps round(x / s) and one scale s = max|x| / 127 for each slot and head.
    """

    k: Tensor  # [B, S, Hkv, D]
    v: Tensor  # [B, S, Hkv, D]
    seqlens: Tensor  # int32 [B], slots in use, left padding included
    start: Tensor  # int32 [B]
    k_scale: Tensor | None = None  # fp32 [B, S, Hkv], int8 caches only
    v_scale: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        batch: int,
        max_seqlen: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """An empty cache of ``max_seqlen`` slots a row. Those of one head lie beside each other in
        memory, a stream that a processor fetches ahead.

        Raises:
            TypeError: ``dtype`` is not fp32, bf16, fp16, fp64 (reference only) or int8.
        """
        if dtype not in (*DTYPES, torch.float64):
            raise TypeError(f"dtype: expected a floating type or int8 for a cache, got {dtype}")
        shape = (batch, num_kv_heads, max_seqlen)
        k, v = (_zeros((*shape, head_dim), dtype, device).transpose(1, 2) for _ in range(2))
        seqlens, start = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2))
        scales = ()
        if dtype == torch.int8:
            scales = tuple(
                torch.zeros(shape, dtype=torch.float32, device=device).transpose(1, 2)
                for _ in range(2)
            )
        return cls(k, v, seqlens, start, *scales)

    @property
    def max_seqlen(self) -> int:
        """Slots a row."""
        return self.k.shape[-3]

    def first(self, rows: int) -> KVCache:
        """The first ``rows`` rows, in the same memory."""
        k, v = (t[..., :rows, :, :, :] for t in (self.k, self.v))
        scales = (None if s is None else s[..., :rows, :, :] for s in (self.k_scale, self.v_scale))
        return KVCache(k, v, self.seqlens[:rows], self.start[:rows], *scales)

    def advance(self, tokens: int) -> None:
        """Keep the ``tokens`` slots that ``decode_attention`` wrote last; negative goes back."""
        self.seqlens += tokens


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return allocate_large(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
