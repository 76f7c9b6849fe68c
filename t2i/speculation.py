"""Several tokens of an image in one pass of the model: the same ones, in less time.

A pass reads all weights, for one token or for some alike. So tokens are guessed, read together, and
kept as far as they turn out right. What is drawn behind a right token is what one token at a time
would draw: the noise of every position is fixed beforehand, and a row's logits do not depend on how
many are computed with it (``decode_step``). No token is accepted by chance, as in speculative
sampling (arXiv 2211.17192): the images are equal to the bit.

Guesses come from the same weights in fewer bits, on the same cache. With the same noise their draw
is nearly always the same one. Or they are what earlier passes drew there (Jacobi decoding, arXiv
2410.01699), which takes no time, and is right far less often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lm.decoding import Decoder
from .sampler import CHUNK, Sampler

MOST = 12  # guesses that Pace may ask for


class Counts(NamedTuple):
    passes: int  # of the model
    drafts: int  # passes of the weights that guess
    bytes_read: int  # of weights and of the cache, in all of them


class Pace:
    """How many guesses a pass should read, from the times that passes took and from the share of
    guesses that were right.

    With n guesses of which each is right with probability p, if the ones before it are, a pass
    draws 1 + p + … + pⁿ tokens on average (arXiv 2211.17192, equation 1). It takes n drafts,
    and the time of a plain pass and of n rows more. Without guesses some tokens are drawn by plain
    passes, as fast as where none is ever guessed.
    """

    def __init__(self) -> None:
        self.plain = self.draft = self.row = 0.0  # seconds
        self.right, self.wrong = 4.0, 1.0  # what is expected before anything was seen
        self.passes = 0

    def guesses(self) -> int:
        if self.passes < 4:  # the costs of both, each twice: the first ones are cold
            return (0, 4)[self.passes % 2]
        best = max(range(MOST + 1), key=self.speed)
        return best or (4 if self.passes % 16 == 0 else 0)  # circumstances may change

    def speed(self, guesses: int) -> float:
        """Tokens a second."""
        p = self.right / (self.right + self.wrong)
        drawn = sum(p**i for i in range(guesses + 1))
        return drawn / (self.plain + guesses * (self.draft + self.row))

    def record(self, guesses: int, drafting: float, reading: float, right: int, wrong: int) -> None:
        """A pass: its guesses, seconds for them and for reading them, how many were right, and at
        how many a row ended early. Of plain passes ``reading`` is what one of them took."""
        self.passes += 1
        if self.passes <= 2:
            return
        if not guesses:
            self.plain = _towards(self.plain, reading)
            return
        self.plain = min(self.plain, reading)  # no pass takes less: what was measured is too long
        self.draft = _towards(self.draft, drafting / guesses)
        self.row = _towards(self.row, max(0.0, reading - self.plain) / guesses)
        # Images differ: what was seen fades.
        self.right, self.wrong = 0.95 * self.right + right, 0.95 * self.wrong + wrong


def _towards(mean: float, value: float) -> float:
    return 0.8 * mean + 0.2 * value if mean else value


def speculate(
    decoder: Decoder,
    codes: Tensor,
    sampler: Sampler,
    used: Sequence[int],
    *,
    ahead: int | None,
    guesser: Decoder | None,
    progress: Callable[[int, int], None] | None = None,
) -> Counts:
    """Fill codes int64 [N, num_tokens] behind its first column.

    Args:
        used: tokens that were read of each row.
        ahead: guesses a pass; None for as many as make it fastest, on the CPU.
        guesser: reads into the same cache, with the weights that guess; None for Jacobi decoding.
    """
    images, num_tokens = codes.shape
    pace = Pace() if ahead is None else None
    most = min(MOST if ahead is None else ahead, num_tokens)
    passes = drafts = bytes_read = 0
    known = torch.ones_like(sampler.seeds)  # codes of each image that are right
    guesses = codes[:, :1].repeat(1, num_tokens + most)  # of all codes, right ones in front
    index = torch.arange(max(most + 1, CHUNK), device=codes.device)

    def forget(counts: Tensor) -> None:
        decoder.forget(counts.int().repeat(len(used) // images))

    while (least := int(known.min())) < num_tokens:
        if sampler.guided and least >= sampler.guided_tokens:
            decoder.keep(images)
            if guesser is not None:
                guesser.keep(images)
            sampler, used = sampler.unguided(), used[:images]
        count = min(most if pace is None else pace.guesses(), num_tokens - least - 1)
        plain = pace is not None and not count
        drawing = min(CHUNK, num_tokens - least) if plain else count + 1  # tokens, at most
        # An image that is done, or nearly so, reads its last tokens again: they are not guessed.
        sure = known[:, None].clone()
        again = (known - (num_tokens - drawing)).clamp_min(0)
        forget(again)
        known -= again

        began = time.perf_counter()
        if plain:
            drawn, read = _draw_in_turns(decoder, sampler, guesses, known, used, drawing)
            guesses.scatter_(1, known[:, None] + index[:drawing], drawn)
            passes += drawing
            bytes_read += read
            known += drawing
            pace.record(0, 0.0, (time.perf_counter() - began) / drawing, 0, 0)
            if guesser is None:
                guesses = _repeat_last(guesses, known, index[: most + 1])
            if progress is not None:
                progress(int(known.min()), num_tokens)
            continue
        if guesser is not None and count:
            drawn, read = _draw_in_turns(guesser, sampler, guesses, known, used, count)
            at = known[:, None] + index[:count]
            guesses.scatter_(1, at, torch.where(at < sure, guesses.gather(1, at), drawn))
            drafts += count
            bytes_read += read
            forget(torch.full_like(known, count))
        drafted = time.perf_counter()
        where = known[:, None] + index[: count + 1]  # positions that are drawn
        drawn = sampler.next(decoder, guesses.gather(1, where - 1), known)
        right = (drawn == guesses.gather(1, where))[:, :-1].long().cumprod(dim=1).sum(dim=1)
        guesses.scatter_(1, where, drawn)
        if guesser is None:
            guesses = _repeat_last(guesses, known + count + 1, index[: most + 1])
        passes += 1
        slots = sum(used) + len(used) // images * int((known + count).sum())
        bytes_read += decoder.weight_bytes + decoder.slot_bytes * slots
        forget(count - right)
        known += right + 1
        if pace is not None:
            ended = int((right < count).sum())
            finished = time.perf_counter()
            pace.record(count, drafted - began, finished - drafted, int(right.sum()), ended)
        if progress is not None:
            progress(int(known.min()), num_tokens)
    codes.copy_(guesses[:, :num_tokens])
    return Counts(passes, drafts, bytes_read)


def _draw_in_turns(
    decoder: Decoder,
    sampler: Sampler,
    guesses: Tensor,
    known: Tensor,
    used: Sequence[int],
    count: int,
) -> tuple[Tensor, int]:
    """The next ``count`` codes of each image behind its ``known`` ones, and the bytes read."""
    slots = sum(used) + len(used) // len(known) * int(known.sum())
    slots = count * slots + len(used) * count * (count - 1) // 2
    last = guesses.gather(1, known[:, None] - 1)
    drawn = sampler.several(decoder, last, known, count)
    return drawn, count * decoder.weight_bytes + decoder.slot_bytes * slots


def _repeat_last(guesses: Tensor, first: Tensor, index: Tensor) -> Tensor:
    """Repeat the code in front of ``first`` [N] behind it."""
    where = first[:, None] + index
    where = where.clamp_max(guesses.shape[1] - 1)
    last = guesses.gather(1, first[:, None] - 1)
    return guesses.scatter(1, where, last.expand_as(where))
