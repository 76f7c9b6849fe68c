"""Which of their turns engines are compared by.

Neighbours of a shared machine take half the speed of memory for minutes. What engines do while
they have it and what others do while they have not is no comparison.
"""

from __future__ import annotations

import statistics
from typing import Any

from engines import PICTURES

NEAR = 0.1  # of the speed of memory
LISTS = ("prefill", "decode", "bandwidth")  # a number for each turn


def common(rows: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """The turns of every engine around which memory was about as fast as around the others'.

    Of all speeds that were seen, the one that leaves the most turns to the engine with the fewest,
    the fastest of those. Where every speed leaves some engine without a turn, no turns.
    """
    speeds = {name: row["bandwidth"] for name, row in rows.items() if "decode" in row}

    def near(level: float) -> dict[str, list[int]]:
        return {
            name: [i for i, x in enumerate(seen) if abs(x - level) <= NEAR * level]
            for name, seen in speeds.items()
        }

    levels = sorted({x for seen in speeds.values() for x in seen}, reverse=True)
    return max(map(near, levels), key=fewest, default={})


def fewest(turns: dict[str, list[int]]) -> int:
    return min(map(len, turns.values()), default=0)


def compared(run: dict[str, Any]) -> dict[str, Any]:
    """A measured case with those turns alone, or with all of them where they have none in common or
    the speed of memory is not known for each; how many turns an engine has there at least; and the
    tokens_per_second of every engine, by its median, with their spread: the range over the median.

    ``turns`` is 0 where all of them count, whatever memory did.
    """
    case = run["case"]
    turns = {}
    if all("bandwidth" in row for row in run["rows"].values() if "decode" in row):
        turns = common(run["rows"])
    rows = {}
    for name, row in run["rows"].items():
        if "decode" in row:
            if fewest(turns):
                row = row | {what: [row[what][i] for i in turns[name]] for what in LISTS}
            seconds, median = row["decode"], statistics.median(row["decode"])
            drawn = case["batch"] // (2 if name in PICTURES else 1)
            row = row | {"tokens_per_second": drawn * (case["tokens"] - 1) / median}
            row["spread"] = (max(seconds) - min(seconds)) / median
        rows[name] = row
    return run | {"rows": rows, "turns": fewest(turns)}
