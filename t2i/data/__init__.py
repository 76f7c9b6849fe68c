"""Pictures with captions on disk, and the tokens of those pictures."""

from .dataset import SPLITS, ImageTextDataset
from .emoji import build_emoji
from .folder import build_folder
from .tokens import TokenDataset, tokenize_dataset

__all__ = [
    "SPLITS",
    "ImageTextDataset",
    "TokenDataset",
    "build_emoji",
    "build_folder",
    "tokenize_dataset",
]
