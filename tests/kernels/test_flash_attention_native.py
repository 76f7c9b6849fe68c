"""The native flash_attention at the edges of its tiles and tasks, with every instruction set.

The contract is in test_flash_attention.py, on small problems. These cross the tiles of rows and
keys, and are long enough to be cut over keys, forward and backward.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from oracle import assert_no_worse
from test_flash_attention import differentiate, pack, run, tensors

from t2i_kernels import native

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))

# batch, Lq, Lk, heads, key heads, head_dim, of v. A task has a multiple of 64 rows, a block 64 keys
# (and 64 rows in the backward pass), a tile 8 to 64 rows; few tasks are cut over 1,024 keys or so.
SIZES = [
    (2, 64, 65, 4, 4, 64, 64),
    (1, 129, 129, 2, 1, 16, 16),
    (1, 200, 131, 2, 2, 24, 40),
    (1, 50, 300, 6, 2, 33, 7),
    (1, 1, 2100, 4, 1, 8, 8),
    (1, 7, 1100, 2, 2, 8, 8),
    (1, 140, 1300, 1, 1, 8, 12),
]
OPTIONS = [
    dict(),
    dict(causal=True),
    dict(causal=True, window=(70, 0)),
    dict(window=(10, 90)),
    dict(causal=True, softcap=2.0),
    dict(causal=True, window=(40, 0), scale=1.0),
    dict(scale=-0.9),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# What AVX512_VNNI has of its own is for packed weights.
@pytest.fixture(params=[name for name in native.cpu_capabilities() if name != "AVX512_VNNI"])
def capability(request):
    with native.use_cpu_capability(request.param):
        yield request.param


def doubled(function, q, k, v, dout, dlse, **options):
    return differentiate(function, *(t.double() for t in (q, k, v)), dout, dlse, **options)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_oracle(capability, size, dtype):
    for options in OPTIONS[1:2] if dtype == torch.float16 else OPTIONS:
        compare_with_fp64(*tensors(*size, dtype=dtype), **options)


def compare_with_fp64(q, k, v, **options):
    dout = torch.randn(*q.shape[:-1], v.shape[-1])
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1])
    call = q, k, v, dout, dlse
    exact = doubled(oracle.plain_attention, *call, **options)
    plain = differentiate(oracle.plain_attention, *call, **options)
    if q.dtype != torch.float32:
        wide = oracle.plain_attention(q.float(), k.float(), v.float(), **options)
        plain = plain[0], wide[1], *plain[2:]
    got = differentiate(run("cpu"), *call, **options)
    fp32 = torch.finfo(torch.float32).eps / torch.finfo(q.dtype).eps
    names = "out", "logsumexp", "dq", "dk", "dv"
    for name, *values in zip(names, got, plain, exact, strict=True):
        factor, rounding = (3, 1 + 16 * fp32) if name[0] == "d" else (2, 4)
        assert_no_worse(name, *values, factor=factor, rounding=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_that_miss_whole_parts_of_the_keys(capability, dtype):
    """Rows of the end see none of the keys of the first tasks."""
    compare_with_fp64(*tensors(1, 1600, 1600, 1, 1, 16, dtype=dtype), window=(127, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_may_hold_anything(capability, dtype):
    q, k, v = tensors(1, 150, 70, 2, 1, 16, dtype=dtype)  # causal: the first 80 see nothing
    dout = torch.randn(q.shape).to(dtype)
    q[:, :80] = dout[:, :80] = torch.nan
    out, lse, *grads = differentiate(run("cpu"), q, k, v, dout, None, causal=True, scale=1.0)
    assert (out[:, :80] == 0).all() and (lse[..., :80] == -torch.inf).all()
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    seeing = [t[:, 80:] for t in (q, dout)]
    expected = differentiate(run("cpu"), seeing[0], k, v, seeing[1], None, causal=True, scale=1.0)
    torch.testing.assert_close(out[:, 80:], expected[0])
    for name, grad, other in zip("kv", grads[1:], expected[3:], strict=True):
        torch.testing.assert_close(grad, other, msg=f"d{name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_longer_than_tiles(capability, dtype):
    lengths_q, lengths_k = [130, 1, 70, 0], [200, 40, 70, 3]
    q, k, v = (t[0] for t in tensors(1, sum(lengths_q), sum(lengths_k), 4, 2, 16, dtype=dtype))
    dout, dlse = torch.randn(q.shape), torch.randn(4, len(q))
    ends = dict(cu_seqlens_q=pack(lengths_q), cu_seqlens_k=pack(lengths_k))
    got = differentiate(run("cpu"), q, k, v, dout, dlse, causal=True, **ends)
    rows, keys = torch.arange(len(q)).split(lengths_q), torch.arange(len(k)).split(lengths_k)
    alone = [
        differentiate(
            run("cpu"), *(t[None] for t in (q[r], k[j], v[j], dout[r], dlse[:, r])), causal=True
        )
        for r, j in zip(rows, keys, strict=True)
    ]
    for i, value in enumerate(got):
        parts = [one[i][0] for one in alone]
        torch.testing.assert_close(value, torch.cat(parts, dim=1 if i == 1 else 0))


# Of the last one, tasks have 1,408, 704 and 512 rows.
@pytest.mark.parametrize("size", [SIZES[0], SIZES[-1], SIZES[4], (1, 700, 720, 8, 4, 16, 16)])
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3]], ids=["causal", "window"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(capability, size, options, dtype):
    q, k, v = tensors(*size, dtype=dtype)
    dout, dlse = torch.randn(*q.shape[:-1], v.shape[-1]), None
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(differentiate(run("cpu"), q, k, v, dout, dlse, **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_among_values_spreads_alike_for_any_number_of_threads(capability, dtype):
    q, k, v = tensors(1, 700, 720, 8, 4, 16, 16, dtype=dtype)
    v[0, 375] = torch.nan
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run("cpu")(q, k, v, causal=True)[0])
    assert results[0].isnan().any() and not results[0].isnan().all()
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, (8e3, 1e4)),
        (torch.bfloat16, (14336, 8192)),
        (torch.bfloat16, (229376, 131072)),
    ],
)
def test_huge_scores_keep_their_gradient(capability, dtype, sizes):
    """Where one key takes all, its probability is 1 however large the score is."""
    q, k, v = (torch.full((1, 1, 1, 1), x, dtype=dtype, requires_grad=True) for x in (*sizes, 3.0))
    out, lse = run("cpu")(q, k, v, scale=1.0)
    dout = torch.full_like(out, 0.7)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert out.item() == 3 and lse.item() == float(torch.tensor(sizes[0] * sizes[1]))
    assert dv.item() == dout.item() and dq.item() == dk.item() == 0
