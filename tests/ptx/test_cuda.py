"""The PTX that nvcc emits for csrc/cuda, inline assembly included, interpreted, against the fp64
oracles of the operators' tests, and what it costs in bank conflicts and sectors.

csrc/simt runs the same sources with every option. Interpreting is slower, so here are few calls:
each kernel, each branch of a loop (whole and masked tiles, softcap, scores that are computed
again), edges of tiles on both sides, groups, packed and empty sequences.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cuda_ptx
import interpreter
import numpy as np
import oracle
import pytest
import torch
from parse import PtxError, parse

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import test_decode_attention as decoding  # noqa: E402
import test_flash_attention as flash  # noqa: E402
import test_vq_nearest as nearest  # noqa: E402

MISSING = cuda_ptx.nvcc.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
BF16, FP16 = torch.bfloat16, torch.float16
LENGTHS_Q, LENGTHS_K = [70, 0, 5, 30], [66, 20, 5, 0]


def attend(dim, dtype, lq, lk, heads=1, kv_heads=1, **options):
    flash.compare("cuda", *flash.tensors(1, lq, lk, heads, kv_heads, dim, dtype=dtype), **options)


def attend_rising(dtype, dim=64, length=150):
    """Scores above all before them: forward computes tiles again with their maxima."""
    q, k, v = flash.tensors(1, 40, length, 1, 1, dim, dtype=dtype)
    k = torch.linspace(0, 30, length).to(dtype)[None, :, None, None].expand(k.shape).contiguous()
    flash.compare("cuda", torch.ones_like(q), k, v)


def attend_packed(dim, dtype, lengths_q, lengths_k, **options):
    """Each sequence is what it would be alone; some are empty, on either side."""
    sizes = 1, sum(lengths_q), sum(lengths_k), 2, 1, dim
    q, k, v = (t[0] for t in flash.tensors(*sizes, dtype=dtype))
    dout, dlse = torch.randn(q.shape).to(dtype), torch.randn(2, len(q))
    ends = dict(cu_seqlens_q=flash.pack(lengths_q), cu_seqlens_k=flash.pack(lengths_k))
    got = flash.differentiate(flash.run("cuda"), q, k, v, dout, dlse, **ends, **options)

    def alone(function, tensors):
        q, k, v, dout, dlse = tensors
        parts = []
        split = (torch.arange(len(x)).split(n) for x, n in ((q, lengths_q), (k, lengths_k)))
        for rows, keys in zip(*split, strict=True):
            part = (t[None] for t in (q[rows], k[keys], v[keys], dout[rows], dlse[:, rows]))
            plain = len(rows) and len(keys)  # else the plain formula has no answer
            one = flash.differentiate(function if plain else exact, *part, **options)
            parts.append([t[0] for t in one])
        return [torch.cat(x, 1 if i == 1 else 0) for i, x in enumerate(zip(*parts, strict=True))]

    call, exact = (q, k, v, dout, dlse), flash.run("reference")
    plain = alone(oracle.plain_attention, call)
    plain[1] = alone(oracle.plain_attention, [t.float() for t in call])[1]
    flash.assert_right(got, alone(exact, [t.double() for t in call]), plain)


def decode(dim, group, int8, slots, tokens=1, dtype=BF16):
    """Lengths around the edges of splits; unused slots hold NaN."""
    cache = decoding.poisoned(2, slots, 2, dim, torch.int8 if int8 else dtype, start=[0, 3])
    decoding.fill(cache, [slots - tokens, 130])
    new = decoding.tokens(2, tokens, 2 * group, 2, dim, dtype)
    decoding.step("cuda", cache, *new, **decoding.table(slots, dim))


# name: (architectures, call). What nvcc writes differs little by architecture, so that the newer
# ones have one call of each size.
CASES = {
    "d 64 bf16 causal, groups": (
        ("80",), lambda: attend(64, BF16, 140, 140, 2, 1, causal=True)
    ),
    "d 128 bf16 causal, more keys": (
        ("80",), lambda: attend(128, BF16, 70, 140, 2, 1, causal=True)
    ),
    "d 64 fp16 window": (("80",), lambda: attend(64, FP16, 140, 70, window=(40, 9))),
    "d 128 fp16 softcap": (("80",), lambda: attend(128, FP16, 70, 70, softcap=2.0)),
    "d 64 bf16 softcap": (("80",), lambda: attend(64, BF16, 65, 63, softcap=1.0, causal=True)),
    "d 64 bf16 packed": (
        ("80",),
        lambda: attend_packed(64, BF16, LENGTHS_Q, LENGTHS_K, causal=True, window=(60, -1)),
    ),
    "d 72 bf16, of 128": (("80",), lambda: attend(72, BF16, 33, 47, window=(-1, 20))),
    "d 64 fp16 rising scores": (("80",), lambda: attend_rising(FP16)),
    "d 64 bf16": (("90a", "100a"), lambda: attend(64, BF16, 70, 70, causal=True)),
    "d 128 bf16": (("90a", "100a"), lambda: attend(128, BF16, 70, 70, causal=True)),
    # The kernel with wgmma is another: several tiles of keys, each of its loops.
    "wgmma, d 64 fp16 window": (
        ("90a",), lambda: attend(64, FP16, 200, 390, 2, 1, window=(150, 0))
    ),
    "wgmma, d 128 bf16 causal": (("90a",), lambda: attend(128, BF16, 130, 390, causal=True)),
    "wgmma, d 64 softcap": (("90a",), lambda: attend(64, BF16, 65, 150, softcap=1.0)),
    "wgmma, d 128 rising": (("90a",), lambda: attend_rising(FP16, 128, 400)),
    "wgmma, packed": (
        ("90a",), lambda: attend_packed(64, BF16, LENGTHS_Q, LENGTHS_K, causal=True)
    ),
}  # fmt: skip
# name: (architectures, call, most wavefronts and most sectors by needed ones). Where codes and
# vectors are prepared a thread has a row, number by number; where vectors are scored again rows of
# codes are read; what splits of a cache have found is combined 32 bytes a thread.
OTHERS = {
    "vq_nearest l2": (
        ("80",), lambda: nearest.compare("cuda", *nearest.trained(130, 600, 8), "l2"), 1.06, 6.6
    ),
    "vq_nearest cosine, d 4": (
        ("80", "90a", "100a"),
        lambda: nearest.compare("cuda", *nearest.gaussian(70, 150, 4), "cosine"), 1.03, 3,
    ),
    "decode bf16": (("80", "90a", "100a"), lambda: decode(64, 3, False, 600), 1.02, 1.02),
    "decode d 128 bf16": (("80",), lambda: decode(128, 4, False, 300, tokens=3), 1.1, 1.1),
    "decode int8": (("80", "90a"), lambda: decode(64, 3, True, 1100), 1.06, 1.07),
    "decode fp16 d 128 int8": (
        ("80",), lambda: decode(128, 1, True, 530, tokens=2, dtype=FP16), 1.2, 1.2
    ),
    "vq_nearest d 128": (
        ("80",), lambda: nearest.compare("cuda", *nearest.gaussian(70, 100, 128), "l2"), 1.21, 8
    ),
}  # fmt: skip
MOST = {"wavefronts": 1.05, "sectors": 1.02}  # by needed ones


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "architecture"), [(name, a) for name, (many, _) in CASES.items() for a in many]
)
def test_against_the_oracle(name, architecture):
    with cuda_ptx.interpreted(architecture) as reports:
        CASES[name][1]()
    assert len(reports) == 4  # forward, and three kernels of backward
    for kernel, report in reports:
        for what, most in MOST.items():
            ratio = report.ratio(what)
            assert ratio <= most, f"{kernel}: {ratio:.3f}\n{report.offenders(what)}"


@pytest.mark.parametrize(
    ("name", "architecture"), [(name, a) for name, (many, *_) in OTHERS.items() for a in many]
)
def test_others_against_the_oracle(name, architecture):
    _, call, *most = OTHERS[name]
    with cuda_ptx.interpreted(architecture) as reports:
        call()
    assert reports
    for kernel, report in reports:
        for what, bound in zip(("wavefronts", "sectors"), most, strict=True):
            ratio = report.ratio(what)
            assert ratio <= bound, f"{kernel}: {ratio:.3f}\n{report.offenders(what)}"


@pytest.mark.parametrize(
    ("kernel", "left_out", "message"),
    [
        ("flash_forward", "bar.sync", "race|not written"),
        ("flash_forward", "cp.async.wait_group", "in flight"),
        ("flash_forward", ".trans", "out is off"),
        ("flash_backward", "bar.sync", "race|not written"),
        ("flash_backward", "cp.async.wait_group", "in flight"),
        ("flash_backward", ".trans", "d[qkv] is off"),
        ("vq_search", "bar.sync", "race|not written|in flight"),
        ("vq_search", "cp.async.wait_group", "in flight"),
        ("decode_attention", "bar.sync", "race|not written"),
        ("decode_attention", "cp.async.wait_group", "in flight"),
        ("decode_attention", ".trans", "out is off|not close"),
    ],
)
def test_what_is_left_out_is_missed(kernel, left_out, message):
    def change(text):
        instead = "" if left_out == ".trans" else "//"
        return text.replace(left_out, instead) if f"{kernel}_" in text else text

    with cuda_ptx.interpreted(change=change):
        with pytest.raises((PtxError, AssertionError), match=message):
            if kernel == "vq_search":
                nearest.compare("cuda", *nearest.trained(130, 600, 8), "l2")
            elif kernel == "decode_attention":
                decode(64, 3, False, 600)
            else:
                attend(64, BF16, 70, 140)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("fence.proxy.async", "no fence.proxy.async"),
        ("wgmma.wait_group", "never waited for|while a wgmma reads it"),
        ("cp.async.wait_group", "in flight"),
        ("mbarrier.arrive", "deadlock|wait"),
    ],
)
def test_what_is_left_out_of_sm_90a_is_missed(left_out, message):
    def change(text):
        return text.replace(left_out, "//") if "FlashForwardSm90" in text else text

    with cuda_ptx.interpreted("90a", change):
        with pytest.raises(PtxError, match=message):
            attend(64, BF16, 70, 300)


@pytest.mark.parametrize(
    ("source", "mirror"),
    [
        ("flash_forward_bf16_64", cuda_ptx.FORWARD),
        ("flash_backward_bf16_64", cuda_ptx.BACKWARD),
        ("vq_nearest_4", cuda_ptx.NEAREST),
        ("decode_attention_bf16_64", cuda_ptx.DECODE),
    ],
)
def test_structs_are_those_of_the_header(source, mirror):
    text = cuda_ptx.nvcc.compile(f"{source}.cu", "ptx", "80").read_text()
    for kernel in parse(text).kernels.values():
        assert kernel.params[0].size == mirror.itemsize
    shorter = interpreter.Struct(np.zeros((), np.dtype(mirror.descr[:-1])), {})
    with pytest.raises(PtxError, match=f"bytes, expected {mirror.itemsize}"):
        args = [shorter, *[bytes(p.size) for p in kernel.params[1:]]]
        interpreter.launch(text, kernel.name, (1,), (32,), args)
