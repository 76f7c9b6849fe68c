"""results/decode.json -> results/decode.md with its plot: python benchmarks/decode/report.py"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from shapes import SHAPES, step_bytes  # noqa: E402
from turns import compared  # noqa: E402

RESULTS = HERE.parent / "results"
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- decoding: by benchmarks/decode/report.py -->", "<!-- end of decoding -->"
ABOUT = """# Decoding

Made by `make bench-decode`. Every engine decodes 256 tokens behind a prompt of 64, greedily, with
the whole head, from the same random weights. In fp32 an engine takes part whose first tokens are
those of transformers; in the other precisions, whose rounding differs, the share of tokens that are
ours is in the list of all engines. int8 and int4 are each engine's own format of about as many
bits, for all matrices; llama.cpp's bf16 is f16, and it is compiled without AMX, with which it
crashes on the smaller shape. transformers runs in fp32 and bf16, CTranslate2 in fp32 and int8,
ik_llama.cpp, made for small weights, in int8 and int4, ONNX Runtime in all but bf16. With fp32
weights all keep keys and values in fp32, otherwise as each does by itself: llama.cpp in 16 bits,
OpenVINO in 8; "cache" says how we do, in bf16, which is asked for: `sample` keeps fp32 unless told.
OpenVINO keeps those of a prompt, too, which is read once: its time is not told.

Engines take turns; numbers are medians, "spread" is the range over the median. Other machines share
the memory of this one, and take half its speed for minutes: turns are compared that had it at one
speed, within a tenth, the one that leaves the most to the engine with the fewest; "turns" is how
many that engine has, "any" where all count, since none are at one speed or the speed was measured
once for all. A ratio above 1 is how many times as many tokens a second we decode as the best
engine; **bold** is where an engine wins, and ~ where it is not certain who does: our slowest turn
and its fastest one overlap. The share of the bandwidth counts the weights and the cache that a step
reads, of what the same threads read of as many bytes right before and after each turn; "goal" is
what we set ourselves for both. Where memory is short, engines are started for each of their turns.

Results with AMX are older: ik_llama.cpp is its wheel there, which has no AVX-512, ONNX Runtime has
no int8, transformers no bf16, and llama.cpp keeps 16 bits of keys and values in fp32, too, which
cost it its place where tokens differed. The heads of llama.cpp, ik_llama.cpp and OpenVINO have 6 to
8 bits there in int4, too, and the speed of memory is that of reading as many bytes as the weights
alone. README says under "Not done yet" which others are of an earlier version of ours.
"""
PICTURES = """Seconds for the tokens of one picture with guidance, its prompt included, the pixels
not. Ours are all of sampling: guidance, noise and draw behind every step. transformers draws with
guidance, too, in `generate`. The other engines only decode two rows greedily, which is less than a
picture takes. "Outside": the share of our time beyond that of reading weights and cache at the
measured bandwidth. "Ahead": the same pictures with int8 weights that guess; of the shipped weights,
where that means something.
"""
SLICED = """Where only the 16,384 codes of a picture may be drawn, only their rows of the head need
be read. That is how pictures are drawn; the tables above read the whole head.
"""
QUALITY = """The shipped model, drawing as it does by default, by `benchmarks/decode/quality.py`:
perplexity of the tokens of real pictures, Fréchet distance in features of EfficientNet-Lite0 to all
other real pictures, and how many pictures are found by their caption within ten.
"""
PROFILE = """Shares of the samples of perf over all threads, by `benchmarks/decode/where.py`. While
one thread runs Python the others wait, which is counted, too.
"""
# Times the best engine, and share of the bandwidth, at batch 1.
GOALS = {
    ("135m", "fp32"): (1.5, 0.85), ("135m", "bf16"): (1.8, 0.8),
    ("135m", "int8"): (2.0, 0.7), ("135m", "int4"): (1.8, 0.55),
    ("1b", "fp32"): (1.3, 0.9), ("1b", "bf16"): (1.3, 0.9),
    ("1b", "int8"): (1.3, 0.85), ("1b", "int4"): (1.3, 0.75),
}  # fmt: skip


def main() -> None:
    runs = [compared(run) for run in json.loads((RESULTS / "decode.json").read_text())["runs"]]
    machines = defaultdict(set)  # that have a name, by their instruction set
    for run in runs:
        machines[run["case"]["instruction_set"]] |= {run["case"]["machine"]} - {""}
    for case in [run["case"] for run in runs]:
        if len(machines[case["instruction_set"]]) > 1:
            case["instruction_set"] += f" of {case['machine'] or 'another machine'}"
    latest = runs[-1]["case"]["machine"], runs[-1]["case"]["instruction_set"]
    order = ("fp32", "bf16", "int8", "int4")
    runs.sort(key=lambda run: (
        list(SHAPES).index(run["case"]["shape"]), run["case"]["instruction_set"],
        -run["case"]["threads"], run["case"]["batch"], order.index(run["case"]["precision"]),
    ))  # fmt: skip
    for run in runs:
        failed = [n for n, row in run["rows"].items() if n.startswith("t2i") and "skipped" in row
                  and n != "t2i, guided, ahead"]  # fmt: skip
        assert not failed, f"{run['case']}: {failed} did not run"
    machines = sorted(
        {
            f"{r['case']['instruction_set']} ({r['case']['machine'] or 'its name is not known'})"
            for r in runs
        }
    )
    parts = [ABOUT, f"Machines: {', '.join(machines)}.\n"]
    pictures = [run for run in runs if SHAPES[run["case"]["shape"]].ours]
    runs = [run for run in runs if run not in pictures]
    parts += [f"![roofline]({roofline(runs)})\n"]
    rows = [row for run in runs + pictures for row in run["rows"].values() if "versions" in row]
    parts += [", ".join(sorted({f"{p} {v}" for r in rows for p, v in r["versions"].items()}))]
    for title, here in itertools.groupby(runs, place):
        parts += [f"\n## {title}\n", *tables(list(here))]
    sliced = [run for run in runs if "decode" in run["rows"].get("t2i, sliced head", {})]
    if sliced:
        parts += ["\n## What slicing the head gains\n", SLICED, *sliced_table(sliced)]
    quality = RESULTS / "decode-quality.json"
    if quality.exists():
        parts += ["\n## What smaller weights and caches cost\n", QUALITY]
        parts += quality_table(json.loads(quality.read_text()))
    profile = RESULTS / "decode-profile.json"
    if profile.exists():
        parts += ["\n## Where the time goes\n", PROFILE]
        parts += profile_table(json.loads(profile.read_text())["rows"])
    if pictures:
        parts += ["\n## Pictures\n", PICTURES, *picture_table(pictures)]
    write(RESULTS / "decode.md", "\n".join(parts) + "\n")
    print(RESULTS / "decode.md")
    here = [r for r in runs if (r["case"]["machine"], r["case"]["instruction_set"]) == latest]
    threads = max(run["case"]["threads"] for run in here)
    overview([run for run in here if run["case"]["threads"] == threads])


def write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def place(run: dict[str, Any]) -> str:
    case = run["case"]
    return f"{case['shape']}, {where(case)}"


def where(case: dict[str, Any]) -> str:
    threads = case["threads"]
    return f"{case['instruction_set']}, {threads} thread{'s' * (threads > 1)}"


def overview(runs: list[dict[str, Any]]) -> None:
    """The table of the project's README: what ran on one machine."""
    batches = sorted({run["case"]["batch"] for run in runs})
    columns = [f"{runs[0]['case']['machine']}, {where(runs[0]['case'])}", "weights"]
    columns += ["of bandwidth, batch 1", "best engine there", *(f"batch {b}" for b in batches)]
    lines = [f"| {' | '.join(columns)} |"]
    lines += ["|---" * (4 + len(batches)) + "|"]
    for case in dict.fromkeys((run["case"]["shape"], run["case"]["precision"]) for run in runs):
        cells, ratios = [*case, "", ""], []
        for batch in batches:
            found = [run for run in runs if (run["case"]["shape"], run["case"]["precision"]) == case
                     and run["case"]["batch"] == batch]  # fmt: skip
            ratios.append(beside_best(found[0]) if found else "–")
            if found and batch == 1:
                others = engines(found[0])
                cells[2] = f"{share(found[0]):.0%}"
                cells[3] = max(others, key=others.get, default="none")
        lines.append(f"| {' | '.join([*cells, *ratios])} |")
    before, rest = README.read_text().split(BEGIN)
    write(README, "\n".join([before + BEGIN, *lines, END + rest.split(END)[1]]))


def beside_best(run: dict[str, Any]) -> str:
    """How many times as many tokens a second we decode as the best engine."""
    rows, others = run["rows"], engines(run)
    if not others:
        return "–"
    best = max(others, key=others.get)
    ratio = rows["t2i"]["tokens_per_second"] / others[best]
    if max(rows["t2i"]["decode"]) >= min(rows[best]["decode"]) and ratio >= 1:
        return f"~{ratio:.2f}×"
    return f"{ratio:.2f}×" if ratio >= 1 else f"**{ratio:.2f}×**"


def share(run: dict[str, Any], name: str = "t2i") -> float:
    """Of the bandwidth, if an engine read our weights and cache: the median of its turns, each by
    what was measured right before and after it, since neighbours come and go."""
    case, row = run["case"], run["rows"][name]
    step = step_bytes(case, run["rows"]["t2i"])
    return statistics.median(
        step * (case["tokens"] - 1) / (seconds * bandwidth)
        for seconds, bandwidth in zip(row["decode"], bandwidths(run, name), strict=True)
    )


def cache_type(run: dict[str, Any]) -> str:
    shape = SHAPES[run["case"]["shape"]].config
    values = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return {4: "fp32", 2: "bf16"}[run["rows"]["t2i"]["slot_bytes"] // values]


def bandwidths(run: dict[str, Any], name: str) -> list[float]:
    """Around each turn; in older results once for all."""
    row = run["rows"][name]
    return row["bandwidth"] if "bandwidth" in row else [run["bandwidth"]] * len(row["decode"])


def engines(run: dict[str, Any]) -> dict[str, float]:
    return {
        name: row["tokens_per_second"]
        for name, row in run["rows"].items()
        if not name.startswith("t2i") and "decode" in row
    }


def tables(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| weights | cache | batch | best engine takes | tokens/s | of bandwidth | best engine "
        "| goal | turns |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    details = ["\n<details><summary>all engines</summary>\n"]
    details += ["| weights | batch | engine | tokens/s | spread | prompt | same tokens |"]
    details += ["|---|---|---|---|---|---|---|"]
    for run in runs:
        case, rows, others = run["case"], run["rows"], engines(run)
        ours = rows["t2i"]["tokens_per_second"]
        cells = [case["precision"], cache_type(run), case["batch"]]
        best = max(others, key=others.get, default=None)
        cells += [
            beside_best(run),
            f"{ours:.1f}",
            f"{share(run):.0%} of {statistics.median(bandwidths(run, 't2i')) / 1e9:.0f} GB/s",
            f"{best}, {others[best]:.1f}" if best else "none ran",
        ]  # fmt: skip
        goal = GOALS.get((case["shape"], case["precision"])) if case["batch"] == 1 else (1.0, None)
        cells += [f"{goal[0]}×" + (f", {goal[1]:.0%}" if goal[1] else ""), run["turns"] or "any"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        for name, row in rows.items():
            if name == "t2i, sliced head":
                continue
            cells = [case["precision"], case["batch"], name]
            if "decode" in row:
                prompt = f"{statistics.median(row['prefill']) * 1e3:.0f} ms"
                prompt = "" if name == "openvino-genai" else prompt
                cells += [f"{row['tokens_per_second']:.1f}", f"{row['spread']:.0%}",
                          prompt, f"{row['same_tokens']:.0%}"]  # fmt: skip
            else:
                cells += [row["skipped"], "", "", ""]
            details.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, *details, "\n</details>"]


def sliced_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | weights | batch | faster | tokens/s, whole | sliced | of the weights are left |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for run in runs:
        whole, sliced = (run["rows"][name] for name in ("t2i", "t2i, sliced head"))
        speeds = [row["tokens_per_second"] for row in (whole, sliced)]
        lines.append(
            f"| {place(run)} | {run['case']['precision']} | {run['case']['batch']} "
            f"| {speeds[1] / speeds[0]:.2f}× | {speeds[0]:.1f} | {speeds[1]:.1f} "
            f"| {sliced['bytes'] / whole['bytes']:.0%} |"
        )
    return lines


def picture_table(runs: list[dict[str, Any]]) -> list[str]:
    columns = ["model", "tokens", "weights", "cache", "transformers takes", "best engine takes"]
    columns += ["ours", "outside", "turns", "all"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in runs:
        case, rows = run["case"], run["rows"]
        seconds = {
            name: statistics.median(map(sum, zip(row["prefill"], row["decode"], strict=True)))
            for name, row in rows.items()
            if "decode" in row
        }
        ours, theirs = seconds["t2i, guided"], seconds.get("transformers, guided")
        others = {n: s for n, s in seconds.items() if not n.startswith("t2i")}
        best = min((s for n, s in others.items() if n != "transformers, guided"), default=None)
        if "t2i, guided, ahead" in seconds:
            others["t2i, guided, ahead"] = seconds["t2i, guided, ahead"]
        row = rows["t2i, guided"]
        outside = 1 - row["bytes"] * row["passes"][0] * statistics.median(
            1 / (seconds * bandwidth)
            for seconds, bandwidth in zip(
                row["decode"], bandwidths(run, "t2i, guided"), strict=True
            )
        )
        cells = [
            place(run), case["tokens"], case["precision"], cache_type(run),
            f"{theirs / ours:.1f}×" if theirs else "", f"{best / ours:.2f}×" if best else "",
            f"{ours:.3g} s", f"{outside:.0%}", run["turns"] or "any",
            ", ".join(
                [f"{n} {s:.3g} s" for n, s in sorted(others.items(), key=lambda x: x[1])]
                + [f"{n}: {row['skipped']}" for n, row in rows.items() if "skipped" in row
                   and not n.startswith("t2i")]
            ),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def quality_table(record: dict[str, Any]) -> list[str]:
    splits = list(record["rows"][0]["splits"])
    columns = [f"{what}, {s}" for what in ("perplexity", "FD", "found") for s in splits]
    lines = [f"| weights | cache | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for row in record["rows"]:
        scores = row["splits"].values()
        cells = [row["weights"], row.get("cache", "fp32")]
        cells += [f"{score['perplexity']:.2f}" for score in scores]
        cells += [f"{score['fd_efflite0']:.2f}" for score in scores]
        cells += [f"{score['top10']:.1%}" for score in scores]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, f"\n{record['prompts']} captions of each split, fewer where it has fewer."]


def profile_table(rows: list[dict[str, Any]]) -> list[str]:
    parts = list(dict.fromkeys(part for row in rows for part in row["shares"]))
    lines = [f"| model | weights | batch | {' | '.join(parts)} |", "|---" * (3 + len(parts)) + "|"]
    for row in rows:
        cells = [f"{row['shape']}, {where(row)}", row["precision"], str(row["batch"])]
        cells += [f"{row['shares'].get(part, 0):.0%}" for part in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def roofline(runs: list[dict[str, Any]]) -> str:
    """What share of the speed of memory every engine reaches, in every case."""
    points = defaultdict(list)
    for y, run in enumerate(runs):
        for name in ["t2i", *engines(run)]:
            points[name].append((share(run, name), y))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * len(runs)))
    for name, places in points.items():
        style = {"color": "black", "s": 34, "zorder": 3} if name == "t2i" else {"s": 16}
        axes.scatter(*zip(*places, strict=True), label=name, **style)
    axes.axvline(1, color="grey", linewidth=1)
    labels = [
        f"{run['case']['precision']}, batch {run['case']['batch']}: {place(run)}" for run in runs
    ]
    axes.set_yticks(range(len(runs)), labels, fontsize=7)
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xticks([0.1, 0.2, 0.5, 1], ["10 %", "20 %", "50 %", "100 %"])
    axes.set_xlabel("tokens a second, of the limit that reading our weights and cache sets")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncol=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.tight_layout()
    figure.savefig(RESULTS / "decode-roofline.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return "decode-roofline.png"


if __name__ == "__main__":
    main()
