"""linear_cross_entropy in Triton.

Forward: a program computes the logits of a tile of rows for a part of the vocabulary, tile by tile,
and keeps the maximum, the sum of powers and the target's logit; a second kernel joins the parts.

Backward: the accumulators of dx are as wide as x, too many for registers beside logits, and logits
computed again for every slice of them would cost more than the gradients. So the gradient of the
logits is computed for some columns at a time, at most WORKSPACE numbers, and multiplied twice: 3
products in all, 2 of which any backward pass needs. Parts are added up in fp32 in the order of the
columns, without atomics: gradients are the same bits every time, whatever the workspace is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_backend import INTERPRETED
from ..triton_language import LOG2E, dot, round_to, rows_contiguous
from .reference import check_targets

# Small where kernels are interpreted: small problems cross its edges.
WORKSPACE = 1 << 11 if INTERPRETED else 1 << 26


@triton.jit
def _multiply(a, b, rows, columns, stride_am, stride_ak, stride_bn, stride_bk, K, acc,
              BLOCK_K: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """acc + A Bᵀ for rows of A [M, K] and of B [N, K]. EVEN: K is a multiple of BLOCK_K."""
    k = tl.arange(0, BLOCK_K)
    a += rows[:, None].to(tl.int64) * stride_am + k[None, :] * stride_ak
    b += columns[None, :].to(tl.int64) * stride_bn + k[:, None] * stride_bk
    for first in range(0, K, BLOCK_K):
        if EVEN:
            at, bt = tl.load(a), tl.load(b)
        else:
            at = tl.load(a, mask=k[None, :] < K - first, other=0.0)
            bt = tl.load(b, mask=k[:, None] < K - first, other=0.0)
        acc = dot(at, bt, acc)
        a += stride_ak * BLOCK_K
        b += stride_bk * BLOCK_K
    return acc


@triton.jit
def _tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of this program's tile. Programs that run at the same time have tiles of a
    block of GROUP rows, so that what they read is in the L2 cache."""
    program, width = tl.program_id(0), tiles_n * GROUP
    first = program // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + program % width % height, program % width // height


# ---- Forward ------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    x, weight, targets, largest, total, picked, N, V, D, stride_x, stride_w, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows and SPLIT columns of the logits: the maximum and the sum of powers
    [V / SPLIT, N]; of the target's logit [N] those that are among the columns."""
    # Programs that run at the same time share columns: weights are read from memory about once.
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int32)
    above = tl.full([BLOCK_M], float("-inf"), tl.float32)
    powers, logit = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    start = split * SPLIT
    stop = tl.minimum(start + SPLIT, V)
    for n in range(start, stop, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        s = _multiply(
            x, weight, rows % N, columns % V, stride_x, 1, stride_w, 1, D,
            tl.zeros([BLOCK_M, BLOCK_N], tl.float32), BLOCK_K, EVEN,
        )  # fmt: skip
        s = tl.where(columns[None, :] < V, s, float("-inf"))
        logit += tl.sum(tl.where(columns[None, :] == target[:, None], s, 0.0), 1)
        raised = tl.maximum(above, tl.max(s, 1))
        base = tl.where(raised == float("-inf"), 0.0, raised)
        powers = powers * tl.exp2((above - base) * LOG2E)
        powers += tl.sum(tl.exp2((s - base[:, None]) * LOG2E), 1)
        above = raised
    at = split.to(tl.int64) * N + rows
    tl.store(largest + at, above, mask=rows < N)
    tl.store(total + at, powers, mask=rows < N)
    tl.store(picked + rows, logit, mask=(rows < N) & (target >= start) & (target < stop))


@triton.jit
def join_kernel(
    largest, total, picked, targets, loss, lse, N, splits, ignore_index, BLOCK: tl.constexpr
):
    """Loss and logsumexp from the parts of the vocabulary."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    above = tl.full([BLOCK], float("-inf"), tl.float32)
    powers = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        part = tl.load(largest + rows, mask=inside, other=0.0)
        raised = tl.maximum(above, part)
        base = tl.where(raised == float("-inf"), 0.0, raised)
        powers = powers * tl.exp2((above - base) * LOG2E)
        powers += tl.load(total + rows, mask=inside, other=0.0) * tl.exp2((part - base) * LOG2E)
        above = raised
        largest += N
        total += N
    log = tl.log(powers)
    logit = tl.load(picked + rows, mask=inside, other=0.0)
    ignored = tl.load(targets + rows, mask=inside, other=0) == ignore_index
    # Not from the rounded logsumexp: a small loss of large logits keeps its digits.
    tl.store(loss + rows, tl.where(ignored, 0.0, above - logit + log), mask=inside)
    tl.store(lse + rows, above + log, mask=inside)


# ---- Backward -----------------------------------------------------------------------------------


@triton.jit
def logits_kernel(
    x, weight, targets, lse, dloss, dlse, out, first, N, V, D, stride_x, stride_w, stride_o,
    stride_dloss, stride_dlse, ignore_index, tiles_m, tiles_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """(dloss + dlse) · softmax − dloss · onehot for V columns, which begin with ``first``."""
    m, n = _tile(tiles_m, tiles_n, GROUP)
    rows, columns = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    s = _multiply(
        x, weight, rows % N, columns % V, stride_x, 1, stride_w, 1, D,
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), BLOCK_K, EVEN,
    )  # fmt: skip
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=0)
    d = tl.load(dloss + rows.to(tl.int64) * stride_dloss, mask=inside, other=0.0)
    d = tl.where(target == ignore_index, 0.0, d)
    factor = d
    if DLSE:
        factor += tl.load(dlse + rows.to(tl.int64) * stride_dlse, mask=inside, other=0.0)
    p = tl.exp2((s - tl.load(lse + rows, mask=inside, other=0.0)[:, None]) * LOG2E)
    hit = columns[None, :] == (target - first).to(tl.int32)[:, None]
    g = p * factor[:, None] - tl.where(hit, d[:, None], 0.0)
    at = out + rows[:, None].to(tl.int64) * stride_o + columns[None, :]
    tl.store(at, round_to(g, out.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < V))


@triton.jit
def product_kernel(
    a, b, start, out, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_s, stride_o,
    tiles_m, tiles_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """A [M, K] times B [K, N], from ``start`` fp32 on where START."""
    m, n = _tile(tiles_m, tiles_n, GROUP)
    rows, columns = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, inside = rows[:, None].to(tl.int64), (rows[:, None] < M) & (columns[None, :] < N)
    if START:
        acc = tl.load(start + row * stride_s + columns[None, :], mask=inside, other=0.0)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = _multiply(
        a, b, rows % M, columns % N, stride_am, stride_ak, stride_bn, stride_bk, K, acc, BLOCK_K,
        EVEN,
    )  # fmt: skip
    at = out + row * stride_o + columns[None, :]
    tl.store(at, round_to(acc, out.dtype.element_ty), mask=inside)


# ---- Launchers ----------------------------------------------------------------------------------


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    check_targets(targets, len(weight), ignore_index)
    x, weight, targets = rows_contiguous(x), rows_contiguous(weight), targets.contiguous()
    config = _choose("forward", x)
    rows, dim = x.shape
    splits = triton.cdiv(len(weight), config["SPLIT"])
    largest, total = x.new_empty(2, splits, rows, dtype=torch.float32)
    picked, loss, lse = (x.new_empty(rows, dtype=torch.float32) for _ in range(3))
    tiles = triton.cdiv(rows, config["BLOCK_M"])
    forward_kernel[(tiles * splits,)](
        x=x, weight=weight, targets=targets, largest=largest, total=total, picked=picked, N=rows,
        V=len(weight), D=dim, stride_x=x.stride(0), stride_w=weight.stride(0), tiles=tiles,
        EVEN=dim % config["BLOCK_K"] == 0, **config,
    )  # fmt: skip
    join_kernel[(triton.cdiv(rows, 128),)](
        largest=largest, total=total, picked=picked, targets=targets, loss=loss, lse=lse, N=rows,
        splits=splits, ignore_index=ignore_index, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return loss, lse


def linear_cross_entropy_backward(
    dloss: Tensor, dlogsumexp: Tensor | None, x: Tensor, weight: Tensor, targets: Tensor,
    logsumexp: Tensor, ignore_index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, weight, targets = rows_contiguous(x), rows_contiguous(weight), targets.contiguous()
    logsumexp = logsumexp.contiguous()
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    config = _choose("logits", x)
    rows, dim = x.shape
    size = triton.cdiv(max(1, WORKSPACE // max(1, rows)), config["BLOCK_N"]) * config["BLOCK_N"]
    size = min(size, len(weight))
    dlogits = x.new_empty(rows, size)
    single = size == len(weight) or x.dtype == torch.float32
    partial = dx if single else torch.empty_like(dx, dtype=torch.float32)
    dlse = logsumexp if dlogsumexp is None else dlogsumexp
    for first in range(0, len(weight), max(1, size)):
        part = weight[first : first + size]
        d = dlogits[:, : len(part)]
        tiles = triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(len(part), config["BLOCK_N"])
        logits_kernel[(tiles[0] * tiles[1],)](
            x=x, weight=part, targets=targets, lse=logsumexp, dloss=dloss, dlse=dlse, out=d,
            first=first, N=rows, V=len(part), D=dim, stride_x=x.stride(0),
            stride_w=part.stride(0), stride_o=d.stride(0), stride_dloss=dloss.stride(0),
            stride_dlse=dlse.stride(0), ignore_index=ignore_index, tiles_m=tiles[0],
            tiles_n=tiles[1], EVEN=dim % config["BLOCK_K"] == 0, DLSE=dlogsumexp is not None,
            **config,
        )  # fmt: skip
        last = first + size >= len(weight)
        _product(d, part, partial if first else None, dx if last else partial)
        _product(d.T, x, None, dweight[first : first + size])
    return dx, dweight


def _product(a: Tensor, b: Tensor, start: Tensor | None, out: Tensor) -> None:
    """out = a b, or start + a b."""
    config = _choose("product", a)
    (rows, depth), columns = a.shape, b.shape[1]
    tiles = triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(columns, config["BLOCK_N"])
    product_kernel[(tiles[0] * tiles[1],)](
        a=a, b=b, start=out if start is None else start, out=out, M=rows, N=columns, K=depth,
        stride_am=a.stride(0), stride_ak=a.stride(1), stride_bk=b.stride(0), stride_bn=b.stride(1),
        stride_s=(out if start is None else start).stride(0), stride_o=out.stride(0),
        tiles_m=tiles[0], tiles_n=tiles[1], EVEN=depth % config["BLOCK_K"] == 0,
        START=start is not None, **config,
    )  # fmt: skip


def _choose(kernel: str, x: Tensor) -> dict:
    """By the size of an element: dimensions are cut into tiles, whatever they are."""
    return tuning.choose(f"linear_cross_entropy.{kernel}", x, x.element_size())
