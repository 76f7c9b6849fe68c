"""Text to pictures in one call: ``T2I.from_pretrained().sample("a red apple, twemoji style")``."""

from __future__ import annotations

import contextlib
import json
import operator
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from t2i_kernels import use_backend

from .lm import TransformerLM, load_lm, save_lm
from .sampler import check_options
from .sampling import Progress, Statistics, sample_codes, score_codes
from .text import TextTokenizer
from .tokenizer import load_tokenizer, save_tokenizer

FORMAT_VERSION = 1
SHIPPED = Path(__file__).parent / "pretrained" / "emoji64"


@dataclass(frozen=True)
class Sampling:
    """How a model draws unless a call says otherwise; see ``sampling.sample_codes``.

    Raises:
        ValueError: an option out of range.
    """

    cfg: float = 3.0
    temperature: float = 1.0
    top_k: int = 200
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_options([self.cfg], self.temperature, self.top_k, self.top_p)


class T2I:
    """An image tokenizer, a language model over its codes, and the captions' tokenizer.

    Args:
        tokenizer: from ``t2i.tokenizer``; turns codes into images.
        lm: whose image vocabulary has as many rows as ``tokenizer`` has codes.
        text: whose tokens the text rows of ``lm`` cover.
        image_size: (height, width) of the images, multiples of ``tokenizer.downsampling``.
        sampling: its options of ``sample`` where a call has none.
        name: shown to people.

    Raises:
        ValueError: the parts do not fit each other.

    After ``sample``, ``statistics`` says how long it took.
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        lm: TransformerLM,
        text: TextTokenizer,
        *,
        image_size: tuple[int, int],
        sampling: Sampling = Sampling(),
        name: str = "t2i",
    ):
        config, step = lm.config, tokenizer.downsampling
        if tokenizer.num_codes != config.image_vocab_size:
            raise ValueError(
                f"the image tokenizer has {tokenizer.num_codes} codes, the language model rows for "
                f"{config.image_vocab_size}"
            )
        if text.vocab_size > config.text_vocab_size:
            raise ValueError(
                f"the text tokenizer has {text.vocab_size} tokens, the language model rows for "
                f"{config.text_vocab_size}"
            )
        height, width = image_size
        if height % step or width % step:
            raise ValueError(f"image_size={height}x{width}: expected multiples of {step}")
        self.tokenizer = tokenizer.eval()
        self.lm = lm.eval()
        self.text = text
        self.image_size = (height, width)
        self.sampling = sampling
        self.name = name
        self.statistics: Statistics | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): the image tokens of a picture."""
        return tuple(size // self.tokenizer.downsampling for size in self.image_size)

    @property
    def device(self) -> torch.device:
        return self.lm.output.weight.device

    def to(self, device: str | torch.device) -> T2I:
        self.lm.to(device)
        self.tokenizer.to(device)
        return self

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, *, device: str | torch.device | None = None
    ) -> T2I:
        """Load what ``save_pretrained`` wrote; without a path, the weights that ship with t2i.

        Weights become fp32. ``device``: by default a GPU where there is one, else the CPU.

        Raises:
            FileNotFoundError: ``path`` holds no model.
            ValueError: it was written by another version, or is damaged.
        """
        path = SHIPPED if path is None else Path(path)
        description_file = path / "model.json"
        if not description_file.exists():
            raise FileNotFoundError(f"{path} holds no model.json: not a t2i model")
        name, image_size, sampling = _read_description(description_file)
        model = cls(
            load_tokenizer(path),
            load_lm(path),
            TextTokenizer.from_file(path / "text_tokenizer.json"),
            image_size=image_size,
            sampling=sampling,
            name=name,
        )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(device)

    def save_pretrained(
        self, path: str | Path, *, dtype: torch.dtype = torch.float16, card: str | None = None
    ) -> None:
        """Write the model as a folder.

        ``model.json``, ``tokenizer.json`` and ``.safetensors`` (images), ``lm.json`` and
        ``.safetensors``, ``text_tokenizer.json`` and, with ``card``, its text as ``README.md``.
        ``dtype`` is the storage type of the weights.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        # A folder is a model while it holds model.json: never one whose parts are of two models.
        (path / "model.json").unlink(missing_ok=True)
        save_tokenizer(self.tokenizer, path, dtype=dtype)
        save_lm(self.lm, path, dtype=dtype)
        self.text.save(path / "text_tokenizer.json")
        if card is not None:
            _write(path / "README.md", card)
        description = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "image_size": list(self.image_size),
            "sampling": asdict(self.sampling),
        }
        _write(path / "model.json", json.dumps(description, indent=2) + "\n")

    def sample(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        *,
        cfg: float | Sequence[float] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        batch_size: int = 16,
        weights: str | None = None,
        cache: str | None = None,
        speculate: int | None = None,
        draft: str | None = None,
        backend: str | None = None,
        progress: bool | Progress = False,
    ) -> list[Image.Image]:
        """Draw ``n`` pictures for each prompt.

        Args:
            prompts: one caption or several, of any lengths.
            n: pictures a prompt.
            seed: picture i of every prompt has seed + i, and depends on that, its prompt and the
                options alone, up to the rounding that ``sampling`` tells of and a step of 255 in
                pixels: picture 3 of ``seed=0`` is picture 0 of ``seed=3``. A sequence has one for
                each prompt.
            batch_size: pictures drawn together; bounds memory.
            progress: True shows a bar; a function is called with (tokens done, tokens in all).
            cfg, temperature, top_k, top_p: see ``sampling.sample_codes``; None is the model's own.
            weights, cache, speculate, draft: see ``sampling.sample_codes``.
            backend: of all operators, from captions to pixels, by name, and of the whole process
                meanwhile; by default the fastest that runs here.

        Returns:
            ``len(prompts) * n`` RGB images, those of the first prompt first.

        Raises:
            TypeError: a prompt that is not text.
            ValueError: no prompt, an empty or too long one, or an option out of range.
        """
        rows = self._tokens(prompts)
        if n < 1:
            raise ValueError(f"n={n}: expected at least 1 picture a prompt")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        seeds = [int(seed)] * len(rows) if isinstance(seed, Integral) else list(map(int, seed))
        if len(seeds) != len(rows):
            raise ValueError(f"{len(seeds)} seeds for {len(rows)} prompts")
        given = {"cfg": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        options = asdict(self.sampling) | {k: v for k, v in given.items() if v is not None}
        work = [(row, first + i) for row, first in zip(rows, seeds, strict=True) for i in range(n)]
        images: list[Image.Image] = []
        total = Statistics()
        size = self.grid[0] * self.grid[1]

        def on_token(done: int, _: int) -> None:
            report(len(images) * size + len(batch) * done, len(work) * size)

        chosen = use_backend(backend) if backend else contextlib.nullcontext()
        with chosen, _progress(progress) as report:
            for first in range(0, len(work), batch_size):
                batch = work[first : first + batch_size]
                codes, statistics = sample_codes(
                    self.lm,
                    [row for row, _ in batch],
                    seeds=[seed for _, seed in batch],
                    grid=self.grid,
                    unconditional=self.text.prompt(None),
                    **options,
                    weights=weights,
                    cache=cache,
                    speculate=speculate,
                    draft=draft,
                    progress=report and on_token,
                )
                started = time.perf_counter()
                images += self.decode(codes)
                total += statistics + Statistics(pixel_seconds=time.perf_counter() - started)
        self.statistics = total
        return images

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Pictures of codes int64 [N, h, w]."""
        pixels = self.tokenizer.decode(codes.to(self.device)).clamp(-1, 1)
        pixels = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(image) for image in pixels.cpu().numpy()]

    def loss(
        self,
        prompts: str | Sequence[str],
        codes: Tensor,
        *,
        weights: str | None = None,
        cache: str | None = None,
        batch_size: int = 16,
    ) -> Tensor:
        """Nats a token that the model needs for pictures, given their captions: fp32 [N] for codes
        int64 [N, h, w]. The exponential of their mean is the perplexity. ``weights``, ``cache``:
        see ``sampling.sample_codes``."""
        rows = self._tokens(prompts)
        if len(rows) != len(codes):
            raise ValueError(f"{len(codes)} pictures for {len(rows)} prompts")
        return torch.cat([
            score_codes(
                self.lm, rows[i : i + batch_size], codes[i : i + batch_size].to(self.device),
                weights=weights, cache=cache,
            )
            for i in range(0, len(rows), batch_size)
        ])  # fmt: skip

    def _tokens(self, prompts: str | Sequence[str]) -> list[list[int]]:
        """The prompts as tokens, each checked."""
        if isinstance(prompts, str):
            prompts = [prompts]
        elif not isinstance(prompts, Sequence):
            raise TypeError(f"prompts: expected text or a list of it, got {type(prompts).__name__}")
        if not prompts:
            raise ValueError("prompts: expected at least one")
        room = self.lm.config.max_positions - self.grid[0] * self.grid[1]
        rows = []
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompts[{i}]: expected text, got {type(prompt).__name__}")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"prompts[{i}]={prompt!r} is not text: {error}") from None
            if not prompt.strip():
                raise ValueError(f"prompts[{i}] is empty")
            row = self.text.prompt(prompt)
            if len(row) > room:
                raise ValueError(
                    f"prompts[{i}] has {len(row)} tokens with its separators; beside a picture "
                    f"there is room for {room}"
                )
            rows.append(row)
        return rows


def _read_description(file: Path) -> tuple[str, tuple[int, int], Sampling]:
    """Name, image size and options of sampling from a ``model.json``, or ValueError."""
    try:
        description = json.loads(file.read_text())
        version = description.get("format_version")
        if version == FORMAT_VERSION:
            height, width = map(operator.index, description["image_size"])
            sampling = Sampling(**description.get("sampling", {}))
            return description["name"], (height, width), sampling
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    raise ValueError(f"{file}: format version {version}, this t2i reads {FORMAT_VERSION}")


@contextlib.contextmanager
def _progress(progress: bool | Progress) -> Iterator[Progress | None]:
    """The caller's function, a bar for True, None for False."""
    if progress is not True:
        yield progress or None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task("drawing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
