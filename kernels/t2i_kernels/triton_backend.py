"""The Triton backend as far as it goes without importing triton."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch
from torch import Tensor

from . import cuda_backend
from .registry import LIBRARY, Reason

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def reason() -> Reason:
    """None where triton is installed and has something to run on; asked on import, so neither is it
    imported nor a device woken."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED or torch.version.cuda or torch.version.hip:
        return None
    return "this torch is built for the CPU; TRITON_INTERPRET=1 interprets the kernels there"


def runs_on(name: str, x: Tensor) -> Reason:
    """None where kernels can run on x's device."""
    if x.is_cuda:
        return cuda_backend.reason_of(x.device.index or 0)
    if x.device.type == "cpu" and INTERPRETED:
        return None
    hint = "; TRITON_INTERPRET=1 interprets it there" if x.device.type == "cpu" else ""
    return f"{name} is on {x.device}{hint}"


def implement(package: str, *functions: str) -> None:
    """Register functions of ``t2i_kernels.<package>.triton`` as the operators they are called;
    triton is imported by the first call."""
    for function in functions:

        def run(*call, function=function):
            module = importlib.import_module(f"t2i_kernels.{package}.triton")
            with torch.cuda.device_of(call[0]):  # Triton launches on the current one
                return getattr(module, function)(*call)

        LIBRARY.impl(f"{function}.triton", run, "CompositeExplicitAutograd")
