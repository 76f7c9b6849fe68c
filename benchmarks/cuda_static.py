"""Compiles the CUDA kernels for GPUs that need not be there, and writes what their machine code is
made of, and which targets it meets: results/cuda_static.json and cuda_static.md.

    python benchmarks/cuda_static.py [--architectures 80 90a 100a 120a] [--sources …] [--check]

``--check`` compares with the committed file instead, and fails where a count became worse.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import counts  # noqa: E402
import nvcc  # noqa: E402
import sass  # noqa: E402

RESULT = Path(__file__).parent / "results/cuda_static.json"


# ---- Kernels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What an instantiation is launched with, which its machine code does not say."""

    warps: int
    shared: int = 0  # bytes, dynamic
    blocks: dict[str, int] = field(default_factory=dict)  # of its tile
    teams: bool = False  # of warps, each with branches of its own
    innermost: bool = False  # main loop, rather than the one around that
    steps: int = 1  # of the innermost loop, if it is another, in an iteration of the main loop
    # How much of something a matrix instruction of the main loop does.
    work: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Instantiation:
    """Of a kernel template: "flash_forward", ("bf16",), (64,), (False,)"""

    kernel: str
    types: tuple[str, ...]
    numbers: tuple[int, ...]
    flags: tuple[bool, ...]

    def __str__(self) -> str:
        parts = [*self.types, *map(str, self.numbers), *(str(x).lower() for x in self.flags)]
        return f"{self.kernel}<{', '.join(parts)}>"

    @property
    def shape(self) -> Shape | None:
        make = SHAPES.get(self.kernel)
        return make(self) if make else None


def _flash_forward(this: Instantiation) -> Shape:
    (dim,) = this.numbers
    queries, keys = 128, 128 if dim == 64 else 64
    return Shape(4, (queries + 3 * keys) * dim * 2 + 1024, dict(queries=queries, keys=keys))


def _flash_forward_sm90(this: Instantiation) -> Shape:
    (dim,), (softcap,) = this.numbers, this.flags
    warpgroups, keys = 3 if dim == 64 and not softcap else 2, 128  # of queries
    queries = 64 * warpgroups
    # wgmma of 16 channels for the scores, of 16 keys for the values.
    work = {"keys": keys / (dim // 16 + keys // 16)}
    return Shape(4 * (warpgroups + 1), (queries + 4 * keys) * dim * 2 + 1024,
                 dict(queries=queries, keys=keys), work=work)  # fmt: skip


def _flash_backward_queries(this: Instantiation) -> Shape:
    (dim,) = this.numbers
    queries, keys = 64, 128 if dim == 64 else 64
    return Shape(4, (2 * queries + 3 * keys) * dim * 2 + 1024, dict(queries=queries, keys=keys))


def _flash_backward_keys(this: Instantiation) -> Shape:
    (dim,), (softcap,) = this.numbers, this.flags
    keys, queries, step = 128, 64, 64 if dim == 64 else 16 if softcap else 32
    shared = 4 * queries * dim * 2 + 2 * keys * step * 2 + 3072
    return Shape(8, shared, dict(keys=keys, queries=queries), teams=True,
                 steps=queries // step)  # fmt: skip


def _flash_backward_rows(this: Instantiation) -> Shape:
    return Shape(4, blocks=dict(rows=1024 // this.numbers[0]))


def _decode_attention(this: Instantiation) -> Shape:
    (dim, tiles), (int8,) = this.numbers, this.flags
    key_bytes, queries, ring = dim * (1 if int8 else 2), 8 * tiles, 4 * 4096
    split = (64 << 10) // key_bytes
    shared = 4 * ring + queries * dim * 2 + 2 * int8 * split * 4 + 2048
    # 16 keys by 16 channels, for each tile of queries.
    work = {"KV bytes": (256 if int8 else 512) / tiles}
    return Shape(4, shared, dict(queries=queries, keys=split), work=work)


def _vq_search(this: Instantiation) -> Shape:
    (dim,) = this.numbers
    steps = -(-(3 * dim + 3) // 16)
    tile = 256 if steps == 1 else 128 if steps == 2 else 64 if steps <= 7 else 32
    vectors, pitch = 128 if steps <= 7 else 64, dim + 4 if dim // 4 % 2 == 0 else dim
    stages = 3 if steps <= 13 else 2
    shared = stages * tile * steps * 32 + vectors * (pitch + 2) * 4 + 3072
    return Shape(4, shared, dict(vectors=vectors, codes=tile), innermost=True,
                 work={"scores": 128 / steps})  # fmt: skip


# By the kernel's name without "_kernel". One that is missing here has a row of what its code alone
# says, and no occupancy.
SHAPES: dict[str, Callable[[Instantiation], Shape]] = {
    "flash_forward": _flash_forward,
    "flash_forward_sm90": _flash_forward_sm90,
    "flash_backward_rows": _flash_backward_rows,
    "flash_backward_queries": _flash_backward_queries,
    "flash_backward_keys": _flash_backward_keys,
    "decode_attention": _decode_attention,
    "vq_search": _vq_search,
}


def parse(mangled: str) -> Instantiation:
    names = [name[: int(n)] for n, name in re.findall(r"(?<!\d)(\d+)(?=([a-z]\w*))", mangled)]
    (kernel,) = (x.removesuffix("_kernel") for x in names if x.endswith("_kernel"))
    kernel += "_sm90" * ("Sm90Kernel" in mangled)
    types = re.findall(r"\d(Bf16|Fp16)", mangled.split("Ev")[0])
    numbers, flags = re.findall(r"Li(\d+)E", mangled), re.findall(r"Lb([01])E", mangled)
    return Instantiation(kernel, tuple(dict.fromkeys(t.lower() for t in types)),
                         tuple(map(int, numbers)), tuple(x == "1" for x in flags))  # fmt: skip


def main_loop(code: sass.Kernel, shape: Shape) -> sass.Loop | None:
    """The one that goes from tile to tile: what holds a loop that tries again, or one of steps."""
    inner = sass.leanest(code.loops)
    loop = inner if shape.innermost else sass.leanest(code.outer)
    if loop and inner and inner.size < loop.size and shape.steps > 1:
        for _ in range(shape.steps - 1):
            loop += inner
    return loop.of_teams() if loop and shape.teams else loop


def row_of(code: sass.Kernel, architecture: str) -> dict[str, Any]:
    this, number = parse(code.name), int(architecture.rstrip("af"))
    shape = this.shape
    row = {
        "kernel": str(this), "architecture": architecture, "blocks": shape.blocks if shape else {},
        "warps": shape.warps if shape else None, "registers": code.registers, "stack": code.stack,
        "spills": code.spills, "shared": code.shared + (shape.shared if shape else 0),
        "occupancy": None,
    }  # fmt: skip
    if shape:
        row["occupancy"] = code.occupancy(number, shape.warps, row["shared"])
        row["work"] = shape.work
    row |= counts.of_loop(main_loop(code, shape or Shape(0)), number)
    return row


def measure(architecture: str, patterns: list[str]) -> list[dict[str, Any]]:
    """A row for each instantiation in these files of csrc/cuda."""
    sources = sorted({path.name for x in patterns for path in nvcc.SOURCES.glob(x)})
    sources = [x for x in sources if "_sm90" not in x or architecture == "90a"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        cubins = pool.map(lambda source: nvcc.compile(source, "cubin", architecture), sources)
        return [row_of(code, architecture) for cubin in cubins for code in sass.read(cubin)]


# ---- Targets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """``value`` of a kernel's rows is at most ``bound``, or at least."""

    name: str
    kernel: str  # pattern of the rows' names
    what: str
    value: Callable[[dict], float]
    bound: float
    least: bool = False
    architecture: str = "80"

    def met(self, row: dict) -> bool:
        value = self.value(row)
        return value >= self.bound if self.least else value <= self.bound


def ldsm_per_matrix(row: dict) -> float:
    return row["LDSM"] / row["matrix"]


def per_128_keys(row: dict) -> float:
    return row["per_matrix"] / row["work"]["keys"] * 128


# "false": without a softcap, as FlashAttention was compiled.
TARGETS = [
    Target("G1", "flash_forward<", "spills", lambda row: sum(row["spills"]), 0),
    Target("G1", "flash_forward<.*false>", "instructions for each matrix instruction",
           lambda row: row["per_matrix"], 3.1),
    Target("G1", "flash_forward<.*false>", "FMUL on the common path", lambda row: row["FMUL"], 8),
    Target("G1", "flash_forward<.*128, false>", "LDSM, FlashAttention-2's",
           lambda row: row["LDSM"], 80),
    Target("G1", "flash_forward<.*64, false>", "LDSM, FlashAttention-2's",
           lambda row: row["LDSM"], 72),
    Target("G1", "flash_forward<.*128, false>", "modelled use of matrix units, nothing overlapped",
           lambda row: row["bounds"][0], 0.65, least=True),
    Target("G1", "flash_forward<.*64, false>", "modelled use of matrix units, nothing overlapped",
           lambda row: row["bounds"][0], 0.50, least=True),
    Target("G2", "flash_backward_", "spills", lambda row: sum(row["spills"]), 0),
    Target("G2", "flash_backward_(keys|queries)<.*false>", "LDSM for each matrix instruction",
           ldsm_per_matrix, 0.40),
    Target("G2", "flash_backward_(keys|queries)<.*128, false>",
           "instructions for each matrix instruction", lambda row: row["per_matrix"], 3.0),
    Target("G3", "flash_forward_sm90<", "bytes of stack", lambda row: row["stack"], 0,
           architecture="90a"),
    Target("G3", "flash_forward_sm90<.*128, false>",
           "instructions for 128 keys, FlashAttention-3's", per_128_keys, 471, architecture="90a"),
    Target("G3", "flash_forward_sm90<.*128, false>", "instructions for 128 keys", per_128_keys, 410,
           architecture="90a"),
    Target("G3", "flash_forward_sm90<.*64, false>",
           "instructions for 128 keys, FlashAttention-3's", per_128_keys, 428, architecture="90a"),
    Target("G3", "flash_forward_sm90<.*64, false>", "instructions for 128 keys", per_128_keys, 395,
           architecture="90a"),
    Target("G5", "decode_attention<", "instructions a byte of keys and values",
           lambda row: row["per_matrix"] / row["work"]["KV bytes"], 0.03),
    Target("G6", "vq_search<4>", "matrix instructions for 128 scores",
           lambda row: 128 / row["work"]["scores"], 1),
    Target("G6", "vq_search<8>", "matrix instructions for 128 scores",
           lambda row: 128 / row["work"]["scores"], 2),
    Target("G6", "vq_search<[48]>", "operations a score, but for matrix instructions",
           lambda row: (row["per_matrix"] - 1) * 32 / row["work"]["scores"], 1.25),
]  # fmt: skip


# Why a bound does not hold, read from the machine code, by target and patterns of the
# kernel and of what is bounded.
MISSED = {
    ("G1", "flash_forward<.*, 64, false>", "instructions.*"):
        "256 HMMA, 128 each of EX2, FFMA and FADD, 64 F2FP, 64 LDSM, and 16 copies with an address"
        " and a predicate each are 816 of 962 instructions, 3.19 for each HMMA. FADD could go:"
        " products of P with a column of ones are sums, too. But those are of rounded"
        " probabilities, and the log-sum-exp is held to fp32's exactness.",
    ("G5", "decode_attention<.*, true>", "instructions.*"):
        "SHF, two LOP3 and two HADD2 widen 4 bytes of a lane to fp16, 0.039 instructions a byte,"
        " about half of the loop. FlashAttention has no such cache to compare with.",
    ("G5", "decode_attention<.*, 64, 2, false>", "instructions.*"):
        "16 queries take twice the exponentials for the same bytes. The bound is meant for 8.",
}  # fmt: skip


def verdicts(rows: list[dict]) -> Iterator[tuple[Target, dict, bool]]:
    for target in TARGETS:
        for row in rows:
            of_it = re.match(target.kernel, row["kernel"])
            if of_it and row["architecture"] == target.architecture:
                yield target, row, target.met(row)


# ---- The page -----------------------------------------------------------------------------------


def page(record: dict) -> str:
    lines = [
        "# Machine code of the CUDA kernels\n",
        f"Made by `{record['command']}` with nvcc {record['nvcc']}, on a machine without a GPU."
        f" {counts.LEGEND}\n",
        "\n## Targets: G3 for sm_90a, the others for sm_80\n",
        "| | kernel | what | bound | is | holds |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for target, row, met in verdicts(record["rows"]):
        cells = [target.name, f"`{row['kernel']}`", target.what,
                 f"{'≥' if target.least else '≤'} {target.bound:g}", f"{target.value(row):.3g}",
                 "yes" if met else "**no**"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["\nWhere they do not hold:\n"]
    lines += [f"- {name}, `{kernel}`: {why}" for (name, kernel, _), why in MISSED.items()]
    rows = [row | {"name": f"`{row['kernel']}`"} for row in record["rows"]]
    return "\n".join([*lines, *counts.tables(rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=["80", "90a", "100a", "120a"])
    parser.add_argument("--sources", nargs="+", default=["*.cu"], help="with --check: patterns")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    try:
        record = {"nvcc": nvcc.version(), "command": "python benchmarks/cuda_static.py", "rows": []}
    except nvcc.Missing as reason:
        sys.exit(str(reason))
    for architecture in options.architectures:
        record["rows"] += measure(architecture, options.sources)
        print(f"sm_{architecture}", flush=True)
    if options.check:
        sys.exit(counts.check(record, RESULT, "nvcc"))
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(page(record))


if __name__ == "__main__":
    main()
