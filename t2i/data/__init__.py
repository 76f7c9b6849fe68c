"""Pictures with captions on disk, and the tokens of those pictures."""

from .dataset import SPLITS, ImageTextDataset
from .tokens import TokenDataset, tokenize_dataset

__all__ = ["SPLITS", "ImageTextDataset", "TokenDataset", "tokenize_dataset"]
