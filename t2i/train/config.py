"""Configurations of training runs: dataclasses, read from TOML or YAML, changed by ``key=value``.

Every key has a type and a default. A key that does not exist or a value of another type is an
error that names it: a misspelt option never trains for a night without effect.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class ConfigError(ValueError):
    """A key that does not exist, or a value that its key cannot take."""


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= least:  # also where it is nan
            raise ConfigError(f"{name}={value}: expected at least {least}")


def _at_most(config: Any, most: float, *names: str) -> None:
    for name in names:
        if getattr(config, name) > most:
            raise ConfigError(f"{name}={getattr(config, name)}: expected at most {most}")


def _one_of(config: Any, name: str, *choices: str) -> None:
    if getattr(config, name) not in choices:
        raise ConfigError(f"{name}={getattr(config, name)!r}: expected {' or '.join(choices)}")


def _needs_pretrained(config: Any) -> None:
    if config.init == "pretrained" and not config.pretrained:
        raise ConfigError("init='pretrained' needs pretrained, the path of a checkpoint")


@dataclass(frozen=True)
class Run:
    """Where a run lives and what it does beside training."""

    folder: str = "runs/run"
    steps: int = 1000
    seed: int = 0
    device: str = "auto"  # "auto": a GPU where there is one; or "cpu", "cuda", "cuda:1"
    threads: int = 0  # of the CPU; 0: torch's own choice. Another number rounds differently
    precision: str = "auto"  # "auto": bf16 where the hardware computes in it; or "bf16", "fp32"
    compile: bool = False  # with torch.compile: faster steps after a minute; needs a C++ compiler
    log_every: int = 50  # steps between lines of metrics.jsonl
    evaluate_every: int = 500
    draw_every: int = 500  # steps between sample grids
    checkpoint_every: int = 500
    checkpoint_minutes: float = 10.0  # and at least this often
    keep: int = 3  # checkpoints
    max_hours: float = 0.0  # checkpoint and stop after this long; 0: no limit

    def __post_init__(self) -> None:
        _at_least(
            self,
            1,
            "steps",
            "log_every",
            "evaluate_every",
            "draw_every",
            "checkpoint_every",
            "keep",
        )
        _at_least(self, 0, "seed", "threads", "checkpoint_minutes", "max_hours")
        _one_of(self, "precision", "auto", "bf16", "fp32")


@dataclass(frozen=True)
class Optim:
    """AdamW (arXiv 1711.05101) with linear warm-up, then a cosine down to ``min_lr`` · lr."""

    batch_size: int = 32  # samples a step, over all ranks and micro-batches
    accumulate: int = 1  # micro-batches a step, to use less memory
    lr: float = 1e-3
    min_lr: float = 0.02  # share of lr at the last step
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01  # of matrices, not of biases and norms
    grad_clip: float = 1.0  # of the global norm; 0: none
    ema: float = 0.999  # decay of the averaged weights, those that are evaluated and kept

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "accumulate")
        _at_least(self, 0, "lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "ema")
        if self.ema >= 1:
            raise ConfigError(f"ema={self.ema}: expected less than 1")


@dataclass(frozen=True)
class ImageData:
    path: str = "data/emoji"
    flip: float = 0.5  # probability of a mirrored image
    shift: int = 4  # pixels, at most, that an image moves in each direction; the edge is repeated

    def __post_init__(self) -> None:
        _at_least(self, 0, "flip", "shift")
        _at_most(self, 1, "flip")


@dataclass(frozen=True)
class TokenizerModel:
    name: str = "emoji64"  # of t2i.tokenizer.TOKENIZER_CONFIGS
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of its configuration
    init: str = "random"  # or "pretrained"
    pretrained: str = ""  # path of a run, a model or a published checkpoint
    train: str = "all"  # or "decoder": codes stay what they are, and so do tokens written before

    def __post_init__(self) -> None:
        _one_of(self, "init", "random", "pretrained")
        _one_of(self, "train", "all", "decoder")
        _needs_pretrained(self)
        if self.train == "decoder" and self.init != "pretrained":
            raise ConfigError("train='decoder' needs init='pretrained': random codes say nothing")


@dataclass(frozen=True)
class TokenizerLoss:
    """Weights of the terms; the quantizer's own loss has weight 1."""

    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 0.0
    perceptual_from: float = 0.0  # share of the steps after which the term joins
    gan: float = 0.0
    gan_from: float = 0.0  # share of the steps
    gan_channels: int = 32
    gan_lr: float = 2e-4

    def __post_init__(self) -> None:
        _at_least(self, 0, *(f.name for f in dataclasses.fields(self)))
        if self.gan_channels % 8:
            raise ConfigError(f"gan_channels={self.gan_channels}: expected a multiple of 8")


@dataclass(frozen=True)
class TokenizerEvaluation:
    images: int = 512  # of each split, at most
    drawn: int = 24  # originals with their reconstructions

    def __post_init__(self) -> None:
        _at_least(self, 1, "images", "drawn")


@dataclass(frozen=True)
class TokenizerTraining:
    """``t2i train tokenizer``."""

    run: Run = Run(folder="runs/tokenizer")
    data: ImageData = ImageData()
    model: TokenizerModel = TokenizerModel()
    optim: Optim = Optim()
    loss: TokenizerLoss = TokenizerLoss()
    evaluation: TokenizerEvaluation = TokenizerEvaluation()


@dataclass(frozen=True)
class TokenData:
    path: str = "data/emoji-tokens"  # written by t2i tokenize
    tokenizer: str = "runs/tokenizer"  # that wrote them, a run or a model; "": draw no samples
    tokenizer_name: str = ""  # which one it is, of a published checkpoint
    views: int = 0  # of each picture; 1: as it is; 0: all that were written

    def __post_init__(self) -> None:
        _at_least(self, 0, "views")


@dataclass(frozen=True)
class Captions:
    """How the caption of a sample varies from epoch to epoch. All are probabilities."""

    drop: float = 0.1  # no caption: the model learns the images alone, which guidance needs
    article: float = 0.1  # "a shark, noto style"
    tags: float = 0.3  # "shark: fish, sea, noto style"
    no_style: float = 0.1  # "shark"

    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(self)]
        _at_least(self, 0, *names)
        _at_most(self, 1, *names)


@dataclass(frozen=True)
class Text:
    tokenizer: str = "train"  # "train" on the captions, or a path: tokenizer.json or GGUF
    vocab_size: int = 2048  # of a trained one


@dataclass(frozen=True)
class LMModel:
    name: str = "emoji"  # of t2i.lm.LM_CONFIGS
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of its configuration
    init: str = "random"  # or "pretrained"
    pretrained: str = ""  # path of a run or a checkpoint
    image_init: str = "random"  # new rows of a vocabulary without images: or "mean"

    def __post_init__(self) -> None:
        _one_of(self, "init", "random", "pretrained")
        _one_of(self, "image_init", "random", "mean")
        _needs_pretrained(self)


@dataclass(frozen=True)
class LMLoss:
    """The loss is the mean over tokens of their cross entropies, weighted by modality."""

    text: float = 1.0
    image: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 0, "text", "image", "label_smoothing")


@dataclass(frozen=True)
class LMEvaluation:
    pairs: int = 256  # of each split, at most
    prompts: tuple[str, ...] = ()  # of the sample grids; by default captions of every split
    cfg: float = 3.0
    top_k: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "pairs")


@dataclass(frozen=True)
class LMTraining:
    """``t2i train lm``."""

    run: Run = Run(folder="runs/lm")
    data: TokenData = TokenData()
    captions: Captions = Captions()
    text: Text = Text()
    model: LMModel = LMModel()
    optim: Optim = Optim(batch_size=64, weight_decay=0.1)
    loss: LMLoss = LMLoss()
    evaluation: LMEvaluation = LMEvaluation()


def load_config(base: T, path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """``base`` changed by a file, then by texts ``key.key=value``.

    Args:
        base: a dataclass with the defaults, e.g. ``TokenizerTraining()``.
        path: a ``.toml`` file, or ``.yaml``/``.yml`` where pyyaml is installed.
        overrides: values are written as in TOML; what is not TOML is text: ``run.folder=runs/a``.

    Raises:
        FileNotFoundError: no file at ``path``.
        ConfigError: not TOML or YAML, an unknown key, or a value of the wrong type or range.
    """
    changes = {} if path is None else _read(Path(path))
    for override in overrides:
        changes = _merged(changes, _parse_override(override))
    return updated(base, changes)


def updated(config: T, changes: dict[str, Any], where: str = "") -> T:
    """A dataclass with other values; ``changes`` nests as the dataclass does.

    Raises:
        ConfigError: naming the key as ``where`` + its path.
    """
    values = checked(config, changes, where)
    try:
        return dataclasses.replace(config, **values)
    except ConfigError as error:  # of __post_init__, which does not know its section
        raise ConfigError(f"{where}{error}") from None


def checked(config: Any, changes: dict[str, Any], where: str = "") -> dict[str, Any]:
    """``changes`` as values for the fields of the dataclass ``config``; see ``updated``."""
    hints = typing.get_type_hints(type(config))
    values = {}
    for key, value in changes.items():
        if key not in hints:
            raise ConfigError(_unknown(key, where, hints))
        current = getattr(config, key)
        if not dataclasses.is_dataclass(current):
            values[key] = _as_type(value, hints[key], where + key)
        elif isinstance(value, dict):
            values[key] = updated(current, value, f"{where}{key}.")
        else:
            raise ConfigError(f"{where}{key}={value!r}: expected a section with keys of its own")
    return values


def differences(old: dict[str, Any], new: dict[str, Any], where: str = "") -> list[str]:
    """Lines "key: old -> new" of two nested dictionaries that came from JSON."""
    lines = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{where}{key}.")
        elif a != b:
            lines.append(f"{where}{key}: {a} -> {b}")
    return lines


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"no configuration at {path}")
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise ConfigError(
                f"{path}: YAML needs pyyaml (pip install pyyaml), or write TOML"
            ) from None
        try:
            changes = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from None
        if not isinstance(changes, dict):
            raise ConfigError(f"{path}: expected sections with keys, got {type(changes).__name__}")
        return changes
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _parse_override(text: str) -> dict[str, Any]:
    """ "a.b=1" -> {"a": {"b": 1}}."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"override {text!r}: expected key=value, such as optim.lr=3e-4")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for key in reversed(path.strip().split(".")):
        parsed = {key: parsed}
    return parsed


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries joined; where both have a value, the new one."""
    both = {
        key: _merged(old[key], value)
        for key, value in new.items()
        if isinstance(value, dict) and isinstance(old.get(key), dict)
    }
    return {**old, **new, **both}


def _as_type(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the type ``hint`` says."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _as_type(value, hint, key)
    if origin is tuple and isinstance(value, (list, tuple)):
        if args[-1] is Ellipsis:
            args = args[:1] * len(value)
        if len(args) == len(value):
            return tuple(
                _as_type(item, arg, f"{key}[{i}]")
                for i, (item, arg) in enumerate(zip(value, args, strict=True))
            )
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)  # YAML takes 1e-3 for text
    elif isinstance(value, origin or hint) and not (isinstance(value, bool) and hint is int):
        return value
    expected = hint.__name__ if origin is None else str(hint)
    raise ConfigError(f"{key}={value!r}: expected {expected}, got {type(value).__name__}")


def _unknown(key: str, where: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"no key {where}{key}: did you mean {where}{near[0]}?"
    return f"no key {where}{key}: {where[:-1] or 'the configuration'} has {', '.join(known)}"
