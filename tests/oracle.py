"""What the operators must compute: in fp64, one row at a time, sharing nothing with their code.

``attention`` is differentiable. ``plain_attention`` is the textbook formula at the precision of its
inputs: what an operator's error is measured against.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distances(z: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """(fp64 [N, K], bound on their own rounding [N, 1]) of z [N, d] and codebook [K, d]."""
    z, codes, u, dim = z.double(), codebook.double(), 2.0**-53, z.shape[1]
    if metric == "l2":
        found = (z[:, None] - codes).square().sum(-1)
        return found, 4 * (dim + 4) * u * found.amin(dim=1, keepdim=True)
    found = torch.full((len(z), len(codes)), 2.0, dtype=torch.float64)  # of a zero vector: cos is 0
    rows, columns = (z != 0).any(1), (codes != 0).any(1)
    if rows.any() and columns.any():
        a, b = (x / x.norm(dim=1, keepdim=True) for x in (z[rows], codes[columns]))
        found[rows[:, None] & columns] = (a[:, None] - b).square().sum(-1).flatten()
    return found, torch.full((len(z), 1), 8 * (dim + 8) * u)


def visible(i: int, lq: int, lk: int, causal: bool, window: tuple[int, int]) -> list[int]:
    """Keys that query i sees; the last query stands at the last key."""
    position, (left, right) = i + lk - lq, window
    return [
        j
        for j in range(lk)
        if (j <= position or not causal)
        and (position - j <= left or left < 0)
        and (j - position <= right or right < 0)
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, softcap: float, scale: float) -> tuple[Tensor, Tensor]:
    """One query [D] over the keys [n, D] that it sees: (out [Dv], logsumexp)."""
    if len(k) == 0:
        return v.new_zeros(v.shape[1]), q.new_tensor(-math.inf)
    scores = scale * (k @ q)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    logsumexp = scores.logsumexp(0)
    return (scores - logsumexp).exp() @ v, logsumexp


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, H, Dv], logsumexp [B, H, Lq]) in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    batch, lq, heads, dim = q.shape
    lk, group = k.shape[1], heads // k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    out, logsumexp = [], []
    for i in range(lq):
        keys = visible(i, lq, lk, causal, window)
        for b in range(batch):
            for h in range(heads):
                kh, vh = k[b, keys, h // group], v[b, keys, h // group]
                row = attend(q[b, i, h], kh, vh, softcap, scale)
                out.append(row[0])
                logsumexp.append(row[1])
    return (
        torch.stack(out).view(lq, batch, heads, v.shape[-1]).transpose(0, 1),
        torch.stack(logsumexp).view(lq, batch, heads).permute(1, 2, 0),
    )


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``attention``, all at once and each step rounded to the type of the inputs."""
    lq, lk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = torch.zeros(lq, lk, dtype=torch.bool)
    for i in range(lq):
        mask[i, visible(i, lq, lk, causal, window)] = True
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    seeing = mask.any(dim=1)[:, None]
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1) * seeing, v)
    return out, scores.logsumexp(-1).masked_fill(~seeing[:, 0], -math.inf)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [H, D] by the angles cos, sin [R/2] of its position: pairs of channels as complex numbers
    times cos + i·sin."""
    x, pairs = x.double().clone(), len(cos)
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        turned = torch.complex(x[:, a], x[:, b]) * torch.complex(cos[i].double(), sin[i].double())
        x[:, a], x[:, b] = turned.real, turned.imag
    return x


def assert_no_worse(
    name: str, got: Tensor, plain: Tensor, exact: Tensor, factor: float, rounding: float
) -> None:
    """``got`` is at most ``factor`` times as far from ``exact`` as ``plain`` is, at the worst
    element and on average, beyond ``rounding`` units in the last place of the largest element."""
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.double()[~finite], exact[~finite]), f"{name} differs at infinities"
    if not finite.any():
        return
    error, allowed = ((x.double() - exact)[finite].abs() for x in (got, plain))
    assert allowed.isfinite().all(), f"{name}: the plain formula overflows on this data"
    floor = rounding * torch.finfo(plain.dtype).eps * exact[finite].abs().max()
    for what, norm in (("", Tensor.max), (" on average", lambda x: x.square().mean().sqrt())):
        off, bound = norm(error), factor * norm(allowed) + floor
        assert off <= bound, f"{name} is off by {off:.2e}{what}, allowed are {bound:.2e}"
