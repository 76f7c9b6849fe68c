"""Compiles every shipped configuration of the Triton kernels for GPUs that need not be there, and
writes what their machine code is made of: results/gpu_static.json and gpu_static.md.

    python benchmarks/gpu_static.py [--architectures 80 90 100 120 gfx942] [--check]

A launcher runs on tensors without data ("meta") while its kernels are replaced by recorders: what
is compiled is what a GPU would be given. ``--check`` compares with the committed file instead, and
fails where a count became worse. Of AMD's code only resources are counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import target_info

sys.path.insert(0, str(Path(__file__).parent))
import counts  # noqa: E402
import sass  # noqa: E402

from t2i_kernels import tuning  # noqa: E402

RESULT = Path(__file__).parent / "results/gpu_static.json"
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "debug",
           "sanitize_overflow")  # fmt: skip
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A call whose launches are compiled."""

    name: str
    op: str  # folder
    function: str
    call: Callable[[], tuple]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(dim: int, dtype: torch.dtype) -> tuple:
    q = meta(2, 4096, 16, dim, dtype=dtype)
    return q, q, q, None, None, True, -1, -1, 0.0, dim**-0.5


def attention_backward(dim: int, dtype: torch.dtype) -> tuple:
    q, *rest = attention(dim, dtype)
    lse = meta(2, 16, 4096, dtype=torch.float32)
    return q, None, q, q, q, q, lse, *rest[2:]


def nearest(dim: int, codes: int, metric: str) -> tuple:
    z, codebook = meta(32768, dim, dtype=torch.float32), meta(codes, dim, dtype=torch.float32)
    return z, codebook, metric, False, True


def decoding(
    dim: int, group: int, dtype: torch.dtype, kept: torch.dtype, tokens: int = 1, batch: int = 2,
    slots: int = 4096,
) -> tuple:  # fmt: skip
    int8 = kept == torch.int8
    q, new = (meta(batch, tokens, n, dim, dtype=dtype) for n in (8 * group, 8))
    cache = meta(batch, slots, 8, dim, dtype=kept)
    scale = meta(batch, slots, 8, dtype=torch.float32) if int8 else None
    lengths, table = meta(batch, dtype=torch.int32), meta(slots, dim // 2, dtype=torch.float32)
    return (q, new, new, cache, cache, scale, scale, lengths, lengths, table, table, False, -1, 0.0,
            dim**-0.5)  # fmt: skip


def sampling(codes: int, top_k: int, top_p: float) -> tuple:
    index = meta(2, dtype=torch.int64)
    guidance = meta(2, 1, dtype=torch.float32)
    return meta(4, 1, codes, dtype=torch.float32), index, index, guidance, 0.9, top_k, top_p


def vocabulary(dtype: torch.dtype = torch.bfloat16) -> tuple:
    """x, weight, targets of the 135M shape."""
    return (*(meta(n, 576, dtype=dtype) for n in (8192, 65536)), meta(8192, dtype=torch.int64))


def cases() -> list[Case]:
    found = []
    for dim, dtype in [(64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16),
                       (64, torch.float32), (128, torch.float32)]:  # fmt: skip
        name = f"causal, d {dim}, {TYPES[dtype]}"
        found += [
            Case(f"forward, {name}", "flash_attention", "flash_attention",
                 lambda dim=dim, dtype=dtype: attention(dim, dtype)),
            Case(f"backward, {name}", "flash_attention", "flash_attention_backward",
                 lambda dim=dim, dtype=dtype: attention_backward(dim, dtype)),
        ]  # fmt: skip
    for dim, codes, metric in [(4, 16384, "l2"), (8, 16384, "l2"), (8, 16384, "cosine"),
                               (32, 8192, "l2"), (256, 16384, "l2")]:  # fmt: skip
        found.append(
            Case(f"K {codes}, d {dim}, {metric}", "vq_nearest", "vq_nearest",
                 lambda *a, c=(dim, codes, metric): nearest(*c))
        )  # fmt: skip
    bf16, fp16, fp32, int8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
    for dim, group, dtype, kept, tokens in [
        (64, 3, bf16, bf16, 1), (64, 3, bf16, int8, 1), (128, 1, bf16, bf16, 1),
        (128, 1, bf16, int8, 1), (128, 1, fp16, int8, 1), (128, 4, bf16, bf16, 1),
        (128, 4, bf16, int8, 1), (128, 1, fp32, fp32, 1), (256, 1, fp32, fp32, 1),
        (64, 3, bf16, bf16, 64), (64, 3, bf16, int8, 64), (64, 3, fp16, int8, 64),
        (128, 1, bf16, bf16, 64), (128, 1, fp32, fp32, 64), (256, 1, fp32, fp32, 64),
    ]:  # fmt: skip
        name = f"{tokens} token{'s' * (tokens > 1)}, group of {group}, d {dim}, {TYPES[kept]} cache"
        name = name.replace("i8", "int8" if dtype == bf16 else f"{TYPES[dtype]} beside an int8")
        found.append(
            Case(name, "decode_attention", "decode_attention",
                 lambda c=(dim, group, dtype, kept, tokens): decoding(*c))
        )  # fmt: skip
    for codes, top_k, top_p in [(1024, 0, 1.0), (4096, 0, 1.0), (16384, 0, 1.0), (16384, 100, 0.9)]:
        kept = f", top-k {top_k}, top-p {top_p}" if top_k else ""
        found.append(
            Case(f"K {codes}{kept}", "draw", "draw", lambda c=(codes, top_k, top_p): sampling(*c))
        )
    x = meta(8, 1024, 576)
    for dim in (64, 128, 256, 512, 576, 2048, 4096, 8192, 32768):
        row = meta(8, 1024, dim)
        found += [
            Case(f"forward, D {dim}, bf16", "rms_norm", "rms_norm",
                 lambda row=row: (row, row[0, 0], 1e-5)),
            Case(f"backward, D {dim}, bf16", "rms_norm", "rms_norm_backward",
                 lambda row=row: (row, row, row[0, 0], 1e-5)),
        ]  # fmt: skip
    found += [
        Case("forward, D 576, bf16", "swiglu", "swiglu", lambda: (x, x)),
        Case("backward, D 576, bf16", "swiglu", "swiglu_backward", lambda: (x, x, x)),
    ]
    for dim in (64, 128, 256, 2048):
        found.append(
            Case(f"d {dim}, bf16", "rotary", "rotary",
                 lambda dim=dim: (meta(8, 1024, 9, dim), *[meta(1024, 32, dtype=torch.float32)] * 2,
                                  None, False, False))
        )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        name = f"V 65536, D 576, {TYPES[dtype]}"
        found += [
            Case(f"forward, {name}", "linear_cross_entropy", "linear_cross_entropy",
                 lambda dtype=dtype: (*vocabulary(dtype), -100)),
            Case(f"backward, {name}", "linear_cross_entropy", "linear_cross_entropy_backward",
                 lambda dtype=dtype: (meta(8192, dtype=torch.float32), None, *vocabulary(dtype),
                                      meta(8192, dtype=torch.float32), -100)),
        ]  # fmt: skip
    return found


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self, kernel, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            names = self.kernel.arg_names
            self.launches.append((self.kernel, dict(zip(names, args, strict=False)) | kwargs))

        return launch


def launches(case: Case, architecture: int | str, **options: Any) -> list[tuple[Any, dict]]:
    """(kernel, arguments) of each launch; ``options`` go before the shipped ones."""
    module = importlib.import_module(f"t2i_kernels.{case.op}.triton")
    recorded: list = []

    def choose(kernel, x, size=None):
        size = tuning.row_bytes(x) if size is None else size
        return tuning.lookup(kernel, architecture, size) | options

    recorders = {
        name: Recorder(value, recorded)
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction) and name.endswith("_kernel")
    }
    with mock.patch.object(tuning, "choose", choose), mock.patch.multiple(module, **recorders):
        getattr(module, case.function)(*case.call())
    return recorded


def compiled(kernel, arguments: dict[str, Any], target: GPUTarget):
    """What a launch with these arguments compiles, specialized as on a GPU: numbers that are 1, and
    multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments.get(name)
        number = isinstance(value, int) and not isinstance(value, bool)
        if kernel.params[i].is_constexpr or value is None or (number and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif number:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[name] = "i1" if isinstance(value, bool) else "fp32"
        if isinstance(value, torch.Tensor) or (number and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor) and target.backend == "hip":  # of less than 2 GB
            attributes[(i,)].append(["tt.pointer_range", 32])
    options = {name: arguments[name] for name in OPTIONS if name in arguments}

    def current_target():
        return target

    # As that of the original: it is no part of the kernels that ask for it.
    current_target.__triton_builtin__ = True
    with mock.patch.object(target_info, "current_target", current_target):
        return triton.compile(
            ASTSource(kernel, signature, constants, attributes), target=target, options=options
        )


def target_of(architecture: int | str) -> GPUTarget:
    if isinstance(architecture, str):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", architecture, 32)


def of_amd(text: str, shared: int, warps: int) -> dict[str, Any]:
    """What an assembly file for CDNA 3 says of resources. A compute unit has 64 KB, and four times
    512 registers for a lane of up to 8 wavefronts (AMD Instinct MI300 ISA reference)."""
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    wavefronts = 4 * min(512 // max(-(-int(registers) // 8) * 8, 1), 8)
    blocks = min(wavefronts // warps, (64 << 10) // max(shared, 1))
    return {
        "registers": int(registers), "occupancy": blocks * warps,
        "spills": tuple(len(re.findall(rf"scratch_{x}_", text)) for x in ("store", "load")),
    }  # fmt: skip


def measure(case: Case, architecture: int | str) -> list[dict[str, Any]]:
    """A row for each kernel of a case: of several launches, the one with most registers."""
    rows: dict[str, dict[str, Any]] = {}
    seen = set()
    for kernel, arguments in launches(case, architecture):
        binary = compiled(kernel, arguments, target_of(architecture))
        if binary.hash in seen:
            continue
        seen.add(binary.hash)
        warps, shared = binary.metadata.num_warps, binary.metadata.shared
        row = {
            "case": f"{case.op}: {case.name}", "kernel": kernel.__name__,
            "architecture": architecture,
            "blocks": {k: v for k, v in arguments.items() if k in ("BLOCK_M", "BLOCK_N", "TILE")},
            "warps": warps, "stages": binary.metadata.num_stages, "shared": shared,
        }  # fmt: skip
        if isinstance(architecture, str):
            row |= of_amd(binary.asm["amdgcn"], shared, warps)
        else:
            code = sass.read_bytes(binary.asm["cubin"])
            row["registers"], row["spills"] = code.registers, code.spills
            row["occupancy"] = code.occupancy(architecture, warps, shared)
            row |= counts.of_loop(code.main, architecture)
        if row["registers"] >= rows.get(kernel.__name__, row)["registers"]:
            rows[kernel.__name__] = row
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--architectures", nargs="+", default=["80", "90", "100", "120", tuning.AMD]
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    rows = []
    for name in options.architectures:
        architecture = int(name) if name.isdigit() else name
        for case in cases():
            rows += measure(case, architecture)
            print(f"{counts.name_of(architecture)} {case.op}: {case.name}", flush=True)
    record = {"triton": triton.__version__, "command": "python benchmarks/gpu_static.py"}
    record["rows"] = rows
    if options.check:
        sys.exit(counts.check(record, RESULT, "triton"))
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(page(record))


def page(record: dict) -> str:
    lines = [
        "# Machine code of the Triton kernels\n",
        f"Made by `{record['command']}` with triton {record['triton']}, on a machine without a GPU."
        f" {counts.LEGEND}\n",
    ]
    for row in record["rows"]:
        row["name"] = f"{row['case']}, {row['kernel'].removesuffix('_kernel')}"
    return "\n".join([*lines, *counts.tables(record["rows"])]) + "\n"


if __name__ == "__main__":
    main()
