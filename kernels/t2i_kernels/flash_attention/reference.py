"""flash_attention in plain PyTorch: the formulas, forward and backward, on the whole matrix.

Inside this file q is [B, Hkv, G·Lq, D] and k, v are [B, Hkv, Lk, D]: the G query heads that share
a key head are stacked along the queries, so that keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    options = causal, (window_left, window_right), softcap, scale
    if cu_seqlens_q is None:
        return _forward(q, k, v, *options)
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    logsumexp = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=_accumulator(q))
    for rows, keys in _documents(cu_seqlens_q, cu_seqlens_k, len(q), len(k)):
        one = _forward(q[None, rows], k[None, keys], v[None, keys], *options)
        out[rows], logsumexp[:, rows] = one[0][0], one[1][0]
    return out, logsumexp


def flash_attention_backward(
    dout: Tensor,
    dlogsumexp: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    options = causal, (window_left, window_right), softcap, scale
    if dlogsumexp is None:
        dlogsumexp = torch.zeros_like(logsumexp)
    if cu_seqlens_q is None:
        return _backward(dout, dlogsumexp, q, k, v, out, logsumexp, *options)
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    for rows, keys in _documents(cu_seqlens_q, cu_seqlens_k, len(q), len(k)):
        dq[rows], dk[keys], dv[keys] = (
            grad[0]
            for grad in _backward(
                dout[None, rows],
                dlogsumexp[None, :, rows],
                q[None, rows],
                k[None, keys],
                v[None, keys],
                out[None, rows],
                logsumexp[None, :, rows],
                *options,
            )
        )
    return dq, dk, dv


def _forward(q, k, v, causal, window, softcap, scale):
    mask = _stacked_mask(q, k, causal, window)
    qh, kh, vh = stack_queries(q, k.shape[2]), by_head(k), by_head(v)
    out, logsumexp = attend(qh, kh, vh, mask, softcap, scale)
    return (
        unstack_queries(out, q.shape[2]).to(q.dtype).contiguous(),
        logsumexp.view(q.shape[0], q.shape[2], q.shape[1]),
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, logsumexp [B, Hkv, G·Lq]); a row that sees no key has output 0 and logsumexp −inf.

    ``mask`` is what each query sees, bool, broadcast to [B, Hkv, G·Lq, Lk]; None is all.
    """
    scores = _scores(q, k, softcap, scale)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf)
    if scores.shape[-1] == 0:
        return scores @ v, scores.new_full(scores.shape[:-1], -torch.inf)
    p, largest = scores.softmax(dim=-1), scores.amax(dim=-1)
    logsumexp = largest - p.amax(dim=-1).log()  # the largest p is exp(largest − logsumexp)
    unseeing = largest == -torch.inf
    if unseeing.any():  # −inf − −inf is NaN
        p = torch.where(unseeing[..., None], 0, p)
        logsumexp = torch.where(unseeing, -torch.inf, logsumexp)
    return p @ v, logsumexp


def _backward(dout, dlogsumexp, q, k, v, out, logsumexp, causal, window, softcap, scale):
    """FlashAttention-2 (arXiv 2307.08691), section 2.3.2: P is computed again from the logsumexp.
    A gradient of the logsumexp itself subtracts from delta, since d lse / d s = p."""
    kv_heads = k.shape[2]
    do, o, qh = (stack_queries(t, kv_heads) for t in (dout, out, q))
    kh, vh = by_head(k), by_head(v)
    lse, dlse = (t.reshape(qh.shape[:3]) for t in (logsumexp, dlogsumexp))
    unseeing = lse == -torch.inf  # p is 0 there, which 0 · NaN or −inf − −inf would undo
    lse, dlse = (torch.where(unseeing, 0, t) for t in (lse, dlse))
    do = torch.where(unseeing[..., None], 0, do)

    scores = _scores(qh, kh, softcap, scale)
    p = (scores - lse[..., None]).exp_()
    mask = _stacked_mask(q, k, causal, window)
    if mask is not None:
        p = torch.where(mask, p, 0)
    dv = p.mT @ do
    delta = (do * o).sum(dim=-1) - dlse
    ds = (do @ vh.mT).sub_(delta[..., None]).mul_(p)
    if softcap > 0:  # d c·tanh(x / c) = 1 − tanh²(x / c)
        ds *= 1 - (scores / softcap).square()
    dq, dk = scale * (ds @ kh), scale * (ds.mT @ qh)
    return (
        unstack_queries(dq, q.shape[2]).to(q.dtype).contiguous(),
        dk.transpose(1, 2).to(k.dtype).contiguous(),
        dv.transpose(1, 2).to(v.dtype).contiguous(),
    )


def _scores(q: Tensor, k: Tensor, softcap: float, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    return softcap * (scores / softcap).tanh() if softcap > 0 else scores


def _stacked_mask(q, k, causal, window):
    mask = attention_mask(q.shape[1], k.shape[1], causal, window, q.device)
    return None if mask is None else mask.repeat(q.shape[2] // k.shape[2], 1)


def attention_mask(
    lq: int, lk: int, causal: bool, window: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Which keys each query sees, bool [Lq, Lk]; None is all. Query i stands at key i + Lk − Lq."""
    left, right = window
    right = 0 if causal else right
    if left < 0 and right < 0:
        return None
    offset = torch.arange(lk, device=device) - torch.arange(lk - lq, lk, device=device)[:, None]
    seen = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        seen &= offset >= -left
    if right >= 0:
        seen &= offset <= right
    return seen


def by_head(x: Tensor) -> Tensor:
    """[B, L, H, D] -> [B, H, L, D], contiguous, in the type that sums are kept in."""
    return x.transpose(1, 2).to(_accumulator(x)).contiguous()


def stack_queries(q: Tensor, kv_heads: int) -> Tensor:
    """[B, Lq, H, D] -> [B, Hkv, G·Lq, D]; head h belongs to key head h // G."""
    return by_head(q).unflatten(1, (kv_heads, -1)).flatten(2, 3)


def unstack_queries(out: Tensor, heads: int) -> Tensor:
    """[B, Hkv, G·Lq, D] -> [B, Lq, H, D]."""
    groups = heads // out.shape[1]
    return out.unflatten(2, (groups, out.shape[2] // groups)).flatten(1, 2).transpose(1, 2)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _documents(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, total_q: int, total_k: int
) -> Iterator[tuple[slice, slice]]:
    """The rows of each packed sequence, (queries, keys)."""
    ends = (read_ends("cu_seqlens_q", cu_seqlens_q, total_q),
            read_ends("cu_seqlens_k", cu_seqlens_k, total_k))  # fmt: skip
    slices = ([slice(a, b) for a, b in zip(x[:-1], x[1:], strict=True)] for x in ends)
    return zip(*slices, strict=True)


def read_ends(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """Where sequences start and end; raises ValueError unless they cover ``total`` rows. Checked
    here because reading them is not free on a device."""
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != total or values != sorted(values):
        raise ValueError(
            f"flash_attention: {name} must rise from 0 to {total}, the number of rows, got {values}"
        )
    return values
