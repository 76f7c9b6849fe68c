"""Drawing image tokens from a language model: prefill, then one token of every image at a time, or
as many as are guessed right (``speculation``).

Reproducibility. The noise of every token is a function of (seed, position, code) and of nothing
else (``t2i_kernels.draw``): no generator is advanced, so neither the other images of the batch nor
their order matter. With ``decode_step``, which runs where native CPU kernels are, a row's logits do
not depend on the others either, and an image has the same codes to the bit. Elsewhere the rounding
of the logits is left: products over another batch size, or attention behind another amount of
padding, may differ in the last bits of fp32, and move a token where two codes nearly tie. At the
size of the shipped model, guidance 3, batches of 16 and of 1 differ by 1e-5 (rms) in logits of std
7: one 64-token image in some thousands. ``lm.double()`` puts it beyond reach.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i_kernels import use_backend
from t2i_kernels.linear import WEIGHT_TYPES

from . import speculation
from .lm.decoding import Decoder, PackedModel, make_decoder
from .lm.model import TransformerLM
from .sampler import CHUNK, Sampler, make_sampler
from .speculation import Counts

Progress = Callable[[int, int], None]
SCORED = 64  # tokens of an image whose logits score_codes holds at once
CACHE_TYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Statistics:
    """What was drawn, and in which time, but for packing weights, once for a model. Statistics of
    several batches add up."""

    images: int = 0
    tokens: int = 0  # image tokens, over all images
    prefill_seconds: float = 0.0  # reading prompts and drawing the first token of each image
    decode_seconds: float = 0.0  # drawing the other tokens
    pixel_seconds: float = 0.0  # from codes to pixels
    passes: int = 0  # of the model, to draw the tokens behind the first ones
    drafts: int = 0  # passes of the weights that guessed tokens
    bytes_read: int = 0  # of weights and caches, in all of these passes
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
    cache: str | None = None,
    speculate: int | None = None,
    draft: str | None = None,
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
        prefix_padding: int [N], leading positions of each row of caption features to ignore; one
            at least is left.
        weights: type of the weights while drawing, on the CPU: "fp32", "bf16", "int8" or "int4"
            (``t2i_kernels.linear.PackedWeight``); by default the model's own.
        cache: type of the keys and values that are kept: "fp32", "bf16", "fp16" or "int8" with
            ``decode_step``, by default fp32; elsewhere the model's own, or "int8".
        speculate: guess so many tokens behind the last one, read them in one pass of the model, and
            keep those that turn out right: fewer passes, each of more rows. With the native
            ``decode_step`` the image is the same to the bit. 0 is off. By default it is on where
            that holds and ought to pay, for images of 512 tokens or more, two with guidance or
            four without, with weights in fp32, or where ``draft`` is given; then the times of
            passes decide how many are guessed, if any.
        draft: what guesses: weights of this type ("int8", "int4", "bf16"), which are packed at
            their first use and held beside the others, or "jacobi", what earlier passes drew. By
            default int8 for weights in fp32 or bf16, int4 for int8, otherwise jacobi.
        backend: of all operators, by name, and of the whole process meanwhile; by default the
            fastest that runs here.
        progress: called with (tokens done, tokens in all) of an image, every 8 tokens or so.

    Returns:
        ``Samples(codes, statistics)``: codes int64 [N, h, w] in [0, image_vocab_size).

    Raises:
        ValueError: an argument out of range, or a prompt too long for the model.
    """
    num_tokens = grid[0] * grid[1]
    sampler = make_sampler(lm, seeds, cfg, temperature, top_k, top_p, num_tokens)
    _check_grid(lm, tuple(grid))
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed each")
    if speculate is not None and speculate < 0:
        raise ValueError(f"speculate={speculate}: expected at least 0, which is off")
    if draft is not None and draft not in (*WEIGHT_TYPES, "jacobi"):
        raise ValueError(f"draft={draft!r}: expected one of {', '.join(WEIGHT_TYPES)}, jacobi")
    _check_types(weights, cache)
    if not len(prompts):
        return Samples(torch.empty(0, *grid, dtype=torch.int64), Statistics())

    with (
        torch.no_grad(),
        _evaluating(lm),
        use_backend(backend) if backend else contextlib.nullcontext(),
    ):
        prompt = _prompt(lm, prompts, unconditional, prefix_padding, guided=sampler.guided)
        decoder = _decoder(lm, prompt, num_tokens, weights, cache)
        guesser = None
        if speculate is None and draft is None and not _pays(decoder, prompt, num_tokens):
            speculate = 0
        draft = draft or _smaller(decoder)
        if speculate != 0 and draft != "jacobi":
            guesser = decoder.with_weights(draft)
        codes = torch.empty(
            len(prompts), num_tokens, dtype=torch.int64, device=sampler.seeds.device
        )

        started = _now(codes.device)
        codes[:, 0] = prefill(decoder, prompt, sampler)
        if progress is not None:
            progress(1, num_tokens)
        prefilled = _now(codes.device)
        if speculate == 0:
            counts = decode_n_tokens(decoder, codes, sampler, prompt.used, progress)
        else:
            counts = speculation.speculate(
                decoder, codes, sampler, prompt.used,
                ahead=speculate, guesser=guesser, progress=progress,
            )  # fmt: skip
        finished = _now(codes.device)
        statistics = Statistics(
            images=len(codes),
            tokens=codes.numel(),
            prefill_seconds=prefilled - started,
            decode_seconds=finished - prefilled,
            passes=counts.passes,
            drafts=counts.drafts,
            bytes_read=counts.bytes_read,
            backend=decoder.backend,
            path=decoder.path,
        )
    return Samples(codes.unflatten(1, grid), statistics)


@torch.no_grad()
def score_codes(
    lm: TransformerLM,
    prompts: Sequence[Sequence[int]] | Tensor,
    codes: Tensor,
    *,
    prefix_padding: Tensor | None = None,
    weights: str | None = None,
    cache: str | None = None,
) -> Tensor:
    """Nats a token that ``lm`` needs for given images: the mean of −log p(code) over the codes
    int64 [N, h, w] of each, fp32 [N]. The other arguments and errors are ``sample_codes``'s."""
    if len(prompts) != len(codes):
        raise ValueError(f"{len(prompts)} prompts for codes of {len(codes)} images")
    _check_grid(lm, tuple(codes.shape[1:]))
    _check_types(weights, cache)
    codes = codes.flatten(1)
    with _evaluating(lm):
        prompt = _prompt(lm, prompts, None, prefix_padding, guided=False)
        decoder = _decoder(lm, prompt, codes.shape[1], weights, cache)
        logits, losses = decoder.read(prompt.tokens, prompt.prefix), []
        # Some at a time: the logits of all would be large.
        for first in range(0, codes.shape[1], SCORED):
            part = codes[:, first : first + SCORED]
            if part.shape[1] > 1:
                logits = torch.cat([logits, decoder.read_codes(part[:, :-1])], dim=1)
            losses.append(F.cross_entropy(logits.mT, part, reduction="none"))
            if first + SCORED < codes.shape[1]:
                logits = decoder.read_codes(part[:, -1:])
    return torch.cat(losses, dim=1).mean(dim=1)


def _check_grid(lm: TransformerLM, grid: tuple[int, ...]) -> None:
    if lm.config.image_grid not in (None, grid):
        raise ValueError(f"grid={grid}: the model's positions are for {lm.config.image_grid}")


def _check_types(weights: str | None, cache: str | None) -> None:
    if weights is not None and weights not in WEIGHT_TYPES:
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(WEIGHT_TYPES)}")
    if cache is not None and cache not in CACHE_TYPES:
        raise ValueError(f"cache={cache!r}: expected one of {', '.join(CACHE_TYPES)}")


def _decoder(
    lm: TransformerLM, prompt: Prompt, num_tokens: int, weights: str | None, cache: str | None
) -> Decoder:
    if prompt.length + num_tokens > lm.config.max_positions:
        raise ValueError(
            f"a prompt of {prompt.length} positions and {num_tokens} image tokens exceed "
            f"the model's max_positions={lm.config.max_positions}"
        )
    slots = prompt.length + num_tokens - 1  # the last token is never read
    cache_type = None if cache is None else CACHE_TYPES[cache]
    return make_decoder(lm, len(prompt.used), slots, prompt.start, weights, cache_type)


def _smaller(decoder: Decoder) -> str:
    """What guesses for these weights by default: the largest that are well below their size."""
    if not isinstance(decoder, PackedModel):
        return "jacobi"
    return {"int8": "int4", "int4": "jacobi"}.get(decoder.decoder.weight_type, "int8")


def _pays(decoder: Decoder, prompt: Prompt, num_tokens: int) -> bool:
    """Whether guesses make drawing faster, as a rule. Packing the weights that guess takes as long
    as some 130 passes in fp32 (of the shipped model), which saving every second one of fewer tokens
    does not make up for; bf16 are read little slower than what guesses; and with every row of the
    batch a guess costs more, a pass of the weights hardly."""
    return (
        isinstance(decoder, PackedModel)
        and decoder.backend == "cpu"  # others do not promise the same bits
        and decoder.decoder.weight_type == "fp32"
        and num_tokens >= 512
        and len(prompt.used) <= 4
    )


def prefill(decoder: Decoder, prompt: Prompt, sampler: Sampler) -> Tensor:
    """Read the prompts and draw the first code of each image: int64 [N]."""
    logits = decoder.read(prompt.tokens, prompt.prefix)
    copies = len(prompt.used) - len(logits)
    if copies:
        decoder.copy_last(copies)
        logits = torch.cat([logits, logits[-1:].expand(copies, -1, -1)])
    return sampler(logits, torch.zeros_like(sampler.seeds))[:, 0]


def decode_n_tokens(
    decoder: Decoder,
    codes: Tensor,
    sampler: Sampler,
    used: Sequence[int],
    progress: Progress | None = None,
) -> Counts:
    """Fill codes int64 [N, num_tokens] behind its first column; ``used`` are the tokens that were
    read of each row. Nothing here waits for the device."""
    num_tokens, bytes_read, first = codes.shape[1], 0, 1
    while first < num_tokens:
        if first == sampler.guided_tokens:
            decoder.keep(len(codes))
            sampler, used = sampler.unguided(), used[: len(codes)]
        # The last of a few is where guidance ends, or there is progress to be told.
        end = min(first + CHUNK, num_tokens)
        end = min(end, sampler.guided_tokens) if first < sampler.guided_tokens else end
        positions = torch.full_like(sampler.seeds, first)
        last = codes[:, first - 1 : first]
        codes[:, first:end] = sampler.several(decoder, last, positions, end - first)
        slots = sum(sum(used) + i * len(used) for i in range(first, end))
        bytes_read += (end - first) * decoder.weight_bytes + decoder.slot_bytes * slots
        if progress is not None:
            progress(end, num_tokens)
        first = end
    return Counts(num_tokens - 1, 0, bytes_read)


@dataclass(frozen=True)
class Prompt:
    """What stands in front of the images: N rows, or 2N with the unconditional half behind. Where
    the unconditional rows are alike, only one of them is in ``tokens`` or ``prefix``, to be read
    once."""

    tokens: Tensor | None  # int64 [rows, length], padded on the left
    prefix: Tensor | None
    start: Tensor | None  # int32 [N or 2N]: positions of padding
    used: list[int]  # [N or 2N] positions that are not
    length: int


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
        halves = 2 if guided else 1
        start, length = None, lm.config.prefix_length
        used = [length] * len(prefix) * halves
        if prefix_padding is not None:
            if not all(0 <= padding < length for padding in prefix_padding.tolist()):
                raise ValueError(
                    f"prefix_padding: expected 0 to {length - 1}, got {prefix_padding.tolist()}"
                )
            start = prefix_padding.to(device, torch.int32).repeat(halves)
            used = [length - padding for padding in start.tolist()]
        if guided:
            unlike = len(prefix) if prefix_padding is not None else 1
            prefix = torch.cat([prefix, lm.prefix_embedding.unconditional(unlike)])
        return Prompt(None, prefix, start, used, length)

    rows = [list(prompt) for prompt in prompts]
    used = list(map(len, rows))
    if guided:
        if not unconditional:
            raise ValueError(
                "cfg: guidance needs the unconditional prompt, TextTokenizer.prompt(None)"
            )
        rows.append(list(unconditional))
        used += [len(unconditional)] * len(used)
    if not min(used):
        raise ValueError("prompts: one has no tokens at all; it needs at least its separators")
    length = max(used)
    start = torch.tensor([length - count for count in used], dtype=torch.int32, device=device)
    # Any token does for padding: nothing attends to it.
    tokens = torch.tensor([row[:1] * (length - len(row)) + row for row in rows])
    return Prompt(tokens.to(device), None, start, used, length)


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
