"""rms_norm in plain PyTorch, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed, _ = _normalise(x, eps)
    return (normed * weight.to(normed.dtype)).to(x.dtype).contiguous()


def rms_norm_backward(dout: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """With n = x · r, r = 1 / √(mean(x²) + eps): dx = r (w·dout − n · mean(n · w·dout))."""
    normed, r = _normalise(x, eps)
    dout = dout.to(normed.dtype)
    dnormed = dout * weight.to(normed.dtype)
    dx = r * (dnormed - normed * (normed * dnormed).mean(dim=-1, keepdim=True))
    dweight = (dout * normed).sum_to_size(weight.shape)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x · r, r [..., 1]) in the type that sums are kept in."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    r = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return x * r, r
