"""Exact attention: schema, checks, gradient and backends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import cuda_backend, native, triton_backend
from ..checks import check_groups, check_heads, check_indices, check_scores, default_scale
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
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
    which a gradient scaler relies on; whether it reaches others of its sequence is left open.

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
        TypeError, ValueError: a wrong type, shape, device or option; ``cu_seqlens`` that do not
            cover the rows.
        BackendError: the backend asked for cannot run the call.
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
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: expected (left, right), got {window!r}")
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, *window, softcap, scale)
    if scale is None:
        scale = default_scale(q)
    return q, k, v, cu_seqlens_q, cu_seqlens_k, causal, *window, float(softcap), float(scale)


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, left, right, softcap, scale) -> None:
    packed = cu_seqlens_q is not None
    if packed != (cu_seqlens_k is not None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k: give both or none")
    if packed:
        dim, layout = 3, "[total, heads, head_dim] with cu_seqlens"
    else:
        dim, layout = 4, "[batch, length, heads, head_dim] without cu_seqlens"
    check_heads("q", q, dim, layout, q)
    check_heads("k", k, dim, layout, q)
    check_heads("v", v, dim, layout, q)
    if k.shape[-1] != q.shape[-1] or (not packed and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"k: expected the batch and head_dim of q {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"v: expected k's {tuple(k.shape)} but for the last dimension, got {tuple(v.shape)}"
        )
    check_groups(q, k.shape[-2], "k and v")
    if packed:
        check_indices("cu_seqlens_q", cu_seqlens_q, "[sequences + 1]", q)
        check_indices("cu_seqlens_k", cu_seqlens_k, "[sequences + 1]", q)
        if cu_seqlens_q.shape != cu_seqlens_k.shape or not len(cu_seqlens_q):
            raise ValueError(
                "cu_seqlens_q and cu_seqlens_k: expected [sequences + 1] each, got "
                f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
            )
    if left < -1 or right < -1:
        raise ValueError(f"window: expected at least -1, which is all, got {(left, right)}")
    check_scores(softcap, scale)


def _fake(q, k, v, *options):
    _check(q, k, v, *options)
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

    @once_differentiable
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


def _cpu_supports(q, k, v, *options) -> Reason:
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    if q.dtype == torch.float64:
        return "float64 is for the reference only"
    return None


def _cuda_supports(q, k, v, *options) -> Reason:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"CUDA kernels are for bfloat16 and float16, q is {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > 128 or q.shape[-1] % 8 or v.shape[-1] % 8:
        return "head_dim is no multiple of 8 up to 128"
    if options[-1] <= 0 and not options[-2]:
        return "scale is not above 0, and there is no softcap"
    return cuda_backend.runs_on("q", q)


def _triton_supports(q, k, v, *options) -> Reason:
    if q.dtype == torch.float64:
        return "float64 is for the reference only"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return "head_dim is above 256"
    return triton_backend.runs_on("q", q)


register_op("flash_attention", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("flash_attention.reference", reference.flash_attention, "CompositeExplicitAutograd")
LIBRARY.impl(
    "flash_attention_backward.reference",
    reference.flash_attention_backward,
    "CompositeExplicitAutograd",
)
add_backend("cuda", cuda_backend.reason, _cuda_supports)
add_backend("cpu", native.reason, _cpu_supports)
add_backend("triton", triton_backend.reason, _triton_supports)
triton_backend.implement("flash_attention", "flash_attention", "flash_attention_backward")
