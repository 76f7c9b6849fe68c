"""results/*.json -> results/README.md with its plots: python benchmarks/report.py"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: by benchmarks/report.py -->", "<!-- end of benchmarks -->"
ABOUT = """# Benchmarks

Made by `make bench`. Every contender passes a check of its results first, then all take turns: nine
rounds, or as many as take it five seconds, three at least. Numbers are medians, "spread" is the
distance of the quartiles, in % of the median.
GFLOP/s count the products of the brute force, whatever an algorithm really does. A ratio above 1 is
how much longer than ours a peer takes; **bold** is where a peer wins. Peaks, of fp32 multiply-adds
out of registers and of reads from memory, are of the same run. Where it says AVX2, every library is
restricted to that, as on machines that have no more.
"""


FAISS, SDPA = ("faiss IndexFlatL2",), ("torch SDPA",)
TREES = ("scipy cKDTree", "pykdtree", "scikit-learn KDTree")
# What is asked of the problems that have such a case: so many times the speed of the best of these
# peers, or such a share of the peak.
GOALS: dict[str, list[tuple[dict[str, Any], tuple[str, ...] | None, float]]] = {
    "vq_nearest": [
        ({"codes": 16384, "dim": 4}, FAISS, 8),
        ({"codes": 16384, "dim": 4}, TREES, 3),
        ({"codes": 16384, "dim": 8}, FAISS, 4),
        ({"codes": 16384, "dim": 8}, TREES, 2),
        ({"codes": 8192, "dim": 32}, FAISS, 1.6),
        ({"dim": 256}, FAISS, 1.1),
        ({"dim": 256}, None, 0.9),
    ],
    "VectorQuantizer step": [({}, ("torch, chunks of 512", "torch, compiled"), 10)],
    "flash_attention": [
        ({"dtype": "fp32", "backward": False}, SDPA, 1.5),
        ({"dtype": "fp32", "backward": False, "length": 1152}, None, 0.75),
        ({"dtype": "fp32", "backward": False, "length": 4096}, None, 0.75),
        ({"dtype": "fp32", "backward": True}, SDPA, 1.7),
        ({"dtype": "bf16", "backward": False}, SDPA, 1.8),
        ({"dtype": "bf16", "backward": True}, SDPA, 8),
    ],
}


def main() -> None:
    files = sorted(file for op in GOALS for file in RESULTS.glob(f"{op}-*.json"))
    records = [record for file in files for record in read(file)]
    if not records:
        raise SystemExit(f"no results in {RESULTS}: run make bench")
    parts = [ABOUT]
    for op in dict.fromkeys(record["case"]["op"] for record in records):
        mine = [record for record in records if record["case"]["op"] == op]
        parts.append(f"## {op}\n")
        for picture in draw(op, mine):
            parts.append(f"![{picture}]({picture})\n")
        for run in dict.fromkeys(record["run"] for record in mine):
            parts.append(f"### {run}\n")
            here = [record for record in mine if record["run"] == run]
            parts += goals(GOALS.get(op, []), here)
            parts += tables(here)
    (RESULTS / "README.md").write_text("\n".join(parts))
    print(RESULTS / "README.md")
    overview(records)


def read(file: Path) -> list[dict[str, Any]]:
    data = json.loads(file.read_text())
    about, machine = data["t2i"], data["machine_info"]
    cpu = machine["cpu"].get("brand_raw", machine["machine"])
    threads = about["threads"]
    peaks = next(b["extra_info"]["case"]["peaks"] for b in data["benchmarks"] if b["extra_info"])
    run = (
        f"{threads} thread{'s' * (threads > 1)}, {cpu}, {about['instruction_set']}, peak "
        f"{peaks['gflops']:.0f} GFLOP/s and {peaks['gigabytes_per_second']:.0f} GB/s, "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f", by `{about['command']}`"
    )
    return [
        {
            **b["extra_info"],
            "run": run,
            "threads": threads,
            "instruction_set": about["instruction_set"],
            "test": b["name"].split("[")[0],
        }
        for b in data["benchmarks"]
        if b["extra_info"]
    ]  # fmt: skip


HIDDEN = ("op", "peaks", "path")  # of a case, in its name


def name(case: dict[str, Any]) -> str:
    words = []
    for key, value in case.items():
        if key in HIDDEN or value is False:
            continue
        words.append(key if value is True else f"{value}" if isinstance(value, str)
                     else f"{key} {value}")  # fmt: skip
    return ", ".join(words)


def reached(
    case: dict[str, Any], peers: tuple[str, ...] | None, records: list[dict[str, Any]]
) -> list[float]:
    """The best peer's ratio, or the share of the peak, in all problems that have such a case."""
    found = []
    for record in records:
        here = record["case"]
        if "_over_" in record["test"] or any(here[key] != case[key] for key in case):
            continue
        rows = [row for row in record["rows"] if "seconds" in row]
        if peers is None:
            ours = next(row for row in rows if row["ours"])
            found.append(ours["gflops"] / here["peaks"]["gflops"])
        else:
            found += sorted(row["ratio"] for row in rows if row["name"] in peers)[:1]
    return found


def goals(asked: list[Any], records: list[dict[str, Any]]) -> list[str]:
    """What was asked, and the range of what was reached."""
    lines = ["| goal | asked | reached | problems that reach it |", "|---|---|---|---|"]
    for case, peers, least in asked:
        found = reached(case, peers, records)
        if found:
            unit = "{:.0%}" if peers is None else "{:.2g}×"
            beside = "of peak" if peers is None else f"beside {' or '.join(peers)}"
            lines.append(
                f"| {f'{name(case)}, ' if case else ''}{beside} | {unit.format(least)} | "
                f"{unit.format(min(found))} – {unit.format(max(found))} | "
                f"{sum(x >= least for x in found)} of {len(found)} |"
            )
    return [*lines, ""] if len(lines) > 2 else []


def overview(records: list[dict[str, Any]]) -> None:
    """The table of the project's README."""
    kinds = list(dict.fromkeys(r["instruction_set"] for r in records))
    runs = sorted({(r["threads"], r["instruction_set"]) for r in records},
                  key=lambda run: (kinds.index(run[1]), run[0]))  # fmt: skip
    columns = [f"{n} thread{'s' * (n > 1)}, {kind}" for n, kind in runs]
    lines = [f"| | beside | {' | '.join(columns)} |", "|---|---|" + "---|" * len(runs)]
    for op, asked in GOALS.items():
        for case, peers, _ in asked:
            cells = []
            for run in runs:
                here = [
                    r for r in records
                    if r["case"]["op"] == op and (r["threads"], r["instruction_set"]) == run
                ]  # fmt: skip
                found = reached(case, peers, here) if peers else []
                least, most = (f"{f(found):.1f}×" if found else "–" for f in (min, max))
                cells.append(least if least == most else f"{least} – {most}")
            if peers and any(cell != "–" for cell in cells):
                what = ", ".join(filter(None, [f"`{op}`", name(case)]))
                lines.append(f"| {what} | {' or '.join(peers)} | {' | '.join(cells)} |")
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text("\n".join([before + BEGIN, *lines, END + after]))


def tables(records: list[dict[str, Any]]) -> list[str]:
    """The overview: us beside the best peer; then every contender, folded away."""
    lines = [
        "| problem | best peer takes | ours | of peak | path | best peer |",
        "|---|---|---|---|---|---|",
    ]
    details = ["<details><summary>all contenders</summary>\n"]
    details += ["| problem | contender | ratio | time | spread | GFLOP/s | memory |"]
    details += ["|---|---|---|---|---|---|---|"]
    for record in records:
        case, rows = record["case"], record["rows"]
        ran = [row for row in rows if "seconds" in row]
        ours = next(row for row in ran if row["ours"])
        peers = [row for row in ran if not row["ours"] and not row["name"].startswith("t2i")]
        if peers:
            best = min(peers, key=lambda row: row["seconds"])
            ratio = f"{best['ratio']:.2f}×"
            ratio = f"**{ratio}**" if best["ratio"] < 1 else ratio
            share = ours["gflops"] / case["peaks"]["gflops"]
            lines.append(
                f"| {name(case)} | {ratio} | {duration(ours['seconds'])} | {share:.0%} | "
                f"{case['path']} | {best['name']}, {duration(best['seconds'])} |"
            )
        for row in rows:
            cells = [name(case), row["name"]]
            if "seconds" in row:
                cells += [f"{row['ratio']:.2f}", duration(row["seconds"]), f"{row['spread']:.0%}",
                          f"{row['gflops']:.1f}", f"{row['peak_megabytes']:.0f} MB"]  # fmt: skip
            else:
                cells += [row["skipped"], "", "", "", ""]
            details.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *details, "\n</details>\n"]


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


SWEEPS = {  # test -> the key of a case along the x axis
    "test_over_codes": "codes",
    "test_over_dimensions": "dim",
    "test_over_length": "length",
}


def draw(op: str, records: list[dict[str, Any]]) -> list[str]:
    pictures = []
    for test, key in SWEEPS.items():
        for threads in sorted({record["threads"] for record in records}):
            chosen = [r for r in records if r["test"] == test and r["threads"] == threads]
            if chosen:
                pictures.append(sweep(op, chosen, key, threads))
    return [*pictures, roofline(op, records)] if len(records) > 1 else pictures


def sweep(op: str, records: list[dict[str, Any]], key: str, threads: int) -> str:
    lines = defaultdict(list)
    for record in records:
        for row in record["rows"]:
            if "seconds" in row:
                lines[row["name"]].append((record["case"][key], row["seconds"] * 1e3))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for label, points in lines.items():
        style = {"linewidth": 2.5, "color": "black"} if label == "t2i" else {"linewidth": 1.2}
        axes.plot(
            *zip(*sorted(points), strict=True), marker="o", markersize=3, label=label, **style
        )
    axes.set(xscale="log", yscale="log", xlabel=key, ylabel="ms")
    problem = name({**records[0]["case"], key: False})
    axes.set_title(f"{op}: {problem}, {threads} thread{'s' * (threads > 1)}", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return save(figure, f"{op}-{key}-{threads}.png")


def roofline(op: str, records: list[dict[str, Any]]) -> str:
    """Of every problem, the share of the machine's multiply-adds that each contender reaches."""
    records = [r for r in records if r["test"] == "test_shapes"] or records
    points = defaultdict(list)
    for y, record in enumerate(records):
        for row in record["rows"]:
            if "seconds" in row:
                label = "t2i" if row["ours"] else row["name"]
                points[label].append((row["gflops"] / record["case"]["peaks"]["gflops"], y))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.2 * len(records)))
    for label, places in points.items():
        style = {"color": "black", "s": 30, "zorder": 3} if label == "t2i" else {"s": 14}
        axes.scatter(*zip(*places, strict=True), label=label, **style)
    axes.axvline(1, color="grey", linewidth=1)
    labels = [f"{name(r['case'])}, {r['threads']} thr., {r['instruction_set']}" for r in records]
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set(xscale="log", xlabel="effective GFLOP/s, as a share of the peak of fp32 multiply-adds")
    axes.set_ylim(len(records) - 0.3, -0.7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncol=5, loc="lower center", bbox_to_anchor=(0.3, 1.0))
    return save(figure, f"{op}-roofline.png")


def save(figure: Any, file: str) -> str:
    file = file.replace(" ", "-")
    figure.tight_layout()
    figure.savefig(RESULTS / file, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return file


if __name__ == "__main__":
    main()
