"""How a run uses the machine: threads, memory, precision."""

from __future__ import annotations

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def prepare(threads: int) -> None:
    """Set the threads of the CPU (0: torch's own choice), and let the allocator keep freed memory.

    glibc returns every large tensor to the system as it is freed, which then clears the pages of
    the next one: 7 to 14 % of a training step on the CPU. Elsewhere nothing happens.
    """
    if threads:
        torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Older versions of it refuse more than 32 MiB.
        if mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25):
            mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass. ``precision`` "auto" is bf16 where the hardware multiplies
    matrices of it: on most GPUs, and on CPUs with AMX. Other CPUs emulate it, slowly."""
    enabled = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is the faster type on a device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
