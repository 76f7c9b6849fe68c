"""The library of CUDA kernels: loaded once, on import. Where it is not, there is a reason.

``setup.py`` builds ``libt2i_kernels_cuda.so`` beside this file where it was asked for, or where
nvcc was found and torch is built for CUDA; ``_build_info.json`` says how, or why not.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from . import native
from .registry import Reason

LIBRARY = Path(__file__).with_name("libt2i_kernels_cuda.so")
MINIMUM_CAPABILITY = (8, 0)  # bf16 and cp.async


def build_info() -> dict:
    """What ``setup.py`` recorded of the library, as ``native.build_info``."""
    return native.build_info().get("cuda") or {
        "backend": None,
        "reason": "the package was built without CUDA kernels: make cuda",
    }


def _load() -> Reason:
    if not LIBRARY.is_file():
        return build_info()["reason"] or f"{LIBRARY} is missing: install the package again"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error}"
    return None


_reason = _load()


def loaded() -> bool:
    """Whether the library is there, which says nothing of a device."""
    return _reason is None


def reason() -> Reason:
    """None where the library is loaded and torch may have a device for it; none is woken."""
    if _reason is None and not torch.version.cuda:
        return "compiled, but this torch is built for the CPU"
    return _reason


def runs_on(name: str, x: Tensor) -> Reason:
    """None where kernels can run on x's device."""
    if not x.is_cuda:
        return f"{name} is on {x.device}"
    return reason_of(x.device.index or 0)


@functools.cache
def reason_of(device: int) -> Reason:
    """None where it can run kernels that need what sm_80 has."""
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability} is below {MINIMUM_CAPABILITY}"
    return None
