"""vq_nearest in Triton: scores on the matrix units, then exact distances of what may be nearest.

The nearest code has the largest score z·c − |c|²/2, or z·c/|c| for the cosine. A program scores its
vectors against all codes, tile by tile, and keeps the largest scores of the three best tiles. Every
score is within a bound of the exact one, so the nearest code is in a tile whose largest score is
within twice the bound of the best. The codes of the best tile, and of the second where it
qualifies, are measured in fp64; where the third qualifies, too, all tiles are scored again and
those that qualify measured. So the answer is that of fp64 whatever the data: duplicated codes, ties
and cancellation only cost time.

Scores are products of fp16 with sums in fp32. Every number is the sum of two in fp16, |c|²/2 of
three, side by side: [zh | zh | zl | 1 1 1] · [ch | cl | ch | −b0 −b1 −b2] drops only zl·cl. That is
one matrix instruction deep at d ≤ 4 and two at d ≤ 8. Values are scaled by the largest entries, so
that nothing overflows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_language import block, dot
from .reference import check_finite

WHOLE = 64  # up to this width vectors stay in registers
LOWEST = tl.constexpr(-65504.0)  # of fp16: the score of codes that are not there


@triton.jit
def _inverse(x):
    """1/x, and 1 for 0."""
    return 1.0 / tl.where(x > 0, x, 1.0)


@triton.jit
def pack_kernel(
    x, packed, lengths, squares, largest, code_largest, stride, stride_d, num_rows,
    D: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    COSINE: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Rows of x [num_rows, D], scaled, as fp16 [padded, WIDTH] with zeros behind them; ``lengths``
    are of the scaled rows, ``squares`` of the rows as they were."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, D):
        value = tl.load(x + rows * stride + i * stride_d, mask=inside, other=0.0)
        value = value.to(tl.float32).to(tl.float64)
        total += value * value
    # |c|² is no larger than the largest product this way.
    code_factor = _inverse(tl.load(code_largest).to(tl.float64))
    z_factor = _inverse(tl.load(largest).to(tl.float64))
    if COSINE:
        factor = _inverse(tl.sqrt(total))
    elif CODES:
        factor = code_factor + total * 0.0
    else:
        factor = z_factor + total * 0.0
    tl.store(lengths + rows, (tl.sqrt(total) * factor).to(tl.float32))
    tl.store(squares + rows, total)

    columns = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)[None, :]
    at = x + rows[:, None] * stride + (columns % D) * stride_d
    value = tl.load(at, mask=inside[:, None] & (columns < 3 * D), other=0.0)
    value = (value.to(tl.float32).to(tl.float64) * factor[:, None]).to(tl.float32)
    high = value.to(tl.float16)
    low = (value - high.to(tl.float32)).to(tl.float16)
    value = tl.where(columns // D == (1 if CODES else 2), low, high)
    rest = columns - 3 * D
    if CODES:
        half = (0.5 * total * code_factor * z_factor).to(tl.float32)
        if COSINE:
            half = half * 0.0
        half = tl.where(inside, -half, LOWEST)[:, None]
        b0 = half.to(tl.float16)
        half -= b0.to(tl.float32)
        b1 = half.to(tl.float16)
        b2 = (half - b1.to(tl.float32)).to(tl.float16)
        value = tl.where(rest == 0, b0, tl.where(rest == 1, b1, tl.where(rest == 2, b2, value)))
    else:
        value = tl.where((rest >= 0) & (rest < 3), tl.full(value.shape, 1.0, tl.float16), value)
    tl.store(packed + rows[:, None] * WIDTH + columns, value)


@triton.jit
def _largest(x, vectors, codes, tile, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
             BLOCK_N: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """The largest score of a tile of codes for each vector; ``x`` is all of the vectors where they
    are no deeper than DEPTH."""
    at = tl.arange(0, DEPTH)[None, :]
    vectors += tl.arange(0, BLOCK_N)[:, None] * WIDTH + at
    codes += (tile * TILE + tl.arange(0, TILE)[:, None]).to(tl.int64) * WIDTH + at
    s = tl.zeros([BLOCK_N, TILE], tl.float32)
    if WIDTH == DEPTH:
        s = dot(x, tl.trans(tl.load(codes)), s)
    else:
        for i in range(0, WIDTH, DEPTH):
            s = dot(tl.load(vectors + i), tl.trans(tl.load(codes + i)), s)
    return tl.max(s, 1)


@triton.jit
def _measure(nearest, index, z, codebook, rows, squares, tile, wanted, stride_n, stride_d, stride_k,
             stride_c, num_codes, D: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
             CHUNK: tl.constexpr, COSINE: tl.constexpr):  # fmt: skip
    """Exact distances of the vectors that are ``wanted`` to the codes of their tile [BLOCK_N]: a
    nearer code, or one as near with a lower index, replaces what was nearest."""
    for j in range(0, TILE, CHUNK):
        codes = (tile * TILE + j)[:, None].to(tl.int64) + tl.arange(0, CHUNK)[None, :]
        there = wanted[:, None] & (codes < num_codes)
        total = tl.zeros([BLOCK_N, CHUNK], tl.float64)
        norms = tl.zeros([BLOCK_N, CHUNK], tl.float64)
        for i in range(0, D):
            a = tl.load(z + rows * stride_n + i * stride_d, mask=wanted, other=0.0)
            b = tl.load(codebook + codes * stride_k + i * stride_c, mask=there, other=0.0)
            a = a.to(tl.float32).to(tl.float64)[:, None]
            b = b.to(tl.float32).to(tl.float64)
            if COSINE:
                total += a * b
                norms += b * b
            else:
                total += (a - b) * (a - b)
        if COSINE:
            cosine = total * _inverse(tl.sqrt(squares))[:, None] * _inverse(tl.sqrt(norms))
            total = tl.maximum(2.0 - 2.0 * cosine, 0.0)
        total = tl.where(there, total, float("inf"))
        least = tl.min(total, 1)
        first = tl.min(tl.where(there & (total == least[:, None]), codes, num_codes), 1)
        better = (least < nearest) | ((least == nearest) & (first < index))
        nearest, index = tl.where(better, least, nearest), tl.where(better, first, index)
    return nearest, index


@triton.jit
def nearest_kernel(
    z, codebook, vectors, codes, lengths, squares, longest, largest, code_largest, indices,
    distance, counts, stride_n, stride_d, stride_k, stride_c, num_vectors, num_codes, relative,
    absolute, D: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, COSINE: tl.constexpr, DISTANCE: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    """``vectors``, ``codes``: packed; ``longest``: of the scaled codes. ``relative``, ``absolute``:
    see ``_bounds``."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < num_vectors
    vectors += tl.program_id(0).to(tl.int64) * BLOCK_N * WIDTH
    x = 0
    if WIDTH == DEPTH:
        columns = tl.arange(0, WIDTH)[None, :]
        x = tl.load(vectors + tl.arange(0, BLOCK_N)[:, None] * WIDTH + columns)
    # The largest scores of three tiles, in descending order, and which the first two are.
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    second, third = best, best
    best_tile = tl.zeros([BLOCK_N], tl.int32)
    second_tile = best_tile
    for tile in range(0, tl.cdiv(num_codes, TILE)):
        s = _largest(x, vectors, codes, tile, WIDTH, DEPTH, BLOCK_N, TILE)
        second_tile = tl.where(s > best, best_tile, tl.where(s > second, tile, second_tile))
        best_tile = tl.where(s > best, tile, best_tile)
        third = tl.maximum(third, tl.minimum(second, s))
        second = tl.maximum(second, tl.minimum(best, s))
        best = tl.maximum(best, s)

    length, longest = tl.load(lengths + rows), tl.load(longest)
    half = 0.5 * longest * longest * tl.load(code_largest) / tl.load(largest)
    terms = length * longest + (0.0 if COSINE else half)
    least = best - 2.0 * (relative * terms + absolute * (1.0 + length + longest))
    square = tl.load(squares + rows)
    nearest = tl.full([BLOCK_N], float("inf"), tl.float64)
    index = tl.zeros([BLOCK_N], tl.int64) + num_codes
    nearest, index = _measure(
        nearest, index, z, codebook, rows, square, best_tile, inside, stride_n, stride_d, stride_k,
        stride_c, num_codes, D, BLOCK_N, TILE, CHUNK, COSINE,
    )  # fmt: skip
    wanted = inside & (second >= least)
    if tl.max(wanted.to(tl.int32)) > 0:
        nearest, index = _measure(
            nearest, index, z, codebook, rows, square, second_tile, wanted, stride_n, stride_d,
            stride_k, stride_c, num_codes, D, BLOCK_N, TILE, CHUNK, COSINE,
        )  # fmt: skip
    unsure = inside & (third >= least)
    if tl.max(unsure.to(tl.int32)) > 0:
        for tile in range(0, tl.cdiv(num_codes, TILE)):
            s = _largest(x, vectors, codes, tile, WIDTH, DEPTH, BLOCK_N, TILE)
            wanted = unsure & (s >= least)
            if tl.max(wanted.to(tl.int32)) > 0:
                nearest, index = _measure(
                    nearest, index, z, codebook, rows, square, best_tile * 0 + tile, wanted,
                    stride_n, stride_d, stride_k, stride_c, num_codes, D, BLOCK_N, TILE, CHUNK,
                    COSINE,
                )  # fmt: skip
    tl.store(indices + rows, index, mask=inside)
    if DISTANCE:
        tl.store(distance + rows, nearest.to(tl.float32), mask=inside)
    if COUNTS:
        tl.atomic_add(counts + index, tl.full([BLOCK_N], 1, tl.int64), mask=inside, sem="relaxed")


def vq_nearest(
    z: Tensor, codebook: Tensor, metric: str, return_distance: bool, return_counts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (num_codes, dim), shape = codebook.shape, z.shape[:-1]
    vectors = z.reshape(shape.numel(), dim)
    indices = z.new_empty(shape, dtype=torch.int64)
    distance = z.new_empty(shape if return_distance else 0, dtype=torch.float32)
    counts = z.new_zeros(num_codes if return_counts else 0, dtype=torch.int64)
    largest, code_largest = _largest_entry("z", vectors), _largest_entry("codebook", codebook)
    if not dim:  # all codes are at distance 0
        counts[:1] = len(vectors)
        return indices.zero_(), distance.zero_(), counts
    if not len(vectors):
        return indices, distance, counts
    largest = torch.maximum(largest, code_largest)
    width = 3 * dim + 3
    depth = min(block(width), WHOLE)
    width = triton.cdiv(width, depth) * depth
    config = tuning.choose("vq_nearest", z, width)
    how = dict(
        largest=largest, code_largest=code_largest, D=dim, WIDTH=width, DEPTH=depth,
        COSINE=metric == "cosine", enable_fp_fusion=False,
    )  # fmt: skip
    codes, code_lengths, _ = _pack(codebook, config["TILE"], CODES=True, **how)
    packed, lengths, squares = _pack(vectors, config["BLOCK_N"], CODES=False, **how)
    relative, absolute = _bounds(dim, width)
    nearest_kernel[(len(packed) // config["BLOCK_N"],)](
        z=vectors, codebook=codebook, vectors=packed, codes=codes, lengths=lengths,
        squares=squares, longest=code_lengths.amax(), indices=indices, distance=distance,
        counts=counts, stride_n=vectors.stride(0), stride_d=vectors.stride(1),
        stride_k=codebook.stride(0), stride_c=codebook.stride(1), num_vectors=len(vectors),
        num_codes=num_codes, relative=relative, absolute=absolute, DISTANCE=return_distance,
        COUNTS=return_counts, **how, **config,
    )  # fmt: skip
    return indices, distance, counts


def _pack(x: Tensor, multiple: int, **how) -> tuple[Tensor, Tensor, Tensor]:
    """(packed fp16 [padded, width], lengths fp32 [padded], squares fp64 [padded])."""
    padded = triton.cdiv(len(x), multiple) * multiple
    packed = x.new_empty(padded, how["WIDTH"], dtype=torch.float16)
    lengths, squares = (x.new_empty(padded, dtype=t) for t in (torch.float32, torch.float64))
    size = min(multiple, 64)
    pack_kernel[(padded // size, how["WIDTH"] // how["DEPTH"])](
        x=x, packed=packed, lengths=lengths, squares=squares, stride=x.stride(0),
        stride_d=x.stride(1), num_rows=len(x), BLOCK=size, **how,
    )  # fmt: skip
    return packed, lengths, squares


def _bounds(dim: int, width: int) -> tuple[float, float]:
    """How far a score may be from the exact one, in parts of Σ|z c| + |c|²/2 and of 1 + |z| + |c|.

    A matrix instruction 16 deep sums 17 numbers exactly but for what it cuts off each, 2^-23 of the
    largest. Two fp16 numbers leave 2^-22 of each factor, and so does zl·cl; scaling has rounded
    both factors to fp32 before. Numbers below 2^-14 leave 2^-25 instead, √d of which each norm
    meets.
    """
    return (17 * width / 16 + 12) * 2.0**-23, math.sqrt(dim) * 2.0**-24


def _largest_entry(name: str, x: Tensor) -> Tensor:
    """max |x| as fp32 on its device. NaN and infinity are an error, on a GPU without waiting."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    largest = torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32)
    if x.device.type == "cpu":
        check_finite(name, x.double())
    else:
        torch._assert_async(largest.isfinite(), f"vq_nearest: {name} holds NaN or infinite values")
    return largest
