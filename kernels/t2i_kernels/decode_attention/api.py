"""One decoding step of attention: schema, checks and backends. Without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_backend, native, triton_backend
from ..checks import (
    check_device,
    check_floating,
    check_groups,
    check_heads,
    check_indices,
    check_scores,
    default_scale,
)
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import cuda, reference
from .cache import KVCache

SCHEMA = (
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor seqlens, Tensor start,"
    " Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, int window, float softcap,"
    " float scale) -> Tensor out"
)
LAYOUT = "[batch, tokens, heads, head_dim]"


def decode_attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    cache: KVCache,
    *,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    window: int = -1,
    softcap: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotate and append n new tokens to the cache of each row, and attend from them to all of it.

    The n tokens go to slots [seqlens, seqlens + n) of their row; token i sees slots [start,
    seqlens + i]. ``cache.seqlens`` is read, not advanced: every layer of a model starts from the
    same lengths, and ``cache.advance(n)`` afterwards keeps the tokens. A prompt is read the same
    way, with n its length. Lengths stay on the device.

    Args:
        q: [B, n, H, D] queries of the new tokens; fp32, bf16 or fp16 (the reference also fp64).
        k_new, v_new: [B, n, Hkv, D], their keys and values; H is a multiple of Hkv.
        cache: of B rows, in the type of q or int8. Written in place.
        rotary_cos, rotary_sin: fp32 [positions, R/2], R ≤ D: q and k_new are turned by row
            ``slot − start`` of the table, in fp32, and rounded to the type of q; both or none.
        rotary_interleaved: pairs of channels are (2i, 2i + 1); else (i, i + R/2).
        window: how many keys a token sees before its own; −1 is all.
        softcap, scale: as in ``flash_attention``.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        [B, n, H, D] in the type of q, without a gradient. A token that sees no key gives 0, as
        those before ``start`` do.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option.
        IndexError: a full cache, a negative start, a position outside the rotary table. On a GPU,
            where nothing waits for the lengths, Triton's kernels stop with an assertion; those in
            CUDA give such a row NaN, and leave its cache as it was.
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(
        q,
        k_new,
        v_new,
        cache,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        window=window,
        softcap=softcap,
        scale=scale,
    )
    return select("decode_attention", backend, *call).run(*call)


def _bind(
    q,
    k_new,
    v_new,
    cache,
    *,
    rotary_cos=None,
    rotary_sin=None,
    rotary_interleaved=False,
    window=-1,
    softcap=0.0,
    scale=None,
) -> tuple:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    buffers = cache.k, cache.v, cache.k_scale, cache.v_scale, cache.seqlens, cache.start
    rotary = rotary_cos, rotary_sin, rotary_interleaved
    _check(q, k_new, v_new, *buffers, *rotary, window, softcap, scale)
    if scale is None:
        scale = default_scale(q)
    if torch.is_grad_enabled():  # a cache would keep the history of every token in it alive
        q, k_new, v_new = q.detach(), k_new.detach(), v_new.detach()
    return q, k_new, v_new, *buffers, *rotary, window, float(softcap), float(scale)


def _check(q, k_new, v_new, *rest) -> None:
    *buffers, cos, sin, _, window, softcap, scale = rest
    _check_tokens(q, k_new, v_new)
    _check_cache(q, k_new, *buffers)
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin: give both or none")
    if cos is not None:
        _check_rotary("rotary_cos", cos, cos, q)
        _check_rotary("rotary_sin", sin, cos, q)
    if window < -1:
        raise ValueError(f"window: expected at least -1, which is all, got {window}")
    check_scores(softcap, scale)


def _check_tokens(q, k_new, v_new) -> None:
    check_heads("q", q, 4, LAYOUT, q)
    check_heads("k_new", k_new, 4, LAYOUT, q)
    check_heads("v_new", v_new, 4, LAYOUT, q)
    batch, tokens, _, head_dim = q.shape
    if k_new.shape[:2] != q.shape[:2] or k_new.shape[3] != head_dim:
        raise ValueError(
            f"k_new: expected {(batch, tokens, 'heads', head_dim)} for q {tuple(q.shape)}, "
            f"got {tuple(k_new.shape)}"
        )
    if v_new.shape != k_new.shape:
        raise ValueError(f"v_new: expected {tuple(k_new.shape)} as k_new, got {tuple(v_new.shape)}")
    check_groups(q, k_new.shape[2], "k_new")


def _check_cache(q, k_new, k, v, k_scale, v_scale, seqlens, start) -> None:
    batch, _, kv_heads, head_dim = k_new.shape
    for name, buffer in (("cache.k", k), ("cache.v", v)):
        if not isinstance(buffer, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(buffer).__name__}")
    if k.dim() != 4 or k.shape[0] != batch or k.shape[2:] != k_new.shape[2:]:
        raise ValueError(
            f"cache.k: expected {(batch, 'slots', kv_heads, head_dim)} for k_new "
            f"{tuple(k_new.shape)}, got {tuple(k.shape)}"
        )
    if k.dtype != q.dtype and k.dtype != torch.int8:
        raise TypeError(f"cache.k: expected {q.dtype} as q, or int8, got {k.dtype}")
    if v.shape != k.shape:
        raise ValueError(f"cache.v: expected {tuple(k.shape)} as cache.k, got {tuple(v.shape)}")
    if v.dtype != k.dtype:
        raise TypeError(f"cache.v: expected {k.dtype} as cache.k, got {v.dtype}")
    check_device("cache.k", k, "q", q)
    check_device("cache.v", v, "q", q)
    _check_cache_scale("cache.k_scale", k_scale, k)
    _check_cache_scale("cache.v_scale", v_scale, k)
    check_indices("cache.seqlens", seqlens, f"[{batch}]", q)
    check_indices("cache.start", start, f"[{batch}]", q)
    for name, lengths in (("cache.seqlens", seqlens), ("cache.start", start)):
        if lengths.shape[0] != batch:
            raise ValueError(f"{name}: expected [{batch}], got {tuple(lengths.shape)}")


def _check_cache_scale(name: str, scale: Tensor | None, k: Tensor) -> None:
    if scale is None:
        if k.dtype == torch.int8:
            raise ValueError(f"{name}: expected float32 {tuple(k.shape[:3])} for int8, got None")
        return
    if k.dtype != torch.int8:
        raise ValueError(f"{name}: expected None for {k.dtype}, got {tuple(scale.shape)}")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {scale.dtype}")
    if scale.shape != k.shape[:3]:
        raise ValueError(f"{name}: expected {tuple(k.shape[:3])}, got {tuple(scale.shape)}")
    check_device(name, scale, "cache.k", k)


def _check_rotary(name: str, table: Tensor, cos: Tensor, q: Tensor) -> None:
    check_floating(name, table)
    if table.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32, got {table.dtype}")
    if table.dim() != 2 or 2 * table.shape[1] > q.shape[3]:
        raise ValueError(
            f"{name}: expected [positions, R/2] with R at most head_dim, {q.shape[3]}, "
            f"got {tuple(table.shape)}"
        )
    if table.shape != cos.shape:
        raise ValueError(
            f"{name}: expected {tuple(cos.shape)} as rotary_cos, got {tuple(table.shape)}"
        )
    check_device(name, table, "q", q)


def _fake(q, *rest):
    _check(q, *rest)
    return q.new_empty(q.shape)


def add_backend(name: str, available, supports) -> None:
    """Define the overload ``t2i::decode_attention.<name>`` and offer it to the registry; its
    implementation is registered in torch by the caller, in Python or in C++."""
    LIBRARY.define(f"decode_attention.{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::decode_attention.{name}", _fake, lib=LIBRARY)
    run = getattr(torch.ops.t2i.decode_attention, name)
    register("decode_attention", Backend(name, available, supports, run))


def _cpu_supports(q, k_new, v_new, k_cache, v_cache, *rest) -> Reason:
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    if q.dtype == torch.float64:
        return "float64 is for the reference only"
    if any(cache.stride(3) != 1 and cache.shape[3] > 1 for cache in (k_cache, v_cache)):
        return "the cache is not contiguous in its last dimension"
    return None


def _cuda_supports(q, k_new, v_new, k_cache, v_cache, *rest) -> Reason:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"CUDA kernels are for bfloat16 and float16, q is {q.dtype}"
    if q.shape[1] > 16:
        return "there are more than 16 new tokens"
    if not k_cache.shape[1]:
        return "the cache has no slots"
    chunk = 16 // k_cache.element_size()
    if not 0 < q.shape[3] <= 128 or q.shape[3] % chunk:
        return f"head_dim is no multiple of {chunk} up to 128"
    for cache in (k_cache, v_cache):
        places = (*cache.stride()[:3], cache.storage_offset())
        if cache.stride(3) != 1 or any(place % chunk for place in places):
            return "the rows of the cache are not aligned to 16 bytes"
        if cache.stride(1) >= 2**23:
            return "the cache's tokens are 2^23 numbers or more apart"
    return cuda_backend.runs_on("q", q)


def _triton_supports(q, k_new, v_new, k_cache, v_cache, *rest) -> Reason:
    if q.dtype == torch.float64:
        return "float64 is for the reference only"
    if q.shape[3] > 256:
        return "head_dim is above 256"
    for cache in (k_cache, v_cache):
        if cache.stride(3) != 1 and cache.shape[3] > 1:
            return "the cache is not contiguous in its last dimension"
        odd = cache.shape[3] % 2 or any(stride % 2 for stride in cache.stride()[:3])
        if cache.dtype == torch.int8 and odd:  # it is read as 16-bit words
            return "an int8 cache whose head_dim or strides are odd"
    return triton_backend.runs_on("q", q)


register_op("decode_attention", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("decode_attention.reference", reference.decode_attention, "CompositeExplicitAutograd")
add_backend("cuda", cuda_backend.reason, _cuda_supports)
LIBRARY.impl("decode_attention.cuda", cuda.decode_attention, "CUDA")
add_backend("cpu", native.reason, _cpu_supports)
add_backend("triton", triton_backend.reason, _triton_supports)
triton_backend.implement("decode_attention", "decode_attention")
