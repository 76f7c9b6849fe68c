"""How the Triton kernels are cut up: tiles, warps and stages, by kernel, architecture and size.

The table is what a reading of the machine code favours (benchmarks/results/gpu_static.md): nothing
in it was measured on a GPU yet. ``t2i tune`` measures on the GPU at hand and keeps what it finds in
a file of the user's; nothing is ever tuned on its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

AMD = "gfx942"

# kernel -> architecture -> bytes of a row of head_dim, rounded up to a power of two -> how.
# An architecture takes what it does not have itself from those before it, AMD's from 80; a size
# that is not there takes the next larger one, the largest where there is none.
TABLE = {
    "flash_attention.forward": {
        80: {
            128: dict(BLOCK_M=128, BLOCK_N=128, LAZY=True, num_warps=8, num_stages=2),
            256: dict(BLOCK_M=128, BLOCK_N=64, LAZY=True, num_warps=8, num_stages=2),
            512: dict(BLOCK_M=64, BLOCK_N=64, LAZY=True, num_warps=8, num_stages=2),
            1024: dict(BLOCK_M=32, BLOCK_N=32, LAZY=True, num_warps=4, num_stages=2),
            2048: dict(BLOCK_M=16, BLOCK_N=16, LAZY=True, num_warps=4, num_stages=1),
        },
        90: {1024: dict(BLOCK_M=64, BLOCK_N=32, LAZY=True, num_warps=4, num_stages=2)},
        100: {
            128: dict(BLOCK_M=128, BLOCK_N=64, LAZY=True, num_warps=8, num_stages=2),
            1024: dict(BLOCK_M=32, BLOCK_N=32, LAZY=True, num_warps=4, num_stages=2),
        },
        120: {
            512: dict(BLOCK_M=64, BLOCK_N=32, LAZY=True, num_warps=8, num_stages=2),
            1024: dict(BLOCK_M=32, BLOCK_N=16, LAZY=True, num_warps=4, num_stages=2),
        },
        AMD: {
            128: dict(BLOCK_M=128, BLOCK_N=64, LAZY=True, num_warps=8, num_stages=2),
            512: dict(BLOCK_M=64, BLOCK_N=32, LAZY=True, num_warps=8, num_stages=2),
        },
    },
    "flash_attention.keys": {
        80: {
            128: dict(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=2),
            256: dict(BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
            512: dict(BLOCK_M=16, BLOCK_N=64, num_warps=8, num_stages=1),
            1024: dict(BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=1),
            2048: dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
        },
        90: {512: dict(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)},
        120: {2048: dict(BLOCK_M=16, BLOCK_N=32, num_warps=8, num_stages=1)},
        AMD: {
            128: dict(BLOCK_M=32, BLOCK_N=128, num_warps=8, num_stages=1),
            256: dict(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=1),
        },
    },
    "flash_attention.queries": {
        80: {
            128: dict(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
            256: dict(BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=2),
            512: dict(BLOCK_M=64, BLOCK_N=16, num_warps=8, num_stages=1),
            1024: dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
            2048: dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1),
        },
        90: {512: dict(BLOCK_M=32, BLOCK_N=16, num_warps=8, num_stages=1)},
        120: {
            512: dict(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1),
            2048: dict(BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=1),
        },
    },
    "vq_nearest": {
        80: {
            1 << 16: dict(BLOCK_N=128, TILE=128, CHUNK=16, num_warps=8, num_stages=3),
        },
        120: {1 << 16: dict(BLOCK_N=64, TILE=128, CHUNK=16, num_warps=8, num_stages=3)},
    },
    # Bytes of a row of the cache, or of q where it is fp32. WAYS: as many as warps, each with slots
    # of its own, or 1. "many" is for more than 16 queries a head of the cache.
    "decode_attention": {
        80: {
            128: dict(
                SPLIT=256, BLOCK_M=16, BLOCK_N=128, WAYS=4, BLOCK_NEW=16, num_warps=4, num_stages=3
            ),
            256: dict(
                SPLIT=128, BLOCK_M=16, BLOCK_N=64, WAYS=4, BLOCK_NEW=16, num_warps=4, num_stages=3
            ),
            512: dict(
                SPLIT=128, BLOCK_M=16, BLOCK_N=32, WAYS=1, BLOCK_NEW=16, num_warps=4, num_stages=2
            ),
            1024: dict(
                SPLIT=128, BLOCK_M=16, BLOCK_N=32, WAYS=1, BLOCK_NEW=16, num_warps=8, num_stages=2
            ),
        },
        120: {
            128: dict(
                SPLIT=256, BLOCK_M=16, BLOCK_N=64, WAYS=4, BLOCK_NEW=16, num_warps=4, num_stages=3
            ),
            1024: dict(
                SPLIT=128, BLOCK_M=16, BLOCK_N=16, WAYS=1, BLOCK_NEW=16, num_warps=8, num_stages=2
            ),
        },
        AMD: {
            128: dict(
                SPLIT=256, BLOCK_M=16, BLOCK_N=64, WAYS=4, BLOCK_NEW=16, num_warps=4, num_stages=3
            ),
            1024: dict(
                SPLIT=128, BLOCK_M=16, BLOCK_N=16, WAYS=1, BLOCK_NEW=16, num_warps=8, num_stages=2
            ),
        },
    },
    "decode_attention.many": {
        80: {
            128: dict(
                SPLIT=256, BLOCK_M=64, BLOCK_N=64, WAYS=1, BLOCK_NEW=16, num_warps=4, num_stages=3
            ),
            256: dict(
                SPLIT=128, BLOCK_M=64, BLOCK_N=64, WAYS=1, BLOCK_NEW=16, num_warps=4, num_stages=3
            ),
            512: dict(
                SPLIT=128, BLOCK_M=32, BLOCK_N=16, WAYS=1, BLOCK_NEW=16, num_warps=8, num_stages=2
            ),
            1024: dict(
                SPLIT=128, BLOCK_M=16, BLOCK_N=32, WAYS=1, BLOCK_NEW=16, num_warps=4, num_stages=1
            ),
        },
        100: {
            128: dict(
                SPLIT=256, BLOCK_M=64, BLOCK_N=64, WAYS=1, BLOCK_NEW=16, num_warps=8, num_stages=3
            ),
        },
        AMD: {
            256: dict(
                SPLIT=128, BLOCK_M=64, BLOCK_N=64, WAYS=1, BLOCK_NEW=16, num_warps=4, num_stages=2
            ),
        },
    },
    # By 4 bytes a code. HELD: how many scores registers hold; ptxas left alone spills at 64.
    "draw": {
        80: {
            4096: dict(HELD=8192, TILE=512, num_warps=4, maxnreg=128),
            16384: dict(HELD=16384, TILE=1024, num_warps=8, maxnreg=128),
            65536: dict(HELD=32768, TILE=2048, num_warps=16, maxnreg=128),
        },
        AMD: {
            4096: dict(HELD=8192, TILE=512, num_warps=4),
            16384: dict(HELD=16384, TILE=1024, num_warps=8),
            65536: dict(HELD=32768, TILE=2048, num_warps=16),
        },
    },
    "rms_norm.forward": {
        80: {
            128: dict(ROWS=32, num_warps=4),
            256: dict(ROWS=16, num_warps=4),
            512: dict(ROWS=8, num_warps=4),
            1024: dict(ROWS=4, num_warps=4),
            2048: dict(ROWS=2, num_warps=4),
            8192: dict(ROWS=1, num_warps=4),
            16384: dict(ROWS=1, num_warps=8),
            65536: dict(ROWS=1, num_warps=16),
        },
    },
    "rms_norm.backward": {
        80: {
            128: dict(ROWS=16, PROGRAMS=512, num_warps=4),
            256: dict(ROWS=8, PROGRAMS=512, num_warps=4),
            512: dict(ROWS=4, PROGRAMS=512, num_warps=4),
            1024: dict(ROWS=2, PROGRAMS=512, num_warps=4),
            4096: dict(ROWS=1, PROGRAMS=512, num_warps=4),
            16384: dict(ROWS=1, PROGRAMS=256, num_warps=8),
            65536: dict(ROWS=1, PROGRAMS=128, num_warps=16),
        },
    },
    "swiglu": {80: {4096: dict(ROWS=1, BLOCK=1024, num_warps=4)}},
    "rotary": {
        80: {
            128: dict(BLOCK_H=32, num_warps=4),
            256: dict(BLOCK_H=16, num_warps=4),
            512: dict(BLOCK_H=8, num_warps=4),
            4096: dict(BLOCK_H=4, num_warps=4),
        },
    },
    # By bytes of a number.
    "linear_cross_entropy.forward": {
        80: {
            2: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, SPLIT=1024, num_warps=8, num_stages=3),
            4: dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, SPLIT=1024, num_warps=4, num_stages=3),
        },
        90: {2: dict(BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, SPLIT=1024, num_warps=8, num_stages=3)},
        100: {2: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, SPLIT=1024, num_warps=8, num_stages=3)},
    },
    "linear_cross_entropy.logits": {
        80: {
            2: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3),
            4: dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP=8, num_warps=4, num_stages=3),
        },
        90: {2: dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3)},
    },
    "linear_cross_entropy.product": {
        80: {
            2: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3),
            4: dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP=8, num_warps=4, num_stages=3),
        },
        90: {2: dict(BLOCK_M=256, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3)},
        100: {2: dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3)},
    },
}
# Small tiles where kernels are interpreted: small problems cross their edges.
INTERPRETED = {
    "rms_norm.forward": dict(ROWS=8),
    "rms_norm.backward": dict(ROWS=4, PROGRAMS=3),
    "swiglu": dict(ROWS=8, BLOCK=32),
    "rotary": dict(BLOCK_H=4),
    "linear_cross_entropy.forward": dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, SPLIT=64),
    "linear_cross_entropy.logits": dict(BLOCK_M=32, BLOCK_N=16, BLOCK_K=32, GROUP=2),
    "linear_cross_entropy.product": dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, GROUP=2),
    "flash_attention.forward": dict(BLOCK_M=16, BLOCK_N=32, LAZY=True),
    "flash_attention.keys": dict(BLOCK_M=32, BLOCK_N=16),
    "flash_attention.queries": dict(BLOCK_M=16, BLOCK_N=32),
    "decode_attention": dict(SPLIT=8, BLOCK_M=16, BLOCK_N=4, WAYS=2, BLOCK_NEW=2),
    "decode_attention.many": dict(SPLIT=8, BLOCK_M=16, BLOCK_N=8, WAYS=1, BLOCK_NEW=4),
    "vq_nearest": dict(BLOCK_N=128, TILE=128, CHUNK=128),
    "draw": dict(HELD=32768, TILE=512),
}


_used: dict[str, dict[str, int]] = {}


def choose(kernel: str, x: Tensor, size: int | None = None) -> dict[str, int]:
    """The launch options of ``kernel`` on x's device, for ``size``: bytes of a row of x unless it
    is given."""
    if kernel in _used:
        return _used[kernel]
    if not x.is_cuda:
        return INTERPRETED[kernel]
    return _choose(kernel, x.device.index, row_bytes(x) if size is None else size)


@contextlib.contextmanager
def use(kernel: str, config: dict[str, int]) -> Iterator[None]:
    """Launch ``kernel`` with these options inside the block, whatever the size."""
    _used[kernel] = config
    try:
        yield
    finally:
        del _used[kernel]


def row_bytes(x: Tensor) -> int:
    """Of x's last dimension, rounded up to a power of two."""
    return 1 << (max(x.shape[-1], 1) * x.element_size() - 1).bit_length()


@functools.cache
def _choose(kernel: str, device: int, size: int) -> dict[str, int]:
    if torch.version.hip:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
    tuned = read_tuned(path(torch.cuda.get_device_name(device)))
    return lookup(kernel, architecture, size, tuned.get(kernel, {}))


def lookup(
    kernel: str, architecture: int | str, size: int, tuned: dict[int, dict[str, int]] | None = None
) -> dict[str, int]:
    """The shipped options, but for the sizes that were ``tuned``. ``architecture``: 80 for sm_80,
    or a name of AMD's."""
    table, sizes = TABLE[kernel], {}
    if isinstance(architecture, str):
        before = [80, AMD]
    else:
        before = sorted(x for x in table if x != AMD and x <= architecture)
    for known in before:
        sizes |= table.get(known, {})
    sizes |= tuned or {}
    return sizes[min((s for s in sizes if s >= size), default=max(sizes))]


def path(device_name: str) -> Path:
    """Where ``t2i tune`` keeps what it measured on such a device."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "t2i" / f"tuned-{device_name.replace(' ', '-')}.json"


@functools.cache
def read_tuned(file: Path) -> dict[str, dict[int, dict[str, int]]]:
    """What ``t2i tune`` wrote: kernel -> size -> options; nothing where there is no file.

    Raises:
        ValueError: the file is no such thing.
    """
    if not file.is_file():
        return {}
    try:
        kernels = json.loads(file.read_text())
        return {k: {int(size): c for size, c in sizes.items()} for k, sizes in kernels.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, and run t2i tune again") from None
