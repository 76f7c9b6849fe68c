"""Attention on the CPU: forward, and forward + backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from contest import Contender, contest
from t2i_kernels import explain, flash_attention

SHAPES = [  # B, H, T, D
    (1, 16, 1152, 64),
    (2, 16, 1152, 128),
    (8, 8, 256, 64),
    (1, 12, 4096, 64),
]
LENGTHS = [128, 256, 512, 1024, 2048]  # of a sweep over T
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def eager(q, k, v, causal: bool):
    """Softmax over the whole matrix, which torch.compile fuses."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def sdpa(q, k, v, causal: bool):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def flex(q, k, v, causal: bool):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        return i >= j

    length = q.shape[1]
    mask = create_block_mask(seen, None, None, length, length, "cpu") if causal else None
    run = compiled(flex_attention)

    def call(q, k, v, causal: bool):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return run(q, k, v, block_mask=mask).transpose(1, 2)

    return call


def outputs_of(function, q, k, v, dout, causal: bool, backward: bool) -> list[torch.Tensor]:
    """The output and, with ``backward``, the gradients."""
    if not backward:
        with torch.no_grad():
            return [function(q, k, v, causal=causal)]
    out = function(q, k, v, causal=causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def contenders(q, k, v, dout, causal: bool, backward: bool) -> list[Contender]:
    def ready(function):
        return lambda: outputs_of(function, q, k, v, dout, causal, backward)

    def make_flex():
        if backward:
            raise NotImplementedError("flex_attention has no backward on a CPU")
        inputs = [x.detach() for x in (q, k, v)]
        run = flex(*inputs, causal)
        return lambda: outputs_of(run, *inputs, dout, causal, backward)

    return [
        Contender("t2i", lambda: ready(flash_attention), ours=True),
        Contender("torch SDPA", lambda: ready(sdpa)),
        Contender("torch flex, compiled", make_flex),
        Contender("torch eager, compiled", lambda: ready(compiled(eager))),
    ]


def race(benchmark, peaks, shape, dtype: str, causal: bool, backward: bool) -> None:
    batch, heads, length, dim = shape
    q, k, v = (
        torch.randn(batch, length, heads, dim).to(DTYPES[dtype]).requires_grad_() for _ in range(3)
    )
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    field = contenders(q, k, v, dout, causal, backward)
    expected = None

    def gate(outputs) -> str | None:
        nonlocal expected
        if expected is None:  # by torch in fp32; the tests have an fp64 oracle
            expected = outputs_of(sdpa, *exact, dout.float(), causal, backward)
        for found, right in zip(outputs, expected, strict=True):
            error = ((found.float() - right).abs().max() / right.abs().max()).item()
            if error > TOLERANCE[dtype]:
                return f"off by {error:.1e} of the largest element"
        return None

    products = 4 * batch * heads * length * length * dim * (0.5 if causal else 1)
    chosen = explain("flash_attention", q, k, v, causal=causal).chosen
    contest(
        benchmark,
        field,
        gate=gate,
        flops=products * (3.5 if backward else 1),
        case={
            "op": "flash_attention",
            "batch": batch,
            "heads": heads,
            "length": length,
            "head_dim": dim,
            "dtype": dtype,
            "causal": causal,
            "backward": backward,
            "path": chosen,
            "peaks": peaks,
        },
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(benchmark, peaks, shape, dtype, causal, backward):
    race(benchmark, peaks, shape, dtype, causal, backward)


@pytest.mark.parametrize("length", LENGTHS)
def test_over_length(benchmark, peaks, length):
    race(benchmark, peaks, (1, 8, length, 64), "fp32", True, False)
