"""From logits to codes: what is drawn of each image, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from t2i_kernels.draw import draw
from t2i_kernels.draw.api import check_options as check_draw_options

from .lm.decoding import Decoder, PackedModel
from .lm.model import TransformerLM

CHUNK = 8  # tokens of an image between calls of ``progress``


@dataclass(frozen=True)
class Sampler:
    """Options of drawing, and the seeds of N images."""

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

    def next(self, decoder: Decoder, codes: Tensor, positions: Tensor) -> Tensor:
        """Read codes of each image [N, n], which continue what was read, and draw what follows each
        of them: int64 [N, n]. The first one drawn is at ``positions`` int64 [N] of the images."""
        if self.guided:
            codes = torch.cat([codes, codes])
        return self(decoder.read_codes(codes), positions)

    def several(self, decoder: Decoder, codes: Tensor, positions: Tensor, count: int) -> Tensor:
        """Draw the next ``count`` codes of each image, one after another, behind the last one,
        int64 [N, 1], which is read: int64 [N, count]. The first one is at ``positions``."""
        if isinstance(decoder, PackedModel):
            return decoder.draw_tokens(
                codes[:, 0], count=count, seeds=self.seeds, positions=positions,
                guidance=self._guidance(positions, count), temperature=self.temperature,
                top_k=self.top_k, top_p=self.top_p,
            )  # fmt: skip
        drawn = []
        for i in range(count):
            codes = self.next(decoder, codes, positions + i)
            drawn.append(codes)
        return torch.cat(drawn, dim=1)

    def _guidance(self, positions: Tensor, count: int) -> Tensor | None:
        if not self.guided:
            return None
        return self.scales[positions[:, None] + torch.arange(count, device=positions.device)]

    def __call__(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Codes int64 [N, T] from logits [N or 2N, T, codes]; the first of the T tokens of each
        image is at ``positions`` int64 [N]."""
        return draw(
            logits,
            self.seeds,
            positions,
            guidance=self._guidance(positions, logits.shape[1]),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def make_sampler(
    lm: TransformerLM,
    seeds: Sequence[int],
    cfg: float | Sequence[float],
    temperature: float,
    top_k: int,
    top_p: float,
    num_tokens: int,
) -> Sampler:
    """Raises ValueError for an option out of range; see ``sampling.sample_codes``."""
    if not lm.config.image_vocab_size:
        raise ValueError("the model has no image tokens: extend_vocabulary adds them")
    if num_tokens < 1:
        raise ValueError("grid: expected at least one token")
    device = lm.output.weight.device
    scales = [float(cfg)] * num_tokens if isinstance(cfg, Real) else list(map(float, cfg))
    if len(scales) != num_tokens:
        raise ValueError(f"cfg: a schedule of {len(scales)} scales for {num_tokens} tokens")
    check_options(scales, temperature, top_k, top_p)
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


def check_options(scales: Sequence[float], temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError for an option out of range; ``scales`` are of guidance."""
    for scale in scales:
        if not 0 <= scale < float("inf"):
            raise ValueError(f"cfg: expected a finite number of at least 0, got {scale}")
    check_draw_options(temperature, top_k, top_p)
