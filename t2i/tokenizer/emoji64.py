"""The default image tokenizer: a small VQ autoencoder that trains on a CPU.

A 64×64 picture becomes 8×8 tokens. Convolving at full resolution is what makes such models slow on
a CPU, so the encoder starts at a quarter of it (pixel-unshuffle) and the decoder ends at half of it
(pixel-shuffle). Each level costs about the same: half the side, twice the channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from t2i_kernels import VectorQuantizer, flash_attention
from t2i_kernels.vector_quantizer import VQOutput

from .checks import check_codes, check_images

GROUPS = 16  # of every GroupNorm


@dataclass(frozen=True)
class Emoji64Config:
    """Sizes of the default tokenizer.

    ``channels`` are the widths at 1/2, 1/4 and 1/8 of the resolution; ``encoder_blocks`` count the
    residual blocks at 1/4 and 1/8, ``decoder_blocks`` those at 1/8, 1/4 and 1/2.
    """

    channels: tuple[int, int, int] = (48, 96, 192)
    encoder_blocks: tuple[int, int] = (1, 2)
    decoder_blocks: tuple[int, int, int] = (2, 2, 1)
    num_heads: int = 4
    num_codes: int = 4096
    code_dim: int = 8


class Emoji64(nn.Module):
    """VQ autoencoder of square or oblong RGB images in [-1, 1]; one token for each 8×8 pixels."""

    downsampling = 8
    decoder_parts = ("decoder.",)  # what parameters are called that have no say in the codes

    def __init__(self, config: Emoji64Config = Emoji64Config()) -> None:
        super().__init__()
        self.config = config
        self.num_codes = config.num_codes
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(
            config.num_codes, config.code_dim, metric="l2", restart_after=150
        )
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> tuple[Tensor, VQOutput]:
        """[B, 3, H, W] -> reconstruction of the same shape, and what the quantizer says."""
        vq = self.quantizer(self._latents(images))
        return self._pixels(vq.quantized), vq

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> codes int64 [B, H/8, W/8]."""
        return self.quantizer.encode(self._latents(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, h, w] -> images [B, 3, 8h, 8w], not clamped."""
        check_codes(codes)
        return self._pixels(self.quantizer.lookup(codes))

    def _latents(self, images: Tensor) -> Tensor:
        check_images(images, self.downsampling)
        batch, _, height, width = images.shape
        if not batch:  # which pixel-unshuffle refuses
            grid = height // self.downsampling, width // self.downsampling
            return images.new_empty(0, *grid, self.config.code_dim)
        return self.encoder(images).permute(0, 2, 3, 1)

    def _pixels(self, quantized: Tensor) -> Tensor:
        batch, height, width, _ = quantized.shape
        if not batch:
            return quantized.new_empty(0, 3, height * self.downsampling, width * self.downsampling)
        return self.decoder(quantized.permute(0, 3, 1, 2))


class ResBlock(nn.Module):
    """Two normalised 3×3 convolutions beside a skip. The second starts at zero: an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    """Self-attention over the whole grid; like `ResBlock`, an identity at the start."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        y = self.out(flash_attention(q, k, v).flatten(2))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Encoder(nn.Sequential):
    def __init__(self, config: Emoji64Config) -> None:
        _, middle, deep = config.channels
        at_quarter, at_eighth = config.encoder_blocks
        super().__init__(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, middle, 3, padding=1),
            *(ResBlock(middle) for _ in range(at_quarter)),
            nn.Conv2d(middle, deep, 3, stride=2, padding=1),
            ResBlock(deep),
            AttentionBlock(deep, config.num_heads),
            *(ResBlock(deep) for _ in range(at_eighth - 1)),
            nn.GroupNorm(GROUPS, deep),
            nn.SiLU(),
            nn.Conv2d(deep, config.code_dim, 1),
        )


class Decoder(nn.Sequential):
    def __init__(self, config: Emoji64Config) -> None:
        shallow, middle, deep = config.channels
        at_eighth, at_quarter, at_half = config.decoder_blocks
        super().__init__(
            nn.Conv2d(config.code_dim, deep, 3, padding=1),
            ResBlock(deep),
            AttentionBlock(deep, config.num_heads),
            *(ResBlock(deep) for _ in range(at_eighth - 1)),
            AttentionBlock(deep, config.num_heads),
            nn.Conv2d(deep, 4 * middle, 1),
            nn.PixelShuffle(2),
            *(ResBlock(middle) for _ in range(at_quarter)),
            nn.Conv2d(middle, 4 * shallow, 1),
            nn.PixelShuffle(2),
            *(ResBlock(shallow) for _ in range(at_half)),
            nn.GroupNorm(GROUPS, shallow),
            nn.SiLU(),
            nn.Conv2d(shallow, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
