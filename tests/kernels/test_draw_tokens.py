"""draw_tokens: what decode_step and draw give in turns, to the bit."""

from __future__ import annotations

import pytest
import torch
from test_decode_step import DIM, OUTPUTS, decoder, poisoned

from t2i_kernels import BackendError, native
from t2i_kernels.decode_step import decode_step
from t2i_kernels.draw import draw
from t2i_kernels.draw_tokens import api, draw_tokens

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))

SEEDS = torch.tensor([3, -5, 7])
POSITIONS = torch.tensor([0, 4, 9])


@pytest.fixture(params=native.cpu_capabilities())
def capability(request):
    with native.use_cpu_capability(request.param):
        yield request.param


def problem(count, *, guided, dtype=torch.float32, start=None, **options):
    """A model, a cache behind prompts, an embedding, the last codes, scales of guidance."""
    torch.manual_seed(0)
    model = decoder(**options)
    rows = len(SEEDS) * (2 if guided else 1)
    prompt = torch.randn(rows, 5, DIM)
    cache = poisoned(model, rows, 5 + count, dtype, start)
    decode_step(prompt, model, cache, backend="cpu")
    embedding = torch.randn(OUTPUTS, DIM)
    codes = torch.tensor([1, OUTPUTS - 1, 0])
    scales = 1 + 2 * torch.rand(len(SEEDS), count) if guided else None
    if guided:
        scales[1, 1:] = 1
    return model, cache, embedding, codes, scales


def in_turns(model, cache, embedding, codes, scales, count, backend="cpu", **options):
    drawn = []
    for i in range(count):
        x = embedding[codes][:, None]
        x = x if scales is None else torch.cat([x, x])
        logits = decode_step(x, model, cache, backend=backend)
        guidance = None if scales is None else scales[:, i : i + 1].contiguous()
        codes = draw(logits, SEEDS, POSITIONS + i, guidance=guidance, backend=backend, **options)
        codes = codes[:, 0]
        drawn.append(codes)
    return torch.stack(drawn, dim=1)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.0}, {"temperature": 0.6, "top_k": 9, "top_p": 0.8},
], ids=str)  # fmt: skip
def test_codes_are_those_drawn_in_turns(capability, guided, options):
    count = 6
    expected = in_turns(*problem(count, guided=guided), count, **options)
    model, cache, embedding, codes, scales = problem(count, guided=guided)
    drawn = draw_tokens(
        codes, embedding, model, cache, count=count, seeds=SEEDS, positions=POSITIONS,
        guidance=scales, backend="cpu", **options,
    )  # fmt: skip
    assert torch.equal(drawn, expected) and len(drawn.unique()) > 3
    assert cache.seqlens.tolist() == [5 + count] * len(cache.seqlens)


@pytest.mark.parametrize("dtype, weight_type", [(torch.int8, "int8"), (torch.bfloat16, "int4")])
def test_caches_and_weights(capability, dtype, weight_type):
    options = dict(guided=True, dtype=dtype, weight_type=weight_type, start=[2, 0, 1, 0, 3, 4])
    plain = problem(4, **options)
    expected = in_turns(*plain, 4)
    model, cache, embedding, codes, scales = problem(4, **options)
    settings = dict(seeds=SEEDS, positions=POSITIONS, backend="cpu")
    first = draw_tokens(
        codes, embedding, model, cache, count=1, guidance=scales[:, :1], **settings
    )  # and the others, which continue it
    settings["positions"] = POSITIONS + 1
    rest = draw_tokens(
        first[:, 0], embedding, model, cache, count=3, guidance=scales[:, 1:], **settings
    )
    assert torch.equal(torch.cat([first, rest], dim=1), expected)
    for ours, theirs in zip(vars(cache).values(), vars(plain[1]).values(), strict=True):
        assert (ours is None and theirs is None) or ours.equal(theirs)


def test_rows_of_different_lengths(capability):
    """As where guesses of some images were right, and of others not."""
    drawn = []
    for together in (True, False):
        model, cache, embedding, codes, _ = problem(4, guided=False)
        cache.seqlens -= torch.tensor([0, 2, 1], dtype=torch.int32)
        if together:
            drawn.append(in_turns(model, cache, embedding, codes, None, 4))
        else:
            settings = dict(seeds=SEEDS, positions=POSITIONS, backend="cpu")
            drawn.append(draw_tokens(codes, embedding, model, cache, count=4, **settings))
    assert torch.equal(*drawn)


def test_the_operator_itself_reads_nothing_out_of_bounds():
    """Where it is called past the checks of draw_tokens."""
    model, cache, embedding, codes, scales = problem(4, guided=True)
    good = api._bind(
        codes, embedding, model, cache, count=4, seeds=SEEDS, positions=POSITIONS, guidance=scales
    )
    names = ["codes", "embedding", "count", "seeds", "positions", "guidance"]
    for name, wrong, error in [
        ("codes", codes - 1, ValueError),
        ("codes", codes + 1, ValueError),
        ("codes", codes[:2], ValueError),
        ("embedding", embedding[1:], ValueError),
        ("embedding", embedding.double(), ValueError),
        ("embedding", embedding[:, 1:].contiguous(), ValueError),
        ("seeds", SEEDS[:2], ValueError),
        ("positions", POSITIONS[:2], ValueError),
        ("guidance", scales[:, 1:], ValueError),
        ("guidance", None, ValueError),
    ]:
        call = list(good)
        call[names.index(name)] = wrong
        with pytest.raises(error, match="draw_tokens: "):
            torch.ops.t2i.draw_tokens.cpu(*call)
    wider = torch.cat([scales, scales[:, :1]], dim=1)
    for place, tensor, match in [
        (None, None, "slots 5 to 9, but the cache has 9"),
        (9 + 13, cache.seqlens - 6, "cache.seqlens"),
        (9 + 14, cache.start - 1, "start"),
    ]:
        call = list(good)
        call[2], call[5] = (5, wider) if place is None else (4, scales)
        if place is not None:
            call[place] = tensor
        with pytest.raises(IndexError, match=f"draw_tokens: .*{match}"):
            torch.ops.t2i.draw_tokens.cpu(*call)
    call = list(good)
    call[9 + 3] = 0  # heads
    with pytest.raises(ValueError, match="draw_tokens: heads, 0, is no multiple"):
        torch.ops.t2i.draw_tokens.cpu(*call)
    assert cache.k[:, :, 5:].isnan().all()


def test_the_reference_draws_the_same():
    expected = in_turns(*problem(5, guided=True), 5, backend="reference")
    for backend in ("reference", "cpu"):
        model, cache, embedding, codes, scales = problem(5, guided=True)
        drawn = draw_tokens(
            codes, embedding, model, cache, count=5, seeds=SEEDS, positions=POSITIONS,
            guidance=scales, backend=backend,
        )  # fmt: skip
        assert torch.equal(drawn, expected)
        assert cache.seqlens.tolist() == [10] * 6


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_full_cache_is_an_error_before_anything_is_written(backend):
    model, cache, embedding, codes, _ = problem(4, guided=False)
    with pytest.raises(IndexError, match="slots up to 9, but the cache has 9"):
        draw_tokens(
            codes, embedding, model, cache, count=5, seeds=SEEDS, positions=POSITIONS,
            backend=backend,
        )  # fmt: skip
    assert cache.k[:, :, 5:].isnan().all() and cache.seqlens.tolist() == [5] * 3


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("from_start", [True, False])
def test_positions_beyond_the_rotary_table_are_an_error_before_anything_is_written(
    backend, from_start
):
    model, cache, embedding, codes, _ = problem(4, guided=False, positions_from_start=from_start)
    model.rotary_cos, model.rotary_sin = model.rotary_cos[:7], model.rotary_sin[:7]
    with pytest.raises(IndexError, match="position 8 is outside rotary_cos, which has 7"):
        draw_tokens(
            codes, embedding, model, cache, count=4, seeds=SEEDS, positions=POSITIONS,
            backend=backend,
        )  # fmt: skip
    assert cache.k[:, :, 5:].isnan().all() and cache.seqlens.tolist() == [5] * 3


def test_a_cache_that_the_cpu_cannot_take_is_for_the_reference():
    expected, *_ = drawn_by_turns = problem(4, guided=False)
    expected = in_turns(*drawn_by_turns, 4)
    model, cache, embedding, codes, _ = problem(4, guided=False)
    wide = model.allocate_cache(3, 12).v[:, :, :9]
    cache.v = wide.copy_(cache.v)
    settings = dict(count=4, seeds=SEEDS, positions=POSITIONS)
    reason = "layers of the keys in the cache are not as far apart"
    with pytest.raises(BackendError, match=reason):
        draw_tokens(codes, embedding, model, cache, backend="cpu", **settings)
    with pytest.raises(BackendError, match=reason):
        decode_step(embedding[codes][:, None], model, cache, backend="cpu")
    assert torch.equal(draw_tokens(codes, embedding, model, cache, **settings), expected)


def test_errors_name_the_argument():
    model, cache, embedding, codes, scales = problem(4, guided=True)
    good = dict(count=4, seeds=SEEDS, positions=POSITIONS, guidance=scales)
    for error, match, call, changes in [
        (TypeError, r"codes: expected int64 \[images\]", (codes[:, None], embedding), {}),
        (ValueError, "codes: expected 0 to 49", (codes + 1, embedding), {}),
        (ValueError, "embedding: expected float32", (codes, embedding[1:]), {}),
        (ValueError, "embedding: expected float32", (codes, embedding.double()), {}),
        (ValueError, "count: expected a whole number", (codes, embedding), {"count": 0}),
        (ValueError, "count: expected a whole number", (codes, embedding), {"count": 2.0}),
        (TypeError, "embedding: expected a tensor", (codes, None), {}),
        (ValueError, "seeds: expected int64", (codes, embedding), {"seeds": SEEDS[:2]}),
        (ValueError, "guidance: expected float32", (codes, embedding), {"guidance": scales[:, 1:]}),
        (ValueError, "cache.k: expected", (codes, embedding), {"guidance": None}),
        (TypeError, "guidance: expected a tensor", (codes, embedding), {"guidance": 3.0}),
        (ValueError, "top_p: expected", (codes, embedding), {"top_p": 0.0}),
        (ValueError, "top_k: expected a whole number", (codes, embedding), {"top_k": 0.9}),
        (ValueError, "temperature: expected 0 or", (codes, embedding), {"temperature": 1e-38}),
    ]:
        with pytest.raises(error, match=match):
            draw_tokens(*call, model, cache, **{**good, **changes})
    with pytest.raises(TypeError, match="decoder: expected a PackedDecoder"):
        draw_tokens(codes, embedding, None, cache, **good)
    assert cache.seqlens.tolist() == [5] * 6
    embedding[codes[0]] = torch.nan
    with pytest.raises(ValueError, match="logits: expected numbers"):
        draw_tokens(codes, embedding, model, cache, **good)
    assert cache.seqlens.tolist() == [5] * 6
