"""Distance of two pictures in the features of a network that knows pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2i.evaluate.efficientnet import load_efficientnet
from t2i.evaluate.features import enlarged


class PerceptualLoss(nn.Module):
    """Squared distance of unit-normalised feature maps, summed over channels and depths, averaged
    over positions: LPIPS (arXiv 1801.03924) without its learned weights, on EfficientNet-Lite0,
    with the pooled features as the deepest map.

    The evaluation judges by the same network at the same size, and says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = load_efficientnet().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Scalar, for [B, 3, H, W] in [-1, 1] each; differentiable in ``images``."""
        with torch.no_grad():
            wanted = self.network.maps(enlarged(targets))
        distance = images.new_zeros(())
        for a, b in zip(self.network.maps(enlarged(images)), wanted, strict=True):
            distance = distance + (_unit(a) - _unit(b)).square().sum(dim=1).mean()
        return distance


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()
