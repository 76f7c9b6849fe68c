from .api import draw
from .reference import gumbel_noise, keep_likely

__all__ = ["draw", "gumbel_noise", "keep_likely"]
