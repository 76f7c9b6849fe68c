"""Root mean square normalisation: schema, checks, gradient and backends."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import triton_backend
from ..checks import check_device, check_floating
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import reference

SCHEMA = "(Tensor x, Tensor weight, float eps) -> Tensor out"
BACKWARD_SCHEMA = "(Tensor dout, Tensor x, Tensor weight, float eps) -> (Tensor dx, Tensor dweight)"


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension; differentiable in x and weight.

    Source: RMSNorm (arXiv 1910.07467). Computed in fp32 and rounded once.

    Args:
        x: [..., D], fp32, bf16 or fp16 (the reference also fp64).
        weight: [D], of any of these types.
        eps: at least 0; a row of zeros has output 0 where it is positive.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        As x.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option.
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(x, weight, eps)
    return select("rms_norm", backend, *call).run(*call)


def _bind(x, weight, eps) -> tuple:
    _check(x, weight, eps)
    return x, weight, float(eps)


def _check(x, weight, eps) -> None:
    check_floating("x", x)
    check_floating("weight", weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight: expected [D] for x [..., D], got {tuple(weight.shape)} for {tuple(x.shape)}"
        )
    check_device("weight", weight, "x", x)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")


def _fake(x, weight, eps):
    _check(x, weight, eps)
    return x.new_empty(x.shape)


def _fake_backward(dout, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def add_backend(name: str, available, supports) -> None:
    """Define ``t2i::rms_norm.<name>`` and its backward, and offer the pair to the registry; the
    implementations are registered in torch by the caller."""
    forward, backward = f"rms_norm.{name}", f"rms_norm_backward.{name}"
    LIBRARY.define(forward + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.define(backward + BACKWARD_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::{forward}", _fake, lib=LIBRARY)
    torch.library.register_fake(f"t2i::{backward}", _fake_backward, lib=LIBRARY)
    run_backward = getattr(torch.ops.t2i.rms_norm_backward, name)

    @once_differentiable
    def gradient(ctx, dout):
        return *run_backward(dout, *ctx.saved_tensors, ctx.eps), None

    torch.library.register_autograd(
        f"t2i::{forward}", gradient, setup_context=_setup_context, lib=LIBRARY
    )
    register("rms_norm", Backend(name, available, supports, getattr(torch.ops.t2i.rms_norm, name)))


def _triton_supports(x, weight, eps) -> Reason:
    if torch.float64 in (x.dtype, weight.dtype):
        return "float64 is for the reference only"
    if x.shape[-1] > 16384:
        return "the last dimension is above 16384"
    return triton_backend.runs_on("x", x)


register_op("rms_norm", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("rms_norm.reference", reference.rms_norm, "CompositeExplicitAutograd")
LIBRARY.impl(
    "rms_norm_backward.reference", reference.rms_norm_backward, "CompositeExplicitAutograd"
)
add_backend("triton", triton_backend.reason, _triton_supports)
triton_backend.implement("rms_norm", "rms_norm", "rms_norm_backward")
