"""Sampling: the noise, the filters, guidance, and pictures that depend on seed and prompt alone."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from t2i.lm import LM_CONFIGS, LMConfig, TransformerLM, decoding
from t2i.sampler import Sampler
from t2i.sampling import Statistics, sample_codes, score_codes
from t2i.speculation import MOST, Pace
from t2i_kernels import native, use_backend
from t2i_kernels.draw import gumbel_noise, keep_likely

TINY = LMConfig(
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=48,
    text_vocab_size=20,
    image_vocab_size=30,
    max_positions=40,
)
UNCOND = [0, 1]
PROMPTS = [[0, 5, 6, 1], [0, 7, 1], [0, 8, 9, 10, 11, 12, 1]]


@pytest.fixture(scope="module")
def lm() -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(TINY)
    with torch.no_grad():
        model.output.weight.mul_(4)  # opinions strong enough to be told from noise
    return model


def draw(lm, prompts=PROMPTS, seeds=(1, 2, 3), **options) -> torch.Tensor:
    options = {"grid": (3, 4), "unconditional": UNCOND, "cfg": 3.0, **options}
    return sample_codes(lm, prompts, seeds=list(seeds), **options).codes


fused = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the logits of every pass, on whichever path."""
    shapes = []

    def spy(method):
        def read(self, *args, **kwargs):
            logits = method(self, *args, **kwargs)
            shapes.append(tuple(logits.shape))
            return logits

        return read

    for kind in (decoding.ModuleDecoder, decoding.PackedModel):
        monkeypatch.setattr(kind, "read", spy(kind.read))
    draw_tokens = decoding.PackedModel.draw_tokens

    def several(self, codes, *, count, **options):  # reads, without a call of read
        shapes.extend([(len(self.cache.seqlens), 1, self.decoder.outputs)] * count)
        return draw_tokens(self, codes, count=count, **options)

    monkeypatch.setattr(decoding.PackedModel, "draw_tokens", several)
    return shapes


@torch.no_grad()
def draw_plainly(lm, prompt, seed, *, num_tokens, cfg, temperature=1.0, top_k=0, top_p=1.0):
    """The same picture without cache, batch or padding: the full text again for every token."""
    codes: list[int] = []
    first = lm.config.text_vocab_size
    lm.eval()
    for position in range(num_tokens):
        image = [first + code for code in codes]
        cond = lm(torch.tensor([[*prompt, *image]]))[0, -1, first:]
        uncond = lm(torch.tensor([[*UNCOND, *image]]))[0, -1, first:]
        logits = keep_likely((uncond + cfg * (cond - uncond))[None] / temperature, top_k, top_p)
        noise = gumbel_noise(torch.tensor([seed]), position, lm.config.image_vocab_size)
        codes.append((logits + noise).argmax().item())
    return codes


# --- noise


def test_noise_is_gumbel():
    noise = gumbel_noise(torch.arange(20), 3, 20_000)
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    # Kolmogorov-Smirnov distance of 400,000 draws; 0.00256 is exceeded once in a hundred times.
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    distance = (uniform - (torch.arange(400_000) + 0.5) / 400_000).abs().max()
    assert distance < 0.00256


def test_noise_of_neighbours_is_unrelated():
    """Seeds, positions and codes that differ by one, and (seed, position) that swap."""
    noise = torch.stack([gumbel_noise(torch.arange(4), p, 10_000) for p in range(4)])
    rows = noise.flatten(0, 1)
    assert len(rows.flatten().unique()) == rows.numel()
    correlation = torch.corrcoef(torch.cat([rows[:, :-1], rows[:, 1:]]))
    off_diagonal = correlation - torch.eye(32, dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.05  # 5 standard deviations of chance


def test_noise_is_a_fixed_function():
    """Numbers by Python's integers: another platform, or a changed constant, shows here."""
    mask = (1 << 64) - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    for seed, position in [(0, 0), (1, 5), (2**40, 255), (-3, 1)]:
        state = (mix(seed & mask) + position) & mask
        bits = [mix((mix(state) + 0x9E3779B97F4A7C15 * (code + 1)) & mask) for code in range(4)]
        expected = [-math.log(-math.log(((b >> 12) + 0.5) / 2**52)) for b in bits]
        got = gumbel_noise(torch.tensor([seed]), position, 4)[0]
        assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_gumbel_max_draws_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    picks = (logits + gumbel_noise(torch.arange(40_000), 0, 4)).argmax(dim=-1)
    share = picks.bincount(minlength=4) / 40_000
    assert torch.allclose(share, logits.softmax(0), atol=0.01)


# --- filters


def kept(logits: list[float], top_k: int, top_p: float) -> list[int]:
    return (
        torch.isfinite(keep_likely(torch.tensor([logits]), top_k, top_p))[0]
        .nonzero()[:, 0]
        .tolist()
    )


def test_top_k_and_top_p():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().tolist()
    assert kept(logits, 0, 1.0) == [0, 1, 2, 3]
    assert kept(logits, 2, 1.0) == [1, 3]
    assert kept(logits, 9, 1.0) == [0, 1, 2, 3]
    assert kept(logits, 0, 0.49) == [1]
    assert kept(logits, 0, 0.51) == [1, 3]
    assert kept(logits, 0, 0.76) == [1, 2, 3]
    assert kept(logits, 0, 1e-9) == [1]  # never nothing
    assert kept(logits, 2, 0.7) == [1, 3]  # of the two: 0.667 and 0.333
    assert kept(logits, 2, 0.6) == [1]
    unfiltered = torch.randn(2, 9)
    assert torch.equal(keep_likely(unfiltered, 0, 1.0), unfiltered)


# --- the loop


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg": 1.0},
        {"cfg": 0.0},
        {"temperature": 0.5, "top_k": 7},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9},
    ],
    ids=str,
)
def test_codes_equal_those_drawn_one_by_one(lm, options):
    codes = draw(lm, **options)
    assert codes.shape == (3, 3, 4) and codes.dtype == torch.int64
    options = {"cfg": 3.0, **options}
    for row, prompt, seed in zip(codes, PROMPTS, (1, 2, 3), strict=True):
        assert row.flatten().tolist() == draw_plainly(lm, prompt, seed, num_tokens=12, **options)


def test_a_picture_depends_on_its_seed_and_prompt_alone(lm):
    together = draw(lm)
    assert torch.equal(draw(lm, PROMPTS[::-1], (3, 2, 1)).flip(0), together)
    for i in range(3):
        assert torch.equal(draw(lm, PROMPTS[i : i + 1], [i + 1])[0], together[i])
    crowd = draw(lm, [[0, 3, 1], PROMPTS[1], [0, *range(2, 18), 1]], (9, 2, 9))
    assert torch.equal(crowd[1], together[1])
    assert not torch.equal(draw(lm, seeds=(4, 5, 6)), together)
    assert not torch.equal(
        draw(lm, PROMPTS[:1] * 2, (1, 2))[0], draw(lm, PROMPTS[:1] * 2, (1, 2))[1]
    )
    assert torch.equal(draw(lm, seeds=(1 + 2**64, 2, 3)), together)  # 64 bits of any integer


def test_the_shipped_size_draws_the_same_picture_in_any_batch():
    """fp32 rounding moves with the batch and its padding; here no token may move with it."""
    torch.manual_seed(1)
    lm = TransformerLM(LM_CONFIGS["emoji"])
    generator = torch.Generator().manual_seed(2)
    prompts = [
        [0, *torch.randint(3, 2048, (length,), generator=generator).tolist(), 1]
        for length in (3, 9, 5, 14)
    ]
    options = dict(grid=(4, 4), cfg=3.0)
    together = draw(lm, prompts, range(4), **options)
    order = [2, 0, 3, 1]
    assert torch.equal(draw(lm, [prompts[i] for i in order], order, **options), together[order])
    for i, prompt in enumerate(prompts):
        assert torch.equal(draw(lm, [prompt], [i], **options)[0], together[i])


def test_zero_temperature_takes_the_most_likely(lm):
    codes = draw(lm, temperature=0, seeds=(1, 2, 3))
    assert torch.equal(codes, draw(lm, temperature=0, seeds=(7, 8, 9)))
    assert torch.equal(codes, draw(lm, top_k=1, seeds=(7, 8, 9)))


def test_a_schedule_of_guidance(lm):
    constant = draw(lm, cfg=[3.0] * 12)
    assert torch.equal(constant, draw(lm, cfg=3.0))
    late = draw(lm, cfg=[1.0] * 6 + [5.0] * 6).flatten(1)
    assert torch.equal(late[:, :6], draw(lm, cfg=1.0).flatten(1)[:, :6])
    assert not torch.equal(late, draw(lm, cfg=1.0).flatten(1))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_unconditional_half_ends_with_guidance(lm, reads, backend):
    early = draw(lm, cfg=[3.0] * 5 + [1.0] * 7, backend=backend)
    assert [shape[0] for shape in reads] == [4] + [6] * 4 + [3] * 7
    # As if it had gone on: a scale of 1 + 2⁻⁵⁰ counts as guidance, and is 1 in fp32.
    late = draw(lm, cfg=[3.0] * 5 + [1.0] * 6 + [1 + 2.0**-50], backend=backend)
    assert torch.equal(early, late)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_unconditional_half_is_dropped_without_guidance(lm, reads, backend):
    draw(lm, cfg=3.0, backend=backend)
    draw(lm, cfg=1.0, unconditional=None, backend=backend)
    # The prompts, of which the unconditional one is read once, then 11 of 12 tokens: the last is
    # not read.
    assert [shape[0] for shape in reads] == [4] + [6] * 11 + [3] * 12


@pytest.mark.parametrize("backend", [None, "reference"])
def test_only_image_rows_of_the_head_are_computed(lm, reads, backend):
    draw(lm, backend=backend)
    assert reads == [(4, 1, 30)] + [(6, 1, 30)] * 11


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_loss_of_given_images(lm, backend, monkeypatch):
    torch.manual_seed(0)
    codes = torch.randint(30, (3, 3, 4))
    with use_backend(backend) if backend else contextlib.nullcontext():
        losses = score_codes(lm, PROMPTS, codes)
    for prompt, row, loss in zip(PROMPTS, codes.flatten(1), losses, strict=True):
        tokens = torch.tensor([*prompt, *(row + TINY.text_vocab_size).tolist()])
        with torch.no_grad():
            logits = lm(tokens[None, :-1])[0, len(prompt) - 1 :, TINY.text_vocab_size :]
        assert loss.item() == pytest.approx(F.cross_entropy(logits, row).item(), rel=1e-5)
    with pytest.raises(ValueError, match="2 prompts for codes of 3 images"):
        score_codes(lm, PROMPTS[:2], codes)
    with pytest.raises(ValueError, match="cache='fp8': expected one of"):
        score_codes(lm, PROMPTS, codes, cache="fp8")
    assert score_codes(lm, PROMPTS, codes[:, :1, :1]).shape == (3,)
    monkeypatch.setattr("t2i.sampling.SCORED", 5)  # in three parts
    assert torch.allclose(score_codes(lm, PROMPTS, codes), losses, atol=1e-6)
    if backend is None and native.reason() is None:
        coarse = score_codes(lm, PROMPTS, codes, weights="int4")
        assert 0 < (coarse - losses).abs().max() < 1


# --- the fused path


OPTIONS = [
    {},
    {"cfg": 1.0},
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    {"cfg": [4.0] * 5 + [1.0] * 7},
]


@fused
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_step_draws_what_modules_draw(lm, options, dtype):
    """With bf16 weights, what modules draw with the same weights in fp32."""
    import copy

    path = sample_codes(lm, PROMPTS[:1], grid=(1, 2), seeds=[0]).statistics.path
    assert path == "decode_step, fp32 weights"
    rounded = copy.deepcopy(lm).to(dtype).float()
    expected = draw(rounded, backend="reference", **options)
    weights = {torch.float32: None, torch.bfloat16: "bf16"}[dtype]
    assert torch.equal(draw(lm, weights=weights, **options), expected)


@fused
@pytest.mark.parametrize("changes", [
    dict(norm="layernorm", norm_bias=True, qk_norm="full"),
    dict(norm="layernorm", qk_norm="head", rotary="interleaved"),
    dict(rotary="head", num_kv_heads=4),
    dict(rotary="none", tied=True, ffn_dim=50),
], ids=str)  # fmt: skip
def test_the_fused_step_knows_all_kinds_of_models(changes):
    torch.manual_seed(0)
    lm = TransformerLM(TINY.replace(**changes))
    with torch.no_grad():
        for p in lm.parameters():  # norms that do something
            p.add_(0.1 * torch.randn_like(p))
    assert torch.equal(draw(lm), draw(lm, backend="reference"))


@fused
def test_a_thousand_greedy_tokens_are_those_of_the_reference():
    torch.manual_seed(0)
    lm = TransformerLM(TINY.replace(max_positions=1100, image_vocab_size=500))
    options = dict(grid=(32, 32), temperature=0, cfg=2.0)
    for weights in ("fp32", "bf16"):
        model = lm if weights == "fp32" else lm.to(torch.bfloat16).float()
        fused_codes = draw(model, PROMPTS[:1], [1], weights=weights, **options)
        plain = draw(model, PROMPTS[:1], [1], backend="reference", **options)
        assert torch.equal(fused_codes, plain) and len(plain.unique()) > 20


@fused
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integer_weights_draw_other_pictures_that_depend_on_their_seed_alone(lm, weights):
    together = draw(lm, weights=weights)
    for i in range(3):
        alone = draw(lm, PROMPTS[i : i + 1], [i + 1], weights=weights)
        assert torch.equal(alone[0], together[i])


@fused
def test_packed_weights_follow_the_model(lm):
    import copy

    model = copy.deepcopy(lm)
    before = draw(model)
    first = decoding.packed(model, "fp32")
    assert decoding.packed(model, "fp32") is first
    with torch.no_grad():
        model.layers[0].attention.qkv.weight.mul_(3)
    assert decoding.packed(model, "fp32") is not first
    after = draw(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, draw(model, backend="reference"))


def test_packed_weights_are_for_the_cpu_and_for_known_types(lm):
    with pytest.raises(ValueError, match="weights='bf16': packed weights are for models"):
        draw(TransformerLM(TINY).double(), weights="bf16")
    with pytest.raises(ValueError, match="weights='fp8': expected one of"):
        draw(lm, weights="fp8")


# --- guesses ahead


@fused
@pytest.mark.parametrize(
    "options", [*OPTIONS, {"weights": "int8"}, {"weights": "bf16", "cache": "int8"}], ids=str
)
@pytest.mark.parametrize("draft", ["jacobi", "int8", "int4"])
@pytest.mark.parametrize("ahead", [1, 2, 5, 30])
def test_guesses_change_no_token(lm, options, draft, ahead):
    guessed = draw(lm, speculate=ahead, draft=draft, **options)
    assert torch.equal(guessed, draw(lm, speculate=0, **options))


@fused
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("draft", ["jacobi", "int8"])
def test_plain_passes_between_guesses_change_no_token(lm, options, draft, monkeypatch):
    turns = itertools.cycle([2, 0, 3])  # 8 tokens without guesses
    monkeypatch.setattr(Pace, "guesses", lambda self: next(turns))
    assert torch.equal(draw(lm, draft=draft, **options), draw(lm, speculate=0, **options))


def test_jacobi_works_on_modules(lm):
    options = dict(backend="reference")
    assert torch.equal(draw(lm, speculate=3, **options), draw(lm, **options))
    with pytest.raises(ValueError, match="draft='int8': packed weights need decode_step"):
        draw(lm, speculate=3, draft="int8", **options)


@fused
def test_right_guesses_of_jacobi_save_passes():
    """A model that repeats itself is drawn in few passes; one image at a time in fewer."""
    torch.manual_seed(0)
    lm = TransformerLM(TINY)
    with torch.no_grad():
        for p in lm.layers.parameters():
            p.zero_()
        lm.output.weight.copy_(lm.tok_embeddings.weight * 20)  # the same code again
    options = dict(grid=(3, 4), cfg=1.0, temperature=0)
    plain = sample_codes(lm, PROMPTS, seeds=[1, 2, 3], **options)
    guessed = sample_codes(lm, PROMPTS, seeds=[1, 2, 3], speculate=3, draft="jacobi", **options)
    assert torch.equal(plain.codes, guessed.codes)
    assert plain.statistics.passes == 11 and guessed.statistics.passes == 3


@fused
def test_the_same_weights_guess_everything_right(lm):
    options = dict(grid=(3, 4), unconditional=UNCOND, cfg=3.0, weights="int8", draft="int8")
    numbers = sample_codes(lm, PROMPTS, seeds=[1, 2, 3], speculate=3, **options).statistics
    assert (numbers.passes, numbers.drafts) == (3, 3 + 3 + 2)


@fused
def test_the_bytes_that_are_read_are_counted(lm):
    options = dict(grid=(1, 3), seeds=[1], unconditional=UNCOND, cfg=3.0)
    prompt, rows = [0, 5, 6, 7, 8, 1], 2
    weights = {t: decoding.packed(lm, t).weights.numel() for t in ("int8", "fp32")}
    keys = 2 * TINY.num_kv_heads * TINY.head_dim * TINY.num_layers  # numbers in a slot
    plain = sample_codes(lm, [prompt], speculate=0, **options).statistics
    cached = len(prompt) + len(UNCOND)
    slots = (cached + rows) + (cached + 2 * rows)
    assert plain.bytes_read == 2 * weights["fp32"] + slots * keys * 4
    scales = 2 * TINY.num_kv_heads * TINY.num_layers
    small = sample_codes(lm, [prompt], speculate=0, cache="int8", **options).statistics
    assert small.bytes_read == 2 * weights["fp32"] + slots * (keys + 4 * scales)
    # One guess by the same weights, right; both codes are read together.
    same = dict(weights="int8", draft="int8", speculate=1)
    guessed = sample_codes(lm, [prompt], **same, **options).statistics
    assert (guessed.passes, guessed.drafts) == (1, 1)
    assert guessed.bytes_read == 2 * weights["int8"] + slots * keys * 4


@fused
def test_a_draft_that_is_given_is_used(lm):
    options = dict(grid=(3, 4), seeds=[1, 2, 3], unconditional=UNCOND, cfg=3.0)
    assert sample_codes(lm, PROMPTS, **options).statistics.drafts == 0
    assert sample_codes(lm, PROMPTS, draft="int4", **options).statistics.drafts > 0
    # By default the largest weights that are well below the size of the others.
    for weights, expected in (("bf16", "int8"), ("int8", "int4")):
        sample_codes(lm, PROMPTS, weights=weights, speculate=2, **options)
        assert list(decoding._packed[lm][1]) == [weights, expected]


@fused
def test_two_types_of_packed_weights_are_kept(lm):
    first = decoding.packed(lm, "fp32")
    decoding.packed(lm, "bf16")
    assert decoding.packed(lm, "fp32") is first
    decoding.packed(lm, "int8")  # bf16 goes, which was used before fp32
    assert list(decoding._packed[lm][1]) == ["fp32", "int8"]
    with pytest.raises(ValueError, match="weights='fp8'"):
        draw(lm, weights="fp8")
    assert decoding.packed(lm, "fp32") is first


@fused
def test_pictures_of_512_tokens_are_guessed_ahead_by_default():
    torch.manual_seed(0)
    lm = TransformerLM(TINY.replace(max_positions=600))
    options = dict(grid=(16, 32), seeds=[1, 2], unconditional=UNCOND, cfg=2.0)
    numbers = {}
    for ahead in (None, 0):
        codes, numbers[ahead] = sample_codes(lm, PROMPTS[:2], speculate=ahead, **options)
        numbers[ahead, "codes"] = codes
    assert torch.equal(numbers[None, "codes"], numbers[0, "codes"])
    assert numbers[None].drafts > 0 and numbers[0].drafts == 0
    for smaller in ("bf16", "int8"):
        assert sample_codes(lm, PROMPTS[:2], weights=smaller, **options).statistics.drafts == 0
    many = {**options, "seeds": [1, 2, 3]}  # six rows with guidance
    assert sample_codes(lm, PROMPTS, **many).statistics.drafts == 0
    with use_backend("reference"):  # whose bits depend on how many rows there are
        assert sample_codes(lm, PROMPTS[:2], weights="fp32", **options).statistics.drafts == 0


@pytest.mark.parametrize("draft, row, p, expected", [
    (1.0, 0.0, 0.9, 0),  # guesses that take as long as the pass itself
    (0.6, 0.0, 0.5, 0),  # or are right too seldom
    (0.1, 1.0, 0.9, 0),  # or are read no faster than one by one
    (0.01, 0.0, 0.98, MOST),
    (0.25, 0.01, 0.8, 3),  # 2.95 tokens in 1.78 of the time of a pass; 4: 3.36 in 2.04
])  # fmt: skip
def test_as_many_guesses_as_pay(draft, row, p, expected):
    pace = Pace()
    for _ in range(60):
        n = pace.guesses()
        right = sum(p**i for i in range(1, n + 1))  # on average
        pace.record(n, n * draft, 1 + n * row, right, 1 - p**n)
    assert pace.guesses() == expected


@fused
def test_guesses_change_no_token_of_models_with_a_prefix():
    torch.manual_seed(0)
    config = TINY.replace(
        prefix="caption", prefix_dim=6, prefix_length=5, image_grid=(3, 4), rotary="interleaved",
        text_vocab_size=0, num_kv_heads=4,
    )  # fmt: skip
    lm, features = TransformerLM(config), torch.randn(3, 5, 6)
    options = dict(unconditional=None, prefix_padding=torch.tensor([0, 3, 4]))
    assert torch.equal(draw(lm, features, speculate=3, **options), draw(lm, features, **options))


def test_options_of_decoding_are_checked(lm):
    with pytest.raises(ValueError, match="speculate=-1: expected at least 0"):
        draw(lm, speculate=-1)
    with pytest.raises(ValueError, match="draft='fp8': expected one of fp32, bf16, int8"):
        draw(lm, speculate=1, draft="fp8")
    with pytest.raises(ValueError, match="cache='fp8': expected one of fp32, bf16, fp16, int8"):
        draw(lm, cache="fp8")


@pytest.mark.parametrize("cache, backend", [
    pytest.param("bf16", None, marks=fused), pytest.param("fp16", None, marks=fused),
    ("int8", None), ("int8", "reference"),
])  # fmt: skip
def test_smaller_caches_draw_nearly_the_same(lm, cache, backend):
    small, plain = draw(lm, cache=cache, backend=backend), draw(lm, backend=backend)
    assert (small == plain).float().mean() > 0.5
    alone = draw(lm, PROMPTS[1:2], [2], cache=cache, backend=backend)
    assert torch.equal(alone[0], small[1])
    numbers = [
        sample_codes(lm, PROMPTS, grid=(3, 4), seeds=[1, 2, 3], cache=c, backend=backend).statistics
        for c in (cache, None)
    ]
    assert numbers[0].bytes_read < numbers[1].bytes_read


def test_modules_keep_the_models_type_or_int8(lm):
    with pytest.raises(ValueError, match="cache: modules keep keys and values in torch.float32"):
        draw(lm, cache="bf16", backend="reference")


@pytest.mark.parametrize("kind", ["class", "caption"])
def test_models_with_a_prefix(kind):
    torch.manual_seed(0)
    prefix = dict(prefix="class", prefix_dim=7, prefix_length=1)
    if kind == "caption":
        prefix = dict(prefix="caption", prefix_dim=6, prefix_length=5)
    config = TINY.replace(
        **prefix, image_grid=(3, 4), rotary="interleaved", text_vocab_size=0, num_kv_heads=4
    )
    lm = TransformerLM(config)
    classes = torch.tensor([2, 5, 2])
    condition = classes if kind == "class" else torch.randn(3, 5, 6)
    codes = draw(lm, condition, unconditional=None)
    with torch.no_grad():  # the last token again, from a full pass
        read = codes.flatten(1)[:, :-1]
        cond = lm(read, prefix=condition)[:, -1]
        uncond = lm(read, prefix=lm.prefix_embedding.unconditional(3))[:, -1]
        logits = uncond + 3 * (cond - uncond)
        last = (logits + gumbel_noise(torch.tensor([1, 2, 3]), 11, 30)).argmax(dim=-1)
    assert torch.equal(codes.flatten(1)[:, -1], last)
    if kind == "caption":
        padding = torch.tensor([0, 3, 4])
        padded = draw(lm, condition, unconditional=None, prefix_padding=padding)
        condition[1, :3] += 1  # not read
        again = draw(lm, condition, unconditional=None, prefix_padding=padding)
        assert torch.equal(again, padded)
        assert torch.equal(padded[0], codes[0]) and not torch.equal(padded[1:], codes[1:])
        with pytest.raises(ValueError, match=r"prefix_padding: .* each of 3 .*, got \(1,\)"):
            draw(lm, condition, unconditional=None, prefix_padding=padding[:1])
        for wrong in (-1, 5):
            with pytest.raises(ValueError, match=f"prefix_padding: expected 0 to 4, got .*{wrong}"):
                padding = torch.tensor([0, wrong, 0])
                draw(lm, condition, unconditional=None, prefix_padding=padding)
    with pytest.raises(ValueError, match=r"grid=\(4, 3\).*\(3, 4\)"):
        draw(lm, condition, grid=(4, 3))
    with pytest.raises(ValueError, match=r"grid=\(4, 3\).*\(3, 4\)"):
        score_codes(lm, condition, torch.zeros(3, 4, 3, dtype=torch.int64))


def test_statistics_and_progress(lm):
    calls = []
    progress = lambda done, total: calls.append((done, total))  # noqa: E731
    codes, statistics = sample_codes(lm, PROMPTS, grid=(3, 4), seeds=[1, 2, 3], progress=progress)
    assert calls == [(1, 12), (9, 12), (12, 12)]
    assert (statistics.images, statistics.tokens) == (3, 36)
    assert statistics.prefill_seconds > 0 and statistics.decode_seconds > 0
    both = statistics + Statistics(images=1, tokens=4, pixel_seconds=2.0)
    assert (both.images, both.tokens, both.pixel_seconds) == (4, 40, 2.0)
    seconds = statistics.prefill_seconds + statistics.decode_seconds
    assert both.tokens_per_second == pytest.approx(40 / seconds)
    assert both.seconds_per_image == pytest.approx((seconds + 2) / 4)


def test_a_step_is_one_graph(lm, monkeypatch):
    """Nothing in it waits for the device or branches on its numbers: compiling it is one line."""
    expected = draw(lm, top_k=9, top_p=0.9)
    step = torch.compile(Sampler.next, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(Sampler, "next", step)
    assert torch.equal(draw(lm, top_k=9, top_p=0.9, backend="reference"), expected)


def test_the_backend_can_be_chosen_and_is_reported(lm):
    samples = sample_codes(lm, PROMPTS, grid=(3, 4), seeds=[1, 2, 3], backend="reference")
    assert samples.statistics.backend == "reference"
    assert (samples.statistics + Statistics(pixel_seconds=1.0)).backend == "reference"
    with pytest.raises(ValueError, match="'tpu'"):
        draw(lm, backend="tpu")


def test_double_precision_is_kept(lm):
    """The way out where not even a tie in the last bits of fp32 may move a picture."""
    import copy

    double = copy.deepcopy(lm).double().eval()
    tokens = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        logits = double(tokens)
        cached = double(tokens, cache=double.allocate_cache(1, 7))
        single = lm.eval()(tokens)
    assert logits.dtype == torch.float64
    assert (logits - cached).abs().max() < 1e-12 < (logits - single).abs().max() < 1e-4
    assert draw(double).shape == (3, 3, 4)


def test_an_interrupt_leaves_the_model_as_it_was(lm):
    def interrupt(done, total):
        if done == 9:
            raise KeyboardInterrupt

    expected = draw(lm)
    lm.train()
    with pytest.raises(KeyboardInterrupt):
        draw(lm, progress=interrupt)
    assert lm.training
    lm.eval()
    draw(lm)
    assert not lm.training and torch.equal(draw(lm), expected)


def test_edge_sizes(lm):
    assert draw(lm, [], []).shape == (0, 3, 4)
    assert draw(lm, grid=(1, 1)).shape == (3, 1, 1)
    assert torch.equal(draw(lm, grid=(1, 1))[:, 0, 0], draw(lm)[:, 0, 0])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(seeds=[1]), "3 prompts and 1 seeds"),
        (dict(temperature=-1.0), "temperature: expected .*, got -1.0"),
        (dict(temperature=float("nan")), "temperature: expected .*, got nan"),
        (dict(temperature=float("inf")), "temperature: expected .*, got inf"),
        (dict(top_k=-1), "top_k: expected .*, got -1"),
        (dict(top_p=0.0), "top_p: expected .*, got 0.0"),
        (dict(top_p=1.5), "top_p: expected .*, got 1.5"),
        (dict(cfg=-1.0), "cfg: expected .*, got -1.0"),
        (dict(cfg=float("inf")), "cfg: expected .*, got inf"),
        (dict(cfg=[1.0, 2.0]), "schedule of 2 scales for 12 tokens"),
        (dict(unconditional=None), "unconditional prompt"),
        (dict(grid=(0, 4)), "grid"),
        (dict(grid=(6, 6)), "7 positions and 36 image tokens exceed.*max_positions=40"),
        (dict(prompts=[[0, 1], [], [0, 1]]), "one has no tokens"),
    ],
)
def test_bad_options_are_named(lm, options, message):
    with pytest.raises(ValueError, match=message):
        draw(lm, **options)


def test_a_model_without_image_tokens_cannot_draw():
    with pytest.raises(ValueError, match="extend_vocabulary"):
        draw(TransformerLM(TINY.replace(image_vocab_size=0)))
