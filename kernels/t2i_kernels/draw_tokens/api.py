"""Tokens of images, one after another, without leaving native code: schema, checks, backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..checks import check_device
from ..decode_attention import KVCache
from ..decode_step import PackedDecoder
from ..decode_step.api import CACHE_SCHEMA, bind_cache, check_model, check_room, cpu_takes_cache
from ..draw.api import check_noise, check_options
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import reference

SCHEMA = (
    "(Tensor codes, Tensor embedding, int count, Tensor seeds, Tensor positions, Tensor? guidance,"
    f" float temperature, int top_k, float top_p, {CACHE_SCHEMA}) -> Tensor drawn"
)


def draw_tokens(
    codes: Tensor,
    embedding: Tensor,
    decoder: PackedDecoder,
    cache: KVCache,
    *,
    count: int,
    seeds: Tensor,
    positions: Tensor,
    guidance: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Draw ``count`` codes of N images behind the last one of each: ``decode_step`` for one token
    and ``draw``, in turns, to the same bits. The cache is appended to and advanced by ``count``;
    the last code is drawn, and not read.

    Args:
        codes: int64 [N], the last code of each image, which is not in the cache yet.
        embedding: fp32 [codes, dim], contiguous: what the first layer reads of each.
        decoder: the weights; its outputs are the codes.
        cache: of ``decoder.allocate_cache``, for N rows; with guidance 2N, the unconditional half
            behind.
        count: codes to draw of each image.
        seeds, positions, temperature, top_k, top_p: see ``draw``; ``positions`` are those of the
            first codes drawn.
        guidance: fp32 [N, count], a scale for each code.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        int64 [N, count].

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option; also logits that are NaN or
            inf, or −inf alone, when slots behind the cache's ``seqlens`` have been written.
        IndexError: a full cache, a position outside the rotary table; nothing is written then.
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(
        codes, embedding, decoder, cache, count=count, seeds=seeds, positions=positions,
        guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    backend = select("draw_tokens", backend, *call)
    if len(codes):  # in a first look, that all of them fit
        if not 0 <= int(codes.min()) <= int(codes.max()) < decoder.outputs:
            raise ValueError(f"codes: expected 0 to {decoder.outputs - 1}, got {codes.tolist()}")
        check_room("draw_tokens", decoder, cache, count)
    drawn = backend.run(*call)
    cache.advance(count)
    return drawn


def _bind(
    codes, embedding, decoder, cache, *, count, seeds, positions, guidance=None, temperature=1.0,
    top_k=0, top_p=1.0,
) -> tuple:  # fmt: skip
    check_model(decoder, cache)
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64 or codes.dim() != 1:
        found = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else repr(codes)
        raise TypeError(f"codes: expected int64 [images], got {found}")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count: expected a whole number of at least 1, got {count!r}")
    images = len(codes)
    check_noise(seeds, positions, guidance, images, count)
    check_options(temperature, top_k, top_p)
    options = float(temperature), int(top_k), float(top_p)
    model = bind_cache(decoder, cache, images * (1 if guidance is None else 2))
    if not isinstance(embedding, Tensor):
        raise TypeError(f"embedding: expected a tensor, got {type(embedding).__name__}")
    tensors = dict(codes=codes, embedding=embedding, seeds=seeds, positions=positions)
    if guidance is not None:
        tensors["guidance"] = guidance
    for name, tensor in tensors.items():
        check_device(name, tensor, "decoder", decoder.weights)
    expected = (decoder.outputs, decoder.dim)
    if embedding.dtype != torch.float32 or tuple(embedding.shape) != expected:
        raise ValueError(
            f"embedding: expected float32 {expected}, got {embedding.dtype} "
            f"{tuple(embedding.shape)}"
        )
    embedding = embedding.detach().contiguous()
    return codes, embedding, count, seeds, positions, guidance, *options, *model


def _fake(codes, embedding, count, *rest):
    return codes.new_empty(len(codes), count)


def add_backend(name: str, available, supports) -> None:
    """Define the overload ``t2i::draw_tokens.<name>`` and offer it to the registry."""
    LIBRARY.define(f"draw_tokens.{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::draw_tokens.{name}", _fake, lib=LIBRARY)
    run = getattr(torch.ops.t2i.draw_tokens, name)
    register("draw_tokens", Backend(name, available, supports, run))


def _cpu_supports(codes, *rest) -> Reason:
    if codes.device.type != "cpu":
        return f"codes are on {codes.device}"
    return cpu_takes_cache(*rest[17:21])


register_op("draw_tokens", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("draw_tokens.reference", reference.draw_tokens, "CompositeExplicitAutograd")
add_backend("cpu", native.reason, _cpu_supports)
