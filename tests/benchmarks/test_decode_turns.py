"""Engines are compared by turns that had memory at one speed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/decode"))
from turns import common, compared, fewest  # noqa: E402


def row(*turns):
    """Of pairs: GB/s, seconds."""
    speeds, seconds = zip(*turns, strict=True)
    return {
        "bandwidth": [x * 1e9 for x in speeds], "decode": list(seconds), "prefill": list(seconds),
    }  # fmt: skip


def run(rows, batch=1):
    return {"case": {"batch": batch, "tokens": 11}, "rows": rows}


def test_turns_at_another_speed_of_memory_do_not_count():
    rows = {
        "t2i": row((36, 2.0), (57, 1.0), (35, 2.1)),
        "other": row((58, 1.5), (57, 1.6), (36, 2.5)),
    }
    # At 57 and at 36 one of them has a single turn: the faster.
    assert common(rows) == {"t2i": [1], "other": [0, 1]}
    assert compared(run(rows))["turns"] == 1
    out = compared(run(rows))["rows"]
    assert out["t2i"]["decode"] == [1.0] and out["t2i"]["tokens_per_second"] == 10
    assert out["other"]["tokens_per_second"] == 10 / 1.55
    assert abs(out["other"]["spread"] - 0.1 / 1.55) < 1e-12
    assert len(rows["t2i"]["decode"]) == 3  # what was measured stays


def test_the_speed_that_most_turns_have_is_taken():
    rows = {
        "t2i": row((36, 2.0), (57, 1.0), (35, 2.1)),
        "other": row((36.5, 2.5), (57, 1.6), (36, 2.6)),
    }
    assert common(rows) == {"t2i": [0, 2], "other": [0, 2]}


def test_all_turns_count_without_a_common_speed():
    rows = {"t2i": row((36, 2.0)), "other": row((57, 1.0)), "third": {"skipped": "why"}}
    assert fewest(common(rows)) == 0
    assert compared(run(rows))["turns"] == 0
    out = compared(run(rows))["rows"]
    assert out["t2i"]["decode"] == [2.0] and out["other"]["decode"] == [1.0]
    assert out["third"] == {"skipped": "why"}


def test_all_turns_count_where_the_speed_is_known_once():
    rows = {"t2i": {"prefill": [1.0] * 3, "decode": [1.0, 2.0, 5.0]}}
    assert compared(run(rows))["rows"]["t2i"]["tokens_per_second"] == 5


def test_no_turns_yet():
    assert fewest(common({"t2i": {"decode": [], "bandwidth": []}})) == 0
    assert fewest(common({})) == 0


def test_a_picture_with_guidance_is_two_rows():
    rows = {"t2i": row((36, 1.0)), "t2i, guided": row((36, 1.0))}
    out = compared(run(rows, batch=2))["rows"]
    assert [out[name]["tokens_per_second"] for name in rows] == [20, 10]
