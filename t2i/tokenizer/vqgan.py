"""The convolutional VQ autoencoders of LlamaGen and MoVQGAN, one architecture with two differences.

Source: taming-transformers (arXiv 2012.09841), whose encoder and decoder both projects keep;
LlamaGen (arXiv 2406.06525) quantizes directions, MoVQGAN (after MoVQ, arXiv 2209.09002) modulates
every norm of the decoder by the quantized map. Published checkpoints load through
``load_published``; names here are this project's own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.weights import read_state_dict
from t2i_kernels import VectorQuantizer, flash_attention
from t2i_kernels.vector_quantizer import VQOutput

from .checks import check_codes, check_images


@dataclass(frozen=True)
class VQGANConfig:
    """``channel_multipliers`` has one entry a level, each level at half the resolution of the one
    before; attention stands on the last level. ``spatial_norm`` is MoVQGAN's modulated norm.
    ``legacy_beta`` is how MoVQGAN was trained, see ``VectorQuantizer``; it changes the loss alone.
    """

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int = 256
    num_codes: int = 16384
    code_dim: int = 8
    metric: str = "cosine"
    spatial_norm: bool = False
    legacy_beta: bool = False


class VQGAN(nn.Module):
    """VQ autoencoder of RGB images in [-1, 1] of any size that ``downsampling`` divides."""

    decoder_parts = ("post_quant_conv.", "decoder.")  # see Emoji64

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.downsampling = 2 ** (len(config.channel_multipliers) - 1)
        self.num_codes = config.num_codes
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.quantizer = VectorQuantizer(
            config.num_codes,
            config.code_dim,
            metric=config.metric,
            update="gradient",
            legacy_beta=config.legacy_beta,
        )
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> tuple[Tensor, VQOutput]:
        """[B, 3, H, W] -> reconstruction of the same shape, and what the quantizer says."""
        vq = self.quantizer(self._latents(images))
        return self._pixels(vq.quantized), vq

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> codes int64 [B, h, w].

        Raises:
            TypeError, ValueError: a wrong type or shape, a size that ``downsampling`` does not
                divide.
        """
        return self.quantizer.encode(self._latents(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, h, w] -> images [B, 3, H, W], not clamped.

        Raises:
            TypeError, ValueError, IndexError: a wrong type, shape or code.
        """
        check_codes(codes)
        return self._pixels(self.quantizer.lookup(codes))

    def _latents(self, images: Tensor) -> Tensor:
        check_images(images, self.downsampling)
        return self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1)

    def _pixels(self, quantized: Tensor) -> Tensor:
        quantized = quantized.permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(quantized), quantized)


class GroupNorm(nn.GroupNorm):
    """Group norm that ignores the quantized map: blocks need not ask which norm they have."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels, eps=1e-6)

    def forward(self, x: Tensor, quantized: Tensor | None = None) -> Tensor:
        return super().forward(x)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift follow the quantized map (MoVQ, section 3.2)."""

    def __init__(self, channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.scale = nn.Conv2d(code_dim, channels, 1)
        self.shift = nn.Conv2d(code_dim, channels, 1)

    def forward(self, x: Tensor, quantized: Tensor) -> Tensor:
        quantized = F.interpolate(quantized, size=x.shape[-2:], mode="nearest")
        return self.norm(x) * self.scale(quantized) + self.shift(quantized)


class ResBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, norm) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity()
        if channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, quantized: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x, quantized)))
        y = self.conv2(F.silu(self.norm2(y, quantized)))
        return self.shortcut(x) + y


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions, whose number grows with the size of the
    picture: hence the operator that need not hold the matrix."""

    def __init__(self, channels: int, norm) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, quantized: Tensor | None = None) -> Tensor:
        y = self.norm(x, quantized)
        # [B, C, h, w] -> [B, h·w, 1 head, C], with C contiguous as the operator wants it
        q, k, v = (
            proj(y).flatten(2).transpose(1, 2).unsqueeze(2).contiguous()
            for proj in (self.q, self.k, self.v)
        )
        y = flash_attention(q, k, v).squeeze(2).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.out(y)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention or not; then the way to the
    next."""

    def __init__(self, channels, out_channels, blocks, norm, *, attention, resample) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * blocks
        self.blocks = nn.ModuleList(
            ResBlock(a, b, norm) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.attentions = nn.ModuleList(
            AttentionBlock(out_channels, norm) for _ in range(blocks if attention else 0)
        )
        self.resample = nn.Identity() if resample is None else resample(out_channels)

    def forward(self, x: Tensor, quantized: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, quantized)
            if self.attentions:
                x = self.attentions[i](x, quantized)
        return self.resample(x)


class Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in (1, *config.channel_multipliers)]
        last = len(widths) - 2
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                config.num_res_blocks,
                GroupNorm,
                attention=i == last,
                resample=None if i == last else Downsample,
            )
            for i in range(last + 1)
        )
        self.mid = _middle(widths[-1], GroupNorm)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """``levels`` run from the lowest resolution to the highest."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if config.spatial_norm:
                return SpatialNorm(channels, config.code_dim)
            return GroupNorm(channels)

        multipliers = config.channel_multipliers[::-1]
        widths = [config.channels * m for m in (multipliers[0], *multipliers)]
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], norm)
        self.levels = nn.ModuleList(
            Level(
                widths[i],
                widths[i + 1],
                config.num_res_blocks + 1,
                norm,
                attention=i == 0,
                resample=None if i == last else Upsample,
            )
            for i in range(last + 1)
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor, quantized: Tensor) -> Tensor:
        x = self.conv_in(latents)
        for block in (*self.mid, *self.levels):
            x = block(x, quantized)
        return self.conv_out(F.silu(self.norm_out(x, quantized)))


def _middle(channels: int, norm) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResBlock(channels, channels, norm),
            AttentionBlock(channels, norm),
            ResBlock(channels, channels, norm),
        ]
    )


# Published name -> ours, applied in order.
_RENAMES = [
    (r"\.conv_blocks\.", ".levels."),  # LlamaGen
    (r"\.res\.", ".blocks."),
    (r"\.(down|up)\.", ".levels."),  # MoVQGAN
    (r"\.block\.", ".blocks."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
    (r"\.norm_layer\.", ".norm."),
    (r"\.conv_y\.", ".scale."),
    (r"\.conv_b\.", ".shift."),
    (r"\.attn\.", ".attentions."),  # both
    (r"\.(downsample|upsample)\.", ".resample."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".out."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
]
# What a training run keeps beside the model: LlamaGen's record of recent codes, losses with their
# networks, MoVQGAN's averages (its own code decodes with the plain weights).
_OF_TRAINING = r"quantize\.codebook_used|(loss|discriminator|perceptual_loss|ema_\w+)\..*"


def rename(names: Iterable[str], config: VQGANConfig) -> dict[str, str]:
    """Names of a published state dict -> names here."""
    levels = len(config.channel_multipliers)
    renamed = {}
    for name in names:
        ours = name
        if name.startswith("decoder.up."):  # MoVQGAN counts from the highest resolution
            ours = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", name)
        for pattern, replacement in _RENAMES:
            ours = re.sub(pattern, replacement, ours)
        renamed[name] = ours
    return renamed


def load_published(config: VQGANConfig, path: str | Path) -> VQGAN:
    """Read a LlamaGen or MoVQGAN checkpoint (.pt, .ckpt, .pth or .safetensors), fp32 on the CPU.

    What belongs to its training and not to the model is left out, with a warning; LlamaGen's
    ``quantize.codebook_used``, which every file of theirs has, without.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: weights that are missing, left over or of another shape, each named.
    """
    path = Path(path)
    # LlamaGen's own order of preference.
    tensors = read_state_dict(path, containers=("ema", "model", "state_dict"))
    tensors = _without_training_state(tensors, path)
    names = rename(tensors, config)
    with torch.device("meta"):
        model = VQGAN(config)
    # All buffers are the quantizer's counters, which start at 0.
    counters = {name: torch.zeros_like(t, device="cpu") for name, t in model.named_buffers()}
    expected = {name: t.shape for name, t in model.state_dict().items() if name not in counters}
    found = {ours: tensors[theirs].float() for theirs, ours in names.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{theirs} is unknown" for theirs, ours in names.items() if ours not in expected]
    problems += [
        f"{name} is {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} does not fit the configuration: {'; '.join(problems[:8])}{more}")
    model.load_state_dict({**counters, **found}, assign=True)
    return model.eval()


def _without_training_state(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    left_out = [name for name in tensors if re.fullmatch(_OF_TRAINING, name)]
    groups = {name.split(".")[0] for name in left_out if name != "quantize.codebook_used"}
    if groups:
        warnings.warn(
            f"{path}: not of the model, left out: {', '.join(sorted(groups))}", stacklevel=4
        )
    return {name: value for name, value in tensors.items() if name not in left_out}
