"""One decoding step of attention: schema, checks and backends. Without a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..registry import LIBRARY, Backend, register, register_op, select
from . import reference
from .cache import KVCache

SCHEMA = (
    "(Tensor q, Tensor k_new, Tensor v_new, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor seqlens, Tensor start,"
    " Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, int window, float softcap,"
    " float scale) -> Tensor out"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
            ``slot − start`` of the table, in fp32; both or none.
        rotary_interleaved: pairs of channels are (2i, 2i + 1); else (i, i + R/2).
        window: how many keys a token sees before its own; −1 is all.
        softcap, scale: as in ``flash_attention``.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        [B, n, H, D] in the type of q. A row that sees no key is 0.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option.
        RuntimeError: a full cache, a position outside the rotary table; the backend asked for
            cannot run it.
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
    _check(q, k_new, v_new, *buffers, rotary_cos, rotary_sin, window, softcap)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    rotary = rotary_cos, rotary_sin, rotary_interleaved
    return (q, k_new, v_new, *buffers, *rotary, window, float(softcap), float(scale))


def _check(q, k_new, v_new, k, v, k_scale, v_scale, seqlens, start, cos, sin, window, softcap):
    for name, tensor in (("q", q), ("k_new", k_new), ("v_new", v_new)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}: expected [batch, tokens, heads, head_dim], got {tuple(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.dtype not in (*DTYPES, torch.float64):
            raise TypeError(
                f"{name}: expected float32, bfloat16, float16 or float64, the same for q, k_new "
                f"and v_new, got {tensor.dtype} beside {q.dtype}"
            )
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k_new.shape[2]
    if tuple(k_new.shape) != (batch, tokens, kv_heads, head_dim):
        raise ValueError(
            f"k_new: expected {(batch, tokens, 'heads', head_dim)} for q {tuple(q.shape)}, "
            f"got {tuple(k_new.shape)}"
        )
    if v_new.shape != k_new.shape:
        raise ValueError(f"v_new: expected {tuple(k_new.shape)} as k_new, got {tuple(v_new.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: {heads} heads are not a multiple of the {kv_heads} of k_new")
    for name, tensor in (("cache.k", k), ("cache.v", v)):
        expected = (batch, "slots", kv_heads, head_dim)
        if tensor.dim() != 4 or (tensor.shape[0], *tensor.shape[2:]) != (batch, kv_heads, head_dim):
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype not in (q.dtype, torch.int8):
            raise TypeError(f"{name}: expected {q.dtype} as q, or int8, got {tensor.dtype}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"cache.v: expected {k.dtype} {tuple(k.shape)}, got {tuple(v.shape)}")
    quantized = k.dtype == torch.int8
    for name, tensor in (("cache.k_scale", k_scale), ("cache.v_scale", v_scale)):
        if quantized != (tensor is not None):
            raise ValueError(f"{name}: an int8 cache has one, and no other: cache.k is {k.dtype}")
        if quantized and (tensor.shape != k.shape[:3] or tensor.dtype != torch.float32):
            raise ValueError(
                f"{name}: expected float32 {tuple(k.shape[:3])}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in (("cache.seqlens", seqlens), ("cache.start", start)):
        if tuple(tensor.shape) != (batch,) or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name}: expected int32 [{batch}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin: give both or none")
    if cos is not None:
        for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
            if tensor.dim() != 2 or tensor.dtype != torch.float32 or tensor.shape != cos.shape:
                raise ValueError(
                    f"{name}: expected float32 [positions, R/2], got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
        if 2 * cos.shape[1] > head_dim:
            raise ValueError(
                f"rotary_cos: turns {2 * cos.shape[1]} channels, but head_dim is {head_dim}"
            )
    for tensor in (k_new, v_new, k, v, seqlens, start, cos):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"an argument is on {tensor.device}, but q is on {q.device}")
    if window < -1:
        raise ValueError(f"window: expected at least -1, which is all, got {window}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected 0 (off) or a positive number, got {softcap}")


def _fake(q, k_new, v_new, *rest):
    return q.new_empty(q.shape)


def add_backend(name: str, available, supports) -> None:
    """Define the overload ``t2i::decode_attention.<name>`` and offer it to the registry; its
    implementation is registered in torch by the caller, in Python or in C++."""
    LIBRARY.define(f"decode_attention.{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::decode_attention.{name}", _fake, lib=LIBRARY)
    run = getattr(torch.ops.t2i.decode_attention, name)
    register("decode_attention", Backend(name, available, supports, run))


register_op("decode_attention", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("decode_attention.reference", reference.decode_attention, "CompositeExplicitAutograd")
