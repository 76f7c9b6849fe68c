"""flash_attention in CUDA C++, on the CPU under the checker, against an fp64 oracle.

An error of the checker (a race, a barrier that not all come to, a read of what nobody wrote or of
what a copy has not brought yet, an access out of bounds) fails whichever test runs into it.
"""

from __future__ import annotations

import math

import device
import oracle
import pytest
import torch
from oracle import assert_no_worse

from t2i_kernels import flash_attention

import build  # isort: skip  (whether it is of this project depends on a folder of that name)

KERNELS = build.build(checked=True)
TYPES = {torch.bfloat16: KERNELS.Element.bf16, torch.float16: KERNELS.Element.fp16}


GPU = {"compute_capability": 80}  # that kernels are chosen for


def schedule(order="forward", seed=1, preempt=0):
    KERNELS.configure(getattr(KERNELS.Order, order), seed, preempt, GPU["compute_capability"])


@pytest.fixture(autouse=True, params=[80, 90], ids="sm_{}".format)
def in_order(request):
    """On GPUs for which there are different kernels."""
    torch.manual_seed(0)
    GPU["compute_capability"] = request.param
    schedule()


# ---- Calls --------------------------------------------------------------------------------------


def rows(name, tensor):
    """``tensor`` [B, L, H, D] in guarded memory, its address and strides."""
    return {name: tensor.data_ptr(), f"{name}_strides": KERNELS.Strides(*tensor.stride()[:3])}


def fill(call, q, k, v, *, causal=False, window=(-1, -1), softcap=0.0, scale=None, ends=None):
    """The fields that forward and backward share. ``ends``: cu_seqlens of q and of k."""
    (batch, length_q, heads, dim), (_, length_k, kv_heads, value_dim) = q.shape, v.shape
    fields = dict(
        element=TYPES[q.dtype], **rows("q", q), **rows("k", k), **rows("v", v), sequences=1,
        batch=batch, heads=heads, group=heads // kv_heads, length_q=length_q, length_k=length_k,
        dim=dim, value_dim=value_dim, window_left=window[0],
        window_right=0 if causal else window[1], softcap=softcap, scale=scale or dim**-0.5,
    )  # fmt: skip
    if ends:
        fields |= dict(cu_q=ends[0].data_ptr(), cu_k=ends[1].data_ptr(), sequences=len(ends[0]) - 1)
    for name, value in fields.items():
        setattr(call, name, value)
    return call


def forward(q, k, v, **options):
    """(out, lse) of tensors in guarded memory."""
    call = fill(KERNELS.FlashForward(), q, k, v, **options)
    batch, length, heads, _ = q.shape
    out = device.empty(KERNELS, (batch, length, heads, v.shape[-1]), q.dtype, "out")
    lse = device.empty(KERNELS, (batch, heads, length), torch.float32, "lse")
    call.out, call.out_strides, call.lse = *rows("out", out).values(), lse.data_ptr()
    KERNELS.flash_forward(call)
    return out, lse


def backward(q, k, v, out, lse, dout, dlse, **options):
    """(dq, dk, dv)."""
    call = fill(KERNELS.FlashBackward(), q, k, v, **options)
    scratch = [device.empty(KERNELS, lse.shape, lse.dtype, name) for name in ("log2_sum", "delta")]
    inputs = dict(dq=q, dk=k, dv=v)
    grads = [device.empty(KERNELS, t.shape, t.dtype, name) for name, t in inputs.items()]
    fields = dict(
        **rows("dout", dout), **rows("out", out), lse=lse.data_ptr(),
        dlse=0 if dlse is None else dlse.data_ptr(), log2_sum=scratch[0].data_ptr(),
        minus_delta=scratch[1].data_ptr(), **rows("dq", grads[0]), **rows("dk", grads[1]),
        **rows("dv", grads[2]),
    )  # fmt: skip
    for name, value in fields.items():
        setattr(call, name, value)
    KERNELS.flash_backward(call)
    return tuple(grads)


def run(q, k, v, dout, dlse, ends=None, **options):
    """(out, lse, dq, dk, dv) of the kernels."""
    q, k, v, dout = (
        device.put(KERNELS, t, name) for name, t in dict(q=q, k=k, v=v, dout=dout).items()
    )
    dlse = None if dlse is None else device.put(KERNELS, dlse, "dlse")
    if ends:
        ends = [device.put(KERNELS, t, "cu_seqlens") for t in ends]
    out, lse = forward(q, k, v, ends=ends, **options)
    return out, lse, *backward(q, k, v, out, lse, dout, dlse, ends=ends, **options)


def differentiate(function, q, k, v, dout, dlse, **options):
    """The same of a function that autograd knows."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out, lse = function(q, k, v, **options)
    outputs, grads = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs, grads = [out, lse], [*grads, dlse.to(lse.dtype)]
    options = dict(materialize_grads=True, allow_unused=True)
    grads = torch.autograd.grad(outputs, (q, k, v), grads, **options)
    return out.detach(), lse.detach(), *grads


def exact_attention(q, k, v, **options):
    return flash_attention(
        q.double(), k.double(), v.double(), return_lse=True, backend="reference", **options
    )


def assert_right(got, exact, plain):
    names = "out", "logsumexp", "dq", "dk", "dv"
    largest = exact[1][exact[1].isfinite()].abs().max().item() if exact[1].isfinite().any() else 0
    fp32 = torch.finfo(torch.float32).eps / torch.finfo(got[0].dtype).eps
    for name, *values in zip(names, got, plain, exact, strict=True):
        if name[0] == "d":  # exp(s − lse): the rounding of lse to fp32 is a relative error there
            assert_no_worse(name, *values, factor=3, rounding=1 + max(8, largest) * fp32)
        else:
            assert_no_worse(name, *values, factor=2, rounding=2)


def compare(q, k, v, dlse=True, **options):
    dout = torch.randn(*q.shape[:-1], v.shape[-1]).to(q.dtype)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1]) if dlse else None
    call = q, k, v, dout, dlse
    got = run(*call, **options)
    exact = differentiate(exact_attention, *call, **options)
    plain = differentiate(oracle.plain_attention, *call, **options)
    plain_lse = oracle.plain_attention(q.float(), k.float(), v.float(), **options)[1]
    assert_right(got, exact, (plain[0], plain_lse, *plain[2:]))
    return got


def tensors(batch, lq, lk, heads, kv_heads, dim, value_dim=None, dtype=torch.bfloat16):
    q = torch.randn(batch, lq, heads, dim)
    k = torch.randn(batch, lk, kv_heads, dim)
    v = torch.randn(batch, lk, kv_heads, value_dim or dim)
    return tuple(t.to(dtype) for t in (q, k, v))


# ---- Tests --------------------------------------------------------------------------------------

BF16, FP16 = torch.bfloat16, torch.float16
CASES = {  # batch, lq, lk, heads, kv_heads, dim, value_dim, type; options
    "one key": ((2, 1, 1, 1, 1, 64, 64, BF16), dict()),
    "63 by 65": ((1, 63, 65, 1, 1, 128, 128, FP16), dict(causal=True)),
    "64 by 64": ((1, 64, 64, 2, 2, 128, 128, BF16), dict(causal=True)),
    "65 by 63": ((1, 65, 63, 1, 1, 64, 64, FP16), dict()),
    "127 by 129": ((1, 127, 129, 1, 1, 64, 64, BF16), dict(causal=True)),
    "129 by 127": ((1, 129, 127, 1, 1, 128, 128, BF16), dict(causal=True)),
    "130 by 300": ((1, 130, 300, 1, 1, 128, 128, FP16), dict(causal=True)),
    "300 by 130": ((1, 300, 130, 1, 1, 64, 64, BF16), dict(causal=True)),
    "260 by 70": ((1, 260, 70, 1, 1, 128, 128, BF16), dict(window=(40, 30))),
    "one query": ((1, 1, 200, 4, 2, 128, 128, BF16), dict(causal=True)),
    "window left": ((1, 150, 200, 1, 1, 64, 64, FP16), dict(window=(70, -1))),
    "window right": ((1, 150, 200, 1, 1, 128, 128, FP16), dict(window=(-1, 20))),
    "window both": ((1, 200, 200, 1, 1, 128, 128, BF16), dict(window=(9, 3))),
    "window causal": ((1, 200, 150, 1, 1, 64, 64, BF16), dict(causal=True, window=(66, -1))),
    "edge of a window": ((1, 140, 140, 1, 1, 64, 64, BF16), dict(window=(-1, 62))),
    "only itself": ((1, 140, 140, 1, 1, 64, 64, BF16), dict(window=(0, 0))),
    "groups": ((2, 70, 90, 6, 2, 64, 64, BF16), dict(causal=True)),
    "one key head": ((1, 70, 60, 3, 1, 128, 128, FP16), dict(causal=True)),
    "softcap": ((1, 70, 140, 2, 1, 128, 128, BF16), dict(softcap=2.0, causal=True)),
    "softcap, 64": ((1, 140, 70, 1, 1, 64, 64, FP16), dict(softcap=1.0)),
    "scale": ((1, 40, 50, 1, 1, 64, 64, BF16), dict(scale=0.5, causal=True)),
    "head_dim 8": ((1, 70, 80, 2, 1, 8, 8, BF16), dict(causal=True)),
    "head_dim 32": ((1, 70, 80, 1, 1, 32, 32, FP16), dict()),
    "head_dim 72": ((1, 70, 80, 1, 1, 72, 72, BF16), dict(causal=True)),
    "narrow values": ((1, 70, 80, 1, 1, 128, 40, BF16), dict(causal=True)),
    "wide values": ((1, 70, 80, 1, 1, 16, 96, FP16), dict()),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_the_oracle(case):
    (*shape, dtype), options = case
    compare(*tensors(*shape, dtype=dtype), **options)


@pytest.mark.parametrize("dim", [64, 128])
def test_gradient_of_out_alone(dim):
    compare(*tensors(1, 40, 50, 2, 1, dim), dlse=False, causal=True)


LENGTHS_Q, LENGTHS_K = [70, 0, 130, 1, 30, 5], [100, 20, 66, 3, 0, 5]


def pack(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("dim", [64, 128])
def test_packed(dim):
    q, k, v = tensors(1, sum(LENGTHS_Q), sum(LENGTHS_K), 2, 1, dim)
    dout, dlse = torch.randn(q.shape).to(q.dtype), torch.randn(1, 2, q.shape[1])
    options, ends = dict(causal=True, window=(60, -1)), (pack(LENGTHS_Q), pack(LENGTHS_K))
    got = run(q, k, v, dout, dlse, ends=ends, **options)
    exact, plain = [], []
    for queries, keys in zip(
        torch.arange(q.shape[1]).split(LENGTHS_Q),
        torch.arange(k.shape[1]).split(LENGTHS_K),
        strict=True,
    ):
        call = q[:, queries], k[:, keys], v[:, keys], dout[:, queries], dlse[..., queries]
        exact.append(differentiate(exact_attention, *call, **options))
        # The plain formula has no answer where there are no keys.
        function = oracle.plain_attention if len(queries) and len(keys) else exact_attention
        plain.append(differentiate(function, *call, **options))
    exact, plain = (
        [torch.cat([one[i] for one in parts], 2 if i == 1 else 1) for i in range(5)]
        for parts in (exact, plain)
    )
    assert_right(got, exact, [t.to(x.dtype) for t, x in zip(plain, got, strict=True)])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("options", [dict(causal=True), dict(window=(10, 3)), dict(softcap=3.0)])
def test_rows_that_see_nothing(dim, options):
    """Output 0, logsumexp −inf, no gradient from them, whatever gradient reaches them."""
    lq, lk = (100, 30) if "softcap" not in options else (20, 0)
    unseeing = lq - lk - max(options.get("window", (0, 0))[1], 0)
    q, k, v = tensors(1, lq, lk, 2, 1, dim)
    dout, dlse = torch.randn(q.shape).to(q.dtype), torch.randn(1, 2, lq)
    dout[:, :unseeing] = dlse[..., :unseeing] = math.nan
    out, lse, dq, dk, dv = run(q, k, v, dout, dlse, **options)
    assert (out[:, :unseeing] == 0).all() and (dq[:, :unseeing] == 0).all()
    assert torch.equal(lse == -math.inf, (torch.arange(lq) < unseeing).expand(1, 2, lq))
    if lk:
        seeing = q[:, unseeing:], k, v, dout[:, unseeing:], dlse[..., unseeing:]
        expected = run(*(t.contiguous() for t in seeing), **options)
        got = out[:, unseeing:], lse[..., unseeing:], dq[:, unseeing:], dk, dv
        torch.testing.assert_close(got, expected)


def test_keys_without_queries():
    q, k, v = tensors(1, 0, 150, 2, 1, 64)
    *_, dk, dv = run(q, k, v, q, torch.empty(1, 2, 0))
    assert (dk == 0).all() and (dv == 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_huge_scores(dtype):
    """Of ±10⁴: softmax is an argmax, and forward takes its maxima after all."""
    q, k, v = tensors(1, 70, 140, 1, 1, 64, dtype=dtype)
    compare(30 * q, 30 * k, v, causal=True)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rising_scores(dtype):
    """Each key scores above all before it, or below."""
    q, k, v = tensors(1, 40, 300, 1, 1, 64, dtype=dtype)
    q, rising = torch.ones_like(q), torch.linspace(0, 30, 300).to(dtype)[None, :, None, None]
    k = rising.expand(k.shape).contiguous()
    compare(q, k, v)
    compare(q, k.flip(1), v)


def test_strides():
    """Views of a fused projection, heads before length, rows skipped."""
    qkv = torch.randn(2, 70, 4, 64).to(BF16)
    q, k, v = qkv.split([2, 1, 1], dim=2)
    heads_first = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    dout, dlse = torch.randn(2, 70, 2, 64).to(BF16), torch.randn(2, 2, 70)
    expected = run(*(t.contiguous() for t in (q, k, v)), dout, dlse, causal=True)
    for call in [(q, k, v), heads_first]:
        strided = dout.transpose(1, 2).contiguous().transpose(1, 2)
        got = run(*call, strided, dlse, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dim", [64, 128])
def test_same_bits_in_every_order(dim):
    q, k, v = tensors(1, 140, 140, 2, 1, dim)
    call = q, k, v, torch.randn(q.shape).to(q.dtype), torch.randn(1, 2, 140)
    expected = run(*call, causal=True)
    for order in [("reverse",), ("random", 1), ("random", 2, 30)]:
        schedule(*order)
        got = run(*call, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("line", ["flash_forward", "flash_backward"])
def test_shared_memory_without_conflicts(line):
    """ldmatrix and 16-byte accesses need as few passes as there can be."""
    if (line, GPU["compute_capability"]) == ("flash_forward", 90):
        pytest.skip("wgmma reads by itself; tests/ptx counts what its kernel does besides")
    KERNELS.clear_counts()
    for dim in (64, 128):
        q, k, v = tensors(1, 130, 130, 1, 1, dim)
        run(q, k, v, q, None)
    counts = [count for count in KERNELS.shared_counts() if count.line.startswith(line)]
    assert counts
    for count in counts:
        assert count.wavefronts == count.ideal, count.line


def test_bad_calls_are_named():
    q, k, v = tensors(1, 8, 8, 1, 1, 64)
    with pytest.raises(ValueError, match="head_dim is 12 and 64"):
        forward(q[..., :12], k[..., :12], v)
    with pytest.raises(ValueError, match="head_dim is 136"):
        forward(*(torch.zeros(1, 8, 1, 136, dtype=BF16) for _ in "qkv"))
    padded = torch.zeros(1, 8, 1, 68, dtype=BF16)[..., :64]
    with pytest.raises(ValueError, match="k: rows are not aligned to 16 bytes"):
        forward(q, padded, v)
