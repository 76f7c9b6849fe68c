"""decode_attention in CUDA C++, run by the checked csrc/simt: held to the contract of all backends
(tests/kernels/test_decode_attention.py), and bit by bit to what the reference writes."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import test_decode_attention as contract
import torch
from device import put, strides
from test_decode_attention import poisoned, table, tokens

import build
from t2i_kernels import KVCache, decode_attention

BF16, FP16, INT8 = torch.bfloat16, torch.float16, torch.int8
SPLIT = {(64, 2): 512, (128, 2): 256, (64, 1): 1024, (128, 1): 512}  # by dim and bytes of a number


@functools.cache
def emulator():
    return build.build(checked=True)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(contract, "skip_unless_supported", lambda *_, **__: None)
    monkeypatch.setattr(contract, "decode_attention", run)


def run(q, k_new, v_new, cache, *, rotary_cos=None, rotary_sin=None, rotary_interleaved=False,
        window=-1, softcap=0.0, scale=None, order="forward", seed=1, preempt=0,
        backend=None):  # fmt: skip
    """As t2i_kernels.decode_attention; and counters are zeros again."""
    module = emulator()
    call, held = module.DecodeAttention(), {}

    def give(name, x):
        held[name] = y = put(module, x, name)
        setattr(call, name, y.data_ptr())
        return y

    for name, x in dict(q=q, k_new=k_new, v_new=v_new, k=cache.k, v=cache.v).items():
        setattr(call, f"{name}_strides", strides(module, give(name, x)))
    out = give("out", torch.full(q.shape, math.nan, dtype=q.dtype))
    call.out_strides = strides(module, out)
    if cache.k_scale is not None:
        for name in ("k_scale", "v_scale"):
            setattr(call, f"{name}_strides", strides(module, give(name, getattr(cache, name))))
    for name in ("seqlens", "start"):
        setattr(call, f"{name}_stride", give(name, getattr(cache, name)).stride(0))
    if rotary_cos is not None:
        call.positions, call.rotary_pairs = rotary_cos.shape
        call.cos_stride = give("cos", rotary_cos).stride(0)
        call.sin_stride = give("sin", rotary_sin).stride(0)
    call.element = module.Element.bf16 if q.dtype == BF16 else module.Element.fp16
    call.int8, call.interleaved = cache.k.dtype == INT8, rotary_interleaved
    call.batch, call.tokens, call.heads, call.dim = q.shape
    call.slots, call.kv_heads = cache.k.shape[1:3]
    call.window, call.softcap = window, softcap
    call.scale = q.shape[-1] ** -0.5 if scale is None else scale
    give("partial", torch.full([module.decode_attention_partials(call)], math.nan))
    counters = give(
        "counters", torch.zeros(module.decode_attention_counters(call), dtype=torch.int32)
    )
    module.configure(getattr(module.Order, order), seed, preempt)
    module.decode_attention(call)
    assert not counters.any(), "counters are not zeros again"
    for name in ("k", "v", "k_scale", "v_scale"):
        if getattr(cache, name) is not None:
            getattr(cache, name).copy_(held[name])
    return out.clone()


def bits(x):
    """One NaN is as good as another."""
    return x if x is None or x.dtype == INT8 else x.nan_to_num(nan=12345.0)


def same_caches(a, b):
    names = "k", "v", "k_scale", "v_scale"
    return all(
        getattr(a, name) is None or torch.equal(bits(getattr(a, name)), bits(getattr(b, name)))
        for name in names
    )


def filled(lengths, kv_heads, dim, dtype, slots=None, *, start=None, type=BF16):
    """A cache whose rows have ``lengths``, of random keys and values; unused slots hold NaN."""
    cache = poisoned(len(lengths), slots or max(lengths) + 16, kv_heads, dim, dtype, start=start)
    for b, length in enumerate(lengths):
        first = 0 if start is None else min(start[b], length)
        for name in ("k", "v"):
            x = torch.randn(1, length - first, kv_heads, dim).to(type)
            if dtype == INT8:
                x, scale = quantize(x * torch.rand(1, length - first, 1, 1) * 4)
                getattr(cache, f"{name}_scale")[b, first:length] = scale[0]
            getattr(cache, name)[b, first:length] = x[0]
    cache.seqlens.copy_(torch.tensor(lengths))
    return cache


def quantize(x):
    scale = x.float().abs().amax(-1) / 127
    return (x.float() / scale[..., None]).round().to(INT8), scale


def step(cache, q, k_new, v_new, **options):
    """A call under the contract, and the cache to the bit as the reference leaves it."""
    expected = copy.deepcopy(cache)
    out = contract.step(None, cache, q, k_new, v_new, **options)
    decode_attention(q, k_new, v_new, expected, backend="reference", **options)
    assert same_caches(cache, expected), "the cache is not as the reference leaves it"
    return out


CACHES = {"bf16": (BF16, BF16), "fp16": (FP16, FP16), "bf16-int8": (BF16, INT8),
          "fp16-int8": (FP16, INT8)}  # fmt: skip
types = pytest.mark.parametrize("type, kept", CACHES.values(), ids=CACHES)


@types
@pytest.mark.parametrize("dim", [64, 128])
def test_lengths(dim, type, kept):
    """None, one, slices and splits that are just or not quite full, and many."""
    split = SPLIT[dim, kept.itemsize]
    cache = filled([0, 1, 15, 16, 17, split - 1, split, 1030], 1, dim, kept, type=type)
    step(cache, *tokens(8, 1, 1, 1, dim, type))


@types
@pytest.mark.parametrize(
    "n, group", [(1, 3), (1, 8), (2, 4), (2, 5), (5, 1), (5, 8), (16, 1), (16, 3)]
)
def test_new_tokens_and_groups(n, group, type, kept):
    """Up to 8, up to 16 and more queries of a key head; new tokens in two splits."""
    split = SPLIT[64, kept.itemsize]
    cache = filled([0, 40, split - 1, split - 9], 2, 64, kept, type=type, start=[0, 7, 100, 0])
    step(cache, *tokens(4, n, 2 * group, 2, 64, type), **table(split + 16, 64))


@types
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_rotary(dim, interleaved, type, kept):
    for rotary_dim in (dim, 32, 6, 0):
        cache = filled([0, 20, 3, 9], 1, dim, kept, type=type, start=[0, 0, 2, 7])
        options = dict(table(24, rotary_dim), rotary_interleaved=interleaved)
        step(cache, *tokens(4, 3, 2, 1, dim, type), **options)


@types
@pytest.mark.parametrize("dim", [16, 48, 80, 112])
def test_other_dims(dim, type, kept):
    cache = filled([0, 20, 75], 2, dim, kept, type=type)
    step(cache, *tokens(3, 2, 4, 2, dim, type), **table(100, dim - 4))


def test_dims_of_eight():
    for dim in (8, 24, 72):
        step(filled([0, 20, 75], 2, dim, BF16), *tokens(3, 2, 4, 2, dim, BF16), **table(100, dim))


@types
def test_padding(type, kept):
    """Padded new tokens give 0, are kept, and seen by none, whatever they hold; also where whole
    splits are padding."""
    split = SPLIT[64, kept.itemsize]
    lengths, start = [0, 2, 30, split + 40, split - 2], [3, 9, 28, split + 10, split + 1]
    cache = filled(lengths, 2, 64, kept, type=type, start=start)
    q, k_new, v_new = tokens(5, 5, 4, 2, 64, type)
    step(cache, q, k_new, v_new, **table(40, 64))
    cache = filled(lengths, 2, 64, kept, type=type, start=start)
    k_new[0, :3], v_new[0, :3], q[0, :3] = math.nan, math.nan, math.nan
    if kept != INT8:  # where bytes of a NaN may differ
        step(cache, q, k_new, v_new, **table(40, 64))
    else:
        out = run(q, k_new, v_new, cache, **table(40, 64))
        assert out.isfinite().all() and not out[0, :3].any()


@types
@pytest.mark.parametrize("window", [0, 1, 15, 40, 5000])
def test_window(window, type, kept):
    split = SPLIT[128, kept.itemsize]
    cache = filled([0, 40, split + 5, 2 * split - 2], 1, 128, kept, type=type, start=[0, 3, 0, 0])
    step(cache, *tokens(4, 4, 3, 1, 128, type), window=window)


@types
@pytest.mark.parametrize("options", [
    dict(softcap=0.8), dict(softcap=30.0, window=20), dict(scale=0.5), dict(scale=-0.3, window=5),
    dict(scale=0.0, window=5),
], ids=str)  # fmt: skip
def test_scores(options, type, kept):
    step(filled([5, 130], 1, 64, kept, type=type), *tokens(2, 3, 3, 1, 64, type), **options)


@types
@pytest.mark.parametrize("falling", [False, True])
def test_scores_that_rise_and_fall(falling, type, kept):
    """Bases are raised again and again, and probabilities that were large vanish."""
    cache = filled([700, 333], 1, 64, kept, type=type)
    q, k_new, v_new = tokens(2, 2, 4, 1, 64, type)
    direction = q[:, :1, :1].float().sign()
    for b, used in enumerate([700, 333]):
        ramp = torch.linspace(-3, 3, used)[:, None, None] * (-1 if falling else 1)
        x = (direction[b] * ramp + torch.randn(used, 1, 64)).to(type)
        if kept == INT8:
            x, cache.k_scale[b, :used] = quantize(x)
        cache.k[b, :used] = x
    step(cache, q, k_new, v_new, scale=1.0)


@pytest.mark.parametrize("type", [BF16, FP16])
def test_scales_may_be_any(type):
    """Of int8: zero, tiny, huge and all in between, in one split; queries, too."""
    cache = filled([300, 90], 1, 64, INT8, type=type)
    for scales in (cache.k_scale, cache.v_scale):
        scales[0, :300] *= 10.0 ** torch.linspace(-6, 1, 300)[torch.randperm(300), None]
    cache.v_scale[0, 7:20] = 0
    cache.v_scale[1, :90] *= 1e-30 if type == BF16 else 1e-3
    q, k_new, v_new = tokens(2, 2, 3, 1, 64, type)
    v_new[1] *= 1e-30 if type == BF16 else 1e-3
    for factor in (1e-3, 1e-20, 1e18) if type == BF16 else (1e-3, 10.0):
        options = dict(scale=0.125 / factor)
        step(copy.deepcopy(cache), q * factor, k_new, v_new, **options)
    cache.v_scale.zero_()
    assert not run(q, k_new, v_new * 0, cache).any()


def test_large_values_are_no_overflow():
    """Near the end of fp16, where p · v and the sum of many are beyond it."""
    cache = filled([400], 1, 64, FP16, type=FP16)
    cache.v[:, :400] = 60000
    q, k_new, v_new = tokens(1, 1, 2, 1, 64, FP16)
    step(cache, q, k_new, v_new.fill_(60000))


@types
def test_strides(type, kept):
    """Views of a fused projection; buffers that are slices of a larger one."""
    n, dim, lengths = 3, 64, [0, 33, 70]
    call = torch.randn(3, n, 4 + 2 + 2, dim).to(type).split([4, 2, 2], dim=2)
    packed = filled(lengths, 2, dim, kept, type=type)
    cache = copy.deepcopy(packed)
    whole = torch.full((3, 86, 2, 2, dim), 77 if kept == INT8 else math.nan, dtype=kept)
    whole[:, :, 0], whole[:, :, 1] = cache.k, cache.v
    cache.k, cache.v = whole[:, :, 0], whole[:, :, 1]
    cache.seqlens = torch.stack([cache.seqlens, cache.seqlens + 100], 1)[:, 0]
    if kept == INT8:
        cache.k_scale, cache.v_scale = torch.stack([cache.k_scale, cache.v_scale], 3).unbind(3)
    wide = {name: torch.stack([x, x], 2)[..., 0] for name, x in table(100, dim).items()}
    wide = {name: torch.cat([x, x], 1)[:, : dim // 2] for name, x in wide.items()}
    out = step(cache, *call, **wide)
    assert torch.equal(out, step(packed, *(x.contiguous() for x in call), **wide))


ORDERS = [dict(), dict(order="reverse"), dict(order="random", seed=3),
          dict(order="random", seed=5, preempt=7), dict(preempt=3, seed=9)]  # fmt: skip


@types
@pytest.mark.parametrize("dim, n, group", [(64, 1, 2), (128, 3, 4)])
def test_bits_depend_on_nothing_else(dim, n, group, type, kept):
    """Neither on the rows beside, nor on the order of threads."""
    split, start = SPLIT[dim, kept.itemsize], [0, 5, 0, 20]
    cache = filled([split + 100, 50, 0, 2 * split], 1, dim, kept, type=type, start=start)
    call, options = tokens(4, n, group, 1, dim, type), table(2 * split + 16, dim)
    after = copy.deepcopy(cache)
    out = run(*call, after, **options)
    for b in range(4):
        buffers = cache.k, cache.v, cache.seqlens, cache.start, cache.k_scale, cache.v_scale
        alone = KVCache(*(None if x is None else x[b : b + 1].clone() for x in buffers))
        row = run(*(x[b : b + 1] for x in call), alone, **options, **ORDERS[b + 1])
        assert torch.equal(row, out[b : b + 1])
        assert torch.equal(bits(alone.k), bits(after.k[b : b + 1]))


def test_what_does_not_fit_is_left_alone():
    """A row without slots or positions for its tokens gives NaN; the others are as ever."""
    for change, options in [
        (dict(seqlens=[600, 595, 2]), {}), (dict(seqlens=[-1, 595, 2]), {}),
        (dict(seqlens=[2**31 - 1, 595, 2]), {}), (dict(start=[-1, 0, 0]), {}),
        (dict(start=[-(2**31), 0, 0]), {}),
        (dict(seqlens=[597, 595, 2], start=[0, 1, 0]), table(597, 64)),
    ]:  # fmt: skip
        cache = filled([590, 595, 2], 1, 64, BF16, 600)
        for name, values in change.items():
            getattr(cache, name).copy_(torch.tensor(values, dtype=torch.int32))
        before, good = copy.deepcopy(cache), copy.deepcopy(cache)
        call = tokens(3, 3, 2, 1, 64, BF16)
        out = run(*call, cache, **options)
        assert out[0].isnan().all() and torch.equal(bits(cache.k[0]), bits(before.k[0]))
        assert torch.equal(bits(cache.v[0]), bits(before.v[0]))
        good.seqlens[0], good.start[0] = 0, 0
        assert torch.equal(out[1:], run(*call, good, **options)[1:])


def test_empty():
    for batch, n in [(0, 1), (2, 0)]:
        cache, call = poisoned(batch, 5, 2, 64, BF16), tokens(batch, n, 4, 2, 64, BF16)
        assert run(*call, cache).shape == (batch, n, 4, 64)


@pytest.mark.parametrize("call, message", [
    (dict(n=17), "tokens is 17, expected at most 16"),
    (dict(dim=12), "head_dim is 12, expected a multiple of 8 up to 128"),
    (dict(dim=136), "head_dim is 136, expected a multiple of 8 up to 128"),
    (dict(dim=24, kept=INT8), "head_dim is 24, expected a multiple of 16 up to 128"),
    (dict(heads=3), "heads is 3, expected a multiple of the 2 of the cache"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_bad_calls_are_named(call, message):
    call = dict(n=1, heads=4, dim=64, kept=BF16) | call
    cache = poisoned(1, 20, 2, call["dim"], call["kept"])
    with pytest.raises(ValueError, match=f"decode_attention: {message}"):
        run(*tokens(1, call["n"], call["heads"], 2, call["dim"], BF16), cache)


def test_rows_are_aligned():
    cache = poisoned(1, 20, 1, 68, BF16)
    cache.k, cache.v = cache.k[..., :64], cache.v[..., :64]
    with pytest.raises(ValueError, match="k: rows are not aligned to 16 bytes"):
        run(*tokens(1, 1, 1, 1, 64, BF16), cache)


@types
@pytest.mark.parametrize("dim", [64, 128])
def test_shared_memory_has_no_conflicts(dim, type, kept):
    """But for a few when results are put together."""
    module = emulator()
    module.clear_counts()
    run(*tokens(1, 1, 8, 1, dim, type), filled([1000], 1, dim, kept, type=type))
    counts = module.shared_counts()
    passes, least = sum(x.wavefronts for x in counts), sum(x.ideal for x in counts)
    assert passes < 1.1 * least
