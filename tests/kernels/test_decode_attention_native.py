"""The native decode_attention, with every instruction set: long caches, and the bits of a row."""

from __future__ import annotations

import pytest
import torch
from test_decode_attention import CHECKS, poisoned, step, table, tokens

from t2i_kernels import KVCache, decode_attention, native

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))


# The others have nothing of their own for it.
@pytest.fixture(params=native.cpu_capabilities()[:3])
def capability(request):
    with native.use_cpu_capability(request.param):
        yield request.param


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_contract(capability, check):
    check("cpu")


def filled(batch, slots, kv_heads, dim, used, dtype=torch.float32):
    """A cache with random tokens in the slots below ``used`` of each row, NaN behind."""
    cache = poisoned(batch, slots, kv_heads, dim, dtype)
    for b, length in enumerate(used):
        for buffer in (cache.k, cache.v):
            values = torch.randn(length, kv_heads, dim)
            buffer[b, :length] = (16 * values).to(dtype) if dtype == torch.int8 else values
        if cache.k_scale is not None:
            cache.k_scale[b, :length] = cache.v_scale[b, :length] = 0.05
    cache.seqlens.copy_(torch.tensor(used))
    return cache


# A task has a block of 128 slots at most.
USED = [1, 63, 64, 127, 128, 2100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("window", [-1, 1500])
def test_caches_longer_than_tasks(capability, dtype, window):
    cache = filled(len(USED), 2110, 2, 24, USED, dtype)
    kind = torch.float32 if dtype == torch.int8 else dtype
    call = tokens(len(USED), 3, 6, 2, 24, kind)
    step("cpu", cache, *call, window=window, **table(2110, 16))


@pytest.mark.parametrize("dim", [64, 33])
def test_a_row_does_not_depend_on_the_others(capability, dim):
    """To the bit, whatever their number, their lengths and the threads are."""
    angles = table(2110, 16)
    q, k_new, v_new = tokens(len(USED), 2, 6, 2, dim)
    cache = filled(len(USED), 2110, 2, dim, USED)
    together = decode_attention(q, k_new, v_new, cache, backend="cpu", **angles)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for b in range(len(USED)):
            row = slice(b, b + 1)
            one = KVCache(cache.k[row], cache.v[row], cache.seqlens[row], cache.start[row])
            out = decode_attention(q[row], k_new[row], v_new[row], one, backend="cpu", **angles)
            assert torch.equal(out, together[row])
