"""Memory in large pages, where the system gives them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

LARGE = 2 << 20  # bytes of a page


def allocate_large(size: int) -> Tensor:
    """uint8 [size] on the CPU, zeros; of the size of a large page or more, at the start of one. A
    decoding step reads all weights and the whole cache once, and would miss the TLB with every
    4 KiB."""
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8, device="cpu")
    # Shared memory, which is what mmap gives by default, has no large pages.
    memory = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    first = -data.data_ptr() % LARGE
    return data[first : first + size]
