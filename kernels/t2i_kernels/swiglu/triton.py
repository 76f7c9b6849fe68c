"""swiglu in Triton: one pass forward, one backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..triton_language import LOG2E, round_to, row_offsets, row_strides


@triton.jit
def _place(rows, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, columns, which are there) of this program's tile."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, columns, (row[:, None] < rows) & (columns < dim)


@triton.jit
def _load(x, row, columns, inside, inner, stride_outer, stride_inner):
    at = row_offsets(row, inner, stride_outer, stride_inner)[:, None] + columns
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(out, row, columns, inside, dim, x):
    at = row[:, None].to(tl.int64) * dim + columns
    tl.store(out + at, round_to(x, out.dtype.element_ty), mask=inside)


@triton.jit
def forward_kernel(
    gate, up, out, rows, dim, inner_g, stride_go, stride_gi, inner_u, stride_uo, stride_ui,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns, inside = _place(rows, dim, ROWS, BLOCK)
    g = _load(gate, row, columns, inside, inner_g, stride_go, stride_gi)
    u = _load(up, row, columns, inside, inner_u, stride_uo, stride_ui)
    _store(out, row, columns, inside, dim, g / (1 + tl.exp2(g * -LOG2E)) * u)


@triton.jit
def backward_kernel(
    dout, gate, up, dgate, dup, rows, dim, inner_d, stride_do, stride_di,
    inner_g, stride_go, stride_gi, inner_u, stride_uo, stride_ui,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns, inside = _place(rows, dim, ROWS, BLOCK)
    d = _load(dout, row, columns, inside, inner_d, stride_do, stride_di)
    g = _load(gate, row, columns, inside, inner_g, stride_go, stride_gi)
    u = _load(up, row, columns, inside, inner_u, stride_uo, stride_ui)
    sigmoid = 1 / (1 + tl.exp2(g * -LOG2E))
    _store(dgate, row, columns, inside, dim, d * u * sigmoid * (1 + g * (1 - sigmoid)))
    _store(dup, row, columns, inside, dim, d * g * sigmoid)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    if out.numel():
        grid, call = _call(out, g=gate, u=up)
        forward_kernel[grid](gate=call.pop("g"), up=call.pop("u"), out=out, **call)
    return out


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if dgate.numel():
        grid, call = _call(dgate, d=dout, g=gate, u=up)
        backward_kernel[grid](
            dout=call.pop("d"), gate=call.pop("g"), up=call.pop("u"), dgate=dgate, dup=dup, **call
        )
    return dgate, dup


def _call(out: Tensor, **inputs: Tensor) -> tuple[tuple[int, int], dict]:
    """(grid, arguments) of a kernel that reads ``inputs`` and writes as ``out``."""
    dim = out.shape[-1]
    rows = out.numel() // dim
    call = dict(rows=rows, dim=dim, **tuning.choose("swiglu", out))
    for name, x in inputs.items():
        call[name], call[f"inner_{name}"], call[f"stride_{name}o"], call[f"stride_{name}i"] = (
            row_strides(x)
        )
    return (triton.cdiv(rows, call["ROWS"]), triton.cdiv(dim, call["BLOCK"])), call
