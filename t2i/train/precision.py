"""When to compute in bf16."""

from __future__ import annotations

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass. ``precision`` "auto" is bf16 on a GPU whose hardware computes
    in it; not on the CPU, where most machines emulate it."""
    if precision == "auto":
        enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        enabled = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
