"""Counters of how many blocks of a row are done, for kernels whose last block combines."""

from __future__ import annotations

import torch
from torch import Tensor

_IDLE: dict[tuple[int, int], Tensor] = {}  # by device and stream
_UNUSED: dict[int, Tensor] = {}  # by device
LENT = 2**16  # counters of a device that graphs can have


def lend_counters(x: Tensor, size: int) -> Tensor:
    """Zeros, which a launch leaves as it found them: none has to be cleared.

    Launches in a stream follow each other and share them. A CUDA graph may be replayed beside
    anything, so each launch in one has counters of its own, for good. When all LENT are gone, or
    where no launch outside of graphs came first, its graph clears them at each replay.
    """
    if not x.is_cuda:
        return x.new_zeros(size, dtype=torch.int32)
    device = x.device.index
    if torch.cuda.is_current_stream_capturing():
        unused = _UNUSED.get(device)
        if unused is None or len(unused) < size:
            return x.new_zeros(size, dtype=torch.int32)
        _UNUSED[device] = unused[size:]
        return unused[:size]
    if device not in _UNUSED:
        _UNUSED[device] = x.new_zeros(LENT, dtype=torch.int32)
    key = device, torch.cuda.current_stream(x.device).cuda_stream
    if key not in _IDLE or len(_IDLE[key]) < size:
        _IDLE[key] = x.new_zeros(max(size, 1024), dtype=torch.int32)
    return _IDLE[key]
