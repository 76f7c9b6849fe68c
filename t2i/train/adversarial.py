"""The adversarial loss of an image tokenizer: a discriminator of patches, and its weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8  # of every GroupNorm


class PatchDiscriminator(nn.Sequential):
    """Says for each patch whether it is real (PatchGAN, arXiv 1611.07004, section 3.2.2).

    [B, 3, H, W] -> logits [B, 1, H/8, W/8]. Group norm in place of batch norm: the verdict on an
    image does not depend on the others.
    """

    def __init__(self, channels: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for width in (channels, 2 * channels):
            layers += [
                nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
                nn.GroupNorm(GROUPS, 2 * width),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(4 * channels, 1, 3, padding=1))


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss on logits (arXiv 1705.02894, equation 4)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(quality: Tensor, adversarial: Tensor) -> Tensor:
    """How much to scale the adversarial loss so that it pulls at the decoder's last layer as hard
    as the other losses do (VQGAN, arXiv 2012.09841, equation 7).

    Args:
        quality, adversarial: gradients of the two at that layer.
    """
    return (quality.norm() / (adversarial.norm() + 1e-4)).clamp(max=1e4)
