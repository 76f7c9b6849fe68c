"""Language models over text and image tokens; ``build_lm`` makes one."""

from __future__ import annotations

from .build import build_lm, load_lm, save_lm
from .config import LM_CONFIGS, LMConfig
from .model import TransformerLM

__all__ = ["LM_CONFIGS", "LMConfig", "TransformerLM", "build_lm", "load_lm", "save_lm"]
