"""decode_attention, on every backend, against an fp64 oracle.

``CHECKS`` are also run against planted bugs (test_mutations.py).
"""

from __future__ import annotations

import copy
import math
import mmap

import oracle
import pytest
import torch
from backends import backends, skip_unless_supported, skip_where_it_asserts
from oracle import assert_no_worse

from t2i_kernels import KVCache, decode_attention, flash_attention, memory, native, triton_backend

BACKENDS = backends("decode_attention")


def tokens(batch, n, heads, kv_heads, dim, dtype=torch.float32):
    """Random q, k_new, v_new."""
    return tuple(torch.randn(batch, n, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads))


def poisoned(batch, slots, kv_heads, dim, dtype=torch.float32, *, start=None):
    """An empty cache whose every slot holds NaN, or would after its scale."""
    device = torch.get_default_device()
    cache = KVCache.allocate(batch, slots, kv_heads, dim, dtype=dtype, device=device)
    for buffer in (cache.k, cache.v, cache.k_scale, cache.v_scale):
        if buffer is not None:
            buffer.fill_(math.nan if buffer.is_floating_point() else -128)
    if start is not None:
        cache.start.copy_(torch.tensor(start))
    return cache


def fill(cache, lengths):
    """Random keys and values in the first slots of each row; the others stay as they are."""
    for x, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        for row, used in enumerate(lengths):
            old = torch.randn(used, *x.shape[2:])
            if scale is not None:
                old = (old * 40).round().clamp(-127, 127)
                scale[row, :used] = torch.rand(used, x.shape[2]) / 40
            x[row, :used] = old.to(x.dtype)
    cache.seqlens.copy_(torch.tensor(lengths))


def table(positions, rotary_dim):
    """Angles of no model: any mistaken position or channel shows."""
    angles = 2 * math.pi * torch.rand(positions, rotary_dim // 2)
    return dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())


def dequantized(cache):
    """(k, v) in fp64."""
    buffers = (cache.k, cache.k_scale), (cache.v, cache.v_scale)
    return tuple(x.double() if s is None else x.double() * s[..., None] for x, s in buffers)


def rows(cache):
    """(row, start, seqlen) of each row."""
    return zip(range(len(cache.start)), cache.start.tolist(), cache.seqlens.tolist(), strict=True)


def step(backend, cache, q, k_new, v_new, **options):
    """One call, held to its contract: what it returns, what it writes, and what it leaves alone."""
    skip_unless_supported(backend, "decode_attention", q, k_new, v_new, cache, **options)
    before = copy.deepcopy(cache)
    out = decode_attention(q, k_new, v_new, cache, backend=backend, **options)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert torch.equal(cache.seqlens, before.seqlens) and torch.equal(cache.start, before.start)
    turned_q, turned_k = rotated(before, q, **options), rotated(before, k_new, **options)
    check_written(cache, before, turned_k, v_new)

    options = {name: options[name] for name in ("softcap", "scale") if name in options} | dict(
        causal=True, window=(options.get("window", -1), -1)
    )
    turned_q = turned_q.to(q.dtype)
    plain_type = q.dtype if cache.k_scale is None else torch.float32
    keys, values = dequantized(cache)
    results = []
    for b, first, used in rows(cache):
        end = used + q.shape[1]
        unseeing = min(max(first - used, 0), q.shape[1])
        assert (out[b, :unseeing] == 0).all(), "a padded token sees something"
        if unseeing == q.shape[1]:
            continue
        call = turned_q[b, unseeing:], keys[b, first:end], values[b, first:end]
        exact, _ = oracle.attention(*(t[None] for t in call), **options)
        plain, _ = oracle.plain_attention(*(t[None].to(plain_type) for t in call), **options)
        results.append((out[b, unseeing:].flatten(), plain.flatten(), exact.flatten()))
    got, plain, exact = (torch.cat(parts) for parts in zip(*results, strict=True))
    assert_no_worse("out", got, plain.to(q.dtype), exact, factor=2, rounding=2)
    return out


def rotated(cache, x, rotary_cos=None, rotary_sin=None, rotary_interleaved=False, **_):
    """x [B, n, H, D] in fp64, turned by the positions that it gets in ``cache``."""
    x = x.double()
    if rotary_cos is None:
        return x
    for b, first in enumerate((cache.seqlens - cache.start).tolist()):
        for i in range(max(0, -first), x.shape[1]):
            angles = rotary_cos[first + i], rotary_sin[first + i]
            x[b, i] = oracle.rotate(x[b, i], *angles, rotary_interleaved)
    return x


def check_written(cache, before, k_new, v_new):
    """The new tokens are in their slots, rounded once or quantized; other slots are as before."""
    n = k_new.shape[1]
    for name, new in (("k", k_new), ("v", v_new)):
        buffer, scale = getattr(cache, name), getattr(cache, f"{name}_scale")
        old, old_scale = getattr(before, name), getattr(before, f"{name}_scale")
        for b, first, used in rows(cache):
            written = torch.zeros(buffer.shape[1], dtype=torch.bool)
            written[used : used + n] = True
            assert same_bits(buffer[b, ~written], old[b, ~written]), f"{name}: other slots changed"
            # Padded tokens go somewhere below start, where nothing is ever read.
            real = slice(max(first, used), used + n)
            expected = new[b, max(0, first - used) :].double()
            if scale is None:
                eps = torch.finfo(buffer.dtype).eps
                torch.testing.assert_close(buffer[b, real].double(), expected, rtol=eps, atol=eps)
                continue
            assert same_bits(scale[b, ~written], old_scale[b, ~written])
            largest = expected.abs().amax(-1)
            rounding = 3 * torch.finfo(v_new.dtype).eps
            torch.testing.assert_close(
                scale[b, real].double(), largest / 127, rtol=rounding, atol=0
            )
            error = (buffer[b, real].double() * scale[b, real, :, None] - expected).abs()
            assert (error <= largest[..., None] * (0.5 / 127 + rounding)).all()


def same_bits(a, b):
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


# ---- Checks: (backend) -> None, or AssertionError -----------------------------------------------


def check_steps(backend):
    """A prompt, single tokens, several at once, up to the last slot; rows of different lengths."""
    for options in [dict(), dict(scale=0.3), dict(softcap=0.8), dict(window=3), dict(window=0)]:
        cache = poisoned(3, 16, 2, 6)
        step(backend, cache, *tokens(3, 4, 4, 2, 6), **options)
        cache.seqlens.copy_(torch.tensor([4, 2, 0]))
        for n in (1, 1, 3, 1, 6):
            step(backend, cache, *tokens(3, n, 4, 2, 6), **options)
            cache.advance(n)
    assert cache.seqlens.tolist() == [16, 14, 12]


def check_heads(backend):
    for heads, kv_heads, dim in [(4, 4, 8), (6, 2, 8), (7, 1, 3), (1, 1, 1)]:
        cache = poisoned(2, 9, kv_heads, dim)
        for n in (5, 1):
            step(backend, cache, *tokens(2, n, heads, kv_heads, dim))
            cache.advance(n)


def check_rotary(backend):
    """Both pairings; all channels, some or none; positions count from ``start``."""
    for interleaved in (False, True):
        for rotary_dim in (8, 6, 2, 0):
            options = dict(table(12, rotary_dim), rotary_interleaved=interleaved)
            cache = poisoned(3, 14, 2, 8, start=[0, 2, 3])
            step(backend, cache, *tokens(3, 6, 4, 2, 8), **options)
            cache.seqlens.copy_(torch.tensor([6, 4, 6]))
            for n in (1, 3):
                step(backend, cache, *tokens(3, n, 4, 2, 8), **options)
                cache.advance(n)


def check_relative_positions(backend):
    """With the angles of a model, a row moved along the cache stays the same."""
    frequencies = torch.arange(20)[:, None] * torch.tensor([1.0, 0.3, 0.01])
    options = dict(rotary_cos=frequencies.cos(), rotary_sin=frequencies.sin())
    q, k, v = tokens(1, 7, 2, 1, 8)
    cache = poisoned(2, 12, 1, 8, start=[0, 5])
    cache.seqlens.copy_(torch.tensor([0, 5]))
    call = (t.expand(2, -1, -1, -1) for t in (q, k, v))
    out = decode_attention(*call, cache, backend=backend, **options)
    torch.testing.assert_close(out[0], out[1])


def check_padding(backend):
    """Padded tokens give 0 and are seen by none, in the prompt and after it."""
    cache = poisoned(4, 12, 2, 8, start=[0, 1, 4, 6])
    for n in (5, 1, 2):
        step(backend, cache, *tokens(4, n, 4, 2, 8), **table(20, 8), window=4)
        cache.advance(n)


def check_padding_may_hold_anything(backend):
    q, k, v = tokens(1, 5, 2, 2, 4)
    for t in (k, v):
        t[:, :2] = math.nan
    cache = poisoned(1, 8, 2, 4, start=[2])
    out = decode_attention(q, k, v, cache, backend=backend)
    assert out.isfinite().all() and (out[:, :2] == 0).all()


def check_anything_may_be_in_front_of_a_window(backend):
    for dtype in (torch.float32, torch.float16, torch.int8):
        for n in (1, 3):
            call = tokens(
                1, n, 4, 2, 16, torch.float16 if dtype == torch.float16 else torch.float32
            )
            cache = poisoned(1, 24, 2, 16, dtype)
            fill(cache, [20])
            clean = copy.deepcopy(cache)
            for buffer in (cache.k, cache.v, cache.k_scale, cache.v_scale):
                if buffer is not None:
                    buffer[:, :16] = math.nan if buffer.is_floating_point() else -128
            skip_unless_supported(backend, "decode_attention", *call, cache, window=4)
            outs = [decode_attention(*call, c, window=4, backend=backend) for c in (cache, clean)]
            assert torch.equal(*outs)


def check_low_precision(backend):
    for dtype in (torch.bfloat16, torch.float16):
        for options in [dict(), dict(table(40, 24)), dict(window=9, softcap=2.0)]:
            cache = poisoned(2, 40, 2, 32, dtype, start=[0, 3])
            for n in (14, 16, 1, 4):
                step(backend, cache, *tokens(2, n, 4, 2, 32, dtype), **options)
                cache.advance(n)


def check_halves(backend):
    """Around the edges of splits, and of 8 and 16 queries that share a key."""
    bf16, fp16 = torch.bfloat16, torch.float16
    for dtype, kept, dim, slots in [
        (bf16, bf16, 128, 290), (fp16, fp16, 40, 290), (fp16, torch.int8, 128, 540),
        (bf16, torch.int8, 64, 290),
    ]:  # fmt: skip
        if backend == "triton" and triton_backend.INTERPRETED:
            slots = 40  # splits are small there
        cache = poisoned(2, slots, 2, dim, kept, start=[0, 3])
        fill(cache, [slots - 22, (slots - 22) // 2])
        for n, heads in ((1, 8), (3, 6), (16, 2)):
            step(backend, cache, *tokens(2, n, heads, 2, dim, dtype), **table(slots, 16))
            cache.advance(n)


def check_int8(backend):
    for dtype in (torch.float32, torch.bfloat16):
        cache = poisoned(2, 20, 2, 16, torch.int8, start=[0, 3])
        for n in (9, 1, 3):
            q, k, v = tokens(2, n, 4, 2, 16, dtype)
            k *= 10.0 ** torch.linspace(-2, 1, n)[:, None, None]  # each slot has its own scale
            v[:, 0, 1] = 0  # and some a scale of 0
            step(backend, cache, q, k, v, **table(20, 16))
            cache.advance(n)


def check_int8_of_any_scale(backend):
    """Values whose scales fp16 does not have, and differ within a row."""
    for dtype, size in [(torch.bfloat16, 1e30), (torch.float16, 1e-6), (torch.float32, 1e-25)]:
        cache = poisoned(2, 30, 2, 16, torch.int8)
        fill(cache, [25, 14])
        cache.v_scale *= size * 10.0 ** torch.linspace(-2, 2, 30)[:, None]
        for n in (1, 3):
            q, k, v = tokens(2, n, 4, 2, 16, dtype)
            step(backend, cache, q, k, (v * size).to(dtype))
            cache.advance(n)


def check_int8_beside_fp64(backend):
    """The cache is what it is; what attends to it is in the type of q."""
    q, k, v = tokens(2, 12, 4, 2, 32)
    caches = [poisoned(2, 12, 2, 32, torch.int8) for _ in range(2)]
    skip_unless_supported(
        backend, "decode_attention", q.double(), k.double(), v.double(), caches[0]
    )
    single = decode_attention(q, k, v, caches[0], backend=backend)
    double = decode_attention(q.double(), k.double(), v.double(), caches[1], backend=backend)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


def check_int8_is_near(backend):
    """Attention through the quantized cache is the exact one within a percent or so."""
    q, k, v = tokens(2, 12, 4, 2, 32)
    caches = [poisoned(2, 12, 2, 32, dtype) for dtype in (torch.float32, torch.int8)]
    exact, quantized = (decode_attention(q, k, v, cache, backend=backend) for cache in caches)
    assert 1e-5 < (exact - quantized).square().mean().sqrt() < 0.01


def check_huge_and_structured(backend):
    """Retrieval by name among scores of ±10³, and the mean where all keys are the same."""
    names = torch.eye(16)[torch.randperm(16)][None, :, None]
    values = torch.randn(1, 16, 1, 16)
    asked = torch.randint(16, (1,))
    cache = poisoned(1, 20, 1, 16)
    decode_attention(names, names, values, cache, backend=backend)
    cache.advance(15)
    call = names[:, asked], names[:, 15:], values[:, 15:]
    assert torch.equal(decode_attention(*call, cache, scale=1e3, backend=backend), values[:, asked])

    cache = poisoned(1, 300, 1, 1)
    numbers = torch.arange(300.0)[None, :, None, None]
    for window, mean in [(-1, numbers / 2), (4, (numbers + (numbers - 4).clamp_min(0)) / 2)]:
        out = decode_attention(
            torch.ones_like(numbers), torch.zeros_like(numbers), numbers, cache, window=window,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out, mean)


def check_long_cache(backend):
    """Scores that rise, and fall, over hundreds of slots."""
    for falling in (False, True):
        cache = poisoned(2, 700, 1, 16)
        for row, used in enumerate((690, 333)):
            ramp = torch.linspace(0, 3, used)[:, None, None]
            cache.k[row, :used] = torch.randn(used, 1, 16) * (ramp.flip(0) if falling else ramp)
            cache.v[row, :used] = torch.randn(used, 1, 16)
        cache.seqlens.copy_(torch.tensor([690, 333]))
        step(backend, cache, *tokens(2, 3, 4, 1, 16))


def check_one_by_one(backend):
    """Tokens one at a time, all at once, and in ``flash_attention`` without a cache: the same."""
    q, k, v = tokens(2, 9, 4, 2, 8)
    together = decode_attention(q, k, v, poisoned(2, 9, 2, 8), backend=backend)
    cache, singles = poisoned(2, 9, 2, 8), []
    for i in range(9):
        call = (t[:, i : i + 1] for t in (q, k, v))
        singles.append(decode_attention(*call, cache, backend=backend))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(singles, dim=1), together)
    torch.testing.assert_close(flash_attention(q, k, v, causal=True), together)


def check_going_back(backend):
    """Rejected tokens leave no trace that is ever read."""
    cache = poisoned(2, 10, 2, 8)
    decode_attention(*tokens(2, 4, 4, 2, 8), cache, backend=backend)
    cache.advance(4)
    kept = copy.deepcopy(cache)
    decode_attention(*tokens(2, 5, 4, 2, 8), cache, backend=backend)
    cache.advance(5)
    cache.advance(-5)
    call = tokens(2, 1, 4, 2, 8)
    outs = [decode_attention(*call, one, backend=backend) for one in (cache, kept)]
    assert torch.equal(*outs)


def check_batch_independence(backend):
    """A row is the same whatever the rows beside it are, and however long."""
    call = tokens(3, 4, 4, 2, 8)
    options = table(16, 8)
    together = poisoned(3, 16, 2, 8, start=[0, 2, 1])
    together.seqlens.copy_(torch.tensor([0, 2, 12]))
    for buffer in (together.k, together.v):
        buffer[2, 1:12] = torch.randn(11, 2, 8)
    out = decode_attention(*call, together, backend=backend, **options)
    for b, start in ((0, 0), (1, 2)):
        alone = poisoned(1, 16, 2, 8, start=[start])
        alone.advance(start)
        row = (t[b : b + 1] for t in call)
        expected = decode_attention(*row, alone, backend=backend, **options)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=2**-22, atol=2**-22)


def check_strides(backend):
    """Views of a fused projection; buffers that are slices of a larger one."""
    qkv = torch.randn(2, 5, 8, 6)
    call = qkv.split([4, 2, 2], dim=2)
    whole = torch.full((2, 9, 2, 2, 6), math.nan)
    lengths = torch.tensor([0, 7, 3], dtype=torch.int32)
    cache = KVCache(whole[:, :, 0], whole[:, :, 1], lengths[::2], lengths[::2].clone())
    out = step(backend, cache, *call, **table(12, 4))
    heads_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in call)
    torch.testing.assert_close(step(backend, cache, *heads_first, **table(12, 0)), step(
        backend, cache, *(t.contiguous() for t in call), **table(12, 0)
    ))  # fmt: skip
    assert out.is_contiguous()


def check_empty(backend):
    for batch, n in [(0, 1), (2, 0), (0, 0)]:
        cache, call = poisoned(batch, 5, 2, 8), tokens(batch, n, 4, 2, 8)
        out = decode_attention(*call, cache, backend=backend, **table(5, 8))
        assert out.shape == (batch, n, 4, 8) and cache.k.isnan().all()


def check_nothing_is_differentiated(backend):
    """A cache that kept the history of its tokens would grow with every step."""
    q, k, v = (t.requires_grad_() for t in tokens(1, 2, 2, 2, 4))
    cache = poisoned(1, 4, 2, 4)
    out = decode_attention(q, k, v, cache, backend=backend)
    assert not out.requires_grad and not cache.k.requires_grad and not cache.v.requires_grad


def check_out_of_range(backend):
    """An index outside the cache or the table is an error, and the cache stays as it was."""
    skip_where_it_asserts()
    for change, options, message in [
        (dict(seqlens=[3, 4]), {}, "cache.seqlens puts .* slots 3 to 6, but the cache has 6 slots"),
        (dict(seqlens=[0, -1]), {}, "cache.seqlens puts .* slots -1 to 2"),
        (dict(start=[0, -2]), {}, "cache.start is -2, below 0"),
        (dict(seqlens=[1, 2]), table(4, 8), "position 4 is outside rotary_cos, which has 4"),
    ]:
        cache = poisoned(2, 6, 2, 8)
        for name, values in change.items():
            getattr(cache, name).copy_(torch.tensor(values))
        with pytest.raises(IndexError, match=message):
            decode_attention(*tokens(2, 3, 4, 2, 8), cache, backend=backend, **options)
        assert cache.k.isnan().all() and cache.v.isnan().all()


CHECKS = [
    check_steps, check_heads, check_rotary, check_relative_positions, check_padding,
    check_padding_may_hold_anything, check_anything_may_be_in_front_of_a_window,
    check_low_precision, check_halves, check_int8,
    check_int8_of_any_scale, check_int8_is_near, check_int8_beside_fp64, check_huge_and_structured,
    check_long_cache, check_one_by_one, check_going_back, check_batch_independence, check_strides,
    check_empty, check_nothing_is_differentiated, check_out_of_range,
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_contract(check, backend):
    if backend == "cuda" and check not in (check_low_precision, check_halves):
        pytest.skip("it is in fp32; tests/simt has the CUDA kernels do the same in 16 bits")
    check(backend)


# ---- As an operator of torch --------------------------------------------------------------------


def positional(q, k_new, v_new, cache, cos=None, sin=None, interleaved=False, window=-1):
    buffers = cache.k, cache.v, cache.k_scale, cache.v_scale, cache.seqlens, cache.start
    return q, k_new, v_new, *buffers, cos, sin, interleaved, window, 0.0, 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_opcheck(backend, dtype):
    type = torch.bfloat16 if backend == "cuda" else torch.float32
    cache = KVCache.allocate(2, 6, 2, 16, dtype=dtype if dtype == torch.int8 else type)
    operator = getattr(torch.ops.t2i.decode_attention, backend)
    first, more = (tokens(2, n, 4, 2, 16, type) for n in (1, 3))
    torch.library.opcheck(operator, positional(*first, cache))
    call = positional(*more, cache, *table(6, 4).values(), interleaved=True, window=2)
    torch.library.opcheck(operator, call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_compiles_to_one_graph(backend, dtype):
    """Also where the projections before it have parameters, and outside ``no_grad``."""
    torch.compiler.reset()  # recompilations of other cases count
    type = torch.bfloat16 if backend == "cuda" else torch.float32
    projection = torch.nn.Linear(16, 16, dtype=type)
    options = table(8, 16)

    def decode(q, k, v, cache):
        q = projection(q)
        out = decode_attention(q, k, v, cache, backend=backend, **options) + 1
        cache.advance(q.shape[1])
        return out

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    kept = dtype if dtype == torch.int8 else type
    caches = [KVCache.allocate(2, 8, 2, 16, dtype=kept) for _ in range(2)]
    for n in (3, 1, 1):
        call = tokens(2, n, 4, 2, 16, type)
        outs = [f(*call, cache) for f, cache in zip((decode, compiled), caches, strict=True)]
        torch.testing.assert_close(*outs)
    for name in ("k", "v", "seqlens"):
        torch.testing.assert_close(*(getattr(cache, name) for cache in caches))
    assert caches[1].seqlens.tolist() == [5, 5] and caches[1].k.any()


# ---- KVCache ------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages")
def test_a_large_cache_begins_with_a_page():
    cache = KVCache.allocate(1, 4096, 4, 64)  # two pages each
    cache.k.fill_(1)
    assert not cache.v.any() and cache.v.shape == (1, 4096, 4, 64)
    assert cache.k.data_ptr() % memory.LARGE == cache.v.data_ptr() % memory.LARGE == 0


def test_memory_of_the_cpu_is_there_whatever_the_default_device():
    with torch.device("meta"):
        assert KVCache.allocate(1, 7, 2, 4).k.device.type == "cpu"
        assert memory.allocate_large(100).device.type == "cpu"


def test_cache_is_one_buffer_with_lengths():
    cache = KVCache.allocate(2, 7, 3, 4, dtype=torch.int8)
    assert cache.k.shape == cache.v.shape == (2, 7, 3, 4) and cache.max_seqlen == 7
    assert cache.k_scale.shape == (2, 7, 3) and cache.k_scale.dtype == torch.float32
    assert cache.seqlens.dtype == cache.start.dtype == torch.int32
    cache.advance(3)
    cache.advance(-1)
    assert cache.seqlens.tolist() == [2, 2] and cache.start.tolist() == [0, 0]
    assert KVCache.allocate(1, 1, 1, 1).k_scale is None
    with pytest.raises(TypeError, match="dtype: expected .* got torch.int64"):
        KVCache.allocate(1, 1, 1, 1, dtype=torch.int64)


# ---- Errors -------------------------------------------------------------------------------------

Q, N = torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 2, 8)
COS = torch.zeros(6, 4)


def changed(**buffers):
    cache = KVCache.allocate(2, 6, 2, 8)
    for name, value in buffers.items():
        setattr(cache, name, value)
    return cache


INT8 = KVCache.allocate(2, 6, 2, 8, dtype=torch.int8)
BAD_CALLS = {
    "no cache": ((Q, N, N, None), {}, TypeError, "cache: expected a KVCache, got NoneType"),
    "no tensor": ((Q, 1.0, N, changed()), {}, TypeError, "k_new: expected a tensor, got float"),
    "integers": ((Q.int(), N, N, changed()), {}, TypeError, "q: expected float32.*torch.int32"),
    "types": ((Q, N, N.half(), changed()), {}, TypeError, "v_new: expected torch.float32 as q"),
    "dims": ((Q[0], N, N, changed()), {}, ValueError, r"q: expected \[batch, .*got \(1, 4, 8\)"),
    "tokens": (
        (Q, N.expand(2, 3, 2, 8), N, changed()), {}, ValueError,
        r"k_new: expected \(2, 1, 'heads', 8\) for q .*, got \(2, 3, 2, 8\)",
    ),
    "v_new": ((Q, N, N[..., :4], changed()), {}, ValueError, r"v_new: expected \(2, 1, 2, 8\)"),
    "groups": ((Q[:, :, 1:], N, N, changed()), {}, ValueError, "q: .* multiple of the 2 heads"),
    "device": ((Q, N, N.to("meta"), changed()), {}, ValueError, "v_new: on meta, but q is on cpu"),
    "cache's batch": (
        (Q, N, N, KVCache.allocate(3, 6, 2, 8)), {}, ValueError,
        r"cache.k: expected \(2, 'slots', 2, 8\) .* got \(3, 6, 2, 8\)",
    ),
    "cache's heads": (
        (Q, N, N, KVCache.allocate(2, 6, 4, 8)), {}, ValueError, r"cache.k: .*got \(2, 6, 4, 8\)",
    ),
    "cache's type": (
        (Q, N, N, KVCache.allocate(2, 6, 2, 8, dtype=torch.half)), {}, TypeError,
        "cache.k: expected torch.float32 as q, or int8, got torch.float16",
    ),
    "cache's device": (
        (Q, N, N, KVCache.allocate(2, 6, 2, 8, device="meta")), {}, ValueError,
        "cache.k: on meta, but q is on cpu",
    ),
    "cache.v": (
        (Q, N, N, changed(v=torch.zeros(2, 5, 2, 8))), {}, ValueError,
        r"cache.v: expected \(2, 6, 2, 8\) as cache.k, got \(2, 5, 2, 8\)",
    ),
    "cache.v's type": (
        (Q, N, N, changed(v=torch.zeros(2, 6, 2, 8).half())), {}, TypeError,
        "cache.v: expected torch.float32 as cache.k, got torch.float16",
    ),
    "no scales": (
        (Q, N, N, KVCache(INT8.k, INT8.v, INT8.seqlens, INT8.start)), {}, ValueError,
        r"cache.k_scale: expected float32 \(2, 6, 2\) for int8, got None",
    ),
    "scales": (
        (Q, N, N, changed(v_scale=torch.zeros(2, 6, 2))), {}, ValueError,
        r"cache.v_scale: expected None for torch.float32, got \(2, 6, 2\)",
    ),
    "scale's shape": (
        (Q, N, N, KVCache(INT8.k, INT8.v, INT8.seqlens, INT8.start, COS, COS)), {}, ValueError,
        r"cache.k_scale: expected \(2, 6, 2\), got \(6, 4\)",
    ),
    "seqlens' type": (
        (Q, N, N, changed(seqlens=torch.zeros(2))), {}, TypeError,
        r"cache.seqlens: expected int32 \[2\], got torch.float32",
    ),
    "start's shape": (
        (Q, N, N, changed(start=torch.zeros(3, dtype=torch.int32))), {}, ValueError,
        r"cache.start: expected \[2\], got \(3,\)",
    ),
    "cos no tensor": (
        (Q, N, N, changed()), dict(rotary_cos=1.0, rotary_sin=COS), TypeError,
        "rotary_cos: expected a tensor, got float",
    ),
    "k no tensor": (
        (Q, N, N, changed(k=None)), {}, TypeError, "cache.k: expected a tensor, got NoneType",
    ),
    "cos alone": ((Q, N, N, changed()), dict(rotary_cos=COS), ValueError, "give both or none"),
    "wide table": (
        (Q, N, N, changed()), dict(rotary_cos=torch.zeros(6, 5), rotary_sin=torch.zeros(6, 5)),
        ValueError, r"rotary_cos: .* at most head_dim, 8, got \(6, 5\)",
    ),
    "sin's shape": (
        (Q, N, N, changed()), dict(rotary_cos=COS, rotary_sin=COS[1:]), ValueError,
        r"rotary_sin: expected \(6, 4\) as rotary_cos, got \(5, 4\)",
    ),
    "table's type": (
        (Q, N, N, changed()), dict(rotary_cos=COS, rotary_sin=COS.half()), TypeError,
        "rotary_sin: expected float32, got torch.float16",
    ),
    "window": ((Q, N, N, changed()), dict(window=-2), ValueError, "window: .* got -2"),
    "softcap": ((Q, N, N, changed()), dict(softcap=-2.0), ValueError, "softcap: .* got -2"),
    "scale": ((Q, N, N, changed()), dict(scale=math.nan), ValueError, "scale: .* got nan"),
    "backend": ((Q, N, N, changed()), dict(backend="fast"), ValueError, "'fast': expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(call):
    args, kwargs, error, message = call
    with pytest.raises(error, match=message):
        decode_attention(*args, **kwargs)


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
def test_the_operator_itself_reads_nothing_out_of_bounds():
    """Where it is called past the checks of decode_attention."""
    from t2i_kernels.decode_attention import api

    names = ["q", "k_new", "v_new", "k_cache", "v_cache", "k_scale", "v_scale", "seqlens", "start",
             "cos", "sin"]  # fmt: skip
    for cache, name, wrong in [
        (changed(), "q", Q[:1]),
        (changed(), "q", Q[..., :4]),
        (changed(), "k_new", N[:1]),
        (changed(), "k_new", N.half()),
        (changed(), "v_new", N[:, :0]),
        (changed(), "v_new", N[:, :, :1]),
        (changed(), "k_cache", torch.zeros(1, 6, 2, 8)),
        (changed(), "k_cache", torch.zeros(2, 6, 1, 8)),
        (changed(), "v_cache", torch.zeros(2, 5, 2, 8)),
        (changed(), "v_cache", torch.zeros(2, 6, 2, 8).bfloat16()),
        (changed(), "v_cache", torch.zeros(2, 6, 2, 4)),
        (changed(), "k_scale", torch.zeros(2, 6, 2)),
        (INT8, "k_scale", torch.zeros(2, 5, 2)),
        (INT8, "v_scale", torch.zeros(2, 6, 2).double()),
        (INT8, "v_scale", None),
        (changed(), "seqlens", torch.zeros(1, dtype=torch.int32)),
        (changed(), "start", torch.zeros(3, dtype=torch.int32)),
        (changed(), "cos", torch.zeros(6, 5)),
        (changed(), "sin", COS[1:]),
        (changed(), "sin", None),
    ]:
        call = list(api._bind(Q, N, N, cache, rotary_cos=COS, rotary_sin=COS))
        call[names.index(name)] = wrong
        with pytest.raises(ValueError, match="decode_attention: "):
            torch.ops.t2i.decode_attention.cpu(*call)
