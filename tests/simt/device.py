"""Tensors for csrc/simt: each in memory between guards, called by its name in what is found."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def empty(module: ModuleType, shape, dtype: torch.dtype, name: str, stride=None) -> Tensor:
    """NaN bytes, with gaps where ``stride`` leaves them."""
    stride = stride or torch.empty(shape, dtype=dtype, device="meta").stride()
    elements = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    elements = elements if all(shape) else 0
    memory = module.Memory(max(elements, 1) * dtype.itemsize, name)
    return torch.frombuffer(memory, dtype=dtype)[:elements].as_strided(shape, stride)


def put(module: ModuleType, x: Tensor, name: str) -> Tensor:
    """A copy of x with its strides."""
    copy = empty(module, x.shape, x.dtype, name, x.stride())
    once = tuple(slice(1 if step == 0 else n) for n, step in zip(x.shape, x.stride(), strict=True))
    if copy.numel():
        copy[once] = x[once]
    return copy


def strides(module: ModuleType, x: Tensor):
    """Of [batch, rows, heads, ...]."""
    return module.Strides(*x.stride()[:3])
