"""What a training run is told: one flat TOML file, and overrides on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class RunConfig:
    """What every run has."""

    out: str  # folder of the run
    steps: int = 1000
    batch_size: int = 32
    seed: int = 0
    threads: int = 0  # of torch on the CPU; 0 leaves torch's choice
    device: str = "auto"  # "auto": a GPU where there is one
    lr: float = 1e-3
    warmup: int = 100  # steps
    final_lr: float = 0.02  # of lr, at the end of the cosine
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01  # of matrices; vectors have none
    clip: float = 1.0  # norm of the gradient
    ema_decay: float = 0.999  # of the averaged weights, which are evaluated and exported
    log_every: int = 50
    eval_every: int = 500
    picture_every: int = 1000
    checkpoint_minutes: float = 5.0
    keep: int = 2  # checkpoints
    max_hours: float = 0.0  # stop, to be resumed; 0: never


@dataclass(frozen=True)
class TokenizerConfig(RunConfig):
    """Training of an image tokenizer on an ``ImageTextDataset``."""

    data: str = "data/emoji"
    model: str = "emoji64"  # of TOKENIZER_CONFIGS
    flip: float = 0.5  # share of pictures mirrored
    shift: int = 4  # pixels, at most, the edge repeated
    perceptual_weight: float = 0.01
    perceptual_from: float = 0.6  # share of the steps after which the perceptual term joins


@dataclass(frozen=True)
class LMConfig(RunConfig):
    """Training of a language model on the tokens of ``t2i tokenize``."""

    tokens: str = "data/emoji-tokens"
    tokenizer: str = "runs/emoji64-tokenizer"  # run or folder of the image tokenizer, for pictures
    model: str = "emoji"  # of t2i.lm.LM_CONFIGS
    pretrained: str = ""  # path of a checkpoint to start from; empty: random weights
    image_init: str = "random"  # rows of the image vocabulary: "random" or "mean"
    text_tokenizer: str = ""  # tokenizer.json or .gguf; empty: learned from the captions
    text_vocab: int = 2048  # of a learned one
    weight_decay: float = 0.1
    text_weight: float = 0.1  # of the loss on caption tokens; the one on image tokens has 1
    caption_dropout: float = 0.1  # share of pairs without their caption, for guidance
    tag_captions: float = 0.3  # share of captions with some of the picture's tags
    cfg: float = 3.0  # of the pictures drawn while training


Config = TypeVar("Config", bound=RunConfig)


def load_config(kind: type[Config], path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file of ``kind``'s fields; ``overrides`` are ``name=value``, as in TOML.

    Raises:
        FileNotFoundError: no file at ``path``.
        ValueError: no TOML, an unknown name or a value of the wrong type; the message names it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    for override in overrides or ():
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: expected name=value")
        try:
            fields[name.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            fields[name.strip()] = text  # a word without quotes
    return make_config(kind, fields)


def make_config(kind: type[Config], fields: dict[str, Any]) -> Config:
    """Check names and types of ``fields``; see ``load_config``."""
    types = get_type_hints(kind)
    for name, value in fields.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(sorted(types))}"
            raise ValueError(f"unknown setting {name!r}{hint}")
        expected = types[name]
        if expected is float and type(value) is int:
            fields[name] = float(value)
        elif type(value) is not expected:
            raise ValueError(f"{name}={value!r}: expected {expected.__name__}")
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in fields
    ]
    if missing:
        raise ValueError(f"missing setting {', '.join(missing)}")
    return kind(**fields)
