"""rms_norm in Triton: a row is read once, forward and backward.

The gradient of the weight is a sum over all rows: each of a fixed number of programs adds up the
rows that it walks over, and one small reduction adds up the programs. Sums have one order, so it is
the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_language import round_to, row_offsets, row_strides


@triton.jit
def _normalise(x, at, inside, eps, D: tl.constexpr):
    """(rows of x times r, r = 1 / √(mean(x²) + eps)) in fp32."""
    x = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    return x * r[:, None], r


@triton.jit
def forward_kernel(
    x, weight, out, rows, inner, stride_xo, stride_xi, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (row[:, None] < rows) & (columns[None, :] < D)
    at = row_offsets(row, inner, stride_xo, stride_xi)[:, None] + columns[None, :]
    normed, _ = _normalise(x, at, inside, eps, D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    y = round_to(normed * w[None, :], out.dtype.element_ty)
    tl.store(out + row[:, None].to(tl.int64) * D + columns[None, :], y, mask=inside)


@triton.jit
def backward_kernel(
    dout, x, weight, dx, partial, rows, inner, stride_xo, stride_xi, dinner, stride_do, stride_di,
    eps, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx of every so many tiles of rows, and what they add to the gradient of the weight."""
    columns = tl.arange(0, BLOCK_D)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (columns[None, :] < D)
        at = row_offsets(row, inner, stride_xo, stride_xi)[:, None] + columns[None, :]
        normed, r = _normalise(x, at, inside, eps, D)
        at = row_offsets(row, dinner, stride_do, stride_di)[:, None] + columns[None, :]
        dy = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
        # Rows that are not there are 0 · inf where eps is 0.
        dw += tl.where(inside, dy * normed, 0.0)
        dnormed = dy * w[None, :]
        shared = tl.sum(normed * dnormed, 1) / D
        d = (dnormed - normed * shared[:, None]) * r[:, None]
        d = round_to(d, dx.dtype.element_ty)
        tl.store(dx + row[:, None].to(tl.int64) * D + columns[None, :], d, mask=inside)
    at = tl.program_id(0) * D + columns
    tl.store(partial + at, tl.sum(dw, 0), mask=columns < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = x.new_empty(x.shape)
    if out.numel():
        x, inner, outer_stride, inner_stride = row_strides(x)
        config = tuning.choose("rms_norm.forward", x)
        rows, dim = out.numel() // out.shape[-1], out.shape[-1]
        forward_kernel[(triton.cdiv(rows, config["ROWS"]),)](
            x=x, weight=weight.contiguous(), out=out, rows=rows, inner=inner,
            stride_xo=outer_stride, stride_xi=inner_stride, eps=eps, D=dim,
            BLOCK_D=triton.next_power_of_2(dim), **config,
        )  # fmt: skip
    return out


def rms_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx, weight.new_zeros(weight.shape)
    x, inner, outer_stride, inner_stride = row_strides(x)
    dout, dinner, douter_stride, dinner_stride = row_strides(dout)
    config = dict(tuning.choose("rms_norm.backward", x))
    rows, dim = dx.numel() // dx.shape[-1], dx.shape[-1]
    programs = min(config.pop("PROGRAMS"), triton.cdiv(rows, config["ROWS"]))
    partial = x.new_empty(programs, dim, dtype=torch.float32)
    backward_kernel[(programs,)](
        dout=dout, x=x, weight=weight.contiguous(), dx=dx, partial=partial, rows=rows, inner=inner,
        stride_xo=outer_stride, stride_xi=inner_stride, dinner=dinner, stride_do=douter_stride,
        stride_di=dinner_stride, eps=eps, D=dim, BLOCK_D=triton.next_power_of_2(dim), **config,
    )  # fmt: skip
    return dx, partial.sum(dim=0).to(weight.dtype)
