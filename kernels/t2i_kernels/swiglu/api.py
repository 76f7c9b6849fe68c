"""The gated activation of SwiGLU: schema, checks, gradient and backends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import triton_backend
from ..checks import check_floating, check_same
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import reference

SCHEMA = "(Tensor gate, Tensor up) -> Tensor out"
BACKWARD_SCHEMA = "(Tensor dout, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)"


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) · up, silu(x) = x / (1 + e⁻ˣ); differentiable in both.

    Source: SwiGLU (arXiv 2002.05202). Computed in fp32 and rounded once.

    Args:
        gate, up: [..., D], fp32, bf16 or fp16 (the reference also fp64). Halves of one projection
            are not copied.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        As gate.

    Raises:
        TypeError, ValueError: a wrong type, shape or device.
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(gate, up)
    return select("swiglu", backend, *call).run(*call)


def _bind(gate, up) -> tuple:
    _check(gate, up)
    return gate, up


def _check(gate, up) -> None:
    check_floating("gate", gate)
    if gate.dim() == 0:
        raise ValueError("gate: expected [..., D], got ()")
    check_same("up", up, "gate", gate)
    if up.shape != gate.shape:
        raise ValueError(f"up: expected {tuple(gate.shape)} as gate, got {tuple(up.shape)}")


def _fake(gate, up):
    _check(gate, up)
    return gate.new_empty(gate.shape)


def _fake_backward(dout, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def add_backend(name: str, available, supports) -> None:
    """Define ``t2i::swiglu.<name>`` and its backward, and offer the pair to the registry; the
    implementations are registered in torch by the caller."""
    forward, backward = f"swiglu.{name}", f"swiglu_backward.{name}"
    LIBRARY.define(forward + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.define(backward + BACKWARD_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::{forward}", _fake, lib=LIBRARY)
    torch.library.register_fake(f"t2i::{backward}", _fake_backward, lib=LIBRARY)
    run_backward = getattr(torch.ops.t2i.swiglu_backward, name)

    @once_differentiable
    def gradient(ctx, dout):
        return run_backward(dout, *ctx.saved_tensors)

    torch.library.register_autograd(
        f"t2i::{forward}", gradient, setup_context=_setup_context, lib=LIBRARY
    )
    register("swiglu", Backend(name, available, supports, getattr(torch.ops.t2i.swiglu, name)))


def _triton_supports(gate, up) -> Reason:
    if gate.dtype == torch.float64:
        return "float64 is for the reference only"
    return triton_backend.runs_on("gate", gate)


register_op("swiglu", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("swiglu.reference", reference.swiglu, "CompositeExplicitAutograd")
LIBRARY.impl("swiglu_backward.reference", reference.swiglu_backward, "CompositeExplicitAutograd")
add_backend("triton", triton_backend.reason, _triton_supports)
triton_backend.implement("swiglu", "swiglu", "swiglu_backward")
