"""flash_attention, on every backend, against an fp64 oracle.

``CHECKS`` are also run against planted bugs (test_mutations.py).
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from backends import backends, skip_unless_supported
from oracle import assert_no_worse

from t2i_kernels import flash_attention

BACKENDS = backends("flash_attention")


def tensors(batch, lq, lk, heads, kv_heads, dim, dim_v=None, dtype=torch.float32):
    """Random q, k, v."""
    q = torch.randn(batch, lq, heads, dim)
    k = torch.randn(batch, lk, kv_heads, dim)
    v = torch.randn(batch, lk, kv_heads, dim_v or dim)
    return tuple(t.to(dtype) for t in (q, k, v))


def differentiate(function, q, k, v, dout, dlse, **options):
    """(out, lse, dq, dk, dv) of ``function`` for gradients dout, and dlse unless it is None."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = function(q, k, v, **options)
    outputs, grads = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, grads = [out, lse], [*grads, dlse.to(lse.dtype)]
    return out.detach(), lse.detach(), *torch.autograd.grad(outputs, (q, k, v), grads)


def run(backend):
    def function(q, k, v, **options):
        return flash_attention(q, k, v, return_lse=True, backend=backend, **options)

    return function


def compare(backend, q, k, v, with_dlse=True, **options):
    """Output, logsumexp and gradients are no worse than the plain formula's."""
    skip_unless_supported(backend, "flash_attention", q, k, v, **options)
    dout = torch.randn(*q.shape[:-1], v.shape[-1]).to(q.dtype)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1])
    call = q, k, v, dout, dlse if with_dlse else None
    exact = differentiate(oracle.attention, *call, **options)
    plain = differentiate(oracle.plain_attention, *call, **options)
    got = differentiate(run(backend), *call, **options)
    assert [t.dtype for t in got] == [q.dtype, torch.float32, q.dtype, q.dtype, q.dtype]
    if q.dtype != torch.float32:  # the logsumexp is fp32 whatever the inputs are
        plain_lse = oracle.plain_attention(q.float(), k.float(), v.float(), **options)[1]
        plain = plain[0], plain_lse, *plain[2:]
    assert_right(got, exact, plain)


def assert_right(got, exact, plain):
    """(out, lse, dq, dk, dv) against the same of the plain formula."""
    names = "out", "logsumexp", "dq", "dk", "dv"
    # A backward pass takes exp(s − lse): the rounding of lse to fp32 is a relative error there.
    largest = exact[1][exact[1].isfinite()].abs().max().item() if exact[1].isfinite().any() else 0
    fp32 = torch.finfo(torch.float32).eps / torch.finfo(got[0].dtype).eps
    for name, *values in zip(names, got, plain, exact, strict=True):
        if name[0] == "d":
            assert_no_worse(name, *values, factor=3, rounding=1 + max(8, largest) * fp32)
        else:
            assert_no_worse(name, *values, factor=2, rounding=2)


# ---- Checks: (backend) -> None, or AssertionError -----------------------------------------------

OPTIONS = [
    dict(),
    dict(causal=True),
    dict(window=(5, 0)),
    dict(window=(3, 4)),
    dict(window=(-1, 2)),
    dict(window=(7, -1)),
    dict(window=(0, 0)),
    dict(causal=True, window=(4, 6)),
    dict(softcap=1.5),
    dict(causal=True, softcap=0.7, scale=0.3),
    dict(scale=-0.8),
]


def check_options(backend):
    for options in OPTIONS:
        compare(backend, *tensors(2, 19, 19, 2, 1, 8), **options)


def check_lengths(backend):
    """Queries and keys of different lengths, odd sizes, one row: aligned bottom-right."""
    for lq, lk in [(1, 37), (3, 3), (37, 2), (13, 70), (70, 13), (130, 130)]:
        for options in [dict(causal=True), dict(window=(9, 3)), dict(window=(40, -1)), dict()]:
            compare(backend, *tensors(1, lq, lk, 1, 1, 5), **options)


def check_one_key(backend):
    """Its value goes through to the bit; only the logsumexp has a gradient in q and k."""
    for lq in (1, 5):
        q, k, v = tensors(3, lq, 1, 2, 2, 4)
        dout, dlse = torch.randn(q.shape), torch.randn(3, 2, lq)
        out, lse, *grads = differentiate(run(backend), q, k, v, dout, dlse, scale=2.0)
        assert torch.equal(out, v.expand(q.shape))
        torch.testing.assert_close(lse, 2 * (q * k).sum(-1).transpose(1, 2))
        dscores = 2 * dlse.transpose(1, 2)[..., None]
        expected = [t.sum(1, keepdim=True) for t in (dscores * q, dout)]
        torch.testing.assert_close(grads, [dscores * k, *expected], rtol=1e-5, atol=1e-5)


def check_heads(backend):
    """Query heads share key heads in order; values may have another width."""
    for heads, kv_heads, dim, dim_v in [(6, 6, 4, 4), (6, 3, 4, 4), (6, 2, 16, 3), (5, 1, 1, 7)]:
        compare(backend, *tensors(2, 9, 11, heads, kv_heads, dim, dim_v), causal=True)


def check_low_precision(backend):
    for dtype in (torch.bfloat16, torch.float16):
        for options in [dict(), dict(causal=True, window=(20, -1)), dict(softcap=3.0)]:
            compare(backend, *tensors(1, 33, 47, 4, 2, 32, dtype=dtype), **options)


def check_sums_are_fp32(backend):
    """Thousands of terms: a sum in bf16 would stop growing at 256."""
    q, k, v = tensors(1, 1, 4096, 1, 1, 8, dtype=torch.bfloat16)
    q = torch.zeros_like(q)
    skip_unless_supported(backend, "flash_attention", q, k, v)
    out, lse = run(backend)(q, k, v.abs())
    expected = v.double().abs().mean(dim=1)
    torch.testing.assert_close(out[:, 0].double(), expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(lse.item(), math.log(4096), rtol=1e-6, atol=0)


def check_gradient_of_out_alone(backend):
    compare(backend, *tensors(1, 7, 9, 2, 2, 8), with_dlse=False, causal=True)


def check_gradient_of_logsumexp_alone(backend):
    q, k, v = (t.requires_grad_() for t in tensors(2, 5, 7, 2, 1, 4))
    grads = {}
    for function in (run(backend), oracle.attention):
        _, lse = function(q, k, v, causal=True)
        grads[function] = torch.autograd.grad(lse.sum(), (q, k), materialize_grads=True)
    for got, exact in zip(*grads.values(), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def check_rows_that_see_nothing(backend):
    """Output 0, logsumexp −inf, no gradient from them, whatever gradient reaches them."""
    for lq, lk, unseeing, options in [
        (9, 4, 5, dict(causal=True)),
        (9, 4, 3, dict(window=(1, 2))),
        (6, 2, 4, dict(window=(0, 0), softcap=2.0)),
        (3, 0, 3, dict()),
        (3, 0, 3, dict(causal=True)),
    ]:
        q, k, v = tensors(2, lq, lk, 4, 2, 8)
        dout, dlse = torch.randn(q.shape), torch.randn(2, 4, lq)
        # Joining two parts by their logsumexps differentiates logaddexp(−inf, −inf): NaN, and
        # 0 · NaN in what weighs the outputs.
        dout[:, :unseeing] = dlse[..., :unseeing] = math.nan
        out, lse, dq, dk, dv = differentiate(run(backend), q, k, v, dout, dlse, **options)
        assert (out[:, :unseeing] == 0).all() and (dq[:, :unseeing] == 0).all()
        assert torch.equal(lse == -math.inf, (torch.arange(lq) < unseeing).expand(2, 4, lq))
        seeing = q[:, unseeing:], k, v, dout[:, unseeing:], dlse[..., unseeing:]
        expected = differentiate(run(backend), *seeing, **options)
        got = out[:, unseeing:], lse[..., unseeing:], dq[:, unseeing:], dk, dv
        torch.testing.assert_close(got, expected)


def check_huge_scores(backend):
    """Scores of ±10⁵ and more: softmax is an argmax, and nothing overflows."""
    q, k, v = tensors(1, 12, 20, 2, 2, 16)
    compare(backend, 300 * q, 300 * k, v, causal=True)
    compare(backend, q, k, v, scale=1e4)
    compare(backend, 1e10 * q, 1e10 * k, v, scale=1e-20)


def check_rising_scores(backend):
    """Each key scores above all before it, or below: sums are scaled again and again, or not."""
    for dtype in (torch.float32, torch.float16):
        q, k, v = tensors(1, 3, 150, 1, 1, 16)
        q, k = torch.ones_like(q), torch.linspace(0, 75, 150)[None, :, None, None].expand(k.shape)
        call = tuple(t.to(dtype) for t in (q, k, v))
        compare(backend, *call)
        compare(backend, *(t.flip(1) for t in call))


def check_shifted(backend):
    """All of +100: scores share an offset of 10⁴ times the dimension."""
    q, k, v = tensors(1, 20, 20, 1, 1, 4)
    compare(backend, q + 100, k + 100, v + 100, causal=True)


def check_retrieval(backend):
    """Each query asks for one key by name, and gets its value to the bit."""
    names = torch.eye(32)[torch.randperm(32)]
    asked = torch.randint(32, (50,))
    q, k, v = (t[None, :, None] for t in (names[asked], names, torch.randn(32, 6)))
    out, lse = run(backend)(q, k, v, scale=1000.0)
    assert torch.equal(out, v[:, asked])
    assert (lse == 1000).all()


def check_means(backend):
    """Equal keys: an output is the mean of the values in sight, a logsumexp their number's log."""
    values = torch.arange(40, dtype=torch.float32)[None, :, None, None]
    q, k = torch.ones(1, 40, 1, 4), torch.zeros(1, 40, 1, 4)
    i = torch.arange(40)
    for options, first, last in [
        (dict(causal=True), 0 * i, i),
        (dict(window=(5, 2)), (i - 5).clamp_min(0), (i + 2).clamp_max(39)),
        (dict(window=(3, 9), causal=True), (i - 3).clamp_min(0), i),
    ]:
        out, lse = run(backend)(q, k, values, **options)
        torch.testing.assert_close(out.flatten(), (first + last) / 2)
        torch.testing.assert_close(lse.flatten(), (last - first + 1).float().log())


def check_strides(backend):
    """Views of a fused projection, heads before length, rows skipped, keys shared by expansion."""
    qkv = torch.randn(2, 10, 8, 6)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    heads_first = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    skipping = tuple(t[:, ::2] for t in (q, k, v))
    shared = q, k[:1].expand(2, -1, -1, -1), v[:, :, :1].expand(-1, -1, 2, -1)
    for call in [(q, k, v), heads_first, skipping, shared]:
        for dout in (torch.randn(2, call[0].shape[1], 4, 6), torch.ones(()).expand(*call[0].shape)):
            dlse = torch.randn(2, call[0].shape[1], 4)
            copies = tuple(t.contiguous() for t in call)
            got = differentiate(run(backend), *call, dout, dlse.transpose(1, 2), causal=True)
            expected = differentiate(
                run(backend), *copies, dout.contiguous(), dlse.transpose(1, 2).contiguous(),
                causal=True,
            )  # fmt: skip
            torch.testing.assert_close(got, expected)


LENGTHS_Q = [3, 0, 5, 1, 2]
LENGTHS_K = [4, 2, 3, 0, 2]


def pack(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check_packed(backend):
    """Each sequence of a packed batch is what it is alone; one may be empty, on either side."""
    q, k, v = (t.squeeze(0) for t in tensors(1, sum(LENGTHS_Q), sum(LENGTHS_K), 4, 2, 8))
    ends = dict(cu_seqlens_q=pack(LENGTHS_Q), cu_seqlens_k=pack(LENGTHS_K))
    for options in OPTIONS:
        skip_unless_supported(backend, "flash_attention", q, k, v, **ends, **options)
        dout, dlse = torch.randn(q.shape), torch.randn(4, len(q))
        got = differentiate(run(backend), q, k, v, dout, dlse, **ends, **options)
        alone = []
        for rows, keys in zip(
            torch.arange(len(q)).split(LENGTHS_Q),
            torch.arange(len(k)).split(LENGTHS_K),
            strict=True,
        ):
            part = (t[None] for t in (q[rows], k[keys], v[keys], dout[rows], dlse[:, rows]))
            alone.append(differentiate(run(backend), *part, **options))
        for i, value in enumerate(got):
            parts = [one[i][0] for one in alone]
            torch.testing.assert_close(value, torch.cat(parts, dim=1 if i == 1 else 0))


def check_sequences_do_not_mix(backend):
    """NaN in one sequence stays there."""
    q, k, v = (t.squeeze(0) for t in tensors(1, 9, 9, 2, 2, 4))
    ends = pack([4, 5])
    skip_unless_supported(backend, "flash_attention", q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends)
    for t in (q, k, v):
        t[4:] = math.nan
    dout = torch.ones_like(q)
    call = dict(cu_seqlens_q=ends, cu_seqlens_k=ends)
    out, lse, *grads = differentiate(run(backend), q, k, v, dout, torch.ones(2, 9), **call)
    for value in (out, lse.T, *grads):
        assert value[:4].isfinite().all() and value[4:].isnan().any()


def check_nan_reaches_the_output(backend):
    """A gradient scaler looks for overflow in gradients: it must not be swallowed."""
    for poisoned in range(3):
        q, k, v = call = tensors(1, 4, 4, 1, 1, 4)
        call[poisoned][0, 2, 0, 1] = math.nan
        out, lse, *grads = differentiate(run(backend), q, k, v, torch.ones_like(q), None)
        assert out[0, 2].isnan().any()
        assert any(grad.isnan().any() for grad in grads)


def check_empty(backend):
    for batch, lq, lk in [(0, 3, 4), (2, 0, 4), (2, 0, 0), (0, 0, 0)]:
        q, k, v = tensors(batch, lq, lk, 4, 2, 8, 6)
        call = q, k, v, torch.ones(batch, lq, 4, 6), torch.ones(batch, 4, lq)
        out, lse, dq, dk, dv = differentiate(run(backend), *call, causal=True)
        assert out.shape == (batch, lq, 4, 6) and lse.shape == (batch, 4, lq)
        assert dq.shape == q.shape and (dk == 0).all() and (dv == 0).all()
    for lengths in ([], [0], [0, 0]):
        q, k, v = (t.squeeze(0) for t in tensors(1, 0, 0, 4, 2, 8))
        ends = pack(lengths)
        out, lse = run(backend)(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends)
        assert out.shape == (0, 4, 8) and lse.shape == (4, 0)


def check_batch_independence(backend):
    """A row is the same whatever the rows beside it are."""
    q, k, v = tensors(5, 11, 11, 4, 2, 16)
    call = q, k, v, torch.randn(q.shape), torch.randn(5, 4, 11)
    together = differentiate(run(backend), *call, causal=True)
    for b in (0, 3):
        alone = differentiate(run(backend), *(t[b : b + 1] for t in call), causal=True)
        for value, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(value[b : b + 1], expected, rtol=2**-22, atol=2**-22)


def check_same_bits_every_time(backend):
    q, k, v = tensors(2, 33, 33, 4, 2, 16)
    call = q, k, v, torch.randn(q.shape), torch.randn(2, 4, 33)
    first, second = (differentiate(run(backend), *call, causal=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_contract(check, backend):
    check(backend)


# ---- As an operator of torch --------------------------------------------------------------------

SIGNATURES = {
    "dense": dict(),
    "causal": dict(causal=True, scale=0.5),
    "window and softcap": dict(window=(3, 2), softcap=2.0),
    "packed": dict(cu_seqlens_q=pack([3, 4]), cu_seqlens_k=pack([5, 4]), causal=True),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SIGNATURES.values(), ids=SIGNATURES)
def test_gradcheck(backend, options):
    q, k, v = (t.requires_grad_() for t in tensors(1, 7, 9, 4, 2, 3, 2, dtype=torch.float64))
    if "cu_seqlens_q" in options:
        q, k, v = (t.detach()[0].requires_grad_() for t in (q, k, v))
    skip_unless_supported(backend, "flash_attention", q, k, v, **options)
    torch.autograd.gradcheck(
        lambda *call: run(backend)(*call, **options), (q, k, v), fast_mode=True
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    """Instead of the wrong one that differentiating the backward kernel would give."""
    q, k, v = (t.requires_grad_() for t in tensors(1, 3, 3, 1, 1, 4))
    out = flash_attention(q, k, v, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def positional(q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, causal=False, window=(-1, -1),
               softcap=0.0, scale=1.0):  # fmt: skip
    return q, k, v, cu_seqlens_q, cu_seqlens_k, causal, *window, softcap, scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SIGNATURES.values(), ids=SIGNATURES)
def test_opcheck(backend, options):
    q, k, v = tensors(1, 7, 9, 4, 2, 8, 6)
    if "cu_seqlens_q" in options:
        q, k, v = q[0], k[0], v[0]
    call = positional(*(t.requires_grad_() for t in (q, k, v)), **options)
    forward = getattr(torch.ops.t2i.flash_attention, backend)
    torch.library.opcheck(forward, call)
    q, k, v, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in call)
    out, lse = forward(q, k, v, *rest)
    backward = getattr(torch.ops.t2i.flash_attention_backward, backend)
    for dlse in (None, torch.randn(lse.shape)):
        torch.library.opcheck(backward, (torch.randn(out.shape), dlse, q, k, v, out, lse, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    def model(q, k, v):
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True, backend=backend)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 8):
        call = [t.requires_grad_() for t in tensors(2, length, length, 4, 2, 8)]
        grads = [torch.autograd.grad(function(*call), call) for function in (model, compiled)]
        torch.testing.assert_close(*grads)


# ---- Errors -------------------------------------------------------------------------------------

Q, K = torch.zeros(2, 5, 4, 8), torch.zeros(2, 6, 2, 8)
ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
ENDS_K = torch.tensor([0, 2, 6], dtype=torch.int32)
BAD_CALLS = {
    "q no tensor": (([1.0], K, K), {}, TypeError, "q: expected a tensor, got list"),
    "v no tensor": ((Q, K, None), {}, TypeError, "v: expected a tensor, got NoneType"),
    "integers": ((Q.int(), K, K), {}, TypeError, r"q: expected float32.*int32 \(2, 5, 4, 8\)"),
    "types": ((Q, K.half(), K), {}, TypeError, "k: expected torch.float32 as q, got torch.float16"),
    "devices": ((Q, K, K.to("meta")), {}, ValueError, "v: on meta, but q is on cpu"),
    "three dims": ((Q[0], K, K), {}, ValueError, r"q: expected \[batch, .*got \(5, 4, 8\)"),
    "five dims": ((Q, K[None], K), {}, ValueError, r"k: expected .*got \(1, 2, 6, 2, 8\)"),
    "batch": ((Q[:1], K, K), {}, ValueError, r"k: .* q \(1, 5, 4, 8\), got \(2, 6, 2, 8\)"),
    "head_dim": ((Q, K[..., :4], K), {}, ValueError, r"k: .* q .*, got \(2, 6, 2, 4\)"),
    "v length": ((Q, K, K[:, 1:]), {}, ValueError, r"v: .* \(2, 6, 2, 8\).* got \(2, 5, 2, 8\)"),
    "v heads": ((Q, K, K[:, :, 1:]), {}, ValueError, r"v: .* got \(2, 6, 1, 8\)"),
    "groups": ((Q[:, :, 1:], K, K), {}, ValueError, "q: expected a multiple of the 2 .*got 3"),
    "no heads": ((Q, K[:, :, :0], K[:, :, :0]), {}, ValueError, "q: expected a multiple of the 0"),
    "window": ((Q, K, K), dict(window=(-2, 0)), ValueError, r"window: .*got \(-2, 0\)"),
    "window's size": ((Q, K, K), dict(window=(1,)), ValueError, r"window: .*got \(1,\)"),
    "window's type": ((Q, K, K), dict(window=5), ValueError, r"window: .*\(left, right\), got 5"),
    "softcap": ((Q, K, K), dict(softcap=-1.0), ValueError, "softcap: .*got -1.0"),
    "softcap NaN": ((Q, K, K), dict(softcap=math.nan), ValueError, "softcap: .*got nan"),
    "scale": ((Q, K, K), dict(scale=math.inf), ValueError, "scale: .*got inf"),
    "one cu_seqlens": ((Q[0], K[0], K[0]), dict(cu_seqlens_q=ENDS), ValueError, "both or none"),
    "packed dims": (
        (Q, K, K), dict(cu_seqlens_q=ENDS, cu_seqlens_k=ENDS_K), ValueError,
        r"q: expected \[total, heads, head_dim\] with cu_seqlens, got \(2, 5, 4, 8\)",
    ),
    "cu_seqlens type": (
        (Q[0], K[0], K[0]), dict(cu_seqlens_q=ENDS.long(), cu_seqlens_k=ENDS_K), TypeError,
        "cu_seqlens_q: expected int32 .*got torch.int64",
    ),
    "cu_seqlens dims": (
        (Q[0], K[0], K[0]), dict(cu_seqlens_q=ENDS, cu_seqlens_k=ENDS_K[None]), ValueError,
        r"cu_seqlens_k: expected int32 .*got \(1, 3\)",
    ),
    "cu_seqlens sizes": (
        (Q[0], K[0], K[0]), dict(cu_seqlens_q=ENDS, cu_seqlens_k=ENDS_K[1:]), ValueError,
        r"cu_seqlens_q and cu_seqlens_k: .*got \(3,\) and \(2,\)",
    ),
    "cu_seqlens end": (
        (Q[0], K[0], K[0]), dict(cu_seqlens_q=ENDS, cu_seqlens_k=ENDS), ValueError,
        r"cu_seqlens_k must rise from 0 to 6.*got \[0, 2, 5\]",
    ),
    "cu_seqlens order": (
        (Q[0], K[0], K[0]), dict(cu_seqlens_q=ENDS[[0, 2, 1, 2]], cu_seqlens_k=ENDS[[0, 1, 1, 2]]),
        ValueError, r"cu_seqlens_q must rise .*got \[0, 5, 2, 5\]",
    ),
    "backend": ((Q, K, K), dict(backend="fast"), ValueError, "'fast': expected one of cuda, "),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(call):
    args, kwargs, error, message = call
    with pytest.raises(error, match=message):
        flash_attention(*args, **kwargs)
