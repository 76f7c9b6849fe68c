"""draw: the native kernel, with every instruction set, draws what the reference draws."""

from __future__ import annotations

import pytest
import torch

from t2i_kernels import native
from t2i_kernels.draw import draw, gumbel_noise

CPU = native.cpu_capabilities()


@pytest.fixture(params=[name for name in CPU if name != "AMX"])
def capability(request):
    with native.use_cpu_capability(request.param):
        yield request.param


def both(logits, seeds, positions, **options) -> torch.Tensor:
    native_one = draw(logits, seeds, positions, backend="cpu", **options)
    assert torch.equal(native_one, draw(logits, seeds, positions, backend="reference", **options))
    return native_one


SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345])
POSITIONS = torch.tensor([0, 5, 2, 1000, 3, 4])


@pytest.mark.parametrize("codes", [1, 2, 63, 64, 65, 1000, 16384])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 20.0, 0.0])
def test_as_the_reference(capability, codes, temperature):
    for top_k, top_p in [(0, 1.0), (1, 1.0), (7, 1.0), (200, 0.9), (0, 0.5), (0, 0.999), (3, 0.01)]:
        for spread in (0.0, 0.1, 3.0, 40.0):
            logits = spread * torch.randn(6, 2, codes)
            both(logits, SEEDS, POSITIONS, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("tokens", [1, 3])
def test_guidance(capability, tokens):
    logits = 3 * torch.randn(12, tokens, 500)
    guidance = 3 * torch.rand(6, tokens)
    drawn = both(logits, SEEDS, POSITIONS, guidance=guidance, top_k=50)
    off = both(logits[:6], SEEDS, POSITIONS, top_k=50)
    assert not torch.equal(drawn, off)
    logits[6:, :, 0] = torch.inf  # not looked at
    one = both(logits, SEEDS, POSITIONS, guidance=torch.ones(6, tokens), top_k=50)
    assert torch.equal(one, off)


def test_ties_and_what_is_out(capability):
    """The lowest code of the most likely; never one at -inf; all that tie with the k-th stay."""
    logits = torch.zeros(1, 1, 100)
    seed, position = torch.tensor([3]), torch.tensor([0])
    assert both(logits, seed, position, temperature=0.0).item() == 0
    assert both(logits, seed, position, top_k=1).item() == gumbel_noise(seed, 0, 100).argmax()
    logits[0, 0, 1:] = -torch.inf
    for top_k in (0, 1, 50):
        assert both(logits, seed, position, top_k=top_k).item() == 0
    logits[0, 0, 70] = 0.0
    seeds = torch.arange(200)
    drawn = both(logits.expand(200, 1, 100), seeds, torch.zeros(200, dtype=torch.int64), top_k=50)
    assert set(drawn.unique().tolist()) == {0, 70}


def test_large_scores(capability):
    """Of which the last bits are larger than the noise."""
    for size in (1e3, 1e5, 1e8):
        logits = size + torch.randn(6, 4, 700) * size * 1e-6
        both(logits, SEEDS, POSITIONS)
        both(-logits, SEEDS, POSITIONS, top_k=30)
    seeds = torch.arange(300)
    for size in (1e5, 1e7):  # where the noise decides, too
        logits = size + 2 * torch.randn(300, 1, 700)
        both(logits, seeds, torch.zeros_like(seeds))


def test_frequencies(capability):
    """Codes are drawn as often as their probabilities say."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    seeds, positions = torch.arange(20_000), torch.full((20_000,), 7)
    drawn = draw(probabilities.log().expand(20_000, 1, 4), seeds, positions, backend="cpu")
    found = torch.bincount(drawn.flatten(), minlength=4) / 20_000
    assert ((found - probabilities).abs() < 0.015).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_undefined_logits(capability, backend):
    for value in (torch.nan, torch.inf):
        logits = torch.randn(2, 1, 30)
        logits[1, 0, 4] = value
        with pytest.raises(ValueError, match="logits: expected numbers"):
            draw(logits, torch.arange(2), torch.zeros(2, dtype=torch.int64), backend=backend)
    nothing = torch.full((1, 1, 5), -torch.inf)
    with pytest.raises(ValueError, match="logits: expected numbers"):
        draw(nothing, torch.arange(1), torch.zeros(1, dtype=torch.int64), backend=backend)


def test_errors_name_the_argument():
    logits, seeds, positions = torch.randn(2, 1, 9), torch.arange(2), torch.arange(2)
    for wrong, options in [
        ("logits: expected", dict(logits=logits[0])),
        ("seeds: expected int64", dict(seeds=seeds[:1])),
        ("positions: expected int64", dict(positions=positions.int())),
        (
            "guidance: expected float32",
            dict(guidance=torch.ones(2, 2), logits=logits.repeat(2, 1, 1)),
        ),
        ("temperature: expected", dict(temperature=-1.0)),
        ("top_k: expected", dict(top_k=-1)),
        ("top_p: expected", dict(top_p=0.0)),
    ]:
        call = dict(logits=logits, seeds=seeds, positions=positions) | options
        with pytest.raises(ValueError, match=wrong):
            draw(**call)
