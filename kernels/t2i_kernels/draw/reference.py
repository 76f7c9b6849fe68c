"""draw in plain PyTorch: guidance, the likely codes, noise, argmax."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    guidance: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    if guidance is not None:
        cond, uncond = logits.chunk(2)
        scale = guidance[..., None]
        logits = torch.where(scale == 1, cond, uncond + scale * (cond - uncond))
    if logits.is_cpu and not logits.amax(dim=-1).isfinite().all():
        raise ValueError("draw: logits: expected numbers, got NaN or inf, or -inf alone")
    if temperature == 0:
        return logits.argmax(dim=-1)
    rows, tokens, codes = logits.shape
    likely = keep_likely((logits / temperature).flatten(0, 1), top_k, top_p)
    where = positions[:, None] + torch.arange(tokens, device=logits.device)
    seeds = seeds[:, None].expand_as(where)
    noise = gumbel_noise(seeds.flatten(), where.flatten(), codes)
    return (likely + noise).argmax(dim=-1).view(rows, tokens)


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [N, K] with −inf for all but the ``top_k`` most likely codes (0: all), and of those
    all but the fewest whose probabilities sum to ``top_p`` (nucleus sampling, arXiv 1904.09751).
    Codes that tie with the last one kept are kept."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        descending = logits.sort(dim=-1, descending=True).values
        probabilities = descending.softmax(dim=-1, dtype=torch.float64)
        before = probabilities.cumsum(dim=-1) - probabilities
        least = descending.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, odd: the step of SplitMix64
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def gumbel_noise(seeds: Tensor, positions: Tensor | int, num_codes: int) -> Tensor:
    """Standard Gumbel noise fp64 [N, num_codes], a function of (seed, position, code) alone.

    A SplitMix64 stream (Steele, Lea, Flood 2014) whose state hashes seed and position, read at the
    code. int64 arithmetic wraps, so every device gives the same bits; fp64 keeps what the logarithm
    may round differently far below the rounding of the logits. The uniform is (52 bits + 1/2)/2^52,
    exact and never 0 or 1.
    """
    state = _mix(_mix(seeds) + positions)
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
