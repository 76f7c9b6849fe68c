"""Image tokenizers: pictures to codes and back.

Each has ``config``, ``downsampling``, ``num_codes``, ``encode(images) -> codes``,
``decode(codes) -> images`` and ``forward(images) -> (reconstruction, VQOutput)``; images are
[B, 3, H, W] in [-1, 1], codes int64 [B, h, w].
"""

from .build import TOKENIZER_CONFIGS, build_tokenizer, load_tokenizer, save_tokenizer

__all__ = ["TOKENIZER_CONFIGS", "build_tokenizer", "load_tokenizer", "save_tokenizer"]
