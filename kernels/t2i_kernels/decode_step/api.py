"""All layers of a transformer for a few new tokens: schema, checks and backends. No gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import check_device
from ..decode_attention import KVCache
from ..decode_attention.cache import DTYPES
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import reference
from .decoder import PackedDecoder

CACHE_SCHEMA = (
    "Tensor weights, Tensor vectors, str weight_type, int heads, int ffn_dim, int outputs,"
    " str norm, float norm_eps, str qk_norm, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor seqlens, Tensor start, Tensor? rotary_cos,"
    " Tensor? rotary_sin, bool rotary_interleaved, bool positions_from_start"
)
SCHEMA = f"(Tensor x, {CACHE_SCHEMA}, int last) -> Tensor logits"
# Tokens of all rows in a call of the operator, and slots that they see: what it needs of memory,
# most of it for results of attention over parts of the slots, stays small.
ROWS, SLOTS = 512, 2048


def decode_step(
    x: Tensor,
    decoder: PackedDecoder,
    cache: KVCache,
    *,
    last: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Run n new tokens of each row through all layers, and score what follows the last of them.

    The cache is appended to and advanced by n. A prompt is read the same way, with n its length. On
    the backend ``cpu`` a row's logits are the same to the bit whatever is computed with it, and
    however its tokens are divided among calls while keys and values are finite: one that is not
    makes NaN of tokens in front of it, too, that share a call.

    Args:
        x: fp32 [B, n, dim], embeddings of the new tokens, on the CPU.
        decoder: the weights.
        cache: of ``decoder.allocate_cache``, for B rows.
        last: for how many tokens of each row, from the end, logits are wanted.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        fp32 [B, last, outputs], without a gradient.

    Raises:
        TypeError, ValueError: a wrong type, shape or device.
        IndexError: a full cache, a negative length or start, a position outside the rotary table;
            nothing is written then.
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(x, decoder, cache, last=last)
    run = select("decode_step", backend, *call).run
    batch, tokens = x.shape[:2]
    logits, first = [], 0
    slots = max(SLOTS, cache.k.shape[2])
    room = max(1, ROWS * SLOTS // slots // max(1, batch))
    if batch and tokens > room:  # in a first look, that all of them fit
        check_room("decode_step", decoder, cache, tokens)
    while first < tokens:
        count = min(room, tokens - first)
        wanted = max(1, min(count, last - (tokens - first - count)))
        part = run(call[0][:, first : first + count], *call[1:-1], wanted)
        if last > tokens - first - count:
            logits.append(part)
        cache.advance(count)
        first += count
    return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)


def check_room(op: str, decoder: PackedDecoder, cache: KVCache, tokens: int) -> None:
    """Raises IndexError where the cache or the rotary table has no room for so many tokens more."""
    if int(cache.seqlens.min()) < 0 or int(cache.start.min()) < 0:
        raise IndexError(
            f"{op}: cache.seqlens and cache.start must be at least 0, got "
            f"{cache.seqlens.tolist()} and {cache.start.tolist()}"
        )
    high = int(cache.seqlens.max()) + tokens
    if high > cache.k.shape[2]:
        raise IndexError(
            f"{op}: cache.seqlens puts the new tokens into slots up to {high - 1}, but the "
            f"cache has {cache.k.shape[2]} slots"
        )
    if decoder.rotary_cos is not None:
        start = cache.start if decoder.positions_from_start else 0
        position = int((cache.seqlens - start).max()) + tokens - 1
        if position >= len(decoder.rotary_cos):
            raise IndexError(
                f"{op}: position {position} is outside rotary_cos, which has "
                f"{len(decoder.rotary_cos)}"
            )


def _bind(x, decoder, cache, *, last=1) -> tuple:
    check_model(decoder, cache)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    check_device("x", x, "decoder", decoder.weights)
    if x.dtype != torch.float32:
        raise TypeError(f"x: expected float32, got {x.dtype}")
    if x.dim() != 3 or x.shape[2] != decoder.dim or x.shape[1] < 1:
        raise ValueError(f"x: expected [batch, tokens, {decoder.dim}], got {tuple(x.shape)}")
    if not 1 <= last <= x.shape[1]:
        raise ValueError(f"last: expected 1 to {x.shape[1]}, the tokens of x, got {last}")
    return (x.detach(), *bind_cache(decoder, cache, len(x)), last)


def check_model(decoder: PackedDecoder, cache: KVCache) -> None:
    if not isinstance(decoder, PackedDecoder):
        raise TypeError(f"decoder: expected a PackedDecoder, got {type(decoder).__name__}")
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")


def bind_cache(decoder: PackedDecoder, cache: KVCache, rows: int) -> tuple:
    """The arguments of ``CACHE_SCHEMA``. Raises TypeError and ValueError for a cache that is not
    the decoder's, or of other rows."""
    d = decoder
    shape = (d.layers, rows, cache.k.shape[2] if cache.k.dim() == 5 else "slots",
             d.kv_heads, d.head_dim)  # fmt: skip
    for name in ("k", "v", "k_scale", "v_scale", "seqlens", "start"):
        if getattr(cache, name) is not None:
            check_device(f"cache.{name}", getattr(cache, name), "decoder", d.weights)
    for name, buffer in (("cache.k", cache.k), ("cache.v", cache.v)):
        if tuple(buffer.shape) != shape:
            raise ValueError(
                f"{name}: expected {shape}, of decoder.allocate_cache, got {tuple(buffer.shape)}"
            )
        if buffer.dtype not in DTYPES or buffer.dtype != cache.k.dtype:
            raise TypeError(
                f"{name}: expected float32, bfloat16, float16 or int8 as cache.k, got "
                f"{buffer.dtype}"
            )
    scales = shape[:4] if cache.k.dtype == torch.int8 else None
    for name, scale in (("cache.k_scale", cache.k_scale), ("cache.v_scale", cache.v_scale)):
        found = None if scale is None else tuple(scale.shape)
        if found != scales or (scale is not None and scale.dtype != torch.float32):
            raise ValueError(
                f"{name}: expected {scales and f'float32 {scales}'} for {cache.k.dtype}, got "
                f"{found and f'{scale.dtype} {found}'}"
            )
    for name, lengths in (("cache.seqlens", cache.seqlens), ("cache.start", cache.start)):
        if lengths.dtype != torch.int32 or tuple(lengths.shape) != (rows,):
            raise ValueError(
                f"{name}: expected int32 {(rows,)}, got {lengths.dtype} {tuple(lengths.shape)}"
            )
    return (
        d.weights, d.vectors, d.weight_type, d.heads, d.ffn_dim, d.outputs, d.norm, d.norm_eps,
        d.qk_norm, cache.k, cache.v, cache.k_scale, cache.v_scale, cache.seqlens, cache.start,
        d.rotary_cos, d.rotary_sin, d.rotary_interleaved, d.positions_from_start,
    )  # fmt: skip


def _fake(x, weights, vectors, weight_type, heads, ffn_dim, outputs, *rest):
    return x.new_empty(x.shape[0], rest[-1], outputs)


def add_backend(name: str, available, supports) -> None:
    """Define the overload ``t2i::decode_step.<name>`` and offer it to the registry."""
    LIBRARY.define(f"decode_step.{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::decode_step.{name}", _fake, lib=LIBRARY)
    run = getattr(torch.ops.t2i.decode_step, name)
    register("decode_step", Backend(name, available, supports, run))


def _cpu_supports(x, *rest) -> Reason:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    return cpu_takes_cache(*rest[9:13])


def cpu_takes_cache(k, v, k_scale, v_scale) -> Reason:
    """Why the CPU's operators cannot take a cache; None where they can."""
    if k.stride(4) != 1 or v.stride(4) != 1:
        return "the cache is not contiguous in its last dimension"
    for a, b in ((k, v), (k_scale, v_scale)):
        if a is not None and a.stride(0) != b.stride(0):
            return "the layers of the keys in the cache are not as far apart as those of the values"
    return None


register_op("decode_step", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("decode_step.reference", reference.decode_step, "CompositeExplicitAutograd")
add_backend("cpu", native.reason, _cpu_supports)
