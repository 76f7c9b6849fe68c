"""Measures against slow formulas, closed forms, scipy and planted data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from t2i.evaluate.metrics import (
    RidgeMap,
    codebook_use,
    frechet_distance,
    kernel_distance,
    mmd2,
    psnr,
    ranks,
    ssim,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_psnr_of_a_known_error():
    images = torch.rand(3, 3, 16, 16) - 0.5
    # On the scale [0, 1] the error is 0.1, 0.05, 0: the pictures are in [-1, 1].
    shift = torch.tensor([0.2, 0.1, 0.0]).view(3, 1, 1, 1)
    expected = torch.tensor([20.0, 20 * math.log10(20), 100.0], dtype=torch.float64)
    torch.testing.assert_close(psnr(images + shift, images), expected, atol=1e-4, rtol=0)


def slow_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, window by window, of [C, H, W] on the scale [0, 1]."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for a, b in zip(x, y, strict=True):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + 1e-4)
                    * (2 * cov + 9e-4)
                    / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
                )
    return float(np.mean(values))


def test_ssim_is_its_definition():
    x = torch.rand(3, 3, 17, 14) * 2 - 1
    y = torch.stack([x[0], (x[1] + 0.3 * torch.randn(3, 17, 14)).clamp(-1, 1), -x[2]])
    found = ssim(x, y)
    for i in range(3):
        expected = slow_ssim(*((t[i].double().numpy() + 1) / 2 for t in (x, y)))
        assert found[i].item() == pytest.approx(expected, abs=1e-9)
    assert found[0] == pytest.approx(1) and found[2] < 0.3
    with pytest.raises(ValueError, match="expected 11 or more"):
        ssim(x[:, :, :10], y[:, :, :10])


def test_codebook_use():
    use = codebook_use(torch.tensor([[0, 1], [2, 3]]), 8)
    assert use == {"usage": 0.5, "perplexity": pytest.approx(4)}
    # Entropy of (3/4, 1/4).
    skewed = codebook_use(torch.tensor([5, 5, 5, 0]), 8)
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert skewed == {"usage": 0.25, "perplexity": pytest.approx(expected)}


def test_frechet_distance_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    a = torch.randn(200, 12) @ torch.randn(12, 12)
    b = torch.randn(150, 12) @ torch.randn(12, 12) + 1
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(
        cov_x + cov_y - 2 * linalg.sqrtm(cov_x @ cov_y).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_few_samples_in_many_dimensions():
    """Covariances without an inverse, in closed form: two points each, one step apart."""
    a, b = torch.zeros(2, 50), torch.zeros(2, 50)
    a[1, 0] = b[1, 1] = 2.0  # variance 2 in one direction each
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 2 + 2)
    a[:, 2], b[1, 1], b[1, 0] = 3.0, 0.0, 4.0  # variances 2 and 8 in one direction
    expected = (1 - 2) ** 2 + 9 + (math.sqrt(2) - math.sqrt(8)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected)


def test_mmd_is_its_double_sum():
    x, y = torch.randn(5, 4).double(), torch.randn(7, 4).double() + 0.5

    def kernel(u, v):
        return (float(u @ v) / 4 + 1) ** 3

    def mean(pairs):
        return sum(kernel(u, v) for u, v in pairs) / len(pairs)

    def others(z):
        return [(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j]

    cross = [(u, v) for u in x for v in y]
    expected = mean(others(x)) + mean(others(y)) - 2 * mean(cross)
    assert mmd2(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_is_unbiased():
    """Zero on average for one distribution however few the samples, which with the diagonals it is
    not; the Fréchet distance of the same samples is far from it."""
    draws = [(torch.randn(6, 8).double(), torch.randn(6, 8).double()) for _ in range(3000)]
    values = torch.stack([mmd2(x, y) for x, y in draws])
    error = values.std() / len(values) ** 0.5
    assert values.mean().abs() < 4 * error
    diagonal = torch.stack([((x.square().sum(1) / 8 + 1) ** 3).mean() for x, _ in draws]).mean()
    assert diagonal / 6 > 40 * error  # what the biased estimate would add, once for each set
    # For a shift it is the same whatever the number of samples.
    shifted = [
        torch.stack([mmd2(torch.randn(n, 8), torch.randn(n, 8) + 1) for _ in range(400)])
        for n in (5, 40)
    ]
    spread = sum(v.var() / len(v) for v in shifted).sqrt()
    assert (shifted[0].mean() - shifted[1].mean()).abs() < 4 * spread
    assert shifted[1].mean() > 20 * spread


def test_kernel_distance_over_subsets():
    a, b = torch.randn(300, 16), torch.randn(200, 16) + 0.5
    mean, std = kernel_distance(a, b, subset_size=100)
    assert mean == pytest.approx(mmd2(a.double(), b.double()).item(), rel=0.1) and std > 0
    assert kernel_distance(a, b, subset_size=100) == (mean, std)
    assert kernel_distance(a, b, subset_size=100, seed=1) != (mean, std)
    # A subset of everything is the same set each time.
    assert kernel_distance(a, a[:, :], subset_size=1000)[0] == pytest.approx(
        mmd2(a.double(), a.double()).item()
    )


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_distributions_need_two_samples(distance):
    with pytest.raises(ValueError, match="a distribution of 1 samples"):
        distance(torch.randn(5, 3), torch.randn(1, 3))


def test_ridge_map_solves_its_problem():
    """The gradient of the penalised squared error is zero at the fit."""
    images, texts = torch.randn(60, 20).double(), torch.randn(60, 7).double()
    for penalty in (0.1, 10.0):
        ridge = RidgeMap.fit(images, texts, penalty)
        centred = images - images.mean(0)
        x = centred / centred.norm(dim=1, keepdim=True)
        y = texts - texts.mean(0)
        gradient = x.T @ (x @ ridge.weight - y) + penalty * ridge.weight
        assert gradient.abs().max() < 1e-10


def test_ridge_map_finds_a_planted_map_on_unseen_samples():
    hidden = torch.randn(400, 16)
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    images = hidden @ torch.linalg.qr(torch.randn(40, 40)).Q[:16] * 5 + 3
    texts = hidden @ torch.randn(16, 24) + torch.randn(24)
    ridge = RidgeMap.fit(images[:300], texts[:300], 0.01)
    found = ranks(ridge.similarity(images[300:], texts[300:]), torch.arange(100))
    assert (found == 0).double().mean() > 0.95
    # Texts that have nothing to do with the pictures are found by chance.
    noise = torch.randn(400, 24)
    ridge = RidgeMap.fit(images[:300], noise[:300], 0.01)
    found = ranks(ridge.similarity(images[300:], noise[300:]), torch.arange(100))
    assert 30 < found.double().mean() < 70


def test_ranks_count_ties_against():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5], [0.1, 0.5, 0.9]])
    assert ranks(similarity, torch.tensor([0, 1, 0])).tolist() == [0, 2, 2]
