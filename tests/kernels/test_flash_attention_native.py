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

# batch, Lq, Lk, heads, key heads, head_dim, of v. A task has 128 rows, a block 64 keys (and 64 rows
# in the backward pass), a tile 8 to 32 rows; keys are cut from 1,024 on where tasks are few.
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
]


@pytest.fixture(params=native.cpu_capabilities())
def capability(request):
    with native.use_cpu_capability(request.param):
        yield request.param


def doubled(function, q, k, v, dout, dlse, **options):
    return differentiate(function, *(t.double() for t in (q, k, v)), dout, dlse, **options)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_oracle(capability, size, dtype):
    for options in OPTIONS if dtype == torch.float32 else OPTIONS[1:2]:
        q, k, v = tensors(*size, dtype=dtype)
        dout = torch.randn(*q.shape[:-1], v.shape[-1])
        dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1])
        call = q, k, v, dout, dlse
        exact = doubled(oracle.plain_attention, *call, **options)
        plain = differentiate(oracle.plain_attention, *call, **options)
        if dtype != torch.float32:
            wide = oracle.plain_attention(q.float(), k.float(), v.float(), **options)
            plain = plain[0], wide[1], *plain[2:]
        got = differentiate(run("cpu"), *call, **options)
        fp32 = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        for name, *values in zip(("out", "logsumexp", "dq", "dk", "dv"), got, plain, exact,
                                 strict=True):  # fmt: skip
            factor, rounding = (3, 1 + 16 * fp32) if name[0] == "d" else (2, 4)
            assert_no_worse(name, *values, factor=factor, rounding=rounding)


def test_packed_sequences_longer_than_tiles(capability):
    lengths_q, lengths_k = [130, 1, 70, 0], [200, 40, 70, 3]
    q, k, v = (t[0] for t in tensors(1, sum(lengths_q), sum(lengths_k), 4, 2, 16))
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


@pytest.mark.parametrize("size", [SIZES[0], SIZES[-1], SIZES[4]])
def test_same_bits_for_any_number_of_threads(capability, size):
    q, k, v = tensors(*size)
    dout, dlse = torch.randn(*q.shape[:-1], v.shape[-1]), None
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(differentiate(run("cpu"), q, k, v, dout, dlse, causal=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_huge_scores_keep_their_gradient(capability):
    """Where one key takes all, its probability is 1 however large the score is."""
    q, k, v = (torch.full((1, 1, 1, 1), x, requires_grad=True) for x in (8e3, 1e4, 3.0))
    out, lse = run("cpu")(q, k, v, scale=1.0)
    dout = torch.full_like(out, 0.7)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert out.item() == 3 and lse.item() == 8e7
    assert dv.item() == dout.item() and dq.item() == dk.item() == 0
