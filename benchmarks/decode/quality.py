"""What smaller weights and caches do to the shipped model: results/decode-quality.json.

    python benchmarks/decode/quality.py --prompts 1000

Needs the data set of ``t2i data emoji`` and what ``t2i eval`` needs; goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t2i.data.tokens import weights_checksum
from t2i.evaluate import evaluate_model
from t2i.pipeline import T2I

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/decode-quality.json"
KINDS = [
    {"weights": "fp32"},
    {"weights": "bf16"},
    {"weights": "int8"},
    {"weights": "int4"},
    {"weights": "fp32", "cache": "bf16"},
    {"weights": "fp32", "cache": "int8"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000, help="captions of each split")
    options = parser.parse_args()
    model = T2I.from_pretrained(device="cpu")
    checksums = [weights_checksum(part) for part in (model.tokenizer, model.lm)]
    made_for = {"prompts": options.prompts, "weights_sha256": checksums}
    rows = []
    if RESULT.exists():
        before = json.loads(RESULT.read_text())
        if before.items() >= made_for.items():
            rows = before["rows"]
    for kind in KINDS:
        if any({k: v for k, v in row.items() if k != "splits"} == kind for row in rows):
            continue
        result = evaluate_model(
            lambda captions, seeds, kind=kind: model.sample(captions, seed=seeds, **kind),
            model.tokenizer,
            ROOT / "data/emoji",
            ROOT / "data/quality" / "-".join(kind.values()),
            prompts=options.prompts,
            loss=lambda captions, codes, kind=kind: model.loss(captions, codes, **kind),
            settings={"weights_sha256": checksums, **asdict(model.sampling), **kind},
        )
        rows.append({**kind, "splits": {k: numbers(v) for k, v in result["splits"].items()}})
        print(json.dumps(rows[-1]), flush=True)
        part = RESULT.with_suffix(".part")
        part.write_text(json.dumps({**made_for, "rows": rows}, indent=1) + "\n")
        os.replace(part, RESULT)


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {
        "perplexity": scores["perplexity"],
        **{key: scores["samples"][key] for key in ("fd_efflite0", "kid", "kid_std", "top10")},
    }


if __name__ == "__main__":
    main()
