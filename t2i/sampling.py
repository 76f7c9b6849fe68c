"""Drawing image tokens from a language model: prefill, then one token of every image at a time.

Reproducibility. The noise of every token is a function of (seed, position, code) and of nothing
else (``t2i_kernels.draw``): no generator is advanced, so neither the other images of the batch nor
their order matter. With ``decode_step``, which runs where native CPU kernels are, a row's logits do
not depend on the others either, and a picture is the same to the bit. Elsewhere the rounding of the
logits is left: products over another batch size, or attention behind another amount of padding, may
differ in the last bits of fp32, and move a token where two codes nearly tie. At the size of the
shipped model, guidance 3, batches of 16 and of 1 differ by 1e-5 (rms) in logits of std 7: one
64-token image in some thousands. ``lm.double()`` puts it beyond reach.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from t2i_kernels import use_backend
from t2i_kernels.draw import draw

from .lm.decoding import Decoder, make_decoder
from .lm.model import TransformerLM

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Statistics:
    """What was drawn, and in which time. Statistics of several batches add up."""

    images: int = 0
    tokens: int = 0  # image tokens, over all images
    prefill_seconds: float = 0.0  # reading prompts and drawing the first token of each image
    decode_seconds: float = 0.0  # drawing the other tokens
    pixel_seconds: float = 0.0  # from codes to pixels
    passes: int = 0  # of the model, to draw the tokens behind the first ones
    bytes_read: int = 0  # of weights and caches, in these passes
    backend: str = ""  # that ran attention
    path: str = ""  # what ran the model: "decode_step, fp32 weights" or "modules"

    @property
    def tokens_per_second(self) -> float:
        """Image tokens drawn in a second, over all images, reading the prompts included."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.tokens / seconds if seconds else 0.0

    @property
    def seconds_per_image(self) -> float:
        seconds = self.prefill_seconds + self.decode_seconds + self.pixel_seconds
        return seconds / self.images if self.images else 0.0

    def __add__(self, other: Statistics) -> Statistics:
        *ours, backend, path = astuple(self)
        *theirs, other_backend, other_path = astuple(other)
        sums = (a + b for a, b in zip(ours, theirs, strict=True))
        return Statistics(*sums, backend=backend or other_backend, path=path or other_path)


class Samples(NamedTuple):
    codes: Tensor  # int64 [N, h, w]
    statistics: Statistics


def sample_codes(
    lm: TransformerLM,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    grid: tuple[int, int],
    seeds: Sequence[int],
    unconditional: Sequence[int] | None = None,
    cfg: float | Sequence[float] = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prefix_padding: Tensor | None = None,
    weights: str | None = None,
    speculate: int = 0,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Draw the codes of one image for each prompt.

    Args:
        lm: a model with image tokens.
        prompts: one list of text tokens an image, of any lengths; for a model with a prefix
            its conditioning instead: int64 [N] classes or [N, P, prefix_dim] caption features.
        grid: (h, w), the image tokens of an image, drawn in raster order.
        seeds: one an image. An image depends on its seed, its prompt and the options alone.
        unconditional: the prompt without a caption. Needed for guidance, except with a prefix,
            where the model has its own.
        cfg: guidance scale s: logits are uncond + s (cond − uncond). 1 is off, and then the
            unconditional half is not computed. A list of h·w numbers is a schedule over the tokens;
            behind its last scale that is not 1, the unconditional half ends.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the fewest codes whose probabilities reach p; 1 keeps all. After top_k.
        prefix_padding: int [N], leading positions of each row of caption features to ignore.
        weights: type of the weights while drawing, on the CPU: "fp32", "bf16", "int8" or "int4"
            (``t2i_kernels.linear.PackedWeight``); by default the model's own.
        speculate: read guesses of so many tokens behind the last one in every pass, and keep those
            that turn out right: fewer passes, each of more rows. With ``decode_step`` the image is
            the same to the bit.
        backend: of all operators, by name; by default the fastest that runs here.
        progress: called with (tokens done, tokens in all) of an image after each of them.

    Returns:
        ``Samples(codes, statistics)``: codes int64 [N, h, w] in [0, image_vocab_size).

    Raises:
        ValueError: an argument out of range, or a prompt too long for the model.
    """
    config = lm.config
    num_tokens = grid[0] * grid[1]
    sampler = _sampler(lm, seeds, cfg, temperature, top_k, top_p, num_tokens)
    if config.image_grid is not None and tuple(grid) != config.image_grid:
        raise ValueError(f"grid={tuple(grid)}: the model's positions are for {config.image_grid}")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed each")
    if speculate < 0:
        raise ValueError(f"speculate={speculate}: expected at least 0, which is off")
    if not len(prompts):
        return Samples(torch.empty(0, *grid, dtype=torch.int64), Statistics())

    with (
        torch.no_grad(),
        _evaluating(lm),
        use_backend(backend) if backend else contextlib.nullcontext(),
    ):
        prompt = _prompt(lm, prompts, unconditional, prefix_padding, guided=sampler.guided)
        if prompt.length + num_tokens > config.max_positions:
            raise ValueError(
                f"a prompt of {prompt.length} positions and {num_tokens} image tokens exceed "
                f"the model's max_positions={config.max_positions}"
            )
        # The last token is drawn but never read.
        slots = prompt.length + num_tokens - 1
        decoder = make_decoder(lm, prompt.rows, slots, prompt.start, weights)
        codes = torch.empty(
            len(prompts), num_tokens, dtype=torch.int64, device=sampler.seeds.device
        )

        started = _now(codes.device)
        codes[:, 0] = prefill(decoder, prompt, sampler)
        if progress is not None:
            progress(1, num_tokens)
        prefilled = _now(codes.device)
        counts = decode_n_tokens(lm, decoder, codes, sampler, prompt.used, speculate, progress)
        finished = _now(codes.device)
        statistics = Statistics(
            images=len(codes),
            tokens=codes.numel(),
            prefill_seconds=prefilled - started,
            decode_seconds=finished - prefilled,
            passes=counts.passes,
            bytes_read=counts.bytes_read,
            backend=decoder.backend,
            path=decoder.path,
        )
    return Samples(codes.unflatten(1, grid), statistics)


def prefill(decoder: Decoder, prompt: Prompt, sampler: Sampler) -> Tensor:
    """Read the prompts and draw the first code of each image: int64 [N]."""
    logits = decoder.read(prompt.tokens, prompt.prefix)
    return sampler(logits, torch.zeros_like(sampler.seeds))[:, 0]


def decode_one_token(
    lm: TransformerLM, decoder: Decoder, codes: Tensor, sampler: Sampler, positions: Tensor
) -> Tensor:
    """Read codes of each image [N, n], which continue what was read, and draw what follows each of
    them: int64 [N, n]. The first one drawn is at ``positions`` int64 [N] of the images."""
    tokens = codes + lm.config.text_vocab_size
    if sampler.guided:
        tokens = torch.cat([tokens, tokens])
    return sampler(decoder.read(tokens, last=codes.shape[1]), positions)


class Counts(NamedTuple):
    passes: int
    bytes_read: int  # of weights and of the cache


def decode_n_tokens(
    lm: TransformerLM,
    decoder: Decoder,
    codes: Tensor,
    sampler: Sampler,
    used: Sequence[int],
    speculate: int = 0,
    progress: Progress | None = None,
) -> Counts:
    """Fill codes [N, num_tokens] behind its first column; ``used`` are the tokens that were read of
    each row. Without ``speculate``, nothing here waits for the device."""
    if speculate:
        return _speculate(lm, decoder, codes, sampler, used, speculate, progress)
    num_tokens, bytes_read = codes.shape[1], 0
    positions = torch.zeros_like(sampler.seeds)
    for i in range(1, num_tokens):
        if i == sampler.guided_tokens:
            decoder.keep(len(codes))
            sampler, used = sampler.unguided(), used[: len(codes)]
        positions += 1
        codes[:, i] = decode_one_token(lm, decoder, codes[:, i - 1 : i], sampler, positions)[:, 0]
        bytes_read += decoder.weight_bytes + decoder.slot_bytes * (sum(used) + i * len(used))
        if progress is not None:
            progress(i + 1, num_tokens)
    return Counts(num_tokens - 1, bytes_read)


def _speculate(
    lm: TransformerLM,
    decoder: Decoder,
    codes: Tensor,
    sampler: Sampler,
    used: Sequence[int],
    ahead: int,
    progress: Progress | None,
) -> Counts:
    """Jacobi decoding (arXiv 2410.01699) with the noise of every position fixed beforehand: what is
    drawn behind right tokens is what one token at a time would draw, whatever was guessed, as long
    as a row's logits do not depend on how many are computed with it."""
    images, num_tokens = codes.shape
    ahead = min(ahead, num_tokens)
    passes = bytes_read = 0
    known = torch.ones_like(sampler.seeds)  # codes of each image that are right
    guesses = codes[:, :1].repeat(1, num_tokens + ahead)  # of all codes, right ones in front
    index = torch.arange(ahead + 1, device=codes.device)
    while (least := int(known.min())) < num_tokens:
        if sampler.guided and least >= sampler.guided_tokens:
            decoder.keep(images)
            sampler, used = sampler.unguided(), used[:images]
        window = min(ahead + 1, num_tokens - least)
        # An image that is done, or nearly so, reads its last tokens again.
        ahead_of_it = (known - (num_tokens - window)).clamp_min(0)
        decoder.forget(ahead_of_it.int().repeat(len(used) // images))
        known -= ahead_of_it
        where = known[:, None] + index[:window]  # positions that are drawn
        drawn = decode_one_token(lm, decoder, guesses.gather(1, where - 1), sampler, known)
        right = (drawn == guesses.gather(1, where))[:, :-1].long().cumprod(dim=1).sum(dim=1) + 1
        guesses.scatter_(1, where, drawn)
        guesses = _guess(guesses, known + window, index)
        passes += 1
        slots = sum(used) + len(used) // images * int((known + window - 1).sum())
        bytes_read += decoder.weight_bytes + decoder.slot_bytes * slots
        forgotten = (window - right).int()
        decoder.forget(forgotten.repeat(len(used) // images))
        known += right
        if progress is not None:
            progress(int(known.min()), num_tokens)
    codes.copy_(guesses[:, :num_tokens])
    return Counts(passes, bytes_read)


def _guess(guesses: Tensor, first: Tensor, index: Tensor) -> Tensor:
    """Repeat the code in front of ``first`` [N] behind it."""
    where = first[:, None] + index
    where = where.clamp_max(guesses.shape[1] - 1)
    last = guesses.gather(1, first[:, None] - 1)
    return guesses.scatter(1, where, last.expand_as(where))


@dataclass(frozen=True)
class Prompt:
    """What stands in front of the images: N rows, or 2N with the unconditional half behind."""

    tokens: Tensor | None  # int64 [rows, length], padded on the left
    prefix: Tensor | None
    start: Tensor | None  # int32 [rows]: positions of padding
    used: list[int]  # positions that are not, of each row
    length: int

    @property
    def rows(self) -> int:
        return len(self.used)


@dataclass(frozen=True)
class Sampler:
    """From logits to codes."""

    seeds: Tensor  # int64 [N]
    scales: Tensor | None  # guidance scale of each token, fp32 [num_tokens]
    guided_tokens: int  # up to the last scale that is not 1
    temperature: float
    top_k: int
    top_p: float

    @property
    def guided(self) -> bool:
        return self.scales is not None

    def unguided(self) -> Sampler:
        return replace(self, scales=None, guided_tokens=0)

    def __call__(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Codes int64 [N, T] from logits [N or 2N, T, codes]; the first of the T tokens of each
        image is at ``positions`` int64 [N]."""
        guidance = None
        if self.guided:
            where = positions[:, None] + torch.arange(logits.shape[1], device=logits.device)
            guidance = self.scales[where]
        return draw(
            logits,
            self.seeds,
            positions,
            guidance=guidance,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def _prompt(
    lm: TransformerLM,
    prompts: Sequence[Sequence[int]] | Tensor,
    unconditional: Sequence[int] | None,
    prefix_padding: Tensor | None,
    *,
    guided: bool,
) -> Prompt:
    device = lm.output.weight.device
    if prefix_padding is not None and (
        lm.prefix_embedding is None or tuple(prefix_padding.shape) != (len(prompts),)
    ):
        raise ValueError(
            f"prefix_padding: expected one number for each of {len(prompts)} caption features, got "
            f"{tuple(prefix_padding.shape)}"
        )
    if lm.prefix_embedding is not None:
        prefix = torch.as_tensor(prompts, device=device)
        if prefix.is_floating_point():
            prefix = prefix.to(lm.output.weight.dtype)
        if guided:
            prefix = torch.cat([prefix, lm.prefix_embedding.unconditional(len(prompts))])
        start, length = None, lm.config.prefix_length
        used = [length] * len(prefix)
        if prefix_padding is not None:
            start = prefix_padding.to(device, torch.int32).repeat(2 if guided else 1)
            used = [length - padding for padding in start.tolist()]
        return Prompt(None, prefix, start, used, length)

    rows = [list(prompt) for prompt in prompts]
    if guided:
        if not unconditional:
            raise ValueError(
                "cfg: guidance needs the unconditional prompt, TextTokenizer.prompt(None)"
            )
        rows += [list(unconditional)] * len(rows)
    length = max(map(len, rows))
    if not min(map(len, rows)):
        raise ValueError("prompts: one has no tokens at all; it needs at least its separators")
    padding = [length - len(row) for row in rows]
    # Any token does for padding: nothing attends to it.
    tokens = torch.tensor([row[:1] * pad + row for row, pad in zip(rows, padding, strict=True)])
    start = torch.tensor(padding, dtype=torch.int32, device=device)
    return Prompt(tokens.to(device), None, start, list(map(len, rows)), length)


def _sampler(
    lm: TransformerLM,
    seeds: Sequence[int],
    cfg: float | Sequence[float],
    temperature: float,
    top_k: int,
    top_p: float,
    num_tokens: int,
) -> Sampler:
    if not lm.config.image_vocab_size:
        raise ValueError("the model has no image tokens: extend_vocabulary adds them")
    if num_tokens < 1:
        raise ValueError("grid: expected at least one token")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: expected a number of at least 0")
    if top_k < 0:
        raise ValueError(f"top_k={top_k}: expected at least 0, which keeps all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: expected 0 < top_p <= 1")
    device = lm.output.weight.device
    scales = [float(cfg)] * num_tokens if isinstance(cfg, Real) else list(map(float, cfg))
    if len(scales) != num_tokens:
        raise ValueError(f"cfg: a schedule of {len(scales)} scales for {num_tokens} tokens")
    if not all(0 <= scale < float("inf") for scale in scales):
        raise ValueError(f"cfg={cfg}: expected finite numbers of at least 0")
    guided_tokens = max((i + 1 for i, scale in enumerate(scales) if scale != 1), default=0)
    # Any Python integer is a seed: its lowest 64 bits, as a signed number.
    signed = [((seed + (1 << 63)) % (1 << 64)) - (1 << 63) for seed in map(int, seeds)]
    return Sampler(
        seeds=torch.tensor(signed, dtype=torch.int64, device=device),
        scales=torch.tensor(scales, dtype=torch.float32, device=device) if guided_tokens else None,
        guided_tokens=guided_tokens,
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
    )


@contextlib.contextmanager
def _evaluating(lm: TransformerLM) -> Iterator[None]:
    """Dropout off, and back as it was whatever happens, an interrupt included."""
    training = lm.training
    lm.eval()
    try:
        yield
    finally:
        lm.train(training)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
