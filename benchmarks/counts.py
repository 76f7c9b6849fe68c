"""What gpu_static.py and cuda_static.py count in machine code, and how they show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sass import Loop

# FlashAttention's main loops: its source of August 2026, nvcc 13.0, its own flags, bf16, even
# shapes (FA2, sm_80), and a published build (FA3, sm_90a).
# name: architecture, registers, spilled bytes stored and loaded, then per iteration and warp
# instructions, matrix instructions, LDSM, EX2, FMUL.
FLASH_ATTENTION = {
    "FA2 forward, d 128, 128×64, 4 warps": (80, 255, (224, 244), 883, 256, 80, 68, 136),
    "FA2 forward, d 64, 128×128, 4 warps": (80, 255, (284, 292), 1128, 256, 72, 132, 72),
    "FA2 backward, d 128, 64×128, 8 warps": (80, 255, (64, 88), 977, 320, 144, 32, 36),
    "FA2 backward, d 64, 128×128, 8 warps": (80, 255, (96, 104), 1282, 320, 144, 64, 68),
    "FA2 split-KV decoding, d 128, 64×128, 4 warps": (80, 254, (0, 0), 976, 256, 136, 66, 68),
    "FA3 forward, d 128, 128×128": (90, 168, (0, 0), 471, 16, 0, 66, 68),
    "FA3 forward, d 64, 192×128": (90, 128, (0, 0), 428, 12, 0, 66, 36),
}

LEGEND = (
    "Nothing here is a time. Counts are of a warp and an iteration of the main loop; where a"
    " branch may skip instructions (rescaling, for one), those are not in the instructions for each"
    " matrix instruction and not in FMUL. The use of matrix units is **modelled** from the clocks"
    " that each pipe is busy: if nothing overlapped, and if everything did (benchmarks/sass.py)."
    " Spills are instructions; FlashAttention's are bytes."
)
COLUMNS = ["kernel", "tile", "warps", "registers", "spills", "shared", "warps a multiprocessor",
           "instructions", "matrix", "each", "LDSM / matrix", "EX2", "FMUL",
           "matrix units"]  # fmt: skip


def name_of(architecture: int | str) -> str:
    return str(architecture) if str(architecture).startswith("gfx") else f"sm_{architecture}"


def of_loop(loop: Loop | None, architecture: int) -> dict[str, Any]:
    """What a row has of its main loop."""
    if loop is None:
        return {}
    return {
        "instructions": round(loop.size), "matrix": loop.matrix,
        "per_matrix": round(loop.per_matrix, 2), "LDSM": loop.count("LDSM"),
        "EX2": round(loop.count("MUFU.EX2")), "FMUL": round(loop.count("FMUL", common=True)),
        "bounds": [round(x, 3) for x in loop.bounds(architecture) or ()],
    }  # fmt: skip


def worse(new: dict, old: dict) -> list[str]:
    """Counts of a row that are above those of an older one."""
    found = []
    for key in ("registers", "shared", "per_matrix", "FMUL", "LDSM"):
        if new.get(key, 0) > old.get(key, 0):
            found.append(f"{key} {old.get(key)} -> {new[key]}")
    if sum(new["spills"]) > sum(old["spills"]):
        found.append(f"spills {old['spills']} -> {new['spills']}")
    return found


def key(row: dict) -> tuple:
    return row.get("case"), row["kernel"], row["architecture"]


def check(record: dict, committed: Path, compiler: str) -> str | None:
    """What became worse than the committed rows, if anything did. ``compiler``: the record's field
    that says its version; nothing is said of another's code."""
    if not committed.exists():
        return f"{committed} is not there: {record['command']}"
    before = json.loads(committed.read_text())
    if before[compiler] != record[compiler]:
        now = f"this is {record[compiler]}"
        print(f"committed with {compiler} {before[compiler]}, {now}: no verdict")
        return None
    old, rows = {key(row): row for row in before["rows"]}, record["rows"]
    lines = [f"{key(row)}: {line}" for row in rows if key(row) in old
             for line in worse(row, old[key(row)])]  # fmt: skip
    lines += [f"{key(row)}: not in {committed.name}" for row in rows if key(row) not in old]
    return "\n".join(lines) or None


def tables(rows: list[dict]) -> list[str]:
    """Lines of one table an architecture; rows have a ``name``."""
    lines = []
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        lines += [f"\n## {name_of(architecture)}\n", f"| {' | '.join(COLUMNS)} |",
                  "|---" * len(COLUMNS) + "|"]  # fmt: skip
        for name, (arch, regs, spills, size, matrix, ldsm, ex2, fmul) in FLASH_ATTENTION.items():
            if str(arch) == str(architecture).rstrip("a"):
                cells = [f"*{name}*", "", "", regs, f"{spills[0]}/{spills[1]} B", "", "", size,
                         matrix, f"{size / matrix:.2f}", f"{ldsm / matrix:.2f}", ex2, fmul,
                         ""]  # fmt: skip
                lines.append(f"| {' | '.join(map(str, cells))} |")
        for row in rows:
            if row["architecture"] != architecture:
                continue
            cells = [row["name"], "×".join(map(str, row["blocks"].values())), row["warps"],
                     row["registers"], "/".join(map(str, row["spills"])),
                     f"{row['shared'] / 1024:.0f} KB", row["occupancy"]]  # fmt: skip
            if "matrix" in row:
                cells += [row["instructions"], row["matrix"], f"{row['per_matrix']:.2f}",
                          f"{row['LDSM'] / row['matrix']:.2f}", row["EX2"], row["FMUL"],
                          " to ".join(f"{x:.0%}" for x in row["bounds"])]  # fmt: skip
            else:
                cells += [""] * 7
            lines.append(f"| {' | '.join('' if x is None else str(x) for x in cells)} |")
    return lines
