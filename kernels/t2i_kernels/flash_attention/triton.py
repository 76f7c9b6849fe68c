"""flash_attention in Triton: forward, and backward as two kernels without atomics.

Forward (FlashAttention-2, arXiv 2307.08691, algorithm 1): a program holds a tile of queries and
walks over the keys that any of them sees. Tiles at the edges of what is seen are masked, those
between are not. Scores stay as the dot product gives them: 2^(c · score − c · maximum) is one FMA
and one ex2. The maximum that is subtracted is raised only where a score exceeds it by 2⁸, so most
tiles do not rescale the output, and probabilities still fit fp16.

Backward (its algorithm 2, without the atomic adds): one kernel walks over queries for a tile of
keys, one over keys for a tile of queries. Both compute P, 7 products instead of 5; sums have one
order, so gradients are the same bits every time.

Rows and columns: "dense" tensors are [B, L, H, D]; packed ones [total, H, D] count as B = 1, and
the ends of their sequences are found on the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_language import (
    LN2,
    LOG2E,
    block,
    dot,
    find_sequence,
    round_to,
    rows_contiguous,
    squash,
)  # fmt: skip
from .reference import read_ends

RAISE = tl.constexpr(8.0)  # log2 of how far a score may exceed the maximum that was subtracted


@triton.jit
def _sees(positions, keys, Lk, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which of the keys the queries at ``positions`` see, broadcast."""
    seen = keys < Lk
    if LEFT:
        seen = seen & (keys >= positions - left)
    if RIGHT:
        seen = seen & (keys <= positions + right)
    return seen


@triton.jit
def _load(base, rows, stride, limit, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of [limit, SIZE] as [rows, BLOCK]; zeros beyond SIZE, and where MASKED beyond limit."""
    columns = tl.arange(0, BLOCK)
    at = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    if MASKED:
        x = tl.load(at, mask=(rows[:, None] < limit) & (columns[None, :] < SIZE), other=0.0)
    elif SIZE < BLOCK:
        x = tl.load(at, mask=columns[None, :] < SIZE, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _store(base, rows, stride, limit, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 rows [rows, BLOCK] into [limit, SIZE] of another type."""
    columns = tl.arange(0, BLOCK)
    at = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    inside = (rows[:, None] < limit) & (columns[None, :] < SIZE)
    tl.store(at, round_to(x, base.dtype.element_ty), mask=inside)


@triton.jit
def _problem(tile, total_q, total_k, cu_q, cu_k, sequences, BLOCK: tl.constexpr,
             BY_KEYS: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """(tile of its sequence, first query, queries, first key, keys). Ends that are no such thing
    are brought inside the tensors: what they give is wrong, but nothing else is read."""
    q0, k0 = tile * 0, tile * 0
    if PACKED:
        s, tile = find_sequence(cu_k if BY_KEYS else cu_q, tile, sequences, BLOCK)
        q0 = tl.minimum(tl.maximum(tl.load(cu_q + s), 0), total_q)
        k0 = tl.minimum(tl.maximum(tl.load(cu_k + s), 0), total_k)
        total_q = tl.minimum(tl.maximum(tl.load(cu_q + s + 1), q0), total_q) - q0
        total_k = tl.minimum(tl.maximum(tl.load(cu_k + s + 1), k0), total_k) - k0
    return tile, q0, total_q, k0, total_k


@triton.jit
def _key_range(first, last, Lk, left, right, BLOCK: tl.constexpr, LEFT: tl.constexpr,
               RIGHT: tl.constexpr):  # fmt: skip
    """(start, full, partial, stop): queries at positions first…last see keys from start to stop,
    and all of them see all keys from full to partial. All but stop are multiples of BLOCK."""
    start, full, stop = 0, 0, Lk
    partial = Lk // BLOCK * BLOCK
    if RIGHT:
        stop = tl.maximum(tl.minimum(Lk, last + right + 1), 0)
        partial = tl.minimum(partial, tl.maximum(first + right + 1, 0) // BLOCK * BLOCK)
    if LEFT:
        start = tl.maximum(first - left, 0) // BLOCK * BLOCK
        full = tl.minimum(tl.cdiv(tl.maximum(last - left, 0), BLOCK), tl.cdiv(stop, BLOCK)) * BLOCK
    return start, full, tl.maximum(partial, full), stop


# ---- Forward ------------------------------------------------------------------------------------


@triton.jit
def _rescale(acc, total, largest, above, c):
    """The sums as they are with another maximum subtracted."""
    base = tl.where(above == float("-inf"), 0.0, above * c)
    factor = tl.exp2(largest * c - base)
    return acc * factor[:, None], total * factor, above


@triton.jit
def _attend(acc, total, largest, q, k, v, stride_k, stride_v, positions, start, stop, Lk, left,
            right, c, capped, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
            LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
            LAZY: tl.constexpr):  # fmt: skip
    """Adds keys from start to stop to the output of a tile of queries."""
    for n in range(start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        kt = tl.trans(_load(k, keys, stride_k, Lk, D, BLOCK_D, MASKED))
        s = dot(q, kt, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if SOFTCAP:
            s = squash(s, capped)
        if MASKED:
            seen = _sees(positions[:, None], keys[None, :], Lk, left, right, LEFT, RIGHT)
            s = tl.where(seen, s, float("-inf"))
        above = tl.maximum(largest, tl.max(s, 1))
        if LAZY:
            # NaN in rows that have seen no key yet and see none now: not above RAISE, as it should.
            if tl.max((above - largest) * c) > RAISE:
                acc, total, largest = _rescale(acc, total, largest, above, c)
        else:
            acc, total, largest = _rescale(acc, total, largest, above, c)
        base = tl.where(largest == float("-inf"), 0.0, largest * c)
        p = tl.exp2(tl.fma(s, c, -base[:, None]))
        total += tl.sum(p, 1)
        values = _load(v, keys, stride_v, Lk, DV, BLOCK_DV, MASKED)
        acc = dot(round_to(p, values.dtype), values, acc)
    return acc, total, largest


@triton.jit
def forward_kernel(
    q, k, v, out, lse, cu_q, cu_k, sequences,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_ob, stride_ot, stride_oh,
    heads, group, total_q, total_k, tiles, left, right, sign, unit, c, capped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, LAZY: tl.constexpr,
):  # fmt: skip
    # The last tiles see most keys where attention is causal: they start first.
    tile, row = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    tile, q0, Lq, k0, Lk = _problem(
        tile, total_q, total_k, cu_q, cu_k, sequences, BLOCK_M, False, PACKED
    )
    m0 = tile * BLOCK_M
    if m0 >= Lq:
        return
    q += b * stride_qb + h * stride_qh + q0.to(tl.int64) * stride_qt
    k += b * stride_kb + h // group * stride_kh + k0.to(tl.int64) * stride_kt
    v += b * stride_vb + h // group * stride_vh + k0.to(tl.int64) * stride_vt
    out += b * stride_ob + h * stride_oh + q0.to(tl.int64) * stride_ot
    lse += (b * heads + h) * total_q + q0

    rows = m0 + tl.arange(0, BLOCK_M)
    x = _load(q, rows, stride_qt, Lq, D, BLOCK_D, True)
    # A maximum of scores is that of scaled scores only where the scale is positive.
    x = round_to(x.to(tl.float32) * sign, x.dtype)
    first, last = m0 + Lk - Lq, tl.minimum(m0 + BLOCK_M, Lq) - 1 + Lk - Lq
    start, full, partial, stop = _key_range(first, last, Lk, left, right, BLOCK_N, LEFT, RIGHT)
    positions = rows + Lk - Lq
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if LEFT:
        acc, total, largest = _attend(
            acc, total, largest, x, k, v, stride_kt, stride_vt, positions, start, full, Lk, left,
            right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP,
            True, LAZY,
        )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, x, k, v, stride_kt, stride_vt, positions, full, partial, Lk, left,
        right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP,
        False, LAZY,
    )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, x, k, v, stride_kt, stride_vt, positions, partial, stop, Lk, left,
        right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP,
        True, LAZY,
    )  # fmt: skip
    unseeing = total == 0
    acc = acc / tl.where(unseeing, 1.0, total)[:, None]
    _store(out, rows, stride_ot, Lq, acc, DV, BLOCK_DV)
    # What was subtracted is largest · c as it was rounded; its distance to the exact product goes
    # back in, so that the scale of scores costs no digits.
    lost = tl.fma(largest, c, -(largest * c))
    logsumexp = largest * unit + (tl.log2(total) - lost) * LN2
    logsumexp = tl.where(unseeing, float("-inf"), logsumexp)
    tl.store(lse + rows, logsumexp, mask=rows < Lq)


# ---- Backward -----------------------------------------------------------------------------------


@triton.jit
def delta_kernel(
    dout, out, lse, dlse, delta, lse2,
    stride_dob, stride_dot, stride_doh, stride_ob, stride_ot, stride_oh,
    stride_lb, stride_lh, stride_lt, heads, total_q, tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout · out) − dlse, and logsumexps as powers of 2; of rows that saw nothing
    delta is 0 and the logsumexp is +inf, with which their probabilities are 0."""
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x = _load(dout + b * stride_dob + h * stride_doh, rows, stride_dot, total_q, DV, BLOCK_DV, True)
    y = _load(out + b * stride_ob + h * stride_oh, rows, stride_ot, total_q, DV, BLOCK_DV, True)
    d = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    if DLSE:
        at = b * stride_lb + h * stride_lh + rows.to(tl.int64) * stride_lt
        d -= tl.load(dlse + at, mask=rows < total_q, other=0.0)
    at = (b * heads + h) * total_q + rows
    l2 = tl.load(lse + at, mask=rows < total_q, other=0.0)
    unseeing = l2 == float("-inf")
    tl.store(delta + at, tl.where(unseeing, 0.0, d), mask=rows < total_q)
    tl.store(lse2 + at, tl.where(unseeing, float("inf"), l2 * LOG2E), mask=rows < total_q)


@triton.jit
def _differentiate(s, dp, lse2, delta, seen, c, capped, SOFTCAP: tl.constexpr,
                   MASKED: tl.constexpr):  # fmt: skip
    """(P, dS without the factor scale) of scores before the softcap and dP."""
    if SOFTCAP:
        s = squash(s, capped)
    p = tl.exp2(tl.fma(s, c, -lse2))
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta)
    if SOFTCAP:  # d c·tanh(x / c) = 1 − tanh²(x / c)
        ds = ds * (1 - s * s)
    return p, ds


@triton.jit
def _gather_keys(dk, dv, k, v, q, do, lse2, delta, stride_q, stride_do, keys, start, stop, Lq, Lk,
                 left, right, c, capped, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
                 LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
                 MASKED: tl.constexpr):  # fmt: skip
    """Adds queries from start to stop to the gradients of a tile of keys. Everything is transposed:
    P and dS come out of the products as the next ones take them."""
    for m in range(start, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        x = _load(q, rows, stride_q, Lq, D, BLOCK_D, MASKED)
        s = dot(k, tl.trans(x), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        dx = _load(do, rows, stride_do, Lq, DV, BLOCK_DV, MASKED)
        if MASKED:
            l2 = tl.load(lse2 + rows, mask=rows < Lq, other=float("inf"))
            d = tl.load(delta + rows, mask=rows < Lq, other=0.0)
            positions = (rows + Lk - Lq)[None, :]
            seen = _sees(positions, keys[:, None], Lk, left, right, LEFT, RIGHT)
        else:
            l2, d = tl.load(lse2 + rows), tl.load(delta + rows)
            seen = True
        dp = dot(v, tl.trans(dx), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        p, ds = _differentiate(s, dp, l2[None, :], d[None, :], seen, c, capped, SOFTCAP, MASKED)
        dv = dot(round_to(p, dx.dtype), dx, dv)
        dk = dot(round_to(ds, x.dtype), x, dk)
    return dk, dv


@triton.jit
def keys_kernel(
    q, k, v, do, lse2, delta, dk, dv, cu_q, cu_k, sequences,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_dob, stride_dot, stride_doh,
    heads, group, total_q, total_k, tiles, left, right, scale, c, capped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, over all heads that share them."""
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    kv_heads = heads // group
    b, h = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    tile, q0, Lq, k0, Lk = _problem(
        tile, total_q, total_k, cu_q, cu_k, sequences, BLOCK_N, True, PACKED
    )
    n0 = tile * BLOCK_N
    if n0 >= Lk:
        return
    k += b * stride_kb + h * stride_kh + k0.to(tl.int64) * stride_kt
    v += b * stride_vb + h * stride_vh + k0.to(tl.int64) * stride_vt
    keys = n0 + tl.arange(0, BLOCK_N)
    kx = _load(k, keys, stride_kt, Lk, D, BLOCK_D, True)
    vx = _load(v, keys, stride_vt, Lk, DV, BLOCK_DV, True)

    # Queries from start to stop see any of the keys, those from full to partial all of them. From
    # start on, to the row: a query that sees no key may have any gradient, and 0 · NaN is NaN.
    n1 = tl.minimum(n0 + BLOCK_N, Lk) - 1
    start, full, partial, stop = n0 * 0, n0 * 0, Lq, Lq
    if RIGHT:
        start = tl.maximum(n0 - right - (Lk - Lq), 0)
        full = tl.maximum(n1 - right - (Lk - Lq), 0)
    if LEFT:
        partial = tl.minimum(Lq, n0 + left - (Lk - Lq) + 1)
        stop = tl.minimum(Lq, n1 + left - (Lk - Lq) + 1)
    full = start + tl.cdiv(tl.maximum(tl.minimum(full, stop) - start, 0), BLOCK_M) * BLOCK_M
    partial = full + tl.maximum(partial - full, 0) // BLOCK_M * BLOCK_M

    dkx = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvx = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(0, group):
        head = h * group + g
        qh = q + b * stride_qb + head * stride_qh + q0.to(tl.int64) * stride_qt
        doh = do + b * stride_dob + head * stride_doh + q0.to(tl.int64) * stride_dot
        at = (b * heads + head) * total_q + q0
        if RIGHT:
            dkx, dvx = _gather_keys(
                dkx, dvx, kx, vx, qh, doh, lse2 + at, delta + at, stride_qt, stride_dot, keys,
                start, full, Lq, Lk, left, right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
                BLOCK_DV, LEFT, RIGHT, SOFTCAP, True,
            )  # fmt: skip
        dkx, dvx = _gather_keys(
            dkx, dvx, kx, vx, qh, doh, lse2 + at, delta + at, stride_qt, stride_dot, keys,
            full, partial, Lq, Lk, left, right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
            BLOCK_DV, LEFT, RIGHT, SOFTCAP, False,
        )  # fmt: skip
        dkx, dvx = _gather_keys(
            dkx, dvx, kx, vx, qh, doh, lse2 + at, delta + at, stride_qt, stride_dot, keys,
            partial, stop, Lq, Lk, left, right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
            BLOCK_DV, LEFT, RIGHT, SOFTCAP, True,
        )  # fmt: skip
    # Gradients are contiguous.
    dk += (b * total_k + k0) * kv_heads * D + h * D
    dv += (b * total_k + k0) * kv_heads * DV + h * DV
    _store(dk, keys, kv_heads * D, Lk, dkx * scale, D, BLOCK_D)
    _store(dv, keys, kv_heads * DV, Lk, dvx, DV, BLOCK_DV)


@triton.jit
def _gather_queries(dq, q, do, k, v, lse2, delta, stride_k, stride_v, positions, start, stop, Lk,
                    left, right, c, capped, D: tl.constexpr, DV: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_DV: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
                    SOFTCAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Adds keys from start to stop to the gradient of a tile of queries."""
    for n in range(start, stop, BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        kx = _load(k, keys, stride_k, Lk, D, BLOCK_D, MASKED)
        vx = _load(v, keys, stride_v, Lk, DV, BLOCK_DV, MASKED)
        s = dot(q, tl.trans(kx), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        dp = dot(do, tl.trans(vx), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        seen = True
        if MASKED:
            seen = _sees(positions[:, None], keys[None, :], Lk, left, right, LEFT, RIGHT)
        _, ds = _differentiate(
            s, dp, lse2[:, None], delta[:, None], seen, c, capped, SOFTCAP, MASKED
        )
        dq = dot(round_to(ds, kx.dtype), kx, dq)
    return dq


@triton.jit
def queries_kernel(
    q, k, v, do, lse2, delta, dq, cu_q, cu_k, sequences,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh, stride_dob, stride_dot, stride_doh,
    heads, group, total_q, total_k, tiles, left, right, scale, c, capped,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries."""
    tile, row = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    tile, q0, Lq, k0, Lk = _problem(
        tile, total_q, total_k, cu_q, cu_k, sequences, BLOCK_M, False, PACKED
    )
    m0 = tile * BLOCK_M
    if m0 >= Lq:
        return
    q += b * stride_qb + h * stride_qh + q0.to(tl.int64) * stride_qt
    do += b * stride_dob + h * stride_doh + q0.to(tl.int64) * stride_dot
    k += b * stride_kb + h // group * stride_kh + k0.to(tl.int64) * stride_kt
    v += b * stride_vb + h // group * stride_vh + k0.to(tl.int64) * stride_vt
    rows = m0 + tl.arange(0, BLOCK_M)
    at = (b * heads + h) * total_q + q0 + rows
    l2 = tl.load(lse2 + at, mask=rows < Lq, other=float("inf"))
    d = tl.load(delta + at, mask=rows < Lq, other=0.0)
    qx = _load(q, rows, stride_qt, Lq, D, BLOCK_D, True)
    # A query that sees no key may have any gradient, and 0 · NaN is NaN.
    seeing = tl.where(l2 == float("inf"), Lq, rows)
    dox = _load(do, seeing, stride_dot, Lq, DV, BLOCK_DV, True)

    first, last = m0 + Lk - Lq, tl.minimum(m0 + BLOCK_M, Lq) - 1 + Lk - Lq
    start, full, partial, stop = _key_range(first, last, Lk, left, right, BLOCK_N, LEFT, RIGHT)
    positions = rows + Lk - Lq
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if LEFT:
        acc = _gather_queries(
            acc, qx, dox, k, v, l2, d, stride_kt, stride_vt, positions, start, full, Lk, left,
            right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP,
            True,
        )  # fmt: skip
    acc = _gather_queries(
        acc, qx, dox, k, v, l2, d, stride_kt, stride_vt, positions, full, partial, Lk, left,
        right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, False,
    )  # fmt: skip
    acc = _gather_queries(
        acc, qx, dox, k, v, l2, d, stride_kt, stride_vt, positions, partial, stop, Lk, left,
        right, c, capped, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, LEFT, RIGHT, SOFTCAP, True,
    )  # fmt: skip
    dq += ((b * total_q + q0) * heads + h) * D
    _store(dq, rows, heads * D, Lq, acc * scale, D, BLOCK_D)


# ---- Launchers ----------------------------------------------------------------------------------


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: bool, window_left: int, window_right: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if cu_seqlens_q is not None:
        _check_ends("cu_seqlens_q", cu_seqlens_q, len(q))
        _check_ends("cu_seqlens_k", cu_seqlens_k, len(k))
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    *batch, length, heads, _ = q.shape
    lse = q.new_empty(*batch, heads, length, dtype=torch.float32)
    sign, size = 1.0 if softcap else float((scale > 0) - (scale < 0)), abs(scale)
    config = tuning.choose("flash_attention.forward", q, _size(q))
    tiles = _tiles(cu_seqlens_q, length, config["BLOCK_M"])
    forward_kernel[(tiles * math.prod(batch) * heads,)](
        out=out, lse=lse, tiles=tiles, sign=sign, unit=softcap or size,
        **_strides("o", out), **_call(q, k, v, cu_seqlens_q, cu_seqlens_k),
        # Where the scale is 0 the sign is, and −inf · 0 would be NaN.
        **_options(causal, window_left, window_right, softcap, scale if softcap else size or 1),
        **config,
    )  # fmt: skip
    return out, lse


def flash_attention_backward(
    dout: Tensor, dlogsumexp: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    logsumexp: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool,
    window_left: int, window_right: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, out = (rows_contiguous(t) for t in (q, k, v, out))
    dout = rows_contiguous(dout)
    logsumexp = logsumexp.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    delta, lse2 = torch.empty_like(logsumexp), torch.empty_like(logsumexp)
    *batch, length, heads, _ = q.shape
    programs = math.prod(batch) * heads
    call = _call(q, k, v, cu_seqlens_q, cu_seqlens_k)

    tiles = triton.cdiv(length, 64)
    dlse = logsumexp if dlogsumexp is None else dlogsumexp
    delta_kernel[(tiles * programs,)](
        dout, out, logsumexp, dlse, delta, lse2, **_strides("do", dout), **_strides("o", out),
        stride_lb=dlse.stride(0) if batch else 0, stride_lh=dlse.stride(-2),
        stride_lt=dlse.stride(-1), heads=heads, total_q=length, tiles=tiles, DV=call["DV"],
        BLOCK_DV=call["BLOCK_DV"], BLOCK_M=64, DLSE=dlogsumexp is not None, num_warps=8,
    )  # fmt: skip
    call |= dict(do=dout, lse2=lse2, delta=delta, scale=scale, **_strides("do", dout))
    call |= _options(causal, window_left, window_right, softcap, scale)
    config = tuning.choose("flash_attention.keys", q, _size(q))
    tiles = _tiles(cu_seqlens_k, k.shape[-3], config["BLOCK_N"])
    keys_kernel[(tiles * programs // call["group"],)](dk=dk, dv=dv, tiles=tiles, **call, **config)
    config = tuning.choose("flash_attention.queries", q, _size(q))
    tiles = _tiles(cu_seqlens_q, length, config["BLOCK_M"])
    queries_kernel[(tiles * programs,)](dq=dq, tiles=tiles, **call, **config)
    return dq, dk, dv


def _check_ends(name: str, ends: Tensor, total: int) -> None:
    """As the reference does, but on a device without waiting for it."""
    if ends.device.type == "cpu":
        read_ends(name, ends, total)
        return
    rise = (ends[0] == 0) & (ends[-1] == total) & (ends.diff() >= 0).all()
    torch._assert_async(rise, f"flash_attention: {name} must rise from 0 to {total}")


def _call(q, k, v, cu_q, cu_k) -> dict:
    """What all kernels take. Fused multiply-adds are where the kernels say so: elsewhere the
    compiler would choose which product is rounded."""
    return dict(
        q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k, sequences=0 if cu_q is None else len(cu_q) - 1,
        **_strides("q", q), **_strides("k", k), **_strides("v", v),
        heads=q.shape[-2], group=q.shape[-2] // k.shape[-2], total_q=q.shape[-3],
        total_k=k.shape[-3], D=q.shape[-1], DV=v.shape[-1], BLOCK_D=block(q.shape[-1]),
        BLOCK_DV=block(v.shape[-1]), PACKED=cu_q is not None, enable_fp_fusion=False,
    )  # fmt: skip


def _options(causal, window_left, window_right, softcap, scale) -> dict:
    """exp(score) = 2^(c · s), where s is q·k, or tanh(capped · q·k)."""
    right = 0 if causal else window_right
    return dict(
        left=window_left, right=right, LEFT=window_left >= 0, RIGHT=right >= 0,
        c=(softcap or scale) * math.log2(math.e), capped=scale / softcap if softcap else 0.0,
        SOFTCAP=softcap > 0,
    )  # fmt: skip


def _size(q: Tensor) -> int:
    """Which entry of the tuning table: bytes of a row, and four times as many in fp32, whose tf32
    parts fill that many registers."""
    return tuning.row_bytes(q) * (4 if q.dtype == torch.float32 else 1)


def _strides(name: str, t: Tensor) -> dict:
    batch, length, heads = (t.stride(0) if t.dim() == 4 else 0, t.stride(-3), t.stride(-2))
    return {f"stride_{name}b": batch, f"stride_{name}t": length, f"stride_{name}h": heads}


def _tiles(ends: Tensor | None, length: int, size: int) -> int:
    return triton.cdiv(length, size) if ends is None else length // size + len(ends) - 1
