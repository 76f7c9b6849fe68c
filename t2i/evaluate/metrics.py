"""Measures of pictures and of their agreement with captions, on plain tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for pictures on [0, 1]
KID_SUBSET = 100
RIDGE = 1.0


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of two [B, 3, H, W] in [-1, 1]: [B]."""
    error = ((images.clamp(-1, 1) - targets) / 2).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each of two [B, C, H, W] in [-1, 1]: [B].

    Source: Wang et al. 2004, with its 11×11 Gaussian window (σ 1.5), on the scale [0, 1], averaged
    over the positions where the window fits, and over channels.
    """
    a, b = ((x.clamp(-1, 1).double() + 1) / 2 for x in (images, targets))
    at = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=a.device) - SSIM_WINDOW // 2
    line = (-(at**2) / (2 * SSIM_SIGMA**2)).exp()
    line /= line.sum()
    window = (line[:, None] * line)[None, None].expand(a.shape[1], 1, -1, -1)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=x.shape[1])

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (var_a + var_b + SSIM_C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½) of features [N, D], [M, D] (arXiv 1706.08500).

    Biased upwards for few samples: compare only sets of equal size.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # tr (Σa Σb)^½ = tr (Σa^½ Σb Σa^½)^½, which is symmetric.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * cross).item()


class KernelDistance(NamedTuple):
    mean: float
    std: float  # over the draws


def kernel_distance(a: Tensor, b: Tensor, *, draws: int = 50, seed: int = 0) -> KernelDistance:
    """Unbiased squared MMD of features [N, D], [M, D] under (x·y / D + 1)³ (KID, arXiv 1801.01401),
    over ``draws`` random subsets of up to 100 samples of each."""
    size = min(KID_SUBSET, len(a), len(b))
    if size < 2:
        raise ValueError(f"a kernel distance needs 2 samples of each, got {len(a)} and {len(b)}")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:size]].double()
            for features in (a, b)
        )
        xx, yy, xy = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = sum((k.sum() - k.trace()) / (size * (size - 1)) for k in (xx, yy))
        values.append(within - 2 * xy.mean())
    values = torch.stack(values)
    return KernelDistance(values.mean().item(), values.std().item())


class Ridge:
    """A linear map from image features to text features, and how well it finds a caption.

    Fit by ridge regression on centred features, the image's at length 1. To be fit on concepts
    other than the scored ones.
    """

    def __init__(self, images: Tensor, texts: Tensor, ridge: float = RIDGE) -> None:
        """images [N, D], texts [N, E]."""
        self.image_mean, self.text_mean = images.mean(dim=0), texts.mean(dim=0)
        x = F.normalize(images - self.image_mean, dim=-1)
        gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype)
        self.weight = torch.linalg.solve(gram, x.T @ (texts - self.text_mean))

    def ranks(self, images: Tensor, candidates: Tensor, answers: Tensor) -> Tensor:
        """How many of candidates [C, E] agree better with each of images [N, D] than its answer
        (int64 [N]) does: 0 is found first."""
        x = F.normalize(images - self.image_mean, dim=-1)
        predicted = F.normalize(x @ self.weight, dim=-1)
        scores = predicted @ F.normalize(candidates - self.text_mean, dim=-1).T
        return (scores > scores.gather(1, answers[:, None])).sum(dim=1)


def nearest_psnr(images: Tensor, others: Tensor, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """PSNR in dB of each of uint8 [N, ...] to the nearest of uint8 [M, ...] pixel by pixel, and
    which one that is: (fp32 [N], int64 [N])."""
    flat = others.flatten(1).float() / 255
    norms = flat.square().sum(dim=1)
    best, index = [], []
    for part in images.flatten(1).float().div(255).split(chunk):
        squared = part.square().sum(dim=1, keepdim=True) - 2 * part @ flat.T + norms
        least = squared.min(dim=1)
        best.append(-10 * (least.values.clamp_min(0) / flat.shape[1]).clamp_min(1e-10).log10())
        index.append(least.indices)
    return torch.cat(best), torch.cat(index)
