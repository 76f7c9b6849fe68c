"""A tiny dataset, tokenizer and tokens, made once for the tests of training and of the CLI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from tiny import TINY_TOKENIZER

COLOURS = ("red", "green", "blue", "black")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures with a table of captions: coloured squares in four places and two
    styles. Nothing black is trained on, and neither is one place of one style."""
    folder, table = tmp_path_factory.mktemp("pictures"), []
    for colour in COLOURS:
        for place in range(4):
            for style, inset in (("full", 0), ("small", 2)):
                image = Image.new("RGB", (16, 16), "white")
                left, top = 8 * (place % 2), 8 * (place // 2)
                box = (left + inset, top + inset, left + 7 - inset, top + 7 - inset)
                ImageDraw.Draw(image).rectangle(box, fill=colour)
                label, name = f"{colour} square {place}", f"{colour}{place}{style}.png"
                image.save(folder / name)
                split = "unseen_labels" if colour == "black" else "train"
                if split == "train" and (place, style) == (3, "small"):
                    split = "unseen_pairs"
                row = {"file": name, "caption": f"{label}, {style} style", "label": label}
                table.append({**row, "style": style, "tags": [colour, "shape"], "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return folder


@pytest.fixture(scope="session")
def dataset(pictures, tmp_path_factory) -> Path:
    from t2i.data.folder import build_folder

    path = tmp_path_factory.mktemp("dataset")
    build_folder(pictures, path, size=16, progress=False)
    return path


@pytest.fixture(scope="session")
def tokenizer_run(dataset, tmp_path_factory) -> Path:
    """The run of an image tokenizer after a few steps."""
    from t2i.train.config import TokenizerTraining, load_config
    from t2i.train.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    changes = [*TINY_TOKENIZER, f"data.path={dataset}", f"run.folder={folder}", "run.steps=3"]
    train_tokenizer(load_config(TokenizerTraining(), overrides=changes))
    return folder


@pytest.fixture(scope="session")
def tokens(dataset, tokenizer_run, tmp_path_factory) -> Path:
    from t2i.data import tokenize_dataset
    from t2i.train.tokenizer import load_image_tokenizer

    path = tmp_path_factory.mktemp("tokens")
    tokenize_dataset(dataset, load_image_tokenizer(tokenizer_run), path, views=2, progress=False)
    return path
