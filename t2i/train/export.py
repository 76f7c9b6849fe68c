"""From two finished runs to one model that can be sampled, and its card."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from t2i.data.files import read_jsonl, write_text
from t2i.data.tokens import encoder_checksum
from t2i.pipeline import T2I, Sampling

from .lm import load_trained_lm
from .loop import holds_run, load_run
from .tokenizer import load_image_tokenizer


def export(
    tokenizer: str | Path,
    lm: str | Path,
    out: str | Path,
    *,
    name: str,
    sampling: Sampling | None = None,
) -> T2I:
    """Write the averaged weights of two runs as a model folder in fp16, with a model card.

    Args:
        tokenizer: a run, or what else ``load_image_tokenizer`` reads; the language model's
            configuration has the name of a published one.
        lm: a run.
        out: folder to write.
        name: of the model, shown to people.
        sampling: how it draws unless a call says otherwise; by default as ``Sampling()``.

    Raises:
        FileNotFoundError: no checkpoint in one of the runs.
        ValueError: the runs do not fit each other.
    """
    published = load_run(lm).config["data"].get("tokenizer_name")
    image_tokenizer = load_image_tokenizer(tokenizer, published or None)
    language_model, text, description = load_trained_lm(lm)
    if encoder_checksum(image_tokenizer) != description["tokenizer_sha256"]:
        raise ValueError(f"{lm} was trained on the tokens of another tokenizer than {tokenizer}")
    image_size = tuple(description["image_size"])
    model = T2I(
        image_tokenizer,
        language_model,
        text,
        image_size=image_size,
        sampling=sampling or Sampling(),
        name=name,
    )
    card = "\n".join(
        [
            f"# {name}\n",
            f"Text to images of {image_size[1]} × {image_size[0]} pixels, trained with t2i.\n",
            _section("Image tokenizer", tokenizer, _size(model.tokenizer)),
            _section("Language model", lm, _size(model.lm)),
            _sources(description.get("sources", [])),
        ]
    )
    model.save_pretrained(out, card=card)
    return model


EVALUATION = "\n## Evaluation\n"  # the last section of a card


def add_evaluation(model: str | Path, tables: str, picture: str | Path) -> None:
    """Put what ``t2i eval`` found into the card of a model folder, in place of an earlier one.

    Raises:
        FileNotFoundError: the folder has no card.
    """
    model = Path(model)
    card, samples = model / "README.md", model / "samples.png"
    text = card.read_text(encoding="utf-8").split(EVALUATION)[0]
    shutil.copyfile(picture, model / ".samples.png")
    os.replace(model / ".samples.png", samples)
    write_text(card, f"{text}{EVALUATION}\n{tables}\n\n![Samples]({samples.name})\n")


def _sources(sources: list[dict[str, str]]) -> str:
    """What the model was trained on, and under which terms."""
    if not sources:
        return "## Data\n\nOf the user's own: its licence is not known here.\n"
    rows = [f"| {source['package']} | {source['license']} |" for source in sources]
    return "\n".join(["## Data\n", "| package | licence |", "|---|---|", *rows, ""])


def _section(title: str, run: str | Path, parameters: str) -> str:
    """What a model's weights went through, from the first run on."""
    runs = [_run(part) for part in _history(run)]
    return "\n".join([f"## {title}\n", f"{parameters}.\n", *runs])


def _history(run: str | Path) -> list[str | Path]:
    """A run behind the runs that its weights come from; of other weights where they are."""
    if not holds_run(run):
        return [run]
    model = load_run(run).config["model"]
    before = _history(model["pretrained"]) if model.get("init") == "pretrained" else []
    return [*before, run]


def _run(run: str | Path) -> str:
    """Time, configuration and last evaluation of a run."""
    name = Path(run).name
    if not holds_run(run):
        return f"From {name}.\n"
    checkpoint = load_run(run)
    lines = read_jsonl(Path(run) / "metrics.jsonl")
    last = next((line for line in reversed(lines) if line["split"] == "evaluation"), {})
    metrics = {k: v for k, v in last.items() if k not in ("step", "split")}
    rows = [f"| {key} | {value:.4g} |" for key, value in metrics.items()]
    return "\n".join(
        [
            f"### {name}\n",
            f"{checkpoint.step} steps in {_hours(lines):.1f} hours.\n",
            f"| evaluation after step {last.get('step', '-')} | |",
            "|---|---|",
            *rows,
            "",
            "```json",
            json.dumps(checkpoint.config, indent=2),
            "```\n",
        ]
    )


def _size(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


def _hours(lines: list[dict[str, Any]]) -> float:
    """Time in steps, from the mean seconds a step between two lines of the log."""
    seconds, before = 0.0, 0
    for line in lines:
        if line["split"] == "train":
            seconds += (line["step"] - before) * line["seconds_per_step"]
            before = line["step"]
    return seconds / 3600
