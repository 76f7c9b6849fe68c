"""Fused operators of auto-regressive text-to-image models, each beside its PyTorch reference."""

from .decode_attention import KVCache, decode_attention
from .decode_step import PackedDecoder, decode_step
from .draw import draw
from .draw_tokens import draw_tokens
from .flash_attention import flash_attention
from .linear import PackedLinear, PackedWeight, linear
from .linear_cross_entropy import linear_cross_entropy
from .registry import BackendError, explain, use_backend
from .rms_norm import rms_norm
from .rotary import rotary
from .swiglu import swiglu
from .vector_quantizer import VectorQuantizer
from .vq_nearest import NearestCodes, vq_nearest

__all__ = [
    "BackendError",
    "KVCache",
    "NearestCodes",
    "PackedDecoder",
    "PackedLinear",
    "PackedWeight",
    "VectorQuantizer",
    "decode_attention",
    "decode_step",
    "draw",
    "draw_tokens",
    "explain",
    "flash_attention",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "swiglu",
    "use_backend",
    "vq_nearest",
]
