"""Measures how the Triton kernels are best cut up on the GPU at hand (``t2i tune``)."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_kernels import (
    KVCache,
    decode_attention,
    flash_attention,
    linear_cross_entropy,
    tuning,
    vq_nearest,
)

WARPS = (4, 8)


@dataclass(frozen=True)
class Problem:
    """A call that is dominated by one kernel, at one size of its table, and what to try."""

    kernel: str
    size: int
    make: Callable[[str], Callable[[], Any]]  # device -> call
    candidates: dict[str, tuple]

    def configs(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.candidates.values()):
            yield dict(zip(self.candidates, values, strict=True))


def problems(small: bool = False) -> list[Problem]:
    """``small``: of sizes that the interpreter can run."""
    found = []
    for dim in (16,) if small else (64, 128, 256):
        size = 2 * dim
        tiles = (16,) if small else (32, 64, 128)
        shape = dict(BLOCK_M=tiles, BLOCK_N=tiles, num_warps=WARPS, num_stages=(1, 2, 3))
        found += [
            Problem("flash_attention.forward", size,
                    lambda device, dim=dim: _attention(device, dim, small, backward=False),
                    shape | dict(LAZY=(False, True))),
            Problem("flash_attention.keys", size,
                    lambda device, dim=dim: _attention(device, dim, small, backward=True), shape),
            Problem("flash_attention.queries", size,
                    lambda device, dim=dim: _attention(device, dim, small, backward=True), shape),
        ]  # fmt: skip
    tiles = (32,) if small else (64, 128, 256)
    found.append(
        Problem("vq_nearest", 1 << 16, lambda device: _nearest(device, small),
                dict(BLOCK_N=tiles, TILE=tiles, CHUNK=(16,), num_warps=WARPS, num_stages=(2, 3)))
    )  # fmt: skip
    for row_bytes in (32,) if small else (64, 128, 256):
        for kernel, tokens, queries in (("decode_attention", 1, 16),
                                        ("decode_attention.many", 16, 64)):  # fmt: skip
            found.append(
                Problem(kernel, row_bytes, lambda device, n=tokens, size=row_bytes: _decoding(
                            device, size // 2, n, small),
                        dict(SPLIT=(16,) if small else (128, 256, 512), BLOCK_M=(queries,),
                             BLOCK_N=(16,) if small else (64, 128),
                             WAYS=(1, 4) if tokens == 1 and not small else (1,),
                             BLOCK_NEW=(16,), num_warps=(4,), num_stages=(2, 3, 4)))
            )  # fmt: skip
    tiles = (16,) if small else (64, 128, 256)
    shape = dict(BLOCK_M=tiles, BLOCK_N=tiles, BLOCK_K=(16,) if small else (32, 64),
                 num_warps=WARPS, num_stages=(2, 3, 4))  # fmt: skip
    for kernel, more in (("forward", dict(SPLIT=(1024,))), ("logits", dict(GROUP=(8,))),
                         ("product", dict(GROUP=(8,)))):  # fmt: skip
        found.append(
            Problem(f"linear_cross_entropy.{kernel}", 2,
                    lambda device, backward=kernel != "forward": _loss(device, small, backward),
                    shape | more)
        )  # fmt: skip
    return found


def _decoding(device: str, dim: int, tokens: int, small: bool) -> Callable[[], Any]:
    batch, heads, slots = (1, 2, 60) if small else (8, 8, 4096)
    q = torch.randn(batch, tokens, 4 * heads, dim, device=device, dtype=torch.float16)
    new = torch.randn(batch, tokens, heads, dim, device=device, dtype=torch.float16)
    cache = KVCache.allocate(batch, slots, heads, dim, dtype=torch.float16, device=device)
    cache.k.normal_(), cache.v.normal_()
    cache.seqlens.fill_(slots - tokens)
    return lambda: decode_attention(q, new, new, cache, backend="triton")


def _loss(device: str, small: bool, backward: bool) -> Callable[[], Any]:
    rows, dim, classes = (40, 24, 50) if small else (8192, 576, 65536)
    x, weight = (
        torch.randn(n, dim, device=device, dtype=torch.float16).requires_grad_(backward)
        for n in (rows, classes)
    )
    targets = torch.randint(classes, (rows,), device=device)
    if not backward:
        return lambda: linear_cross_entropy(x, weight, targets, backend="triton")
    loss = linear_cross_entropy(x, weight, targets, backend="triton").sum()
    return lambda: torch.autograd.grad(loss, (x, weight), retain_graph=True)


def _attention(device: str, dim: int, small: bool, backward: bool) -> Callable[[], Any]:
    length = 48 if small else 4096
    q, k, v = (
        torch.randn(1, length, 2 if small else 16, dim, device=device, dtype=torch.float16)
        .requires_grad_(backward)
        for _ in range(3)
    )  # fmt: skip
    if not backward:
        return lambda: flash_attention(q, k, v, causal=True, backend="triton")
    out = flash_attention(q, k, v, causal=True, backend="triton")
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def _nearest(device: str, small: bool) -> Callable[[], Any]:
    z = torch.randn(60 if small else 65536, 8, device=device)
    codebook = torch.randn(100 if small else 16384, 8, device=device)
    return lambda: vq_nearest(z, codebook, "l2", backend="triton")


def milliseconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU."""
    from triton.testing import do_bench

    return do_bench(call, quantiles=[0.5])


def tune(
    device: str,
    file: Path,
    *,
    chosen: list[Problem],
    clock: Callable[[Callable[[], Any]], float] = milliseconds,
    report: Callable[[str], None] = print,
) -> None:
    """Measures every candidate and writes the fastest ones to ``file``, after each problem: what an
    interrupted run has measured stays, and is not measured again."""
    best = json.loads(file.read_text()) if file.is_file() else {}
    for problem in chosen:
        sizes = best.setdefault(problem.kernel, {})
        if str(problem.size) in sizes:
            report(f"{problem.kernel}, {problem.size} B: measured before, kept")
            continue
        call = problem.make(device)
        expected = _flat(call())
        times: list[tuple[float, dict]] = []
        for config in problem.configs():
            with tuning.use(problem.kernel, config):
                try:
                    # Too large for the device, or compiled wrongly: neither may win.
                    if (_flat(call()) - expected).norm() <= 0.01 * expected.norm():
                        times.append((clock(call), config))
                except Exception as error:
                    report(f"  {config}: {type(error).__name__}")
        if not times:
            report(f"{problem.kernel}, {problem.size} B: nothing ran")
            continue
        fastest, config = min(times, key=lambda t: t[0])
        sizes[str(problem.size)] = config
        report(f"{problem.kernel}, {problem.size} B: {fastest * 1e3:.0f} µs, {config}")
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(best, indent=1) + "\n")
        os.replace(part, file)


def _flat(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    tensors = (result,) if isinstance(result, Tensor) else result
    return torch.cat([t.detach().flatten().float() for t in tensors])
