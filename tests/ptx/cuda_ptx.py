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
from t2i_kernels.decode_attention import cuda as decode_attention
from t2i_kernels.vq_nearest import cuda as vq_nearest

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

# ---- csrc/cuda/vq_nearest.h, decode_attention.h -------------------------------------------------

NEAREST = struct(
    ("z_type", "i4"), ("codebook_type", "i4"), *pointers("z", "codebook"),
    *[(name, "i8") for name in ("num_vectors", "inner", "outer_stride", "inner_stride",
                                "dim_stride", "code_stride", "code_dim_stride")],
    ("num_codes", "i4"), ("dim", "i4"), ("cosine", "?"),
    *pointers("workspace", "indices", "distance", "counts", "invalid"),
)  # fmt: skip
SPLITS = struct(*pointers("nearest", "done"))
FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

DECODE = struct(
    ("element", "i4"), ("int8", "?"),
    *pointers("q", "k_new", "v_new", "k", "v", "k_scale", "v_scale", "seqlens", "start", "cos",
              "sin", "out", "partial", "counters"),
    *strides("q", "k_new", "v_new", "k", "v", "out", "k_scale", "v_scale"),
    *[(f"{name}_stride", "i8") for name in ("seqlens", "start", "cos", "sin")],
    *[(name, "i4") for name in ("batch", "tokens", "heads", "kv_heads", "slots", "dim",
                                "rotary_pairs", "positions")],
    ("interleaved", "?"), ("window", "i4"), ("softcap", "f4"), ("scale", "f4"),
)  # fmt: skip

# ---- Launchers ----------------------------------------------------------------------------------

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


class Launchers:
    def __init__(self, architecture: str, change: Callable, reports: list) -> None:
        self.architecture, self.change, self.reports = architecture, change, reports

    def launch(
        self, source: str, wanted: cuda_static.Instantiation, grid: tuple, names: str, *args
    ) -> None:
        """An instantiation in a source file; ``names`` of the arguments are for messages."""
        text = nvcc.compile(source, "ptx", self.architecture).read_text()
        (entry,) = (x for x in re.findall(r"\.entry (\w+)", text) if cuda_static.parse(x) == wanted)
        (threads,) = re.findall(rf"\.entry {entry}\([^)]*\)\s+\.maxntid (\d+)", text)
        assert wanted.shape is None or int(threads) == 32 * wanted.shape.warps
        shared = wanted.shape.shared if wanted.shape else 0
        report = interpreter.launch(
            self.change(text), entry, grid, (int(threads),), args, shared, names.split()
        )
        self.reports.append((f"{wanted.kernel} of {source}", report))


class Flash(Launchers):
    def launch_flash(
        self, direction: str, kernel: str, grid: tuple, *args: interpreter.Struct
    ) -> None:
        """The instantiation for the types and sizes of the call, which is the first of args."""
        call = args[0].record
        element = "bf16" if call["element"] else "fp16"
        wide = 128 if max(call["dim"], call["value_dim"]) > 64 else 64
        sm90 = "_sm90" * (kernel == "flash_forward_sm90")
        flags = () if kernel == "flash_backward_rows" else (bool(call["softcap"] > 0),)
        wanted = cuda_static.Instantiation(kernel, (element,), (wide,), flags)
        names = "call scale" if len(args) > 1 else "call"
        self.launch(f"flash_{direction}{sm90}_{element}_{wide}.cu", wanted, grid, names, *args)

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
        self.launch_flash("forward", kernel, (tiles, heads, n["batch"]), call)
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
        kv_heads, batch = heads // n["group"], n["batch"]
        self.launch_flash("backward", "flash_backward_rows", (rows, heads, batch), call)
        grid = n["length_q"] // 64 + sequences, heads, batch
        self.launch_flash("backward", "flash_backward_queries", grid, call, factors)
        grid = n["length_k"] // 128 + sequences, kv_heads, batch
        self.launch_flash("backward", "flash_backward_keys", grid, call, factors)
        return tuple(grads)


class Nearest(Launchers):
    def vq_nearest(self, z, codebook, cosine, return_distance, return_counts):
        shape, (num_codes, dim) = z.shape[:-1], codebook.shape
        z, n = z.reshape(-1, dim), shape.numel()
        wide = next(x for x in (4, 8, 16, 32, 64, 128) if dim <= x)
        search = cuda_static.Instantiation("vq_search", (), (wide,), ())
        tile, vectors = search.shape.blocks["codes"], search.shape.blocks["vectors"]
        padded, blocks = -(-num_codes // tile) * tile, -(-n // vectors)
        splits = max(1, min(512 // max(blocks, 1), padded // tile // 2, 32))
        out = dict(
            indices=torch.full((n,), -1), distance=torch.full((n * return_distance,), math.nan),
            counts=torch.full((num_codes * return_counts,), -1), invalid=torch.full((2,), -2),
        )  # fmt: skip
        # A summary, and of each code fp16 in steps of 16 channels, twice, fp32, and its square.
        bytes_of_code = -(-(3 * wide + 3) // 16) * 32 + wide * 4 + 4
        workspace = torch.full((4096 + padded * bytes_of_code,), 255, dtype=torch.uint8)
        tensors = {name: t for name, t in out.items() if t.numel()}
        tensors |= dict(z=z, codebook=codebook, workspace=workspace)
        numbers = dict(
            z_type=FLOATS[z.dtype], codebook_type=FLOATS[codebook.dtype], num_vectors=n, inner=n,
            inner_stride=z.stride(0), dim_stride=z.stride(1), code_stride=codebook.stride(0),
            code_dim_stride=codebook.stride(1), num_codes=num_codes, dim=dim, cosine=cosine,
        )  # fmt: skip
        call = fill(NEAREST, tensors, numbers)
        done = np.full(blocks, 99, np.uint32)
        found = np.full((splits * n, 2), np.nan)
        source, surveys = f"vq_nearest_{wide}.cu", min(-(-num_codes // 256), 32)
        survey, pack = (
            cuda_static.Instantiation(name, (), (wide,), ()) for name in ("vq_survey", "vq_pack")
        )
        self.launch(source, survey, (surveys,), "call", call)
        self.launch(source, pack, (-(-padded // 128),), "call surveyors done blocks", call,
                    surveys * 8, done, blocks)  # fmt: skip
        memory = interpreter.Struct(np.zeros((), SPLITS), dict(nearest=found, done=done))
        self.launch(source, search, (blocks, splits), "call splits", call, memory)
        distance = out["distance"].view(shape) if return_distance else out["distance"]
        return out["indices"].view(shape), distance, out["counts"], out["invalid"]


class Decode(Launchers):
    def decode_attention(self, q, k_new, v_new, k, v, k_scale, v_scale, seqlens, start, cos, sin,
                         interleaved, window, softcap, scale, counters):  # fmt: skip
        (batch, tokens, heads, dim), (_, slots, kv_heads, _) = q.shape, k.shape
        int8, element = k.dtype == torch.int8, "bf16" if q.dtype == torch.bfloat16 else "fp16"
        wide, queries = 128 if dim > 64 else 64, tokens * (heads // kv_heads)
        tiles = 2 if queries > 8 else 1
        wanted = cuda_static.Instantiation("decode_attention", (element,), (wide, tiles), (int8,))
        at_once, split = wanted.shape.blocks["queries"], wanted.shape.blocks["keys"]
        grid = batch * kv_heads, -(-queries // at_once), -(-slots // split)
        partial = torch.full((q.numel() // dim * grid[2] * (dim + 2),), math.nan)
        out = torch.full(q.shape, math.nan, dtype=q.dtype)
        numbers = dict(
            element=ELEMENTS[q.dtype], int8=int8, batch=batch, tokens=tokens, heads=heads,
            kv_heads=kv_heads, slots=slots, dim=dim, interleaved=interleaved, window=window,
            softcap=softcap, scale=scale,
        )  # fmt: skip
        for name, x in dict(seqlens=seqlens, start=start, cos=cos, sin=sin).items():
            if x is not None:
                numbers[f"{name}_stride"] = x.stride(0)
        if cos is not None:
            numbers["positions"], numbers["rotary_pairs"] = cos.shape
        tensors = dict(q=q, k_new=k_new, v_new=v_new, k=k, v=v, k_scale=k_scale, v_scale=v_scale,
                       seqlens=seqlens, start=start, cos=cos, sin=sin, out=out, partial=partial,
                       counters=counters)  # fmt: skip
        call = fill(DECODE, tensors, numbers)
        for name, x in dict(k_scale=k_scale, v_scale=v_scale).items():
            if x is not None:
                call.record[f"{name}_strides"] = x.stride()
        source = f"decode_attention_{element}_{wide}{'_int8' * int8}.cu"
        self.launch(source, wanted, grid, "call", call)
        assert not counters.any()
        return out


@contextlib.contextmanager
def interpreted(
    architecture: str = "80", change: Callable = lambda text: text
) -> Iterator[list[tuple[str, interpreter.Report]]]:
    """In it the backend "cuda" takes tensors on the CPU; gives the list of (kernel, report).
    ``change`` is done to all PTX."""
    reports: list = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(cuda_backend, "runs_on", lambda name, x: None))
        for op in ("flash_attention", "vq_nearest", "decode_attention"):
            missing = registry._ops[op].missing
            stack.enter_context(mock.patch.dict(missing))
            missing.pop("cuda", None)
        library = stack.enter_context(torch.library._scoped_library("t2i", "IMPL"))
        flash, nearest, decode = (
            made(architecture, change, reports) for made in (Flash, Nearest, Decode)
        )
        library.impl("flash_attention.cuda", flash.flash_attention, "CPU")
        library.impl("flash_attention_backward.cuda", flash.flash_attention_backward, "CPU")
        library.impl("vq_nearest_cuda", nearest.vq_nearest, "CPU")
        library.impl("vq_nearest.cuda", vq_nearest.vq_nearest, "CPU")
        library.impl("decode_attention_cuda", decode.decode_attention, "CPU")
        library.impl("decode_attention.cuda", decode_attention.decode_attention, "CPU")
        yield reports
