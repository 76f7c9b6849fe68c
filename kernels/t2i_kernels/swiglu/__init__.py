from .api import swiglu

__all__ = ["swiglu"]
