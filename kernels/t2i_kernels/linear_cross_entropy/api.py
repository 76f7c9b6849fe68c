"""Cross entropy of a linear layer: schema, checks, gradient and backends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import triton_backend
from ..checks import check_device, check_floating, check_same
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import reference

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor targets, int ignore_index) -> (Tensor loss, Tensor logsumexp)"
)
BACKWARD_SCHEMA = (
    "(Tensor dloss, Tensor? dlogsumexp, Tensor x, Tensor weight, Tensor targets, Tensor logsumexp,"
    " int ignore_index) -> (Tensor dx, Tensor dweight)"
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """−log softmax(x Wᵀ)[target] of each row, without ever holding all logits; differentiable in x
    and weight.

    Source: the logits are computed a part at a time, and again for the gradient, as in Cut
    Cross-Entropy (arXiv 2411.09009). Sums are kept in fp32. Of a label-smoothed loss
    (1 − s) · loss + s · (logsumexp − mean of the logits) the last term is x · weight.mean(0).

    Args:
        x: [N, D], fp32, bf16 or fp16 (the reference also fp64).
        weight: [V, D], as x. Any strides with a contiguous last dimension, for both.
        targets: int64 [N], from 0 to V − 1, or ``ignore_index``: loss 0, without a gradient.
        return_lse: also the logsumexp of the logits of every row, differentiable.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        fp32 [N] in nats; with ``return_lse`` also fp32 [N].

    Raises:
        TypeError, ValueError: a wrong type, shape or device; a target out of range (on a device an
            assertion, as it runs).
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(x, weight, targets, ignore_index=ignore_index)
    loss, logsumexp = select("linear_cross_entropy", backend, *call).run(*call)
    return (loss, logsumexp) if return_lse else loss


def _bind(x, weight, targets, *, ignore_index=-100, return_lse=False) -> tuple:
    _check(x, weight, targets, ignore_index)
    return x, weight, targets, int(ignore_index)


def _check(x, weight, targets, ignore_index) -> None:
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected [N, D], got {tuple(x.shape)}")
    check_same("weight", weight, "x", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight: expected [V, {x.shape[1]}] for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if len(weight) == 0 and len(x):
        raise ValueError(f"weight: {tuple(weight.shape)} has no rows for x {tuple(x.shape)}")
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    if targets.shape != x.shape[:1]:
        raise ValueError(
            f"targets: expected [N] for x {tuple(x.shape)}, got {tuple(targets.shape)}"
        )
    check_device("targets", targets, "x", x)


def _fake(x, weight, targets, ignore_index):
    _check(x, weight, targets, ignore_index)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(len(x), dtype=dtype), x.new_empty(len(x), dtype=dtype)


def _fake_backward(dloss, dlogsumexp, x, weight, *rest):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def add_backend(name: str, available, supports) -> None:
    """Define ``t2i::linear_cross_entropy.<name>`` and its backward, and offer the pair to the
    registry; the implementations are registered in torch by the caller."""
    forward, backward = f"linear_cross_entropy.{name}", f"linear_cross_entropy_backward.{name}"
    LIBRARY.define(forward + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.define(backward + BACKWARD_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::{forward}", _fake, lib=LIBRARY)
    torch.library.register_fake(f"t2i::{backward}", _fake_backward, lib=LIBRARY)
    run_backward = getattr(torch.ops.t2i.linear_cross_entropy_backward, name)

    @once_differentiable
    def gradient(ctx, dloss, dlogsumexp):
        if dloss is None:
            dloss = torch.zeros_like(ctx.saved_tensors[-1])
        return *run_backward(dloss, dlogsumexp, *ctx.saved_tensors, ctx.ignore_index), None, None

    torch.library.register_autograd(
        f"t2i::{forward}", gradient, setup_context=_setup_context, lib=LIBRARY
    )
    run = getattr(torch.ops.t2i.linear_cross_entropy, name)
    register("linear_cross_entropy", Backend(name, available, supports, run))


def _triton_supports(x, *rest) -> Reason:
    if x.dtype == torch.float64:
        return "float64 is for the reference only"
    return triton_backend.runs_on("x", x)


register_op("linear_cross_entropy", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl(
    "linear_cross_entropy.reference", reference.linear_cross_entropy, "CompositeExplicitAutograd"
)
LIBRARY.impl(
    "linear_cross_entropy_backward.reference",
    reference.linear_cross_entropy_backward,
    "CompositeExplicitAutograd",
)
add_backend("triton", triton_backend.reason, _triton_supports)
triton_backend.implement(
    "linear_cross_entropy", "linear_cross_entropy", "linear_cross_entropy_backward"
)
