"""decode_step: the native step against the plain one, and what it promises of rows and caches."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from t2i_kernels import native, registry
from t2i_kernels.decode_step import LayerWeights, NormWeights, PackedDecoder, decode_step
from t2i_kernels.linear import WEIGHT_TYPES

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))

DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, OUTPUTS = 44, 6, 2, 12, 40, 3, 50


@pytest.fixture(params=native.cpu_capabilities())
def capability(request):
    with native.use_cpu_capability(request.param):
        yield request.param


def norm(channels: int, bias: bool = False) -> NormWeights:
    return NormWeights(1 + 0.3 * torch.randn(channels), torch.randn(channels) if bias else None)


def decoder(weight_type="fp32", *, norm_name="rmsnorm", qk_norm="none", rotary="half",
            ffn=FFN, gate=1.0, **options) -> PackedDecoder:  # fmt: skip
    bias = norm_name == "layernorm"
    full = qk_norm == "full"

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / math.sqrt(columns)

    layers = []
    for _ in range(LAYERS):
        qk = {}
        if qk_norm != "none":
            qk = dict(
                q_norm=norm(HEADS * HEAD_DIM if full else HEAD_DIM, bias),
                k_norm=norm(KV_HEADS * HEAD_DIM if full else HEAD_DIM, bias),
            )
        layers.append(
            LayerWeights(
                attention_norm=norm(DIM, bias),
                qkv=matrix((HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM),
                out=matrix(DIM, HEADS * HEAD_DIM),
                ffn_norm=norm(DIM, bias),
                gate_up=gate * matrix(2 * ffn, DIM),
                down=matrix(DIM, ffn),
                **qk,
            )
        )
    if rotary != "none":
        angles = 2 * math.pi * torch.rand(400, HEAD_DIM // 2)
        options |= dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())
        options["rotary_interleaved"] = rotary == "interleaved"
    return PackedDecoder.pack(
        layers, norm(DIM, bias), matrix(OUTPUTS, DIM), heads=HEADS, kv_heads=KV_HEADS,
        weight_type=weight_type, norm_name=norm_name, qk_norm=qk_norm, **options,
    )  # fmt: skip


def poisoned(model: PackedDecoder, batch: int, slots: int, dtype=torch.float32, start=None):
    start = None if start is None else torch.tensor(start, dtype=torch.int32)
    cache = model.allocate_cache(batch, slots, start=start, dtype=dtype)
    for buffer in (cache.k, cache.v, cache.k_scale, cache.v_scale):
        if buffer is not None:
            buffer.fill_(math.nan if buffer.is_floating_point() else -128)
    return cache


def run(model, xs, backend, dtype=torch.float32, start=None, last=1):
    """Logits after each part of xs, and the cache behind them."""
    slots = sum(x.shape[1] for x in xs)
    cache = poisoned(model, len(xs[0]), slots, dtype, start)
    logits = [decode_step(x, model, cache, last=min(last, x.shape[1]), backend=backend) for x in xs]
    return logits, cache


def agree(model, xs, tolerance=2e-5, **options):
    ours, cache = run(model, xs, "cpu", **options)
    theirs, expected = run(model, xs, "reference", **options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    assert torch.equal(cache.seqlens, expected.seqlens)


def tokens(batch: int, *lengths: int) -> list[torch.Tensor]:
    return [torch.randn(batch, n, DIM) for n in lengths]


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_weight_types(capability, weight_type):
    """Integer weights see inputs in 8 bits: a last bit may move one by a step of 1/127."""
    tolerance = 2e-5 if weight_type in ("fp32", "bf16") else 5e-2
    agree(decoder(weight_type), tokens(3, 5, 1, 1, 2), tolerance)


@pytest.mark.parametrize("norm_name", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("rotary", ["none", "half", "interleaved"])
def test_kinds_of_models(capability, norm_name, qk_norm, rotary):
    model = decoder(norm_name=norm_name, qk_norm=qk_norm, rotary=rotary, ffn=41)
    agree(model, tokens(2, 4, 1, 3), start=[0, 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_caches(capability, dtype):
    agree(decoder(), tokens(2, 4, 1, 3), dtype=dtype, start=[1, 0])


def test_positions_of_slots(capability):
    agree(decoder(positions_from_start=False), tokens(2, 4, 1, 3), start=[0, 3])


def test_gates_of_any_size(capability):
    """Sigmoids that are 0 or 1, far beyond where an exponential of a gate overflows."""
    model = decoder(gate=1000.0)
    (logits,), _ = run(model, tokens(2, 4), "cpu")
    assert logits.isfinite().all()
    agree(model, tokens(2, 4), tolerance=2e-4)


def test_long_prompts_and_caches(capability):
    """Many rows are prepared by all threads together; parts of a cache are put together again."""
    torch.set_num_threads(2)
    agree(decoder(), tokens(3, 150, 1, 2, 1), last=2)
    agree(decoder("bf16"), tokens(2, 300, 1), last=300)


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_a_row_does_not_depend_on_the_others(capability, weight_type):
    """Nor on how its tokens are divided among calls, nor on the threads: to the bit."""
    model = decoder(weight_type)
    (x,) = tokens(5, 140)
    (together,), cache = run(model, [x], "cpu", last=140)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows, sizes in [(1, [140]), (2, [130, 10]), (1, [125] + 15 * [1]), (5, [137, 1, 2])]:
            logits, alone = run(model, list(x[:rows].split(sizes, dim=1)), "cpu", last=140)
            assert torch.equal(torch.cat(logits, dim=1), together[:rows])
            assert torch.equal(alone.k, cache.k[:, :rows]) and torch.equal(
                alone.v, cache.v[:, :rows]
            )


def test_padding_does_not_matter(capability):
    model = decoder()
    (x,) = tokens(1, 9)
    (alone,), _ = run(model, [x], "cpu", last=9)
    padded = torch.cat([torch.randn(1, 4, DIM), x], dim=1)
    (behind,), _ = run(model, [padded], "cpu", start=[4], last=9)
    assert torch.equal(alone, behind)


def test_going_back(capability):
    """Lower seqlens forget tokens; what was written there is overwritten."""
    model = decoder()
    x, wrong, right = tokens(2, 6, 3, 2)
    cache = poisoned(model, 2, 9)
    decode_step(x, model, cache, backend="cpu")
    decode_step(wrong, model, cache, backend="cpu")
    cache.advance(-3)
    again = decode_step(right, model, cache, backend="cpu")
    (_, straight), _ = run(model, [x, right], "cpu")
    assert torch.equal(again, straight)


def test_rows_of_different_lengths(capability):
    model = decoder()
    x, y = tokens(2, 7, 1)
    cache = poisoned(model, 2, 8)
    decode_step(x, model, cache, backend="cpu")
    cache.seqlens.copy_(torch.tensor([7, 4], dtype=torch.int32))
    both = decode_step(y, model, cache, backend="cpu")
    (_, short), _ = run(model, [x[1:, :4], y[1:]], "cpu")
    assert torch.equal(both[1:], short)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_full_cache_is_an_error_before_anything_is_written(backend, count):
    model = decoder()
    x, y = tokens(2, 6, count)
    cache = poisoned(model, 2, 5 + count)
    decode_step(x, model, cache, backend=backend)
    before = dataclasses.replace(cache, k=cache.k.clone(), v=cache.v.clone())
    with pytest.raises(IndexError, match="cache.seqlens puts the new tokens into slots"):
        decode_step(y, model, cache, backend=backend)
    assert cache.seqlens.tolist() == [6, 6]
    for a, b in ((cache.k, before.k), (cache.v, before.v)):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_a_long_prompt_that_does_not_fit_writes_nothing():
    model = decoder(rotary="none")
    cache = poisoned(model, 2, 600)
    with pytest.raises(IndexError, match="slots up to 600, but the cache has 600"):
        decode_step(torch.randn(2, 601, DIM), model, cache)
    assert cache.k.isnan().all() and cache.seqlens.tolist() == [0, 0]


def test_the_operator_itself_reads_nothing_out_of_bounds():
    """Where it is called past the checks of decode_step."""
    from t2i_kernels.decode_step import api

    model = decoder()
    cache = model.allocate_cache(2, 8)
    x = torch.randn(2, 1, DIM)
    names = ["k_cache", "v_cache", "k_scale", "v_scale", "seqlens", "start", "cos", "sin"]
    for name, wrong in [
        ("k_cache", cache.k[:, :1]),
        ("v_cache", cache.v[:, :, :4]),
        ("v_cache", model.allocate_cache(2, 9).v[:, :, :8]),
        ("k_cache", cache.k.char()),
        ("k_scale", cache.k[..., 0].contiguous()),
        ("seqlens", cache.seqlens[:1]),
        ("start", cache.start[:1]),
        ("cos", torch.ones(400, 20)),
        ("sin", torch.ones(3, HEAD_DIM // 2)),
        ("sin", None),
    ]:
        call = list(api._bind(x, model, cache))
        call[10 + names.index(name)] = wrong
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.t2i.decode_step.cpu(*call)
    for weights in (model.weights[:-64], torch.cat([model.weights, model.weights[:64]])):
        call = list(api._bind(x, model, cache))
        call[1] = weights
        with pytest.raises(ValueError, match="weights"):
            torch.ops.t2i.decode_step.cpu(*call)


def test_weights_that_do_not_fit_are_named():
    good = dict(
        attention_norm=norm(8, False), qkv=torch.zeros(24, 8), out=torch.zeros(8, 8),
        ffn_norm=norm(8, False), gate_up=torch.zeros(82, 8), down=torch.zeros(8, 41),
    )  # fmt: skip

    def pack(options=(), **changes):
        layer = LayerWeights(**{**good, **changes})
        options = dict(heads=1, kv_heads=1, weight_type="fp32") | dict(options)
        return PackedDecoder.pack([layer], norm(8, False), torch.zeros(9, 8), **options)

    pack()
    for match, changes in [
        (r"layers.0.gate_up: expected \(82, 8\), got \(2, 8\)", dict(gate_up=torch.zeros(2, 8))),
        (r"layers.0.gate_up: expected \(82, 8\), got \(84, 8\)", dict(gate_up=torch.zeros(84, 8))),
        (r"layers.0.out: expected \(8, 8\)", dict(out=torch.zeros(9, 8))),
        ("layers.0.ffn_norm: expected weights", dict(ffn_norm=norm(9, False))),
        ("layers.0.ffn_norm.bias: expected none", dict(ffn_norm=norm(8, True))),
        ("layers.0.q_norm: expected none, as qk_norm='none'", dict(q_norm=norm(8, False))),
        ("layers.0.k_norm: expected weights", dict(options={"qk_norm": "head"},
                                                   q_norm=norm(8, False))),
        (r"layers.0.attention_norm.bias: expected \(8,\), got \(7,\)", dict(
            options={"norm_name": "layernorm"},
            attention_norm=NormWeights(torch.ones(8), torch.ones(7)))),
        (r"rotary_cos: expected float32 \[positions, R/2\], got torch.bfloat16", dict(
            options=dict(rotary_cos=torch.ones(4, 4).bfloat16(), rotary_sin=torch.ones(4, 4)))),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            pack(**changes)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        PackedDecoder.pack(
            [], norm(8, False), torch.zeros(9, 8), heads=1, kv_heads=1, weight_type="fp32"
        )


@pytest.mark.parametrize("from_start", [True, False])
def test_a_long_prompt_beyond_the_rotary_table_writes_nothing(from_start):
    model = decoder(positions_from_start=from_start)
    cache = poisoned(model, 1, 700)
    with pytest.raises(IndexError, match="position 599 is outside rotary_cos, which has 400"):
        decode_step(torch.randn(1, 600, DIM), model, cache)
    assert cache.k.isnan().all() and cache.seqlens.tolist() == [0]
    with pytest.raises(IndexError, match="rotary_cos, which has 400"):
        decode_step(torch.randn(1, 401, DIM), model, cache, backend="reference")
    assert cache.k.isnan().all() and cache.seqlens.tolist() == [0]


def test_long_caches_take_prompts_in_smaller_parts(monkeypatch):
    from t2i_kernels.decode_step import api

    parts = []

    def select(*call):
        run = registry.select(*call).run
        return SimpleNamespace(run=lambda x, *rest: parts.append(x.shape[1]) or run(x, *rest))

    monkeypatch.setattr(api, "select", select)
    model = decoder(rotary="none")
    x = torch.randn(1, 200, DIM)
    logits = [decode_step(x, model, model.allocate_cache(1, slots)) for slots in (200, 8192)]
    assert torch.equal(*logits) and parts == [200, 128, 72]


def test_errors_name_the_argument():
    model = decoder()
    cache = model.allocate_cache(2, 8)
    x = torch.randn(2, 1, DIM)
    for error, match, call in [
        (TypeError, "decoder: expected a PackedDecoder", (x, None, cache)),
        (TypeError, "cache: expected a KVCache", (x, model, None)),
        (TypeError, "x: expected float32", (x.double(), model, cache)),
        (ValueError, r"x: expected \[batch, tokens, 44\]", (x[..., :4], model, cache)),
        (ValueError, "cache.k: expected", (x[:1], model, cache)),
    ]:
        with pytest.raises(error, match=match):
            decode_step(*call)
    for changes, error, match in [
        (dict(v=cache.v.bfloat16()), TypeError, "cache.v: expected float32"),
        (dict(k=cache.k.char(), v=cache.v.char()), ValueError, "cache.k_scale: expected float32"),
        (dict(k_scale=cache.k[..., 0]), ValueError, "cache.k_scale: expected None"),
        (dict(seqlens=cache.seqlens[:1]), ValueError, "cache.seqlens: expected int32"),
        (dict(start=cache.start.long()), ValueError, "cache.start: expected int32"),
        (dict(v=cache.v.to("meta")), ValueError, "cache.v: on meta, but decoder is on cpu"),
        (dict(seqlens=cache.seqlens.to("meta")), ValueError, "cache.seqlens: on meta"),
    ]:
        with pytest.raises(error, match=match):
            decode_step(x, model, dataclasses.replace(cache, **changes))
    with pytest.raises(IndexError, match="position 400 is outside rotary_cos, which has 400"):
        long = model.allocate_cache(1, 500)
        decode_step(torch.randn(1, 401, DIM), model, long, backend="cpu")
    with pytest.raises(ValueError, match="norm='LayerNorm': expected one of rmsnorm"):
        decoder(norm_name="LayerNorm")
    with pytest.raises(ValueError, match="last: expected 1 to 1"):
        decode_step(x, model, cache, last=2)
