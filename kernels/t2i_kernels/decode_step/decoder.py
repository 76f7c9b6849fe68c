"""A decoder-only transformer whose weights are packed for decoding, in the order of their use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..decode_attention import KVCache
from ..linear.packed import PANEL, PackedWeight, check_weight_type, packed_bytes
from ..memory import allocate_large

NORMS = ("rmsnorm", "layernorm")
QK_NORMS = ("none", "head", "full")


@dataclass(frozen=True)
class NormWeights:
    weight: Tensor  # [channels]
    bias: Tensor | None = None  # of a LayerNorm


@dataclass(frozen=True)
class LayerWeights:
    """One layer: x += out(attention(qkv(norm x))); x += down(silu(gate(norm x)) · up(norm x))."""

    attention_norm: NormWeights
    qkv: Tensor  # [(H + 2 Hkv) D, dim], q, k and v in that order
    out: Tensor  # [dim, H D]
    ffn_norm: NormWeights
    gate_up: Tensor  # [2 ffn_dim, dim], gate first
    down: Tensor  # [dim, ffn_dim]
    q_norm: NormWeights | None = None
    k_norm: NormWeights | None = None


@dataclass
class PackedDecoder:
    """Made by ``pack``; run by ``decode_step``.

    ``errors`` are relative rms errors of what packing changed, by the name of the matrix.
    """

    weights: Tensor  # uint8: qkv, out, gate_up, down of each layer, then the head
    vectors: Tensor  # fp32: norms of each layer, then the last one
    weight_type: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    outputs: int
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    qk_norm: str = "none"
    rotary_cos: Tensor | None = None  # fp32 [positions, R/2]
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = False
    positions_from_start: bool = True  # a slot's position is slot − start, else the slot
    errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def pack(
        cls,
        layers: Sequence[LayerWeights],
        norm: NormWeights,
        head: Tensor,
        *,
        heads: int,
        kv_heads: int,
        weight_type: str,
        **options,
    ) -> PackedDecoder:
        """Pack weights of any floating type.

        Args:
            layers, norm: see ``LayerWeights``; the norm in front of the head.
            head: [outputs, dim], the rows of the output layer that are to be scored.
            heads, kv_heads: of attention, H and Hkv.
            weight_type: of all matrices, see ``PackedWeight``.
            options: the fields from ``norm`` on, ``norm_name`` for ``norm``.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        check_weight_type(weight_type)
        options["norm"] = options.pop("norm_name", "rmsnorm")
        options.setdefault("qk_norm", "none")
        for name, choices in (("norm", NORMS), ("qk_norm", QK_NORMS)):
            if options[name] not in choices:
                raise ValueError(f"{name}={options[name]!r}: expected one of {', '.join(choices)}")
        if not layers:
            raise ValueError("layers: expected at least one, got none")
        for name in ("rotary_cos", "rotary_sin"):
            table = options.get(name)
            if table is not None and (table.dtype != torch.float32 or table.dim() != 2):
                raise ValueError(
                    f"{name}: expected float32 [positions, R/2], got {table.dtype} "
                    f"{tuple(table.shape)}"
                )
        outputs, dim = head.shape
        first = layers[0]
        head_dim = first.out.shape[1] // heads
        ffn_dim = first.down.shape[1]
        padded = -(-ffn_dim // PANEL) * PANEL
        shapes = {
            "qkv": ((heads + 2 * kv_heads) * head_dim, dim),
            "out": (dim, heads * head_dim),
            "gate_up": (2 * padded, dim),
            "down": (dim, ffn_dim),
        }
        total = len(layers) * sum(packed_bytes(*s, weight_type) for s in shapes.values())
        weights = allocate_large(total + packed_bytes(outputs, dim, weight_type))
        errors, at = {}, 0

        def check_shape(name: str, matrix: Tensor, shape: tuple[int, ...]) -> None:
            if tuple(matrix.shape) != shape:
                raise ValueError(f"{name}: expected {shape}, got {tuple(matrix.shape)}")

        def put(name: str, matrix: Tensor, shape: tuple[int, int]) -> None:
            nonlocal at
            check_shape(name, matrix, shape)
            end = at + packed_bytes(*shape, weight_type)
            errors[name] = PackedWeight.pack(matrix, weight_type, out=weights[at:end]).error
            at = end

        vectors = []
        qk_norm = options["qk_norm"]

        def put_norm(name: str, norm: NormWeights | None, channels: int) -> None:
            if norm is None or tuple(norm.weight.shape) != (channels,):
                found = None if norm is None else tuple(norm.weight.shape)
                raise ValueError(f"{name}: expected weights {(channels,)}, got {found}")
            vectors.append(norm.weight)
            if norm.bias is not None:
                check_shape(f"{name}.bias", norm.bias, (channels,))
            if options["norm"] == "layernorm":
                vectors.append(torch.zeros_like(norm.weight) if norm.bias is None else norm.bias)
            elif norm.bias is not None:
                raise ValueError(f"{name}.bias: expected none, an rmsnorm has no bias")

        for i, layer in enumerate(layers):
            put_norm(f"layers.{i}.attention_norm", layer.attention_norm, dim)
            for which, count in (("q", heads), ("k", kv_heads)):
                found = getattr(layer, f"{which}_norm")
                if qk_norm != "none":
                    channels = head_dim * (count if qk_norm == "full" else 1)
                    put_norm(f"layers.{i}.{which}_norm", found, channels)
                elif found is not None:
                    raise ValueError(f"layers.{i}.{which}_norm: expected none, as qk_norm='none'")
            put_norm(f"layers.{i}.ffn_norm", layer.ffn_norm, dim)
            for name, shape in shapes.items():
                matrix = getattr(layer, name)
                if name == "gate_up" and padded != ffn_dim:
                    check_shape(f"layers.{i}.gate_up", matrix, (2 * ffn_dim, dim))
                    halves = matrix.new_zeros(2, padded, dim)
                    halves[:, :ffn_dim] = matrix.unflatten(0, (2, -1))
                    matrix = halves.flatten(0, 1)
                put(f"layers.{i}.{name}", matrix, shape)
        put_norm("norm", norm, dim)
        put("head", head, (outputs, dim))
        return cls(
            weights,
            torch.cat([v.detach().float().cpu() for v in vectors]),
            weight_type,
            len(layers),
            dim,
            heads,
            kv_heads,
            head_dim,
            ffn_dim,
            outputs,
            errors=errors,
            **options,
        )

    def allocate_cache(
        self,
        batch: int,
        max_seqlen: int,
        *,
        start: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> KVCache:
        """An empty cache for all layers: k and v are [layers, batch, max_seqlen, Hkv, D].

        ``start`` int32 [batch]: slots of left padding in front of each row.
        """
        cache = KVCache.allocate(
            self.layers * batch, max_seqlen, self.kv_heads, self.head_dim, dtype=dtype
        )
        buffers = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        k, v, k_scale, v_scale = (
            None if t is None else t.unflatten(0, (self.layers, batch)) for t in buffers
        )
        seqlens, starts = (torch.zeros(batch, dtype=torch.int32, device="cpu") for _ in range(2))
        if start is not None:
            starts.copy_(start)
        return KVCache(k, v, seqlens, starts, k_scale, v_scale)
