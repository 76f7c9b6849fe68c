from .api import linear
from .packed import WEIGHT_TYPES, PackedLinear, PackedWeight

__all__ = ["WEIGHT_TYPES", "PackedLinear", "PackedWeight", "linear"]
