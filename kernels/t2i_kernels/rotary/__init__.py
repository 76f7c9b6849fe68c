from .api import rotary

__all__ = ["rotary"]
