from .api import decode_step
from .decoder import LayerWeights, NormWeights, PackedDecoder

__all__ = ["LayerWeights", "NormWeights", "PackedDecoder", "decode_step"]
