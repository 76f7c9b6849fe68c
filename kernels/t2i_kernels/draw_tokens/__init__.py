from .api import draw_tokens

__all__ = ["draw_tokens"]
