"""What a training step does with gradients: schedule, clipping, AdamW, averaged weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .config import Optim
from .distributed import average_gradients


def adamw(module: nn.Module, config: Optim, lr: float | None = None) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr if lr is None else lr,
        betas=config.betas,
        fused=True,
    )


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """At step (from 0) of steps: a linear warm-up, then half a cosine down to ``min_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr + (1 - config.min_lr) * cosine)


def apply_gradients(
    parameters: list[Tensor], optimizer: torch.optim.Optimizer, lr: float, grad_clip: float
) -> Tensor:
    """One step of the optimizer on the gradients that are there, which are then dropped. Returns
    their global norm before clipping."""
    average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def mean_metrics(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The metrics of a step from those of its micro-batches."""
    return {name: torch.stack([p[name].detach() for p in parts]).mean() for name in parts[0]}


class Ema:
    """A running mean of a model's weights (Polyak averaging), which is what gets evaluated.

    Buffers are copied: a codebook that is a running mean already needs no second one. The first
    steps count less, so that the mean forgets the random start: decay is at most (n + 1) / (n + 10)
    after n steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._pairs = list(self.module.parameters()), list(model.parameters())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of ``model`` after step ``step`` (from 0)."""
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(*self._pairs, 1 - decay)
        for mean, value in zip(self.module.buffers(), model.buffers(), strict=True):
            mean.copy_(value)
