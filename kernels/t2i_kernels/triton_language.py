"""What the Triton kernels share. Importing this imports triton, which only running them does.

With ``TRITON_INTERPRET=1`` in the environment the kernels run in Triton's interpreter, in numpy on
the CPU: slow, but a check of everything but the compiler.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_hip

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc):
    """acc + a b, in fp32. fp32 inputs keep their 24 bits; the interpreter (3.9) would multiply the
    bits of bf16 as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    precision: tl.constexpr = "ieee" if is_hip() else "tf32x3"
    return tl.dot(a, b, acc, input_precision=precision)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to a type, to nearest even, which the interpreter (3.9) does not do for bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        bits = tl.where(x == x, even, bits | 0x10000)  # a NaN stays one
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def squash(s, capped):
    """tanh(x) of x = s · capped."""
    e = tl.exp2(tl.abs(s * capped) * (-2 * LOG2E))
    t = (1 - e) / (1 + e)
    return tl.where(s * capped < 0, -t, t)


@triton.jit
def find_sequence(ends, tile, sequences, BLOCK: tl.constexpr):
    """Which packed sequence a tile of BLOCK rows is of, and which of its tiles.

    Sequence s, which starts at row ends[s], has the tiles from ends[s] // BLOCK + s on: at least as
    many as it needs, so that a grid of total // BLOCK + sequences tiles has them all and nobody
    has to read lengths on the host.
    """
    low, high = 0, sequences
    while low + 1 < high:
        middle = (low + high) // 2
        if tl.load(ends + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(ends + low) // BLOCK + low)


def block(size: int) -> int:
    """The power of two that a dimension is padded to, 16 at least: a matrix unit's depth."""
    return max(16, triton.next_power_of_2(size))


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit
def row_offsets(row, inner, stride_outer, stride_inner):
    """Where rows begin in a tensor that ``row_strides`` describes."""
    return (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner


def row_strides(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """(x, inner, stride, inner stride): row i of x [..., D] begins at i // inner · stride +
    i % inner · inner stride. Copied only where that cannot say it; heads of a projection, or halves
    of one, need no copy."""
    x = rows_contiguous(x)
    runs: list[tuple[int, int]] = []  # (length, stride) of leading dimensions that go on evenly
    for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if length != 1:
            if runs and runs[-1][1] == length * stride:
                length *= runs.pop()[0]
            runs.append((length, stride))
    if len(runs) > 2:
        return x.contiguous(), 1, x.shape[-1], 0
    if len(runs) == 2:
        return x, runs[1][0], runs[0][1], runs[1][1]
    return x, 1, runs[0][1] if runs else 0, 0
