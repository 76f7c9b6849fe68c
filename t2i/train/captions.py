"""The caption of a sample, which varies from epoch to epoch, and the tokenizer of captions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from t2i.data.dataset import plain_caption
from t2i.text import TextTokenizer

from .config import Captions, Text

MOST_TAGS = 4


def vary_caption(pair: dict[str, Any], options: Captions, rng: np.random.Generator) -> str | None:
    """A caption of a pair, None for none at all.

    Where the caption is the ``label``, with its ``style`` if there is one, it comes with an
    article, with tags or without the style as ``options`` say; any other caption is kept.
    """
    if rng.random() < options.drop:
        return None
    label, style, tags = pair.get("label"), pair.get("style"), pair.get("tags")
    if not label or pair["caption"] != plain_caption(label, style):
        return pair["caption"]
    text = label
    if rng.random() < options.article:
        text = f"{'an' if label[0].lower() in 'aeiou' else 'a'} {label}"
    if tags and rng.random() < options.tags:
        chosen = rng.permutation(len(tags))[: rng.integers(1, MOST_TAGS + 1)]
        text = f"{text}: {', '.join(tags[i] for i in chosen)}"
    return plain_caption(text, None if rng.random() < options.no_style else style)


def make_text_tokenizer(config: Text, pairs: Iterable[dict[str, Any]]) -> TextTokenizer:
    """One trained on the captions and tags of ``pairs``, or one from a file.

    Raises:
        FileNotFoundError, ValueError: no tokenizer at the path.
    """
    if config.tokenizer == "train":
        texts = [text for pair in pairs for text in (pair["caption"], *pair.get("tags", ()))]
        return TextTokenizer.train(texts, config.vocab_size)
    if Path(config.tokenizer).suffix == ".gguf":
        return TextTokenizer.from_gguf(config.tokenizer)
    return TextTokenizer.from_file(config.tokenizer)
