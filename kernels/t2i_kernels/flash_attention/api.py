"""Exact attention: schema, checks, gradient and backends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..registry import LIBRARY, Backend, register, register_op, select
from . import reference

_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, int window_left, int window_right,"
    " float softcap, float scale"
)
SCHEMA = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor logsumexp)"
BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor? dlogsumexp, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,"
    f" {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v, without ever holding the matrix; differentiable in q, k and v.

    Source: FlashAttention-2 (arXiv 2307.08691). Query i of Lq stands at key i + Lk − Lq: the last
    query sees every key, also where the lengths differ. Sums are kept in fp32. A row that sees no
    key gives 0, logsumexp −inf and no gradient. NaN in an input reaches the rows that attend to it,
    which a gradient scaler relies on.

    Args:
        q: [B, Lq, H, D], or packed [total_q, H, D]; fp32, bf16 or fp16 (the reference also fp64).
        k: [B, Lk, Hkv, D] or [total_k, Hkv, D]; H is a multiple of Hkv, head h reads h // (H/Hkv).
        v: as k, its last dimension may differ. Any strides with a contiguous last dimension.
        causal: a query sees keys up to its own position.
        window: (left, right), how many keys a query sees before and behind its own; −1 is all.
        softcap: c > 0 bounds the scaled scores to c · tanh(s / c) (Gemma 2, arXiv 2408.00118).
        scale: 1/√D by default.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where each packed sequence starts; both
            or none.
        return_lse: also the logsumexp of the scores, differentiable.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        out, as q with v's last dimension; with ``return_lse`` also fp32 [B, H, Lq] or [H, total_q],
        natural logarithm.

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option.
        RuntimeError: ``cu_seqlens`` that do not cover the rows; the backend asked for cannot run
            the call.
    """
    call = _bind(
        q,
        k,
        v,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    out, logsumexp = select("flash_attention", backend, *call).run(*call)
    return (out, logsumexp) if return_lse else out


def _bind(
    q,
    k,
    v,
    *,
    causal=False,
    window=(-1, -1),
    softcap=0.0,
    scale=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    return_lse=False,
) -> tuple:
    if len(window) != 2 or min(window) < -1:
        raise ValueError(f"window: expected (left, right), each at least -1, got {window}")
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, softcap)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    return (q, k, v, cu_seqlens_q, cu_seqlens_k, causal, *window, float(softcap), float(scale))


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, softcap) -> None:
    packed = cu_seqlens_q is not None
    layout = "[total, heads, head_dim]" if packed else "[batch, length, heads, head_dim]"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dim() != (3 if packed else 4):
            raise ValueError(f"{name}: expected {layout}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.dtype not in (*DTYPES, torch.float64):
            raise TypeError(
                f"{name}: expected float32, bfloat16, float16 or float64, the same for q, k and v, "
                f"got {tensor.dtype} beside {q.dtype}"
            )
        if tensor.device != q.device:
            raise ValueError(f"{name}: on {tensor.device}, but q is on {q.device}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v: expected {(*k.shape[:-1], 'head_dim')} as k, got {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"k: expected the batch and head_dim of q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q: {heads} heads are not a multiple of the {kv_heads} of k and v")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected 0 (off) or a positive number, got {softcap}")
    if packed != (cu_seqlens_k is not None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: give both or none")
    if packed:
        for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not len(cu_seqlens):
                raise ValueError(
                    f"{name}: expected int32 [sequences + 1], got {cu_seqlens.dtype} "
                    f"{tuple(cu_seqlens.shape)}"
                )
        if len(cu_seqlens_q) != len(cu_seqlens_k):
            raise ValueError(
                f"cu_seqlens_k: expected {len(cu_seqlens_q)} entries as cu_seqlens_q, "
                f"got {len(cu_seqlens_k)}"
            )


def _fake(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_left, window_right, softcap, scale):
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, softcap)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    *batch, length, heads, _ = q.shape
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*batch, heads, length, dtype=dtype)


def _fake_backward(dout, dlogsumexp, q, k, v, *rest):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options
    ctx.set_materialize_grads(False)


def add_backend(name: str, available, supports) -> None:
    """Define ``t2i::flash_attention.<name>`` and its backward, and offer the pair to the registry;
    the implementations are registered in torch by the caller, in Python or in C++."""
    forward, backward = f"flash_attention.{name}", f"flash_attention_backward.{name}"
    LIBRARY.define(forward + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.define(backward + BACKWARD_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::{forward}", _fake, lib=LIBRARY)
    torch.library.register_fake(f"t2i::{backward}", _fake_backward, lib=LIBRARY)
    run_backward = getattr(torch.ops.t2i.flash_attention_backward, name)

    def gradient(ctx, dout, dlogsumexp):
        q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        grads = run_backward(
            dout, dlogsumexp, q, k, v, out, logsumexp, cu_seqlens_q, cu_seqlens_k, *ctx.options
        )
        return *grads, None, None, *(None for _ in ctx.options)

    torch.library.register_autograd(
        f"t2i::{forward}", gradient, setup_context=_setup_context, lib=LIBRARY
    )
    run = getattr(torch.ops.t2i.flash_attention, name)
    register("flash_attention", Backend(name, available, supports, run))


register_op("flash_attention", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("flash_attention.reference", reference.flash_attention, "CompositeExplicitAutograd")
LIBRARY.impl(
    "flash_attention_backward.reference",
    reference.flash_attention_backward,
    "CompositeExplicitAutograd",
)
