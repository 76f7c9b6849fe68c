"""Data-parallel training under ``torchrun``: the batch is split by rank, gradients are averaged.

Without ``torchrun`` every function here does nothing, so the loops never ask.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the other processes that ``torchrun`` started, and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_device(name: str) -> torch.device:
    """The device of a name; "auto" takes a GPU where there is one, under ``torchrun`` the
    one of this process.

    Raises:
        ValueError: not a device, or a GPU where torch finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r}: this torch ({torch.__version__}) finds no GPU")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over ranks, in one message."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    message = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(message)
    message /= world_size()
    for gradient, part in zip(
        gradients, message.split([g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


def mean_over_ranks(values: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Each flag, true where it is on any rank: decisions that depend on the clock or on a signal
    must be the same everywhere."""
    if world_size() == 1:
        return flags
    message = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in message.tolist()]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
