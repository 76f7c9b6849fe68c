"""rotary in Triton: a program turns some heads of one token, whose angles it reads once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_language import round_to, rows_contiguous
from .reference import check_positions


@triton.jit
def rotate_kernel(
    x, cos, sin, positions, out, stride_xb, stride_xl, stride_xh, stride_cos, stride_sin,
    stride_pb, stride_pl, length, heads, table, D: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_H: tl.constexpr,
    INDEXED: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, position = token // length, token % length
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    x += b * stride_xb + position * stride_xl + head.to(tl.int64) * stride_xh
    out += (token * heads + head) * D
    if INDEXED:
        position = tl.load(positions + b * stride_pb + position * stride_pl).to(tl.int64)
        position = tl.minimum(tl.maximum(position, 0), table - 1)
    pairs = tl.arange(0, BLOCK_P)
    c = tl.load(cos + position * stride_cos + pairs, mask=pairs < PAIRS, other=0.0)[None, :]
    s = tl.load(sin + position * stride_sin + pairs, mask=pairs < PAIRS, other=0.0)[None, :]
    if INVERSE:
        s = -s
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_P)[None, :]
        inside = (head < heads) & (columns < 2 * PAIRS)
        both = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
        p, q = tl.split(tl.reshape(both, [BLOCK_H, BLOCK_P, 2]))
        turned = tl.reshape(tl.join(p * c - q * s, p * s + q * c), [BLOCK_H, 2 * BLOCK_P])
        tl.store(out + columns, round_to(turned, out.dtype.element_ty), mask=inside)
    else:
        columns = pairs[None, :]
        inside = (head < heads) & (columns < PAIRS)
        p = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(x + PAIRS + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + columns, round_to(p * c - q * s, out.dtype.element_ty), mask=inside)
        tl.store(out + PAIRS + columns, round_to(p * s + q * c, out.dtype.element_ty), mask=inside)
    if D > 2 * PAIRS:
        columns = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        inside = (head < heads) & (columns < D)
        tl.store(out + columns, tl.load(x + columns, mask=inside), mask=inside)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    if positions is not None:
        check_positions(positions, len(cos))
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    x, cos, sin = rows_contiguous(x), rows_contiguous(cos), rows_contiguous(sin)
    *batch, length, heads, dim = x.shape
    pairs = cos.shape[1]
    config = dict(tuning.choose("rotary", x))
    config["BLOCK_H"] = min(config["BLOCK_H"], triton.next_power_of_2(heads))
    grid = x.shape[:-2].numel(), triton.cdiv(heads, config["BLOCK_H"])
    by_row = positions is not None and positions.dim() == 2
    rotate_kernel[grid](
        x=x, cos=cos, sin=sin, positions=positions, out=out, stride_xb=x.stride(0) if batch else 0,
        stride_xl=x.stride(-3), stride_xh=x.stride(-2), stride_cos=cos.stride(0),
        stride_sin=sin.stride(0), stride_pb=positions.stride(0) if by_row else 0,
        stride_pl=0 if positions is None else positions.stride(-1), length=length, heads=heads,
        table=len(cos), D=dim, PAIRS=pairs, BLOCK_P=triton.next_power_of_2(max(1, pairs)),
        BLOCK_REST=triton.next_power_of_2(max(1, dim - 2 * pairs)), INDEXED=positions is not None,
        INTERLEAVED=interleaved, INVERSE=inverse, **config,
    )  # fmt: skip
    return out
