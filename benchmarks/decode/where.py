"""Where the time of decoding steps goes: results/decode-profile.json. Needs Linux' perf.

python benchmarks/decode/where.py --shapes 135m --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from engines import T2I
from shapes import SHAPES, make_model

from t2i_kernels import native

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/decode-profile.json"
SECONDS = 4
# The first pattern that a sample's "symbol (library)" holds.
PARTS = {
    "attention": r"::attend|::dot<|::exponentiate|::weigh<|::append|::rotate|::finish \(",
    "weights": r"add_rows|::multiply|::finish<",
    "inputs to int8": r"::quantize",
    "norms": r"::norm",
    "draw": r"draw|noisy_argmax|nucleus|kth_largest",
    "waiting, SwiGLU": r"libt2i_kernels|libgomp",
    "torch, Python": r"python|torch|libc\.so|libc10|libstdc",
    "system": r"kernel|unknown",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["135m"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    for shape in options.shapes:
        folder = ROOT / "data/decode" / shape
        make_model(shape, folder)
        for precision in T2I.precisions:
            for batch in (1, 8):
                engine, count = T2I(), SHAPES[shape].tokens
                engine.load(folder, precision, batch, options.threads)
                cache, tokens = engine.read(count)

                def draw(engine=engine, count=count, cache=cache, tokens=tokens) -> None:
                    engine.follow(cache, tokens, count)
                    cache.advance(1 - count)  # back behind the prompt

                shares = profile(draw)
                case = {"shape": shape, "instruction_set": native.cpu_capability(),
                        "threads": options.threads, "precision": precision,
                        "batch": batch}  # fmt: skip
                rows = [row for row in rows if not row.items() >= case.items()]
                rows.append({**case, "shares": shares})
                print(json.dumps(rows[-1]), flush=True)
                part = RESULT.with_suffix(".part")
                part.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                os.replace(part, RESULT)


def profile(work) -> dict[str, float]:
    """Shares of the samples of perf, over all threads, while ``work`` runs again and again."""
    work()
    with tempfile.NamedTemporaryFile(suffix=".perf") as file:
        perf = subprocess.Popen(
            ["perf", "record", "-q", "-e", "cpu-clock", "-F", "1999", "-p", str(os.getpid()),
             "-o", file.name],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(0.5)
        began = time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            work()
        perf.send_signal(signal.SIGINT)
        perf.wait()
        script = ["perf", "script", "-i", file.name, "-F", "ip,sym,dso"]
        out = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    found: Counter[str] = Counter()
    for line in filter(None, map(str.strip, out.splitlines())):
        found[next((part for part, p in PARTS.items() if re.search(p, line)), "other")] += 1
    return {part: count / found.total() for part, count in found.most_common()}


if __name__ == "__main__":
    main()
