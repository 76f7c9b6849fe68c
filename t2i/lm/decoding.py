"""What reads tokens and scores the ones that follow, while images are drawn: one fused step for all
layers, or the model's own modules."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from t2i_kernels import explain
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
        [rows, n], which continue what was read. ``prefix``: as in ``TransformerLM.forward``."""

    def forget(self, counts: Tensor) -> None:
        """Go back by int32 [rows] tokens of each row."""

    def keep(self, rows: int) -> None:
        """Go on with the first rows alone."""


def make_decoder(
    lm: TransformerLM, rows: int, length: int, start: Tensor | None, weights: str | None
) -> Decoder:
    """A decoder for ``rows`` sequences of up to ``length`` tokens, of which the first ``start``
    int32 [rows] are padding. ``weights``: see ``sampling.sample_codes``."""
    weight = lm.output.weight
    fused = weight.device.type == "cpu" and weight.dtype != torch.float64
    if weights is not None and not fused:
        raise ValueError(
            f"weights={weights!r}: packed weights are for models on the CPU in fp32, bf16 or fp16, "
            f"this one is {weight.dtype} on {weight.device}"
        )
    if weights is None and (not fused or explain("decode_step").chosen != "cpu"):
        return ModuleDecoder(lm, rows, length, start)
    if weights is None:
        weights = "bf16" if weight.dtype == torch.bfloat16 else "fp32"
    return PackedModel(lm, packed(lm, weights), rows, length, start)


class ModuleDecoder:
    path = "modules"

    def __init__(self, lm: TransformerLM, rows: int, length: int, start: Tensor | None):
        self.lm = lm
        self.cache = lm.allocate_cache(rows, length, start=start)
        config, weight = lm.config, lm.output.weight
        q = weight.new_empty(rows, 1, config.num_heads, config.head_dim)
        kv = weight.new_empty(rows, 1, config.num_kv_heads, config.head_dim)
        self.backend = explain("decode_attention", q, kv, kv, self.cache[0]).chosen or ""
        numbers = sum(p.numel() for p in lm.layers.parameters())
        numbers += config.image_vocab_size * config.dim
        self.weight_bytes = numbers * weight.element_size()
        self.slot_bytes = len(self.cache) * _slot_bytes(self.cache[0].k)

    def read(self, tokens: Tensor | None, prefix: Tensor | None = None, last: int = 1) -> Tensor:
        features = self.lm.features(tokens, prefix=prefix, cache=self.cache)
        return self.lm.head(features[:, -last:], self.lm.config.image_tokens)

    def forget(self, counts: Tensor) -> None:
        self.cache[0].seqlens -= counts

    def keep(self, rows: int) -> None:
        self.cache = [layer.first(rows) for layer in self.cache]
        for layer in self.cache[1:]:  # one length for all layers, as allocate_cache has it
            layer.seqlens, layer.start = self.cache[0].seqlens, self.cache[0].start


class PackedModel:
    def __init__(
        self,
        lm: TransformerLM,
        decoder: PackedDecoder,
        rows: int,
        length: int,
        start: Tensor | None,
    ):
        self.lm, self.decoder = lm, decoder
        self.cache = decoder.allocate_cache(rows, length, start=start)
        self.path = f"decode_step, {decoder.weight_type} weights"
        self.backend = explain("decode_step").chosen or ""
        self.weight_bytes = decoder.weights.numel()
        self.slot_bytes = decoder.layers * _slot_bytes(self.cache.k)

    def read(self, tokens: Tensor | None, prefix: Tensor | None = None, last: int = 1) -> Tensor:
        x = self.lm.embed(tokens, prefix, continues=prefix is None)
        return decode_step(x.float(), self.decoder, self.cache, last=last)

    def forget(self, counts: Tensor) -> None:
        self.cache.seqlens -= counts

    def keep(self, rows: int) -> None:
        self.cache = self.cache.first(rows)


def _slot_bytes(keys: Tensor) -> int:
    """Of one layer's keys and values [..., Hkv, D] in one slot."""
    return 2 * keys.shape[-2] * keys.shape[-1] * keys.element_size()


# ---- Packing -------------------------------------------------------------------------------------

_packed: WeakKeyDictionary[TransformerLM, tuple[tuple, PackedDecoder]] = WeakKeyDictionary()


def packed(lm: TransformerLM, weight_type: str) -> PackedDecoder:
    """The weights of ``lm`` packed, to score image tokens. The last ones are kept as long as the
    model is, and made again when its weights have changed, as far as torch counts that: not what is
    written through ``.data``, or to inference tensors."""
    state = (
        weight_type,
        *((p.data_ptr(), None if p.is_inference() else p._version) for p in lm.parameters()),
    )
    if lm not in _packed or _packed[lm][0] != state:
        _packed.pop(lm, None)  # not both at once
        _packed[lm] = state, pack(lm, weight_type)
    return _packed[lm][1]


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
