"""Weights in the order in which products read them; ``csrc/cpu/linear.h`` explains the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_TYPES = ("fp32", "bf16", "int8", "int4")
PANEL = 16  # outputs
GROUP = 32  # inputs of one scale
BLOCK = 2 * GROUP
CHUNK = 2048  # outputs that are quantised at once: what it takes of memory stays small


def packed_bytes(outputs: int, inputs: int, weight_type: str) -> int:
    """Bytes of a packed matrix."""
    blocks = -(-inputs // BLOCK)
    panel = {"fp32": inputs * 64, "bf16": -(-inputs // 2) * 64,
             "int8": blocks * 17 * 64, "int4": blocks * 9 * 64}[weight_type]  # fmt: skip
    return -(-outputs // PANEL) * panel


@dataclass
class PackedWeight:
    """A matrix [outputs, inputs] for ``linear``.

    Types of weights: "fp32"; "bf16", 2 bytes a weight; "int8", 1.06 bytes, and "int4", 0.56 bytes,
    which have one scale in bf16 for 32 inputs. With integer weights the products take the inputs in
    8 bits, too, one scale for 32 of them.
    """

    data: Tensor  # uint8 [bytes]
    outputs: int
    inputs: int
    weight_type: str
    error: float  # rms of what packing changed, relative to the rms of the weights

    @classmethod
    def pack(cls, weight: Tensor, weight_type: str, *, out: Tensor | None = None) -> PackedWeight:
        """Pack a matrix [outputs, inputs] of any floating type, on the CPU.

        ``out``: uint8 memory to write to, of ``packed_bytes``; allocated by default.

        Raises:
            ValueError: a wrong shape or type, or a weight that is not finite.
        """
        check_weight_type(weight_type)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"weight: expected a floating [outputs, inputs], got {weight.dtype} "
                f"{tuple(weight.shape)}"
            )
        outputs, inputs = weight.shape
        size = packed_bytes(outputs, inputs, weight_type)
        if out is None:
            out = torch.empty(size, dtype=torch.uint8, device="cpu")
        if out.dtype != torch.uint8 or tuple(out.shape) != (size,):
            raise ValueError(f"out: expected uint8 {(size,)}, got {out.dtype} {tuple(out.shape)}")
        squares = errors = 0.0
        for first in range(0, outputs, CHUNK):
            rows = weight[first : first + CHUNK].detach().float()
            if not rows.isfinite().all():
                raise ValueError("weight: expected finite numbers")
            panels = F.pad(rows, (0, 0, 0, -len(rows) % PANEL))
            packed = _PACK[weight_type](panels)
            at = packed_bytes(first, inputs, weight_type)
            out[at : at + packed.numel()] = packed
            restored = _UNPACK[weight_type](packed, len(panels), inputs)[: len(rows)]
            if not restored.isfinite().all() or (rows.any() and not restored.any()):
                raise ValueError(f"weight: {weight_type} has no room for numbers of this size")
            squares += float(rows.double().square().sum())
            errors += float((restored - rows).double().square().sum())
        error = (errors / squares) ** 0.5 if squares else 0.0
        return cls(out, outputs, inputs, weight_type, error)

    def unpack(self) -> Tensor:
        """The weights as products see them, fp32 [outputs, inputs]."""
        return unpack(self.data, self.outputs, self.inputs, self.weight_type)


class PackedLinear(nn.Module):
    """``nn.Linear`` without bias, whose weights are packed: for inference, on the CPU."""

    def __init__(self, weight: PackedWeight):
        super().__init__()
        self.weight = weight

    @classmethod
    def from_linear(cls, layer: nn.Linear, weight_type: str) -> PackedLinear:
        """Raises ValueError for a layer with a bias, or for what ``PackedWeight.pack`` refuses."""
        if layer.bias is not None:
            raise ValueError("layer: expected one without a bias")
        return cls(PackedWeight.pack(layer.weight, weight_type))

    def forward(self, x: Tensor) -> Tensor:
        from .api import linear

        return linear(x, self.weight)

    def extra_repr(self) -> str:
        weight = self.weight
        return f"{weight.inputs}, {weight.outputs}, {weight.weight_type}, error={weight.error:.2g}"


def check_weight_type(weight_type: str) -> None:
    if weight_type not in WEIGHT_TYPES:
        raise ValueError(f"weight_type {weight_type!r}: expected one of {', '.join(WEIGHT_TYPES)}")


def unpack(data: Tensor, outputs: int, inputs: int, weight_type: str) -> Tensor:
    """fp32 [outputs, inputs] of packed bytes."""
    panels = outputs + -outputs % PANEL
    return _UNPACK[weight_type](data, panels, inputs)[:outputs]


def quantize_inputs(x: Tensor) -> Tensor:
    """x [..., inputs] as products with integer weights see it: scale · round(x / scale), with
    scale = max|x| / 127 of each 32 inputs."""
    inputs = x.shape[-1]
    groups = F.pad(x, (0, -inputs % GROUP)).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    factor = 1 / scale.clamp_min(torch.finfo(torch.float32).tiny)
    return ((groups * factor).round() * scale).flatten(-2)[..., :inputs]


# ---- The formats: panels [16 n, inputs] to bytes, and back ---------------------------------------


def _pack_fp32(w: Tensor) -> Tensor:
    return w.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous().view(torch.uint8).flatten()


def _unpack_fp32(data: Tensor, outputs: int, inputs: int) -> Tensor:
    return data.view(torch.float32).view(-1, inputs, PANEL).transpose(1, 2).reshape(outputs, inputs)


def _pack_bf16(w: Tensor) -> Tensor:
    pairs = F.pad(w, (0, w.shape[1] % 2)).bfloat16().view(-1, PANEL, -(-w.shape[1] // 2), 2)
    return pairs.transpose(1, 2).contiguous().view(torch.uint8).flatten()


def _unpack_bf16(data: Tensor, outputs: int, inputs: int) -> Tensor:
    pairs = data.view(torch.bfloat16).view(-1, -(-inputs // 2), PANEL, 2).transpose(1, 2)
    return pairs.reshape(outputs, -1)[:, :inputs].float()


def _pack_int8(w: Tensor) -> Tensor:
    groups = _groups(w)
    scale = _round_up_to_bf16(groups.abs().amax(dim=-1, keepdim=True) / 127)
    values = (groups / _nonzero(scale)).round()
    # [panels, 16, blocks, halves, words, bytes]
    words = (values + 128).to(torch.uint8).view(-1, PANEL, scale.shape[1] // 2, 2, 8, 4)
    return _with_scales(scale, words.permute(0, 2, 3, 4, 1, 5))


def _unpack_int8(data: Tensor, outputs: int, inputs: int) -> Tensor:
    scale, words = _split_scales(data, inputs, 17)
    values = words.view(len(scale), -1, 2, 8, PANEL, 4).permute(0, 4, 1, 2, 3, 5)
    return _dequantize(scale, values.reshape(outputs, -1, GROUP).float() - 128, inputs)


def _pack_int4(w: Tensor) -> Tensor:
    groups = _groups(w)
    scale, values = _best_int4(groups)
    # [panels, 16, blocks, halves, low or high, words, bytes]
    halves = (values + 8).to(torch.uint8).view(-1, PANEL, scale.shape[1] // 2, 2, 2, 4, 4)
    low, high = halves.unbind(4)
    return _with_scales(scale, (low | high << 4).permute(0, 2, 3, 4, 1, 5))


def _unpack_int4(data: Tensor, outputs: int, inputs: int) -> Tensor:
    scale, words = _split_scales(data, inputs, 9)
    words = words.view(len(scale), -1, 2, 4, PANEL, 4).permute(0, 4, 1, 2, 3, 5)
    values = torch.stack([words & 15, words >> 4], dim=4)
    return _dequantize(scale, values.reshape(outputs, -1, GROUP).float() - 8, inputs)


_PACK = {"fp32": _pack_fp32, "bf16": _pack_bf16, "int8": _pack_int8, "int4": _pack_int4}
_UNPACK = {"fp32": _unpack_fp32, "bf16": _unpack_bf16, "int8": _unpack_int8, "int4": _unpack_int4}


def _best_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and values in [-8, 7] of the least squared error among some scales of either sign: the
    largest weight may lie beyond the last step, if the others gain by it."""
    largest = groups.abs().amax(dim=-1, keepdim=True)
    # Squares of large weights are inf. A power of two leaves the order of errors as it is.
    unit = torch.exp2(-torch.frexp(largest).exponent.clamp(min=-100).float())
    best = torch.full_like(largest, torch.inf)
    best_scale, best_values = torch.zeros_like(largest), torch.zeros_like(groups)
    for steps in torch.linspace(6.5, 9, 11).tolist():
        for sign in (1, -1):
            scale = (sign * largest / steps).bfloat16().float()
            values = (groups / _nonzero(scale)).round().clamp(-8, 7)
            error = ((values * scale - groups) * unit).square().sum(dim=-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_values = torch.where(better, values, best_values)
    return best_scale, best_values


def _groups(w: Tensor) -> Tensor:
    """[outputs, groups, 32], whole blocks of 64 inputs."""
    return F.pad(w, (0, -w.shape[1] % BLOCK)).unflatten(1, (-1, GROUP))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale)


def _round_up_to_bf16(x: Tensor) -> Tensor:
    """Of numbers that are not negative: no value of a group lies beyond 127 steps then."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _with_scales(scale: Tensor, words: Tensor) -> Tensor:
    """Bytes of scales [outputs, groups, 1] and words [panels, blocks, ...], block by block."""
    scale = scale.bfloat16().view(-1, PANEL, scale.shape[1] // 2, 2).transpose(1, 2).contiguous()
    scale_bytes = scale.view(torch.uint8).flatten(2)
    return torch.cat([scale_bytes, words.flatten(2)], dim=2).flatten()


def _split_scales(data: Tensor, inputs: int, lines: int) -> tuple[Tensor, Tensor]:
    """Scales fp32 [panels, blocks, 16, 2], and the other bytes [panels, blocks, ...]."""
    blocks = data.view(-1, -(-inputs // BLOCK), lines * 64)
    scale = blocks[..., :64].contiguous().view(torch.bfloat16).float()
    return scale.unflatten(-1, (PANEL, 2)), blocks[..., 64:].contiguous()


def _dequantize(scale: Tensor, values: Tensor, inputs: int) -> Tensor:
    scale = scale.transpose(1, 2).reshape(len(values), -1, 1)
    return (values * scale).flatten(1)[:, :inputs]
