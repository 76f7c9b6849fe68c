from .api import NearestCodes, vq_nearest

__all__ = ["NearestCodes", "vq_nearest"]
