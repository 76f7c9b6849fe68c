"""What reads tokens and scores the ones that follow, while images are drawn: one fused step for all
layers, or the model's own modules."""

from __future__ import annotations

import functools
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from t2i_kernels import KVCache, draw_tokens, explain
from t2i_kernels.decode_step import LayerWeights, NormWeights, PackedDecoder, decode_step

from .model import TransformerLM


class Decoder(Protocol):
    """Rows of tokens that were read, and what may follow them."""

    path: str  # "decode_step, bf16 weights" or "modules"
    backend: str  # that attention runs on
    weight_bytes: int  # read in every step
    slot_bytes: int  # of the cache, for every token of every row

    def read(self, tokens: Tensor | None, prefix: Tensor | None = None, last: int = 1) -> Tensor:
        """Logits of image codes fp32 [rows, last, codes] behind each of the last tokens of int64
        [rows, n], which continue what was read. ``prefix``: as in ``TransformerLM.forward``. Fewer
        rows than there are: the first ones."""

    def read_codes(self, codes: Tensor) -> Tensor:
        """``read`` for int64 [rows, n] codes of images: logits behind each of them."""

    def forget(self, counts: Tensor) -> None:
        """Go back by int32 [rows] tokens of each row."""

    def copy_last(self, count: int) -> None:
        """Give each of the last ``count`` rows what the row in front of them has read."""

    def keep(self, rows: int) -> None:
        """Go on with the first rows alone."""

    def with_weights(self, weight_type: str) -> Decoder:
        """What reads into the same cache with weights of another type; ``keep`` is for both."""


def make_decoder(
    lm: TransformerLM,
    rows: int,
    length: int,
    start: Tensor | None,
    weights: str | None,
    cache_type: torch.dtype | None = None,
) -> Decoder:
    """A decoder for ``rows`` sequences of up to ``length`` tokens, of which the first ``start``
    int32 [rows] are padding. ``weights``, ``cache_type``: see ``sampling.sample_codes``."""
    weight = lm.output.weight
    fused = weight.device.type == "cpu" and weight.dtype != torch.float64
    if weights is not None and not fused:
        raise ValueError(
            f"weights={weights!r}: packed weights are for models on the CPU in fp32, bf16 or fp16, "
            f"this one is {weight.dtype} on {weight.device}"
        )
    if weights is None and (not fused or explain("decode_step").chosen != "cpu"):
        if cache_type not in (None, torch.int8, weight.dtype):
            raise ValueError(
                f"cache: modules keep keys and values in {weight.dtype}, the model's, or in int8; "
                f"{cache_type} needs decode_step"
            )
        return ModuleDecoder(lm, rows, length, start, cache_type)
    if weights is None:
        weights = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
    decoder = packed(lm, weights)
    cache_type = cache_type or torch.float32
    return PackedModel(
        lm, decoder, decoder.allocate_cache(rows, length, start=start, dtype=cache_type)
    )


class ModuleDecoder:
    path = "modules"

    def __init__(
        self,
        lm: TransformerLM,
        rows: int,
        length: int,
        start: Tensor | None,
        cache_type: torch.dtype | None = None,
    ):
        self.lm = lm
        self.cache = lm.allocate_cache(rows, length, start=start, dtype=cache_type)
        config, weight = lm.config, lm.output.weight
        q = weight.new_empty(rows, 1, config.num_heads, config.head_dim)
        kv = weight.new_empty(rows, 1, config.num_kv_heads, config.head_dim)
        self.backend = explain("decode_attention", q, kv, kv, self.cache[0]).chosen or ""
        numbers = sum(p.numel() for p in lm.layers.parameters())
        numbers += config.image_vocab_size * config.dim
        self.weight_bytes = numbers * weight.element_size()
        self.slot_bytes = len(self.cache) * _slot_bytes(self.cache[0])

    def read(self, tokens: Tensor | None, prefix: Tensor | None = None, last: int = 1) -> Tensor:
        rows = len(tokens if prefix is None else prefix)
        features = self.lm.features(tokens, prefix=prefix, cache=self._first(rows))
        return self.lm.head(features[:, -last:], self.lm.config.image_tokens)

    def read_codes(self, codes: Tensor) -> Tensor:
        return self.read(codes + self.lm.config.text_vocab_size, last=codes.shape[1])

    def forget(self, counts: Tensor) -> None:
        self.cache[0].seqlens -= counts

    def copy_last(self, count: int) -> None:
        for layer in self.cache:
            _copy_last(layer, count)

    def keep(self, rows: int) -> None:
        self.cache = self._first(rows)

    def _first(self, rows: int) -> list[KVCache]:
        if rows == len(self.cache[0].seqlens):
            return self.cache
        cache = [layer.first(rows) for layer in self.cache]
        for layer in cache[1:]:  # one length for all layers, as allocate_cache has it
            layer.seqlens, layer.start = cache[0].seqlens, cache[0].start
        return cache

    def with_weights(self, weight_type: str) -> Decoder:
        raise ValueError(f"draft={weight_type!r}: packed weights need decode_step, not modules")


class PackedModel:
    def __init__(self, lm: TransformerLM, decoder: PackedDecoder, cache: KVCache):
        self.lm, self.decoder, self.cache = lm, decoder, cache
        self.path = f"decode_step, {decoder.weight_type} weights"
        self.backend = explain("decode_step").chosen or ""
        self.weight_bytes = decoder.weights.numel()
        self.slot_bytes = decoder.layers * _slot_bytes(cache)

    @functools.cached_property
    def embedding(self) -> Tensor:
        """fp32 [codes, dim]"""
        return self.lm.tok_embeddings.weight[self.lm.config.image_tokens].detach().float()

    def read(self, tokens: Tensor | None, prefix: Tensor | None = None, last: int = 1) -> Tensor:
        x = self.lm.embed(tokens, prefix, continues=prefix is None)
        return decode_step(x.float(), self.decoder, self.cache.first(len(x)), last=last)

    def read_codes(self, codes: Tensor) -> Tensor:
        return self.read(codes + self.lm.config.text_vocab_size, last=codes.shape[1])

    def draw_tokens(self, codes: Tensor, **options) -> Tensor:
        """Codes behind int64 [N] ones, without Python between them: see the operator."""
        return draw_tokens(codes, self.embedding, self.decoder, self.cache, **options)

    def forget(self, counts: Tensor) -> None:
        self.cache.seqlens -= counts

    def copy_last(self, count: int) -> None:
        _copy_last(self.cache, count)

    def keep(self, rows: int) -> None:
        self.cache = self.cache.first(rows)

    def with_weights(self, weight_type: str) -> PackedModel:
        return PackedModel(self.lm, packed(self.lm, weight_type), self.cache)


def _copy_last(cache: KVCache, count: int) -> None:
    """See ``Decoder.copy_last``; rows are the dimension in front of [slots, heads, head_dim]."""
    first = len(cache.seqlens) - count
    used = int(cache.seqlens[first - 1])
    for buffer, dim in ((cache.k, -4), (cache.v, -4), (cache.k_scale, -3), (cache.v_scale, -3)):
        if buffer is not None:
            rows = buffer.narrow(dim + 1, 0, used)
            rows.narrow(dim, first, count).copy_(rows.narrow(dim, first - 1, 1))
    cache.seqlens[first:] = used


def _slot_bytes(cache: KVCache) -> int:
    """Of one layer's keys and values in one slot, with their scales."""
    scale = 4 if cache.k_scale is not None else 0
    heads, head_dim = cache.k.shape[-2:]
    return 2 * heads * (head_dim * cache.k.element_size() + scale)


# ---- Packing -------------------------------------------------------------------------------------

# What was packed of a model, by type, and the state of its weights then.
_packed: WeakKeyDictionary[TransformerLM, tuple[tuple, dict[str, PackedDecoder]]]
_packed = WeakKeyDictionary()
KEPT = 2  # types, one to draw and one to guess: more are not held in memory


def packed(lm: TransformerLM, weight_type: str) -> PackedDecoder:
    """The weights of ``lm`` packed, to score image tokens. The last two types are kept as long as
    the model is, and made again when its weights have changed, as far as torch counts that: not
    what is written through ``.data``, or to inference tensors."""
    state = tuple((p.data_ptr(), None if p.is_inference() else p._version) for p in lm.parameters())
    if lm not in _packed or _packed[lm][0] != state:
        _packed[lm] = state, {}
    kept = _packed[lm][1]
    found = kept.pop(weight_type, None)
    while found is None and len(kept) >= KEPT:
        del kept[next(iter(kept))]  # used least recently
    kept[weight_type] = found or pack(lm, weight_type)
    return kept[weight_type]


@torch.no_grad()
def pack(lm: TransformerLM, weight_type: str, *, rows: slice | None = None) -> PackedDecoder:
    """Pack the weights of ``lm`` for ``decode_step``; ``rows`` of the vocabulary are scored, by
    default those of image tokens."""
    config = lm.config
    cos, sin = lm.rotary_tables or (None, None)
    layers = []
    for layer in lm.layers:
        attention, qk = layer.attention, {}
        if config.qk_norm != "none":
            qk = {"q_norm": _norm(attention.q_norm), "k_norm": _norm(attention.k_norm)}
        layers.append(
            LayerWeights(
                attention_norm=_norm(layer.attention_norm),
                qkv=attention.qkv.weight,
                out=attention.out.weight,
                ffn_norm=_norm(layer.ffn_norm),
                gate_up=layer.feed_forward.gate_up.weight,
                down=layer.feed_forward.down.weight,
                **qk,
            )
        )
    return PackedDecoder.pack(
        layers,
        _norm(lm.norm),
        lm.output.weight[config.image_tokens if rows is None else rows],
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        weight_type=weight_type,
        norm_name=config.norm,
        norm_eps=config.norm_eps,
        qk_norm=config.qk_norm,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=config.rotary == "interleaved",
        positions_from_start=config.image_grid is None,
    )


def _norm(norm: nn.Module) -> NormWeights:
    return NormWeights(norm.weight, getattr(norm, "bias", None))
