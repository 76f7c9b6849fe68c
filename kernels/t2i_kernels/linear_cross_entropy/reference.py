"""linear_cross_entropy in plain PyTorch, forward and backward, some rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ELEMENTS = 1 << 24  # of the logits of some rows: 64 MB


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    check_targets(targets, len(weight), ignore_index)
    x, weight = _wide(x), _wide(weight)
    loss, logsumexp = x.new_empty(len(x)), x.new_empty(len(x))
    for rows in _parts(x, weight):
        logits = x[rows] @ weight.T
        loss[rows] = F.cross_entropy(
            logits, targets[rows], ignore_index=ignore_index, reduction="none"
        )
        logsumexp[rows] = logits.logsumexp(dim=-1)
    return loss, logsumexp


def linear_cross_entropy_backward(
    dloss: Tensor, dlogsumexp: Tensor | None, x: Tensor, weight: Tensor, targets: Tensor,
    logsumexp: Tensor, ignore_index: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of the logits is (dloss + dlogsumexp) · softmax − dloss · onehot."""
    dtype, x, weight = x.dtype, _wide(x), _wide(weight)
    ignored = targets == ignore_index
    dloss, targets = torch.where(ignored, 0, dloss), torch.where(ignored, 0, targets)
    factor = dloss if dlogsumexp is None else dloss + dlogsumexp
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
    for rows in _parts(x, weight):
        d = (x[rows] @ weight.T).sub_(logsumexp[rows, None]).exp_().mul_(factor[rows, None])
        d.scatter_add_(1, targets[rows, None], -dloss[rows, None])
        dx[rows] = d @ weight
        dweight.addmm_(d.T, x[rows])
    return dx.to(dtype).contiguous(), dweight.to(dtype).contiguous()


def check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    """Raises ValueError for a target out of range; on a device an assertion, without waiting."""
    wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
    expected = f"from 0 to {classes - 1}, or {ignore_index}, which is ignored"
    if targets.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"linear_cross_entropy: targets must be {expected}")
    elif wrong.any():
        value = int(targets[wrong][0])
        raise ValueError(f"linear_cross_entropy: targets: expected {expected}, got {value}")


def _parts(x: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, MAX_ELEMENTS // max(1, len(weight)))
    return [slice(first, first + size) for first in range(0, len(x), size)]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
