"""Nearest codebook vector: schema, checks and backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import cuda_backend, native, triton_backend
from ..checks import check_device, check_floating
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import cuda, reference

SCHEMA = (
    "(Tensor z, Tensor codebook, str metric, bool return_distance, bool return_counts)"
    " -> (Tensor indices, Tensor distance, Tensor counts)"
)
METRICS = ("l2", "cosine")


class NearestCodes(NamedTuple):
    """What ``vq_nearest`` returns beside the indices, where asked for."""

    indices: Tensor  # int64 [...]
    distance: Tensor | None  # fp32 [...]
    counts: Tensor | None  # int64 [K]


def vq_nearest(
    z: Tensor,
    codebook: Tensor,
    metric: str,
    *,
    return_distance: bool = False,
    return_counts: bool = False,
    backend: str | None = None,
) -> Tensor | NearestCodes:
    """Index of the nearest code of each vector, by the exact distance of the given values.

    Ties go to the lowest index. No N×K matrix is kept by any backend. Not differentiable.

    Args:
        z: [..., d] vectors, fp32, bf16 or fp16 (the reference also takes fp64).
        codebook: [K, d] codes on the same device, of any of these types.
        metric: "l2", or "cosine": the angle alone; a zero vector has cosine 0 with every other.
        return_distance: also the distance, fp32 [...]: |z − c|², or 2 − 2 cos(z, c).
        return_counts: also how often each code was chosen, int64 [K].
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        Indices int64 [...]; with a ``return_*`` flag ``NearestCodes``, None where not asked for.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or metric; NaN or infinity in ``z`` or
            ``codebook``. On a GPU, which nothing waits for, the latter is an assertion of the
            device's, after which the process cannot use it any more.
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(z, codebook, metric, return_distance=return_distance, return_counts=return_counts)
    indices, distance, counts = select("vq_nearest", backend, *call).run(*call)
    if not (return_distance or return_counts):
        return indices
    return NearestCodes(
        indices, distance if return_distance else None, counts if return_counts else None
    )


def _bind(
    z: Tensor,
    codebook: Tensor,
    metric: str,
    *,
    return_distance: bool = False,
    return_counts: bool = False,
) -> tuple:
    _check(z, codebook, metric)
    # Indices have no gradient; a distance that pretends to have one would be worse than none.
    return z.detach(), codebook.detach(), metric, return_distance, return_counts


def _check(z: Tensor, codebook: Tensor, metric: str) -> None:
    check_floating("z", z)
    check_floating("codebook", codebook)
    if metric not in METRICS:
        raise ValueError(f"metric: expected 'l2' or 'cosine', got {metric!r}")
    if codebook.dim() != 2:
        raise ValueError(f"codebook: expected [K, d], got {tuple(codebook.shape)}")
    if z.dim() < 1 or z.shape[-1] != codebook.shape[1]:
        raise ValueError(
            f"z: expected [..., {codebook.shape[1]}] for a codebook {tuple(codebook.shape)}, "
            f"got {tuple(z.shape)}"
        )
    check_device("codebook", codebook, "z", z)
    if codebook.shape[0] == 0 and z.shape[:-1].numel():
        raise ValueError(f"codebook: {tuple(codebook.shape)} has no codes for z {tuple(z.shape)}")


def _fake(z, codebook, metric, return_distance, return_counts):
    _check(z, codebook, metric)
    return (
        z.new_empty(z.shape[:-1], dtype=torch.int64),
        z.new_empty(z.shape[:-1] if return_distance else 0, dtype=torch.float32),
        z.new_empty(codebook.shape[0] if return_counts else 0, dtype=torch.int64),
    )


def add_backend(name: str, available, supports) -> None:
    """Define the overload ``t2i::vq_nearest.<name>`` and offer it to the registry; its
    implementation is registered in torch by the caller, in Python or in C++."""
    LIBRARY.define(f"vq_nearest.{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::vq_nearest.{name}", _fake, lib=LIBRARY)
    run = getattr(torch.ops.t2i.vq_nearest, name)
    register("vq_nearest", Backend(name, available, supports, run))


def _cpu_supports(z, codebook, metric, return_distance, return_counts) -> Reason:
    if z.device.type != "cpu":
        return f"z is on {z.device}"
    if z.dtype == torch.float64 or codebook.dtype == torch.float64:
        return "float64 is for the reference only"
    return None


def _cuda_supports(z, codebook, metric, return_distance, return_counts) -> Reason:
    if z.dtype == torch.float64 or codebook.dtype == torch.float64:
        return "float64 is for the reference only"
    if codebook.shape[1] > 128:
        return "d is above 128"
    return cuda_backend.runs_on("z", z)


def _triton_supports(z, codebook, metric, return_distance, return_counts) -> Reason:
    if z.dtype == torch.float64 or codebook.dtype == torch.float64:
        return "float64 is for the reference only"
    return triton_backend.runs_on("z", z)


register_op("vq_nearest", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("vq_nearest.reference", reference.vq_nearest, "CompositeExplicitAutograd")
add_backend("cuda", cuda_backend.reason, _cuda_supports)
LIBRARY.impl("vq_nearest.cuda", cuda.vq_nearest, "CUDA")
add_backend("cpu", native.reason, _cpu_supports)
add_backend("triton", triton_backend.reason, _triton_supports)
triton_backend.implement("vq_nearest", "vq_nearest")
