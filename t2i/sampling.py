"""Drawing image tokens from a language model: prefill, then one token of every image at a time.

Reproducibility. Every token is the argmax of ``logits / temperature + g`` (the Gumbel-max trick,
arXiv 1411.0030, section 2), where g is a function of (seed, position, code) and of nothing else:
no generator is advanced, so neither the other images of the batch nor their order matter. What is
left is the rounding of the logits: products over another batch size, or attention behind another
amount of padding, may differ in the last bits of fp32, and move a token where two codes nearly tie.
At the size of the shipped model, guidance 3, batches of 16 and of 1 differ by 1e-5 (rms) in logits
of std 7: one 64-token image in some thousands. ``lm.double()`` puts it beyond reach.
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

from t2i_kernels import KVCache, explain, use_backend

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
    backend: str = ""  # that ran decode_attention

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
        *ours, backend = astuple(self)
        *theirs, other_backend = astuple(other)
        sums = (a + b for a, b in zip(ours, theirs, strict=True))
        return Statistics(*sums, backend=backend or other_backend)


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
        backend: of the attention, by name; by default the fastest that runs here.
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
        cache = lm.allocate_cache(prompt.rows, prompt.length + num_tokens - 1, start=prompt.start)
        codes = torch.empty(
            len(prompts), num_tokens, dtype=torch.int64, device=sampler.seeds.device
        )

        started = _now(codes.device)
        codes[:, 0] = prefill(lm, prompt, cache, sampler)
        if progress is not None:
            progress(1, num_tokens)
        prefilled = _now(codes.device)
        decode_n_tokens(lm, codes, cache, sampler, progress)
        finished = _now(codes.device)
        statistics = Statistics(
            images=len(codes),
            tokens=codes.numel(),
            prefill_seconds=prefilled - started,
            decode_seconds=finished - prefilled,
            backend=_attention_backend(lm, cache[0]),
        )
    return Samples(codes.unflatten(1, grid), statistics)


def prefill(lm: TransformerLM, prompt: Prompt, cache: list[KVCache], sampler: Sampler) -> Tensor:
    """Read the prompts into an empty cache and draw the first code of each image: int64 [N]."""
    features = lm.features(prompt.tokens, prefix=prompt.prefix, cache=cache)
    position = torch.zeros(1, dtype=torch.int64, device=features.device)
    return sampler(lm.head(features[:, -1], lm.config.image_tokens), position)


def decode_one_token(
    lm: TransformerLM, codes: Tensor, cache: list[KVCache], sampler: Sampler, position: Tensor
) -> Tensor:
    """Read one code of each image [N] and draw the next, the one at ``position``, int64 [1]."""
    tokens = codes + lm.config.text_vocab_size
    if sampler.guided:
        tokens = torch.cat([tokens, tokens])
    features = lm.features(tokens[:, None], cache=cache)
    return sampler(lm.head(features[:, -1], lm.config.image_tokens), position)


def decode_n_tokens(
    lm: TransformerLM,
    codes: Tensor,
    cache: list[KVCache],
    sampler: Sampler,
    progress: Progress | None = None,
) -> None:
    """Fill codes [N, num_tokens] behind its first column. Nothing here waits for the device."""
    num_tokens = codes.shape[1]
    # A tensor of one element: an index without dimensions would be read back to the host.
    position = torch.zeros(1, dtype=torch.int64, device=codes.device)
    for i in range(1, num_tokens):
        if i == sampler.guided_tokens:
            cache, sampler = [layer.first(len(codes)) for layer in cache], sampler.unguided()
        position += 1
        codes[:, i] = decode_one_token(lm, codes[:, i - 1], cache, sampler, position)
        if progress is not None:
            progress(i + 1, num_tokens)


@dataclass(frozen=True)
class Prompt:
    """What stands in front of the images: N rows, or 2N with the unconditional half behind."""

    tokens: Tensor | None  # int64 [rows, length], padded on the left
    prefix: Tensor | None
    start: Tensor | None  # int32 [rows]: positions of padding
    rows: int
    length: int


@dataclass(frozen=True)
class Sampler:
    """From logits [N or 2N, codes] to one code an image [N]."""

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

    def __call__(self, logits: Tensor, position: Tensor) -> Tensor:
        if self.guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + self.scales[position] * (cond - uncond)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = keep_likely(logits / self.temperature, self.top_k, self.top_p)
        return (logits + gumbel_noise(self.seeds, position, logits.shape[-1])).argmax(dim=-1)


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [N, K] with −inf for all but the ``top_k`` most likely codes (0: all), and of those
    all but the fewest whose probabilities sum to ``top_p`` (nucleus sampling, arXiv 1904.09751).
    Codes that tie with the last one kept are kept."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        descending = logits.sort(dim=-1, descending=True).values
        probabilities = descending.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        least = descending.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, odd: the step of SplitMix64
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def gumbel_noise(seeds: Tensor, position: Tensor | int, num_codes: int) -> Tensor:
    """Standard Gumbel noise fp64 [N, num_codes], a function of (seed, position, code) alone.

    A SplitMix64 stream (Steele, Lea, Flood 2014) whose state hashes seed and position, read at the
    code. int64 arithmetic wraps, so every device gives the same bits; fp64 keeps what the logarithm
    may round differently far below the rounding of the logits. The uniform is (52 bits + 1/2)/2^52,
    exact and never 0 or 1.
    """
    state = _mix(_mix(seeds) + position)
    counter = torch.arange(1, num_codes + 1, device=seeds.device) * _GOLDEN
    bits = _shift_right(_mix(state[:, None] + counter), 12)
    uniform = (bits.double() + 0.5) * 2.0**-52
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64 bits."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic on a signed integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


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
        start = None
        if prefix_padding is not None:
            start = prefix_padding.to(device, torch.int32).repeat(2 if guided else 1)
        return Prompt(None, prefix, start, len(prefix), lm.config.prefix_length)

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
    return Prompt(tokens.to(device), None, start, len(rows), length)


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
        scales=torch.tensor(scales, device=device) if guided_tokens else None,
        guided_tokens=guided_tokens,
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
    )


def _attention_backend(lm: TransformerLM, cache: KVCache) -> str:
    """The backend that a decoding step of this model runs on, asked of the registry."""
    config, weight, rows = lm.config, lm.output.weight, len(cache.seqlens)
    q = weight.new_empty(rows, 1, config.num_heads, config.head_dim)
    kv = weight.new_empty(rows, 1, config.num_kv_heads, config.head_dim)
    return explain("decode_attention", q, kv, kv, cache).chosen or ""


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
