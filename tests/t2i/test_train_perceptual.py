"""The perceptual loss, on a network with random weights."""

from __future__ import annotations

import pytest
import torch

from t2i.evaluate.efficientnet import EfficientNetLite0
from t2i.train import perceptual


@pytest.fixture
def loss(monkeypatch):
    torch.manual_seed(0)
    network = EfficientNetLite0().eval().requires_grad_(False)
    monkeypatch.setattr(perceptual, "load_efficientnet", lambda: network)
    return perceptual.PerceptualLoss()


def test_it_is_zero_for_equal_pictures_alone(loss):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert loss(images, images) == 0
    noise = torch.randn_like(images)
    near, far = (loss((images + s * noise).clamp(-1, 1), images) for s in (0.05, 0.5))
    assert 0 < near < far


def test_it_is_the_mean_over_pictures_and_pulls_at_the_first_argument(loss):
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    a.requires_grad_()
    b.requires_grad_()
    together = loss(a, b)
    apart = torch.stack([loss(a[i : i + 1], b[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, apart.mean())
    together.backward()
    assert a.grad.any() and b.grad is None
    assert all(p.grad is None for p in loss.parameters())
    step = a.detach() - 1e-2 * a.grad / a.grad.norm()
    assert loss(step, b) < together
