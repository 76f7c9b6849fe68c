"""How good pictures are: reconstruction, Fréchet distance, agreement with their captions."""

from .evaluate import evaluate_model, summary
from .features import Features, load_features

__all__ = ["Features", "evaluate_model", "load_features", "summary"]
