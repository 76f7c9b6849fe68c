"""Checks that operators share. An error names the argument, what it is and what it should be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# float64 is for the references alone: it lets gradients be checked against differences.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """A tensor of a floating type, or TypeError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )


def check_heads(name: str, tensor: Tensor, dim: int, layout: str, q: Tensor) -> None:
    """A tensor of ``dim`` dimensions, of the type and on the device of q."""
    check_floating(name, tensor)
    if tensor.dim() != dim:
        raise ValueError(f"{name}: expected {layout}, got {tuple(tensor.shape)}")
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name}: expected {q.dtype} as q, got {tensor.dtype}")
    check_device(name, tensor, "q", q)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Both on one device, or ValueError."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: on {tensor.device}, but {other_name} is on {other.device}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A floating tensor of the type and on the device of another."""
    check_floating(name, tensor)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other.dtype} as {other_name}, got {tensor.dtype}")
    check_device(name, tensor, other_name, other)


def check_groups(q: Tensor, kv_heads: int, name: str) -> None:
    """Each key head serves the same number of query heads, one at least."""
    heads = q.shape[-2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"q: expected a multiple of the {kv_heads} heads of {name}, got {heads} heads in "
            f"{tuple(q.shape)}"
        )


def check_indices(name: str, tensor: Tensor, layout: str, q: Tensor) -> None:
    """An int32 vector on the device of q."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32 {layout}, got {tensor.dtype}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected int32 {layout}, got {tuple(tensor.shape)}")
    check_device(name, tensor, "q", q)


def check_scores(softcap: float, scale: float | None) -> None:
    """What scores are bounded and multiplied by."""
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected 0 (off) or a positive number, got {softcap}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")


def default_scale(q: Tensor) -> float:
    """1/√head_dim, with which scores of unit-variance vectors have unit variance."""
    return 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
