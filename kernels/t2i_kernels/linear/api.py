"""A product with packed weights: schema, checks and backends. Without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import check_device, check_floating
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import reference
from .packed import PackedWeight, check_weight_type, packed_bytes

SCHEMA = "(Tensor x, Tensor weights, int outputs, str weight_type) -> Tensor out"


def linear(x: Tensor, weight: PackedWeight, *, backend: str | None = None) -> Tensor:
    """x Wᵀ for packed weights, accumulated in fp32.

    On the backend ``cpu`` in the order of the inputs: a row's result is the same to the bit however
    many rows are computed with it. A few rows run at the speed at which memory gives the weights.

    Args:
        x: [..., inputs] of any floating type, on the CPU; computed in fp32.
        weight: of ``PackedWeight.pack``. Integer weights take x in 8 bits, too.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        [..., outputs] in the type of x, without a gradient.

    Raises:
        TypeError, ValueError: a wrong type, shape or device.
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(x, weight)
    return select("linear", backend, *call).run(*call).to(x.dtype)


def _bind(x, weight) -> tuple:
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"weight: expected a PackedWeight, got {type(weight).__name__}")
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] != weight.inputs:
        raise ValueError(
            f"x: expected [..., {weight.inputs}] for this weight, got {tuple(x.shape)}"
        )
    check_device("x", x, "weight", weight.data)
    _check(x, weight.data, weight.outputs, weight.weight_type)
    return x.detach().float(), weight.data, weight.outputs, weight.weight_type


def _check(x, weights, outputs, weight_type) -> None:
    check_weight_type(weight_type)
    size = packed_bytes(outputs, x.shape[-1], weight_type)
    if weights.dtype != torch.uint8 or tuple(weights.shape) != (size,):
        raise ValueError(
            f"x: {x.shape[-1]} inputs, {outputs} outputs in {weight_type} are {size} bytes of "
            f"weights, got {weights.dtype} {tuple(weights.shape)}"
        )


def _fake(x, weights, outputs, weight_type):
    _check(x, weights, outputs, weight_type)
    return x.new_empty(*x.shape[:-1], outputs)


def add_backend(name: str, available, supports) -> None:
    """Define the overload ``t2i::linear.<name>`` and offer it to the registry."""
    LIBRARY.define(f"linear.{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::linear.{name}", _fake, lib=LIBRARY)
    register("linear", Backend(name, available, supports, getattr(torch.ops.t2i.linear, name)))


def _cpu_supports(x, weights, *rest) -> Reason:
    return None if x.device.type == "cpu" else f"x is on {x.device}"


register_op("linear", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("linear.reference", reference.linear, "CompositeExplicitAutograd")
add_backend("cpu", native.reason, _cpu_supports)
