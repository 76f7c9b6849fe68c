"""swiglu in plain PyTorch, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide, up = _wide(gate), _wide(up)
    return (F.silu(wide) * up).to(gate.dtype).contiguous()


def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """silu′(x) = σ(x) (1 + x (1 − σ(x))), σ(x) = 1 / (1 + e⁻ˣ)."""
    dtype = gate.dtype
    dout, gate, up = _wide(dout), _wide(gate), _wide(up)
    sigmoid = gate.sigmoid()
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dout * gate * sigmoid
    return dgate.to(dtype).contiguous(), dup.to(dtype).contiguous()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
