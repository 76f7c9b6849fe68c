"""Runs the launchers of the Triton kernels on the CPU: what they launch is compiled to PTX for a
GPU that need not be there, and interpreted on the memory of their tensors."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import interpreter
import torch
import triton
from triton.backends.compiler import GPUTarget

from t2i_kernels import registry, triton_backend, tuning

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
with mock.patch.object(sys, "path", [BENCHMARKS, *sys.path]):
    import gpu_static  # its neighbours have the names of tests

PACKAGES = ("decode_attention", "draw", "flash_attention", "linear_cross_entropy", "rms_norm",
            "rotary", "swiglu", "vq_nearest")  # fmt: skip


class Kernel:
    """Stands for a Triton kernel; keeps (name, report) of its launches."""

    def __init__(self, kernel, architecture: int, change: Callable, reports: list) -> None:
        self.kernel, self.architecture = kernel, architecture
        self.change, self.reports = change, reports

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            kernel = self.kernel
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            target = GPUTarget("cuda", self.architecture, 32)
            binary = gpu_static.compiled(kernel, arguments, target)
            assert binary.metadata.global_scratch_size == 0
            # Arguments that are 1, or nothing, were compiled in.
            passed = {
                param.name: pointer(arguments[param.name])
                for param in kernel.params
                if not param.is_constexpr
                and arguments.get(param.name) is not None
                and not (type(arguments[param.name]) is int and arguments[param.name] == 1)
            }
            report = interpreter.launch(
                self.change(binary.asm["ptx"]), kernel.__name__, grid,
                (32 * binary.metadata.num_warps,),
                [*passed.values(), None, None], binary.metadata.shared,
                [*passed, "global scratch", "profile scratch"],
            )  # fmt: skip
            self.reports.append((kernel.__name__, report))

        return launch


def pointer(value):
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


@contextlib.contextmanager
def interpreted(architecture: int = 80, change: Callable = lambda text: text) -> Iterator[list]:
    """In it the backend "triton" takes tensors on the CPU, with the options that are shipped for an
    architecture; gives the list of (kernel, report). ``change`` is done to all PTX."""
    reports: list = []

    def choose(kernel, x, size=None):
        size = tuning.row_bytes(x) if size is None else size
        return tuning.lookup(kernel, architecture, size)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tuning, "choose", choose))
        stack.enter_context(mock.patch.object(triton_backend, "INTERPRETED", True))
        for op in registry.ops():
            missing = registry._ops[op].missing
            stack.enter_context(mock.patch.dict(missing))
            missing.pop("triton", None)
        for package in PACKAGES:
            module = importlib.import_module(f"t2i_kernels.{package}.triton")
            stack.enter_context(mock.patch.multiple(module, **{
                name: Kernel(value, architecture, change, reports)
                for name, value in vars(module).items()
                if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel")
            }))  # fmt: skip
        yield reports
