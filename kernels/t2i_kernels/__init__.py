"""Fused operators of auto-regressive text-to-image models, each beside its PyTorch reference."""

from .decode_attention import KVCache, decode_attention
from .flash_attention import flash_attention
from .registry import BackendError, explain, use_backend
from .vector_quantizer import VectorQuantizer
from .vq_nearest import NearestCodes, vq_nearest

__all__ = [
    "BackendError",
    "KVCache",
    "NearestCodes",
    "VectorQuantizer",
    "decode_attention",
    "explain",
    "flash_attention",
    "use_backend",
    "vq_nearest",
]
