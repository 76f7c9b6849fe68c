"""Are samples copies of training pictures?

Of each picture the nearest training picture is found, by cosine of the features and by pixels. How
near a copy lies is measured, not chosen: the tokenizer's reconstructions of training pictures are
copies, as exact as this model can draw them. A picture counts as a near copy where in both measures
it is at least as near as nine of ten reconstructions are. Pictures of one design resemble each
other, so the number says something beside that of real pictures that were not trained on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import psnr

QUANTILE = 0.1


class CopyCheck:
    """Of training pictures: pixels fp32 [N, 3, H, W] in [-1, 1] and features [N, D], and those of
    the reconstructions [M, ...] of some of them."""

    def __init__(
        self, images: Tensor, features: Tensor, reconstructions: Tensor, their_features: Tensor
    ) -> None:
        self.images, self.center = images, features.mean(dim=0)
        self.flat = images.flatten(1)
        self.norms = self.flat.square().sum(dim=1)
        self.features = F.normalize(features - self.center, dim=-1)
        cosine, noise = self.nearest(reconstructions, their_features)
        self.cosine, self.psnr = (x.quantile(QUANTILE).item() for x in (cosine, noise.float()))

    def nearest(
        self, images: Tensor, features: Tensor, own: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(cosine, PSNR in dB) [M] with the nearest training picture in each sense.

        ``own`` int64 [M]: a training picture that does not count, -1 for none.
        """
        own = torch.full((len(images),), -1) if own is None else own
        cosines, noise = [], []
        for rows in torch.arange(len(images)).split(256):
            allowed = torch.arange(len(self.images)) != own[rows, None]
            similar = F.normalize(features[rows] - self.center, dim=-1) @ self.features.T
            cosines.append(similar.masked_fill(~allowed, -2).amax(dim=1))
            # Squared distance, less the part that is the same for all training pictures.
            distance = torch.addmm(self.norms, images[rows].flatten(1), self.flat.T, alpha=-2)
            closest = distance.masked_fill(~allowed, torch.inf).argmin(dim=1)
            noise.append(psnr(images[rows], self.images[closest]))
        return torch.cat(cosines), torch.cat(noise)

    def __call__(self, images: Tensor, features: Tensor, own: Tensor | None = None) -> dict:
        cosine, noise = self.nearest(images, features, own)
        # The margin is for rounding: a copy to the bit has a cosine of 1, about.
        near = (cosine >= self.cosine - 1e-5) & (noise >= self.psnr - 1e-3)
        return {
            "near_copies": near.double().mean().item(),
            "nearest_cosine": cosine.median().item(),
            "nearest_psnr": noise.median().item(),
        }
