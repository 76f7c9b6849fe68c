"""Us and the peers on one problem: gate, interleaved rounds, memory, and the rows of a table.

A round runs every contender once, in an order that rotates, so that a busy neighbour hits all of
them alike. pytest-benchmark runs the rounds and keeps the result; what is compared are medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.1  # of one sample at least: quick calls are repeated within it
ROUNDS = 3, 9  # of a contender, at least and at most
ROUNDS_SECONDS = 5.0  # of a contender's rounds, where that leaves enough of them


@dataclass
class Contender:
    """``make()`` returns the call to measure, ready to run, or raises ImportError or
    NotImplementedError with the reason why it cannot take part."""

    name: str
    make: Callable[[], Callable[[], Any]]
    ours: bool = False
    rounds: int = 0
    samples: list[float] = field(default_factory=list)


def contest(
    benchmark: Any,
    contenders: Sequence[Contender],
    *,
    gate: Callable[[Any], str | None],
    flops: float,
    case: dict[str, Any],
) -> None:
    """Measure, and put rows into the record of ``benchmark``.

    Args:
        gate: None, or what is wrong with an output. It costs a peer its place, and is an error for
            us.
        flops: of one call, by the formula of the brute force whatever an algorithm really does.
        case: what identifies the problem.
    """
    rows, entries = [], []
    for contender in contenders:
        try:
            run = contender.make()
            problem = gate(run())
        except (ImportError, NotImplementedError) as reason:
            rows.append({"name": contender.name, "skipped": str(reason).splitlines()[0]})
            continue
        if problem:
            assert not contender.ours, f"{contender.name}: {problem}"
            rows.append({"name": contender.name, "skipped": f"wrong: {problem}"})
            continue
        began = time.perf_counter()
        memory = peak_memory(run)
        seconds = time.perf_counter() - began
        repeats = max(1, math.ceil(SAMPLE_SECONDS / seconds))
        least, most = ROUNDS
        contender.rounds = min(max(int(ROUNDS_SECONDS / (repeats * seconds)), least), most)
        entries.append((contender, run, repeats, memory))

    turn = 0

    def play() -> None:
        nonlocal turn
        start, turn = turn % len(entries), turn + 1
        for contender, run, repeats, _ in entries[start:] + entries[:start]:
            if len(contender.samples) == contender.rounds:
                continue
            if repeats > 1:
                run()  # what the one before left in the caches is not to count
            began = time.perf_counter()
            for _ in range(repeats):
                run()
            contender.samples.append((time.perf_counter() - began) / repeats)

    # Each ran twice before, for the check and for its memory: that was the warm-up.
    benchmark.pedantic(play, rounds=max(contender.rounds for contender, *_ in entries))
    for contender, _, _, memory in entries:
        samples = sorted(contender.samples)
        median = statistics.median(samples)
        quarter = len(samples) // 4
        rows.append(
            {
                "name": contender.name,
                "ours": contender.ours,
                "seconds": median,
                "spread": (samples[-1 - quarter] - samples[quarter]) / median,
                "gflops": flops / median / 1e9,
                "peak_megabytes": memory / 2**20,
            }
        )
    ours = min(row["seconds"] for row in rows if row.get("ours"))
    for row in rows:
        if "seconds" in row:
            row["ratio"] = row["seconds"] / ours
    benchmark.extra_info.update(case=case, rows=rows)


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that the process grew by, at most, while ``run`` ran; Linux alone, else 0."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        clear.write_text("5")  # the peak becomes what is resident now
    except OSError:
        run()
        return 0

    def kilobytes(name: str) -> int:
        return int(status.read_text().split(f"{name}:")[1].split()[0])

    before = kilobytes("VmRSS")
    run()
    return 1024 * max(0, kilobytes("VmHWM") - before)
