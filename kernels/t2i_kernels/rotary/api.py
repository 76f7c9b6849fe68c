"""Rotary positions: schema, checks, gradient and backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton_backend
from ..checks import check_device, check_floating
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import reference

SCHEMA = (
    "(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse)"
    " -> Tensor out"
)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Turn pairs of channels by the angles of their positions; differentiable in x.

    Source: RoFormer (arXiv 2104.09864). A pair (a, b) becomes (a cos − b sin, a sin + b cos), in
    fp32 and rounded once; channels from R on pass through.

    Args:
        x: [B, L, H, D], or packed [total, H, D]; fp32, bf16 or fp16 (the reference also fp64).
            Heads of a projection are not copied.
        cos, sin: fp32 [positions, R/2], R ≤ D, without a gradient.
        positions: int64 or int32 [L] or [B, L], packed [total]: rows of the tables; by default
            they count from 0.
        interleaved: pairs of channels are (2i, 2i + 1); else (i, i + R/2).
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        As x.

    Raises:
        TypeError, ValueError: a wrong type, shape or device; more rows than the tables have.
        IndexError: a position outside the tables (on a device an assertion, as it runs).
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(x, cos, sin, positions, interleaved)
    return select("rotary", backend, *call).run(*call)


def _bind(x, cos, sin, positions=None, interleaved=False) -> tuple:
    call = x, cos, sin, positions, bool(interleaved), False
    _check(*call)
    return call


def _check(x, cos, sin, positions, interleaved, inverse) -> None:
    check_floating("x", x)
    if x.dim() not in (3, 4):
        raise ValueError(
            "x: expected [batch, length, heads, head_dim] or [total, heads, head_dim], got "
            f"{tuple(x.shape)}"
        )
    _check_table("cos", cos, cos, x)
    _check_table("sin", sin, cos, x)
    rows = x.shape[:-2]
    if positions is not None:
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions: expected a tensor, got {type(positions).__name__}")
        if positions.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"positions: expected int64 or int32, got {positions.dtype}")
        if positions.shape not in (rows, rows[-1:]):
            raise ValueError(
                f"positions: expected one for each of {tuple(rows)} of x {tuple(x.shape)}, got "
                f"{tuple(positions.shape)}"
            )
        check_device("positions", positions, "x", x)
    needed = rows[-1] if positions is None else min(1, positions.numel())
    if len(cos) < needed:
        raise ValueError(f"cos: {len(cos)} positions, but x has {rows[-1]}: {tuple(x.shape)}")


def _check_table(name, table, cos, x) -> None:
    check_floating(name, table)
    if table.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {table.dtype}")
    if table.dim() != 2 or 2 * table.shape[1] > x.shape[-1]:
        raise ValueError(
            f"{name}: expected [positions, R/2] with R at most head_dim, {x.shape[-1]}, got "
            f"{tuple(table.shape)}"
        )
    if table.shape != cos.shape:
        raise ValueError(f"{name}: expected {tuple(cos.shape)} as cos, got {tuple(table.shape)}")
    check_device(name, table, "x", x)


def _fake(x, *rest):
    _check(x, *rest)
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, *tables, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(*tables)


def add_backend(name: str, available, supports) -> None:
    """Define the overload ``t2i::rotary.<name>`` and offer it to the registry; its implementation
    is registered in torch by the caller."""
    LIBRARY.define(f"rotary.{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::rotary.{name}", _fake, lib=LIBRARY)
    run = getattr(torch.ops.t2i.rotary, name)

    def gradient(ctx, dout):  # itself differentiable: turned back
        return run(dout, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), *[None] * 5

    torch.library.register_autograd(
        f"t2i::rotary.{name}", gradient, setup_context=_setup_context, lib=LIBRARY
    )
    register("rotary", Backend(name, available, supports, run))


def _triton_supports(x, *rest) -> Reason:
    if x.dtype == torch.float64:
        return "float64 is for the reference only"
    if x.shape[-1] > 1024:
        return "head_dim is above 1024"
    return triton_backend.runs_on("x", x)


register_op("rotary", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("rotary.reference", reference.rotary, "CompositeExplicitAutograd")
add_backend("triton", triton_backend.reason, _triton_supports)
triton_backend.implement("rotary", "rotary")
