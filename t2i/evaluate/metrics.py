"""Numbers that say how good pictures are. Pictures are float [N, 3, H, W] in [-1, 1], features
float [N, D]; everything is computed in fp64 where it costs little."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, dB [N]; equal pictures get 100."""
    error = ((images - targets) / 2).double().square().mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each picture [N], the mean over its channels and positions.

    As in Wang et al., "Image quality assessment: from error visibility to structural similarity"
    (2004): Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, windows inside the
    picture only.

    Raises:
        ValueError: pictures smaller than the window.
    """
    if min(images.shape[2:]) < 11:
        raise ValueError(
            f"pictures of {tuple(images.shape[2:])} pixels: expected 11 or more a side"
        )
    x, y = ((t.double() + 1) / 2 for t in (images, targets))
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    channels = x.shape[1]

    def blur(t: Tensor) -> Tensor:
        t = F.conv2d(t, window.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)
        return F.conv2d(t, window.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.mean(dim=(1, 2, 3))


def codebook_use(codes: Tensor, num_codes: int) -> dict[str, float]:
    """``usage``: the share of the codes that occur in int64 ``codes``; ``perplexity``: the number
    of equally frequent codes with the same entropy."""
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    share = counts / counts.sum()
    entropy = -torch.xlogy(share, share).sum()
    return {"usage": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item()}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians with the means and covariances of two sets.

    |μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½), Dowson and Landau (1982); its use on features: Heusel
    et al., arXiv 1706.08500. Biased: the fewer samples, the larger; compare at equal numbers only.

    Raises:
        ValueError: fewer than two samples.
    """
    _at_least_two(a, b)
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of (Σa Σb)^½ is that of (Σa^½ Σb Σa^½)^½, which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * overlap).item()


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, subset_size: int = 200, seed: int = 0
) -> tuple[float, float]:
    """KID of two sets: (mean, standard deviation) over random subsets.

    The unbiased squared maximum mean discrepancy under the kernel (x·y / D + 1)³, Bińkowski et al.,
    arXiv 1801.01401. Zero on average for samples of one distribution, whatever their number.

    Raises:
        ValueError: fewer than two samples.
    """
    _at_least_two(a, b)
    size = min(subset_size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:size]].double()
        y = b[torch.randperm(len(b), generator=generator)[:size]].double()
        values.append(mmd2(x, y))
    values = torch.stack(values)
    return values.mean().item(), values.std().item()


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of [m, D] and [n, D]; may be negative."""

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def without_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    within = without_diagonal(kernel(x, x)) + without_diagonal(kernel(y, y))
    return within - 2 * kernel(x, y).mean()


@dataclass(frozen=True)
class RidgeMap:
    """Linear map from image features to text features, fitted with an l2 penalty.

    Both are centred by the means of the fit; image features are then scaled to unit length.
    """

    image_mean: Tensor
    text_mean: Tensor
    weight: Tensor

    @classmethod
    def fit(cls, images: Tensor, texts: Tensor, penalty: float = 1.0) -> RidgeMap:
        """Of image features [N, D] and the text features [N, E] of their captions."""
        image_mean, text_mean = images.mean(dim=0), texts.mean(dim=0)
        x = F.normalize(images - image_mean, dim=-1).double()
        gram = x.T @ x
        gram.diagonal().add_(penalty)
        weight = torch.linalg.solve(gram, x.T @ (texts - text_mean).double())
        return cls(image_mean, text_mean, weight.to(images.dtype))

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines [N, M] of N mapped pictures with M texts."""
        mapped = F.normalize(images - self.image_mean, dim=-1) @ self.weight
        return F.normalize(mapped, dim=-1) @ F.normalize(texts - self.text_mean, dim=-1).T


def ranks(similarity: Tensor, targets: Tensor) -> Tensor:
    """Rank [N], from 0, of the right column in each row of [N, M]; a tie counts against it."""
    right = similarity.gather(1, targets[:, None])
    return (similarity >= right).sum(dim=1) - 1


def _at_least_two(*sets: Tensor) -> None:
    for features in sets:
        if len(features) < 2:
            raise ValueError(f"a distribution of {len(features)} samples: expected at least 2")
