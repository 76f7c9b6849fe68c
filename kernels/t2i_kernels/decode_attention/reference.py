"""decode_attention in plain PyTorch: rotate, append, attend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash_attention.reference import attend, by_head, stack_queries, unstack_queries


def decode_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    seqlens: Tensor,
    start: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    window: int,
    softcap: float,
    scale: float,
) -> Tensor:
    batch, tokens, heads, _ = q.shape
    if batch == 0 or tokens == 0:
        return q.new_zeros(q.shape)
    slots = seqlens.long()[:, None] + torch.arange(tokens, device=q.device)  # [B, n]
    first = start.long()[:, None]
    check_slots(slots, first, k_cache.shape[1], rotary_cos)
    if rotary_cos is not None:
        # A padded slot has no position; whatever it gets is masked.
        positions = (slots - first).clamp_min(0)
        cos, sin = rotary_cos[positions], rotary_sin[positions]
        q, k_new = (rotate(x, cos, sin, rotary_interleaved) for x in (q, k_new))

    row = torch.arange(batch, device=q.device)[:, None]
    for cache, scales, new in ((k_cache, k_scale, k_new), (v_cache, v_scale, v_new)):
        if scales is not None:
            new, scales[row, slots] = _quantize(new)
        cache[row, slots] = new.to(cache.dtype)

    # Everything behind the longest row is left alone: the cost follows what is in use.
    longest = int(slots.max()) + 1
    slot = torch.arange(longest, device=q.device)
    seen = (slot <= slots[..., None]) & (slot >= first[..., None])  # [B, n, longest]
    if window >= 0:
        seen &= slot >= slots[..., None] - window
    k, v = (
        _read(cache[:, :longest], None if scales is None else scales[:, :longest], q.dtype)
        for cache, scales in ((k_cache, k_scale), (v_cache, v_scale))
    )
    # An unused slot may hold NaN, and 0 · NaN is NaN: a mask on the scores is not enough for v.
    v = torch.where(seen.any(dim=1)[..., None, None], v, 0)
    kv_heads = k.shape[2]
    mask = seen[:, None].repeat(1, 1, heads // kv_heads, 1)
    out, _ = attend(stack_queries(q, kv_heads), by_head(k), by_head(v), mask, softcap, scale)
    return unstack_queries(out, heads).to(q.dtype).contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of channels of x [B, n, H, D] by the angles cos, sin [B, n, R/2] (RoFormer,
    arXiv 2104.09864); channels from R on stay. Pairs are (2i, 2i + 1) or (i, i + R/2)."""
    cos, sin = cos[:, :, None], sin[:, :, None]  # fp32: so are the products, or fp64
    turned, rest = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    if interleaved:
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        a, b = turned.chunk(2, dim=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [B, n, H, D], scale fp32 [B, n, H]), symmetric, one scale a slot and head."""
    x = x.float()
    scale = x.abs().amax(dim=-1) / 127
    return (x / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round(), scale


def _read(cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return cache
    return (cache.float() * scale[..., None]).to(torch.promote_types(dtype, torch.float32))


def check_slots(slots: Tensor, first: Tensor, max_seqlen: int, rotary: Tensor | None) -> None:
    """IndexError where new tokens have no slot [B, n], or no position from first [B, 1] on."""
    low, high = int(slots.min()), int(slots.max())
    if low < 0 or high >= max_seqlen:
        raise IndexError(
            f"decode_attention: cache.seqlens puts the new tokens into slots {low} to {high}, but "
            f"the cache has {max_seqlen} slots"
        )
    if int(first.min()) < 0:
        raise IndexError(f"decode_attention: cache.start is {int(first.min())}, below 0")
    last = int((slots - first).max())
    if rotary is not None and last >= len(rotary):
        raise IndexError(
            f"decode_attention: position {last} is outside rotary_cos, which has {len(rotary)}"
        )
