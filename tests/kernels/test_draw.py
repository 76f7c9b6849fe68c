"""draw: the native kernel, with every instruction set, and Triton draw what the reference draws."""

from __future__ import annotations

import pytest
import torch
from backends import skip_unless_supported

from t2i_kernels import native, triton_backend, tuning
from t2i_kernels.draw import draw, gumbel_noise

CPU = native.cpu_capabilities()


# The other instruction sets have nothing of their own for it.
@pytest.fixture(params=[*CPU[:3], "triton"])
def backend(request):
    if request.param == "triton":
        skip_without_triton()
        yield "triton"
    else:
        with native.use_cpu_capability(request.param):
            yield "cpu"


def skip_without_triton() -> None:
    index = torch.zeros(1, dtype=torch.int64)
    skip_unless_supported("triton", "draw", torch.zeros(1, 1, 2), index, index)


def interpreted(backend: str) -> bool:
    """Where kernels take milliseconds a code drawn, and fewer have to do."""
    return backend == "triton" and triton_backend.INTERPRETED


def run(backend, *call, guidance=None, **options) -> torch.Tensor:
    """The codes, on the CPU whatever device they are drawn on."""
    device = torch.get_default_device() if backend == "triton" else "cpu"
    guidance = None if guidance is None else guidance.to(device)
    call = (tensor.to(device) for tensor in call)
    return draw(*call, guidance=guidance, backend=backend, **options).cpu()


def both(backend, *call, **options) -> torch.Tensor:
    drawn = run(backend, *call, **options)
    assert torch.equal(drawn, run("reference", *call, **options))
    return drawn


SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345])
POSITIONS = torch.tensor([0, 5, 2, 1000, 3, 4])


@pytest.mark.parametrize("codes", [1, 2, 63, 64, 65, 1000, 16384])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 20.0, 0.0])
def test_as_the_reference(backend, codes, temperature):
    for top_k, top_p in [(0, 1.0), (1, 1.0), (7, 1.0), (200, 0.9), (0, 0.5), (0, 0.999), (3, 0.01)]:
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
        for i, spread in enumerate((0.0, 0.1, 3.0, 40.0)):
            rows = slice(i, i + 1) if interpreted(backend) else slice(6)
            logits = spread * torch.randn(6, 2, codes)
            both(backend, logits[rows], SEEDS[rows], POSITIONS[rows], **options)


@pytest.mark.parametrize("tokens", [1, 3])
def test_guidance(backend, tokens):
    logits = 3 * torch.randn(12, tokens, 500)
    guidance = 3 * torch.rand(6, tokens)
    drawn = both(backend, logits, SEEDS, POSITIONS, guidance=guidance, top_k=50)
    off = both(backend, logits[:6], SEEDS, POSITIONS, top_k=50)
    assert not torch.equal(drawn, off)
    logits[6:, :, 0] = torch.inf  # not looked at
    one = both(backend, logits, SEEDS, POSITIONS, guidance=torch.ones(6, tokens), top_k=50)
    assert torch.equal(one, off)


def test_ties_and_what_is_out(backend):
    """The lowest code of the most likely; never one at -inf; all that tie with the k-th stay."""
    logits = torch.zeros(1, 1, 100)
    seed, position = torch.tensor([3]), torch.tensor([0])
    assert both(backend, logits, seed, position, temperature=0.0).item() == 0
    best = gumbel_noise(seed, 0, 100).argmax()
    assert both(backend, logits, seed, position, top_k=1).item() == best
    logits[0, 0, 1:] = -torch.inf
    for top_k in (0, 1, 50):
        assert both(backend, logits, seed, position, top_k=top_k).item() == 0
    logits[0, 0, 70] = 0.0
    seeds = torch.arange(200)
    logits = logits.expand(200, 1, 100)
    drawn = both(backend, logits, seeds, torch.zeros_like(seeds), top_k=50)
    assert set(drawn.unique().tolist()) == {0, 70}


def test_large_scores(backend):
    """Of which the last bits are larger than the noise."""
    for size in (1e3, 1e5, 1e8):
        logits = size + torch.randn(6, 4, 700) * size * 1e-6
        both(backend, logits, SEEDS, POSITIONS)
        both(backend, -logits, SEEDS, POSITIONS, top_k=30)
    both(backend, torch.full((6, 1, 700), 1e30), SEEDS, POSITIONS)  # the noise changes nothing
    seeds = torch.arange(40 if interpreted(backend) else 300)
    for size in (1e5, 1e7):  # where the noise decides, too
        logits = size + 2 * torch.randn(len(seeds), 1, 700)
        both(backend, logits, seeds, torch.zeros_like(seeds))


def test_strides_and_types(backend):
    """Rows may lie anywhere; Triton widens bf16 and fp16 first."""
    logits = 3 * torch.randn(3, 7, 200).transpose(0, 1)[:6, ::2, :100]
    seeds, positions = SEEDS.repeat_interleave(2)[::2], POSITIONS[:1].expand(6)
    guidance = 3 * torch.rand(2, 3).t()
    for options in (dict(top_k=20), dict(top_p=0.9), dict(temperature=0.0)):
        both(backend, logits, seeds, positions, **options)
        both(backend, logits, seeds[:3], positions[:3], guidance=guidance, **options)
        if backend == "triton":
            for low in (logits.bfloat16(), logits.half()):
                expected = run("reference", low.float(), seeds, positions, **options)
                assert torch.equal(run(backend, low, seeds, positions, **options), expected)


def test_triton_rows_that_registers_do_not_hold():
    """They are read once for each halving; here in small tiles."""
    skip_without_triton()
    guidance = torch.tensor([[1.5]])
    with tuning.use("draw", dict(HELD=64, TILE=128, num_warps=4)):
        for codes in (65, 128, 700):
            for top_k, top_p in [(9, 1.0), (0, 0.9), (64, 0.7)]:
                options = dict(temperature=0.7, top_k=top_k, top_p=top_p, guidance=guidance)
                logits = 4 * torch.randn(2, 1, codes)
                both("triton", logits, SEEDS[:1], POSITIONS[:1], **options)


def test_borders_of_the_nucleus(backend):
    """fp64 sums decide: p is where they reach a code, or just not. That code is drawn, if kept, by
    many a seed; beside it there are heavier ones and a long light tail."""
    logits = torch.cat([torch.randn(6), torch.linspace(-9, -20, 600)])[torch.randperm(606)]
    probabilities = logits.double().softmax(0).sort(descending=True).values.cumsum(0)
    seeds = torch.arange(12)
    logits = logits.expand(12, 1, -1)
    for kept in range(1, 6):
        for shift in (-1e-13, 1e-13):
            p = probabilities[kept - 1].item() + shift
            both(backend, logits, seeds, torch.zeros_like(seeds), top_p=p)
    for kept in (50, 400, 605):  # in the tail
        p = probabilities[kept].item()
        both(backend, logits[:1], seeds[:1], seeds[:1], top_p=min(p, 1 - 2**-53))


def test_close_scores(backend):
    """Of which the noise undoes all but the rounding of the logits: fp32 noise cannot tell."""
    seeds, positions = torch.arange(12), torch.full((12,), 3)
    noise = gumbel_noise(seeds, positions, 4104)[:, None]
    for offset in (0.0, 5.0, -70.0):
        both(backend, (offset - noise[..., :600]).float(), seeds, positions)
    logits = (5 - noise).float() - torch.rand(noise.shape) * 3e-4
    both(backend, logits[..., :600], seeds, positions, top_k=300)
    two = torch.full(noise.shape, -100.0)  # and no other
    for code in (7, 7 + 4096):  # a multiple of any tile apart
        two[..., code] = -noise[..., code].float()
    both(backend, two, seeds, positions)


def test_frequencies(backend):
    """Codes are drawn as often as their probabilities say."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    count = 1000 if interpreted(backend) else 20_000
    seeds, positions = torch.arange(count), torch.full((count,), 7)
    drawn = run(backend, probabilities.log().expand(count, 1, 4), seeds, positions)
    found = torch.bincount(drawn.flatten(), minlength=4) / count
    assert ((found - probabilities).abs() < 2.1 / count**0.5).all()


def test_undefined_logits(backend):
    """On a device the check is made later, and ends the process's use of it."""
    if backend == "triton" and not interpreted(backend):
        pytest.skip("raises on the CPU")
    undefined = [torch.full((1, 1, 5), -torch.inf)]
    for value in (torch.nan, torch.inf):
        logits = torch.randn(2, 1, 30)
        logits[1, 0, 4] = value
        undefined.append(logits)
    for logits in undefined:
        call = logits, SEEDS[: len(logits)], POSITIONS[: len(logits)]
        for name in (backend, "reference"):
            for options in (dict(), dict(temperature=0), dict(top_k=4, top_p=0.5)):
                with pytest.raises(ValueError, match="logits: expected numbers"):
                    run(name, *call, **options)


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
        ("seeds: on meta, but logits is on cpu", dict(seeds=seeds.to("meta"))),
        ("temperature: expected 0 or", dict(temperature=-1.0)),
        ("temperature: expected 0 or", dict(temperature=1e-38)),
        ("temperature: expected 0 or", dict(temperature=1e39)),
        ("temperature: expected 0 or", dict(temperature=float("nan"))),
        ("top_k: expected a whole number", dict(top_k=0.9)),
        ("top_k: expected a whole number", dict(top_k=1 << 63)),
        ("top_k: expected", dict(top_k=-1)),
        ("top_p: expected", dict(top_p=0.0)),
    ]:
        call = dict(logits=logits, seeds=seeds, positions=positions) | options
        with pytest.raises(ValueError, match=wrong):
            draw(**call)
    for wrong, options in [
        ("seeds: expected a tensor, got list", dict(seeds=[0, 1])),
        (
            "guidance: expected a tensor, got float",
            dict(logits=logits.repeat(2, 1, 1), guidance=3.0),
        ),
    ]:
        with pytest.raises(TypeError, match=wrong):
            draw(**dict(logits=logits, seeds=seeds, positions=positions) | options)
