"""Distance of two pictures in the features of a network that knows pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2i.evaluate.efficientnet import load_efficientnet

LAST_BLOCK = 10  # to 1/16 of the resolution; deeper maps of a 64-pixel picture are 2×2


class PerceptualLoss(nn.Module):
    """Squared distance of unit-normalised feature maps, summed over channels and depths, averaged
    over positions: LPIPS (arXiv 1801.03924) without its learned weights, on EfficientNet-Lite0."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_efficientnet().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Scalar, for [B, 3, H, W] in [-1, 1] each; differentiable in ``images``."""
        with torch.no_grad():
            wanted = self.network.maps(targets, LAST_BLOCK)
        distance = images.new_zeros(())
        for a, b in zip(self.network.maps(images, LAST_BLOCK), wanted, strict=True):
            distance = distance + (_unit(a) - _unit(b)).square().sum(dim=1).mean()
        return distance


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()
