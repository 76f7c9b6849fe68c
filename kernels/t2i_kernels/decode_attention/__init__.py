from .api import decode_attention
from .cache import KVCache

__all__ = ["KVCache", "decode_attention"]
