"""decode_attention in Triton: rotate, append and attend in one launch.

A program holds the queries that share a key head (new tokens × heads of its group, padded to a
tile) and walks over one split of the slots: a tile of queries reads every cached byte once. The
last of a tile's programs to finish combines what they found (Flash-Decoding, pytorch.org/blog/
flash-decoding), in the order of the splits. How long a split is depends on neither the batch nor
the capacity, so neither do the bits of a row.

Where all queries fit a tile, as in decoding, the one program that sees a new token puts it into the
cache before it reads: nothing goes through memory that another program writes. A prompt has many
tiles; a launch before appends for all of them.

An int8 cache is read as pairs: a 16-bit word holds channels 2i and 2i + 1. Words go through shared
memory into the order of the matrix unit as other 16-bit types do and are parted there, so channels
are even and odd ones all the way to the output.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_language import (
    INTERPRETED,
    block,
    dot,
    is_hip,
    round_to,
    rows_contiguous,
    squash,
)
from .counters import lend_counters
from .reference import check_slots

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
ROUNDER = tl.constexpr(1.5 * 2**23)  # x + ROUNDER has round(x), to even, in its lowest bits
CHUNK = tl.constexpr(16)  # splits that are combined at a time

# The lower and upper bytes of two words as bf16: 2⁷ + the lower 7 bits, less 2⁷ or 2⁸.
_PARTED_BF16 = tl.constexpr("""{
.reg .b32 x, a, b, minus;
mov.b32 minus, 0xbf80bf80;
lop3.b32 a, $2, 0x007f007f, 0x43004300, 0xea;
lop3.b32 b, $2, 0x00800080, 0x43004300, 0xea;
fma.rn.bf16x2 $0, b, minus, a;
shr.u32 x, $2, 8;
lop3.b32 a, x, 0x007f007f, 0x43004300, 0xea;
lop3.b32 b, x, 0x00800080, 0x43004300, 0xea;
fma.rn.bf16x2 $1, b, minus, a;
}""")
# As fp16: 2¹⁰ + (2⁷ + x), less 2¹⁰ + 2⁷.
_PARTED_FP16 = tl.constexpr("""{
.reg .b32 x, a, less;
mov.b32 less, 0x64806480;
lop3.b32 a, $2, 0x00ff00ff, less, 0x6a;
sub.rn.f16x2 $0, a, less;
shr.u32 x, $2, 8;
lop3.b32 a, x, 0x00ff00ff, less, 0x6a;
sub.rn.f16x2 $1, a, less;
}""")


@triton.jit
def _part(x, dtype: tl.constexpr):
    """The lower and the upper bytes of words, exactly."""
    if INTERPRETED or dtype == tl.float32 or is_hip():
        even, odd = ((x << 8) >> 8).to(tl.float32), (x >> 8).to(tl.float32)
        even, odd = round_to(even, dtype), round_to(odd, dtype)
    elif dtype == tl.float16:
        even, odd = tl.inline_asm_elementwise(
            _PARTED_FP16, "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            _PARTED_BF16, "=r,=r,r", [x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    return even, odd


@triton.jit
def _quantize(even, odd):
    """(words, scales) of fp32 rows: round(x / s), s = max|x| / 127; NaN makes s infinite."""
    largest = tl.maximum(
        tl.max(tl.where(even == even, tl.abs(even), float("inf")), 1),
        tl.max(tl.where(odd == odd, tl.abs(odd), float("inf")), 1),
    )
    scale = tl.div_rn(largest, 127.0)
    divisor = tl.maximum(scale, TINY)[:, None]
    low = (tl.div_rn(even, divisor) + ROUNDER).to(tl.int32, bitcast=True)
    high = (tl.div_rn(odd, divisor) + ROUNDER).to(tl.int32, bitcast=True)
    return ((low & 0xFF) | (high << 8)).to(tl.int16), scale


@triton.jit
def _turn(x, columns, positions, inside, cos, sin, stride_cos, stride_sin, D: tl.constexpr,
          R: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Channels ``columns`` of rows at pointers x, turned by their positions and rounded to their
    type as the reference does; zeros where not ``inside``. All of it in fp32."""
    at = x[:, None] + columns[None, :]
    inside = inside[:, None] & (columns < D)[None, :]
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        if INTERLEAVED:
            first, pair, step = columns % 2 == 0, columns // 2, 1
        else:
            first, pair, step = columns < R // 2, columns % (R // 2), R // 2
        turning = inside & (columns < R)[None, :]
        partner = tl.load(at + tl.where(first, step, -step)[None, :], mask=turning, other=0.0)
        positions = positions.to(tl.int64)[:, None]
        c = tl.load(cos + positions * stride_cos + pair[None, :], mask=turning, other=1.0)
        s = tl.load(sin + positions * stride_sin + pair[None, :], mask=turning, other=0.0)
        y = y * c + partner.to(tl.float32) * tl.where(first[None, :], -s, s)
        y = round_to(y, x.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def _append(x, cache, scales, tokens, slots, positions, inside, stride_x, stride_scale, cos, sin,
            stride_cos, stride_sin, D: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
            STRIDE: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Keeps tokens of a head in its slots of the cache, turned (R > 0), rounded and quantized."""
    columns = tl.arange(0, BLOCK)
    rows = x + tokens.to(tl.int64) * stride_x
    slots = slots.to(tl.int64)
    if PAIRS:
        even = _turn(rows, columns * 2, positions, inside, cos, sin, stride_cos, stride_sin, D, R,
                     INTERLEAVED)  # fmt: skip
        odd = _turn(rows, columns * 2 + 1, positions, inside, cos, sin, stride_cos, stride_sin, D,
                    R, INTERLEAVED)  # fmt: skip
        kept, scale = _quantize(even, odd)
        tl.store(scales + slots * stride_scale, scale, mask=inside)
        mask = inside[:, None] & (columns < D // 2)[None, :]
    else:
        kept = _turn(rows, columns, positions, inside, cos, sin, stride_cos, stride_sin, D, R,
                     INTERLEAVED)  # fmt: skip
        kept = round_to(kept, cache.dtype.element_ty)
        mask = inside[:, None] & (columns < D)[None, :]
    tl.store(cache + slots[:, None] * STRIDE + columns[None, :], kept, mask=mask)


@triton.jit
def _lengths(b, seqlens, start, stride_seqlens, stride_start, tokens, slots, positions):
    """(slots in use, first slot, whether the new tokens have slots and positions) of a row."""
    used, first = tl.load(seqlens + b * stride_seqlens), tl.load(start + b * stride_start)
    placed, known = (used >= 0) & (used <= slots - tokens), used - first <= positions - tokens
    tl.device_assert(placed, "decode_attention: cache.seqlens puts new tokens outside the cache")
    tl.device_assert(first >= 0, "decode_attention: cache.start is below 0")
    tl.device_assert(known, "decode_attention: a position is outside rotary_cos")
    return used, first, placed & (first >= 0) & known


@triton.jit
def append_kernel(
    k_new, v_new, k, v, k_scale, v_scale, seqlens, start, cos, sin,
    stride_knb, stride_knt, stride_knh, stride_vnb, stride_vnt, stride_vnh,
    stride_kb, stride_kh, stride_vb, stride_vh, stride_ksb, stride_kst, stride_ksh,
    stride_vsb, stride_vst, stride_vsh, stride_seqlens, stride_start, stride_cos, stride_sin,
    rows, kv_heads, tokens, slots, positions,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_NEW: tl.constexpr,
    STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Appends tokens that more than one tile of queries sees."""
    row = tl.program_id(0) % rows
    b, h = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    used, first, fits = _lengths(
        b, seqlens, start, stride_seqlens, stride_start, tokens, slots, positions
    )
    if not fits:
        return
    if PAIRS:
        k_scale += b * stride_ksb + h * stride_ksh
        v_scale += b * stride_vsb + h * stride_vsh
    new = tl.program_id(0) // rows * BLOCK_NEW + tl.arange(0, BLOCK_NEW)
    # A padded token has no position; whatever it gets is masked.
    place = tl.maximum(used + new - first, 0)
    _append(
        k_new + b * stride_knb + h * stride_knh, k + b * stride_kb + h * stride_kh, k_scale, new,
        used + new, place, new < tokens, stride_knt, stride_kst, cos, sin, stride_cos, stride_sin,
        D, BLOCK, R, STRIDE_K, INTERLEAVED, PAIRS,
    )  # fmt: skip
    _append(
        v_new + b * stride_vnb + h * stride_vnh, v + b * stride_vb + h * stride_vh, v_scale, new,
        used + new, place, new < tokens, stride_vnt, stride_vst, cos, sin, stride_cos, stride_sin,
        D, BLOCK, 0, STRIDE_V, INTERLEAVED, PAIRS,
    )  # fmt: skip


# ---- Attend -------------------------------------------------------------------------------------


@triton.jit
def _grow(unit, weight):
    """(unit, the old one by it, 1 / unit): a power of 2, no smaller than before, that weights are
    below twice of, so that probabilities times them fit fp16 whatever the scales of a cache are."""
    most = tl.maximum(unit, tl.max(tl.abs(weight), len(weight.shape) - 1))
    power = tl.minimum(most, 2.0**126).to(tl.int32, bitcast=True) & 0x7F800000
    inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)
    return power.to(tl.float32, bitcast=True), unit * inverse, inverse


@triton.jit
def _attend(acc, odd, total, largest, unit, q, q_odd, k, v, factor, weight, slots, low, stop,
            positions, edge, window, cap, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
            PAIRS: tl.constexpr):  # fmt: skip
    """Adds a tile of slots to the sums of a tile of queries. Scores, as powers of 2, are factor ·
    q·k; ``weight`` multiplies values, acc and odd are in units of ``unit``; ``edge``: not all is
    seen."""
    LAST: tl.constexpr = len(q.shape) - 1
    if PAIRS:
        k, k_odd = _part(k, q.dtype)
        s = dot(q_odd, tl.trans(k_odd), dot(q, tl.trans(k), None))
        s = s * tl.expand_dims(factor, -2)
    else:
        s = dot(q, tl.trans(k), None) * factor
    if SOFTCAP:
        s = squash(s, 1.0) * cap
    if edge:
        key, query = tl.expand_dims(slots, -2), positions[:, None]
        seen = (key >= low) & (key < stop) & (key <= query)
        if WINDOW:
            seen = seen & (key >= query - window)
        s = tl.where(seen, s, float("-inf"))
    above = tl.maximum(largest, tl.max(s, LAST))
    base = tl.where(above == float("-inf"), 0.0, above)
    keep = tl.exp2(largest - base)
    p = tl.exp2(s - tl.expand_dims(base, -1))
    total = total * keep + tl.sum(p, LAST)
    if PAIRS:
        unit, change, inverse = _grow(unit, weight)
        keep *= tl.expand_dims(change, -1)
        p *= tl.expand_dims(weight * tl.expand_dims(inverse, -1), -2)
        v, v_odd = _part(v, tl.float32 if q.dtype == tl.float32 else tl.float16)
        odd = dot(round_to(p, v.dtype), v_odd, odd * tl.expand_dims(keep, -1))
    acc = dot(round_to(p, v.dtype), v, acc * tl.expand_dims(keep, -1))
    return acc, odd, total, above, unit


@triton.jit
def _merge(acc, total, largest):
    """The sums over the first dimension of sums that subtracted different maxima."""
    above = tl.max(largest, 0)
    base = tl.where(above == float("-inf"), 0.0, above)
    factors = tl.exp2(largest - base[None])
    return tl.sum(acc * tl.expand_dims(factors, -1), 0), tl.sum(total * factors, 0), above


@triton.jit
def _combine(partial, stats, out, first, last, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The output of a query from what splits first…last found of it."""
    columns = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total, largest = 0.0, float("-inf")
    for j in range(first, last + 1, CHUNK):
        splits = j + tl.arange(0, CHUNK)
        inside = splits <= last
        found = tl.load(stats + 2 * splits, mask=inside, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(stats + 2 * splits + 1, mask=inside, other=0.0, cache_modifier=".cg")
        rows = tl.load(
            partial + splits[:, None] * D + columns[None, :],
            mask=inside[:, None] & (columns < D)[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        rows, sums, above = _merge(rows, sums, found)
        base = tl.maximum(largest, above)
        base = tl.where(base == float("-inf"), 0.0, base)
        acc = acc * tl.exp2(largest - base) + rows * tl.exp2(above - base)
        total = total * tl.exp2(largest - base) + sums * tl.exp2(above - base)
        largest = tl.maximum(largest, above)
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out + columns, round_to(acc, out.dtype.element_ty), mask=columns < D)


@triton.jit
def attend_kernel(
    q, k_new, v_new, k, v, k_scale, v_scale, seqlens, start, cos, sin, out, partial, counters,
    stride_qb, stride_qt, stride_qh, stride_knb, stride_knt, stride_knh,
    stride_vnb, stride_vnt, stride_vnh, stride_kb, stride_kh, stride_vb, stride_vh,
    stride_ksb, stride_kst, stride_ksh, stride_vsb, stride_vst, stride_vsh,
    stride_seqlens, stride_start, stride_cos, stride_sin,
    rows, kv_heads, tokens, slots, positions, tiles, splits, results, window, c, cap,
    D: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NEW: tl.constexpr, WAYS: tl.constexpr,
    SPLIT: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr,
    INTERLEAVED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAIRS: tl.constexpr,
    APPEND: tl.constexpr,
):  # fmt: skip
    # Splits that no row has yet come last; the last tiles see most slots and come first.
    row, rest = tl.program_id(0) % rows, tl.program_id(0) // rows
    tile, split = tiles - 1 - rest % tiles, rest // tiles
    b, h = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    used, first, fits = _lengths(
        b, seqlens, start, stride_seqlens, stride_start, tokens, slots, positions
    )
    if not fits:
        return
    # The tile sees slots from low to high, all of its queries those from left to right.
    right = used + tile * BLOCK_M // GROUP
    high = used + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    low, left = first, first
    if WINDOW:
        low, left = tl.maximum(first, right - window), tl.maximum(first, high - window)
    # Also where new tokens go that are padding.
    begins, ends = tl.minimum(low, right) // SPLIT, high // SPLIT
    if (split < begins) | (split > ends):
        return

    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    out += (b * tokens * kv_heads + h) * GROUP * D
    if PAIRS:
        k_scale += b * stride_ksb + h * stride_ksh
        v_scale += b * stride_vsb + h * stride_vsh
    begin, stop = tl.maximum(low, split * SPLIT), tl.minimum(high + 1, split * SPLIT + SPLIT)
    if APPEND:
        if stop > used:
            for n in tl.range(tl.maximum(used, split * SPLIT), stop, BLOCK_NEW, num_stages=1):
                new = n + tl.arange(0, BLOCK_NEW)
                place = tl.maximum(new - first, 0)
                _append(
                    k_new + b * stride_knb + h * stride_knh, k, k_scale, new - used, new, place,
                    new < stop, stride_knt, stride_kst, cos, sin, stride_cos, stride_sin, D, BLOCK,
                    R, STRIDE_K, INTERLEAVED, PAIRS,
                )  # fmt: skip
                _append(
                    v_new + b * stride_vnb + h * stride_vnh, v, v_scale, new - used, new, place,
                    new < stop, stride_vnt, stride_vst, cos, sin, stride_cos, stride_sin, D, BLOCK,
                    0, STRIDE_V, INTERLEAVED, PAIRS,
                )  # fmt: skip
            tl.debug_barrier()  # other threads of this program read them

    C: tl.constexpr = D // 2 if PAIRS else D
    type: tl.constexpr = q.dtype.element_ty
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, group = query // GROUP, query % GROUP
    valid = token < tokens
    place = tl.maximum(used + token - first, 0)
    ask = q + b * stride_qb + h * GROUP * stride_qh
    ask = ask + token.to(tl.int64) * stride_qt + group * stride_qh
    columns = tl.arange(0, BLOCK)
    if PAIRS:
        x = _turn(ask, columns * 2, place, valid, cos, sin, stride_cos, stride_sin, D, R,
                  INTERLEAVED)  # fmt: skip
        y = _turn(ask, columns * 2 + 1, place, valid, cos, sin, stride_cos, stride_sin, D, R,
                  INTERLEAVED)  # fmt: skip
        y = round_to(y, type)
    else:
        x = _turn(ask, columns, place, valid, cos, sin, stride_cos, stride_sin, D, R,
                  INTERLEAVED)  # fmt: skip
        y = 0.0
    x = round_to(x, type)
    acc = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    keys = tl.arange(0, BLOCK_N)
    if WAYS > 1:
        # Each warp has slots of its own in a tile, and sums of its own: no exchange in a pass.
        x = tl.broadcast_to(x[None], [WAYS, BLOCK_M, BLOCK])
        if PAIRS:
            y = tl.broadcast_to(y[None], [WAYS, BLOCK_M, BLOCK])
        acc = tl.broadcast_to(acc[None], [WAYS, BLOCK_M, BLOCK])
        total = tl.broadcast_to(total[None], [WAYS, BLOCK_M])
        largest = tl.broadcast_to(largest[None], [WAYS, BLOCK_M])
        keys = tl.reshape(keys, [WAYS, BLOCK_N // WAYS])
    odd, unit = (acc, tl.full(keys.shape[:-1], TINY, tl.float32)) if PAIRS else (0.0, 1.0)
    k_tile = k + tl.expand_dims(keys.to(tl.int64), -1) * STRIDE_K + columns
    v_tile = v + tl.expand_dims(keys.to(tl.int64), -1) * STRIDE_V + columns
    if PAIRS:
        k_scales = k_scale + keys.to(tl.int64) * stride_kst
        v_scales = v_scale + keys.to(tl.int64) * stride_vst
    # The last tile ends with the last slot: it masks what another had already, and loads need no
    # mask where there is a tile at all.
    whole = tl.where(stop - begin < BLOCK_N, begin, stop)
    for n in range(begin, whole, BLOCK_N):
        n0 = tl.minimum(n, stop - BLOCK_N)
        here = n0 + keys
        at = n0.to(tl.int64)
        if C < BLOCK:
            kx = tl.load(k_tile + at * STRIDE_K, mask=columns < C, other=0)
            vx = tl.load(v_tile + at * STRIDE_V, mask=columns < C, other=0)
        else:
            kx, vx = tl.load(k_tile + at * STRIDE_K), tl.load(v_tile + at * STRIDE_V)
        if PAIRS:
            factor = tl.load(k_scales + at * stride_kst) * c
            weight = tl.load(v_scales + at * stride_vst)
        else:
            factor, weight = c, 1.0
        acc, odd, total, largest, unit = _attend(
            acc, odd, total, largest, unit, x, y, kx, vx, factor, weight, here, n, stop,
            used + token, (n0 < n) | (n0 < left) | (n0 + BLOCK_N > right + 1), window, cap, WINDOW,
            SOFTCAP, PAIRS,
        )  # fmt: skip
    for n in tl.range(whole, stop, BLOCK_N, num_stages=1):
        here = n + keys
        inside = here < stop
        mask = tl.expand_dims(inside, -1) & (columns < C)
        at = tl.cast(n, tl.int64)
        kx = tl.load(k_tile + at * STRIDE_K, mask=mask, other=0)
        vx = tl.load(v_tile + at * STRIDE_V, mask=mask, other=0)
        if PAIRS:
            factor = tl.load(k_scales + at * stride_kst, mask=inside, other=0.0) * c
            weight = tl.load(v_scales + at * stride_vst, mask=inside, other=0.0)
        else:
            factor, weight = c, 1.0
        acc, odd, total, largest, unit = _attend(
            acc, odd, total, largest, unit, x, y, kx, vx, factor, weight, here, n, stop,
            used + token, True, window, cap, WINDOW, SOFTCAP, PAIRS,
        )  # fmt: skip

    if PAIRS:
        unit = tl.expand_dims(tl.expand_dims(unit, -1), -1)
        acc, odd = acc * unit, odd * unit
    if WAYS > 1:
        if PAIRS:
            odd, _, _ = _merge(odd, total, largest)
        acc, total, largest = _merge(acc, total, largest)
    if PAIRS:
        acc = tl.interleave(acc, odd)
    columns = tl.arange(0, acc.shape[1])
    inside = valid[:, None] & (columns < D)[None, :]
    if begins == ends:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        to = out + (token.to(tl.int64) * kv_heads * GROUP + group) * D
        tl.store(to[:, None] + columns[None, :], round_to(acc, type), mask=inside)
    else:
        queries = tokens * GROUP
        found = (row.to(tl.int64) * queries + query) * splits + split
        stats = partial + results
        tl.store(partial + found[:, None] * D + columns[None, :], acc, mask=inside)
        tl.store(stats + 2 * found, largest, mask=valid)
        tl.store(stats + 2 * found + 1, total, mask=valid)
        tl.debug_barrier()
        counter = counters + row * tiles + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == ends - begins:
            tl.store(counter, 0)
            for r in range(tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, queries)):
                one = (row.to(tl.int64) * queries + r) * splits
                head = (r // GROUP * kv_heads * GROUP + r % GROUP).to(tl.int64)
                _combine(
                    partial + one * D, stats + 2 * one, out + head * D, begins, ends, D,
                    acc.shape[1],
                )  # fmt: skip


# ---- Launcher -----------------------------------------------------------------------------------


def decode_attention(
    q: Tensor, k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, seqlens: Tensor, start: Tensor,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool, window: int,
    softcap: float, scale: float,
) -> Tensor:  # fmt: skip
    batch, tokens, heads, dim = q.shape
    slots, kv_heads = k_cache.shape[1:3]
    out = q.new_empty(q.shape)
    if not out.numel():
        return out
    if q.device.type == "cpu":
        new = seqlens.long()[:, None] + torch.arange(tokens)
        check_slots(new, start.long()[:, None], slots, rotary_cos)
    q, k_new, v_new = rows_contiguous(q), rows_contiguous(k_new), rows_contiguous(v_new)
    if rotary_cos is not None:
        rotary_cos, rotary_sin = rows_contiguous(rotary_cos), rows_contiguous(rotary_sin)
    group, pairs = heads // kv_heads, k_scale is not None
    queries, rows = tokens * group, batch * kv_heads
    many = "decode_attention.many" if queries > 16 else "decode_attention"
    config = dict(tuning.choose(many, q if q.dtype == torch.float32 else k_cache))
    # What is found in splits takes a fixed part of what the cache takes at most.
    config["SPLIT"] *= max(triton.next_power_of_2(queries) // 16, 1)
    tiles = triton.cdiv(queries, config["BLOCK_M"])
    splits = triton.cdiv(slots, config["SPLIT"]) or 1
    results = out.numel() * splits
    partial, counters = out, seqlens  # not used
    if splits > 1:
        partial = q.new_empty(results + results // dim * 2, dtype=torch.float32)
        counters = lend_counters(q, rows * tiles)
    if pairs:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    call = dict(
        k_new=k_new, v_new=v_new, k=k_cache, v=v_cache, k_scale=k_scale, v_scale=v_scale,
        seqlens=seqlens, start=start, cos=rotary_cos, sin=rotary_sin, **_strides("kn", k_new),
        **_strides("vn", v_new), stride_kb=k_cache.stride(0), STRIDE_K=k_cache.stride(1),
        stride_kh=k_cache.stride(2), stride_vb=v_cache.stride(0), STRIDE_V=v_cache.stride(1),
        stride_vh=v_cache.stride(2), **_strides("ks", k_scale), **_strides("vs", v_scale),
        stride_seqlens=seqlens.stride(0), stride_start=start.stride(0),
        stride_cos=0 if rotary_cos is None else rotary_cos.stride(0),
        stride_sin=0 if rotary_sin is None else rotary_sin.stride(0), rows=rows,
        kv_heads=kv_heads, tokens=tokens, slots=slots,
        positions=2**31 - 1 if rotary_cos is None else len(rotary_cos), D=dim,
        R=0 if rotary_cos is None else 2 * rotary_cos.shape[1],
        BLOCK=block(dim // 2 if pairs else dim), INTERLEAVED=rotary_interleaved, PAIRS=pairs,
        BLOCK_NEW=config["BLOCK_NEW"], enable_fp_fusion=False, debug=True,
        sanitize_overflow=False,
    )  # fmt: skip
    if tiles > 1:
        append_kernel[(rows * triton.cdiv(tokens, config["BLOCK_NEW"]),)](**call)
    attend_kernel[(rows * tiles * splits,)](
        q=q, out=out, partial=partial, counters=counters, **_strides("q", q), tiles=tiles,
        splits=splits, results=results, window=min(window, slots),
        c=scale / softcap if softcap else scale * math.log2(math.e),
        cap=softcap * math.log2(math.e), GROUP=group, WINDOW=window >= 0, SOFTCAP=softcap > 0,
        APPEND=tiles == 1, **call, **{k: v for k, v in config.items() if k != "BLOCK_NEW"},
    )  # fmt: skip
    return out


def _strides(name: str, t: Tensor | None) -> dict:
    strides = (0, 0, 0) if t is None else t.stride()[:3]
    names = f"stride_{name}b", f"stride_{name}t", f"stride_{name}h"
    return dict(zip(names, strides, strict=True))
