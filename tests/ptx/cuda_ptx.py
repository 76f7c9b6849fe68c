"""Runs this project's CUDA kernels on the CPU: the PTX that nvcc makes of them is interpreted on
the memory of tensors, with the parameters and grids of the launchers in csrc/cuda."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import interpreter
import numpy as np
import torch
from torch import Tensor

from t2i_kernels import cuda_backend, registry

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
with mock.patch.object(sys, "path", [BENCHMARKS, *sys.path]):
    import cuda_static  # its neighbours have the names of tests
    import nvcc


def struct(*fields: tuple) -> np.dtype:
    """As C++ lays it out; a base's fields come first."""
    return np.dtype(list(fields), align=True)


def pointers(*names: str) -> list[tuple]:
    return [(name, "u8") for name in names]


# ---- csrc/cuda/flash_attention.h ----------------------------------------------------------------

STRIDES = struct(("batch", "i8"), ("row", "i8"), ("head", "i8"))


def strides(*names: str) -> list[tuple]:
    return [(f"{name}_strides", STRIDES) for name in names]


ATTENTION = [
    ("element", "i4"), *pointers("q", "k", "v"), *strides("q", "k", "v"), *pointers("cu_q", "cu_k"),
    *[(name, "i4") for name in ("sequences", "batch", "heads", "group", "length_q", "length_k",
                                "dim", "value_dim", "window_left", "window_right")],
    ("softcap", "f4"), ("scale", "f4"),
]  # fmt: skip
FORWARD = struct(*ATTENTION, *pointers("out", "lse"), *strides("out"))
BACKWARD = struct(
    *ATTENTION, *pointers("dout", "out", "lse", "dlse", "log2_sum", "minus_delta"),
    *pointers("dq", "dk", "dv"), *strides("dout", "out", "dq", "dk", "dv"),
)  # fmt: skip
SCALE = struct(("c", "f4"), ("cap_in", "f4"))
ELEMENTS = {torch.float16: 0, torch.bfloat16: 1}


def array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def fill(dtype: np.dtype, tensors: dict[str, Tensor | None], numbers: dict) -> interpreter.Struct:
    """A struct of these values; strides come from the tensors."""
    record = np.zeros((), dtype)
    for name, value in numbers.items():
        record[name] = value
    tensors = {name: t for name, t in tensors.items() if t is not None}
    for name, t in tensors.items():
        if f"{name}_strides" in dtype.names:
            batch = t.stride(0) if t.dim() == 4 else 0
            record[f"{name}_strides"] = (batch, *t.stride()[-3:-1])
    return interpreter.Struct(record, {name: array(t) for name, t in tensors.items()})


class Flash:
    """The launchers of flash_attention."""

    def __init__(self, architecture: str, change: Callable, reports: list) -> None:
        self.architecture, self.change, self.reports = architecture, change, reports

    def launch(self, direction: str, kernel: str, grid: tuple, *args: interpreter.Struct) -> None:
        """The instantiation for the types and sizes of the call, which is the first of args."""
        call = args[0].record
        element = "bf16" if call["element"] else "fp16"
        wide = 128 if max(call["dim"], call["value_dim"]) > 64 else 64
        source = f"flash_{direction}_{element}_{wide}.cu"
        if kernel == "flash_forward_sm90":
            source = source.replace("forward", "forward_sm90")
        text = nvcc.compile(source, "ptx", self.architecture).read_text()
        flags = () if kernel == "flash_backward_rows" else (bool(call["softcap"] > 0),)
        wanted = cuda_static.Instantiation(kernel, (element,), (wide,), flags)
        (entry,) = (x for x in re.findall(r"\.entry (\w+)", text) if cuda_static.parse(x) == wanted)
        (threads,) = re.findall(rf"\.entry {entry}\([^)]*\)\s+\.maxntid (\d+)", text)
        assert int(threads) == 32 * wanted.shape.warps
        names, shared = ["call", "scale"][: len(args)], wanted.shape.shared
        report = interpreter.launch(
            self.change(text), entry, grid, (int(threads),), args, shared, names
        )
        self.reports.append((f"{kernel} of {source}", report))

    @staticmethod
    def describe(q, k, v, cu_q, cu_k, causal, left, right, softcap, scale) -> tuple[dict, dict]:
        """(tensors, numbers) that forward and backward share."""
        batch = q.shape[0] if q.dim() == 4 else 1
        numbers = dict(
            element=ELEMENTS[q.dtype], sequences=1 if cu_q is None else len(cu_q) - 1,
            batch=batch, heads=q.shape[-2], group=q.shape[-2] // k.shape[-2],
            length_q=q.shape[-3], length_k=k.shape[-3], dim=q.shape[-1], value_dim=v.shape[-1],
            window_left=left, window_right=0 if causal else right, softcap=softcap, scale=scale,
        )  # fmt: skip
        return dict(q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k), numbers

    def flash_attention(self, q, k, v, cu_q, cu_k, *options):
        tensors, n = self.describe(q, k, v, cu_q, cu_k, *options)
        out = torch.full((*q.shape[:-1], v.shape[-1]), math.nan, dtype=q.dtype)
        *batch, length, heads, _ = q.shape
        lse = torch.full((*batch, heads, length), math.nan)
        call = fill(FORWARD, tensors | dict(out=out, lse=lse), n)
        kernel = "flash_forward" + "_sm90" * (self.architecture == "90a")
        narrow = max(n["dim"], n["value_dim"]) <= 64 and n["softcap"] == 0
        queries = 192 if kernel == "flash_forward_sm90" and narrow else 128
        tiles = length // queries + (n["sequences"] if cu_q is not None else 1)
        self.launch("forward", kernel, (tiles, heads, n["batch"]), call)
        return out, lse

    def flash_attention_backward(self, dout, dlse, q, k, v, out, lse, cu_q, cu_k, *options):
        tensors, n = self.describe(q, k, v, cu_q, cu_k, *options)
        softcap, scale, heads, sequences = n["softcap"], n["scale"], n["heads"], n["sequences"]
        grads = [torch.full_like(t, math.nan) for t in (q, k, v)]
        scratch = {x: torch.full_like(lse, math.nan) for x in ("log2_sum", "minus_delta")}
        tensors |= dict(dout=dout, out=out, lse=lse, dlse=dlse, **scratch)
        tensors |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        call, factors = fill(BACKWARD, tensors, n), np.zeros((), SCALE)
        factors["c"] = (softcap or scale) * math.log2(math.e)
        factors["cap_in"] = 2 * scale / softcap * math.log2(math.e) if softcap else 0
        factors = interpreter.Struct(factors, {})
        rows = -(-n["length_q"] // (8 if max(n["dim"], n["value_dim"]) > 64 else 16))
        self.launch("backward", "flash_backward_rows", (rows, heads, n["batch"]), call)
        tiles = n["length_q"] // 64 + sequences
        self.launch("backward", "flash_backward_queries", (tiles, heads, n["batch"]), call, factors)
        tiles, kv_heads = n["length_k"] // 128 + sequences, heads // n["group"]
        self.launch("backward", "flash_backward_keys", (tiles, kv_heads, n["batch"]), call, factors)
        return tuple(grads)


@contextlib.contextmanager
def interpreted(
    architecture: str = "80", change: Callable = lambda text: text
) -> Iterator[list[tuple[str, interpreter.Report]]]:
    """In it the backend "cuda" takes tensors on the CPU; gives the list of (kernel, report).
    ``change`` is done to all PTX."""
    reports: list = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cuda_backend, "runs_on", lambda name, x: None))
        missing = registry._ops["flash_attention"].missing
        stack.enter_context(mock.patch.dict(missing))
        missing.pop("cuda", None)
        library = stack.enter_context(torch.library._scoped_library("t2i", "IMPL"))
        launchers = Flash(architecture, change, reports)
        for name in ("flash_attention", "flash_attention_backward"):
            library.impl(f"{name}.cuda", getattr(launchers, name), "CPU")
        yield reports
