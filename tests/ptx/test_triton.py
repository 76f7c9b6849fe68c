"""The PTX that Triton emits for this project's kernels, interpreted, against the fp64 oracles of
their own tests, and what it costs in bank conflicts and sectors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from t2i_kernels import triton_backend

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import test_decode_attention as decoding  # noqa: E402
import test_draw as drawing  # noqa: E402
import test_flash_attention as flash  # noqa: E402
import test_linear_cross_entropy as cross_entropy  # noqa: E402
import test_rms_norm as norm  # noqa: E402
import test_rotary as rotation  # noqa: E402
import test_swiglu as gating  # noqa: E402
import test_vq_nearest as nearest  # noqa: E402

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(triton_backend.INTERPRETED, reason="TRITON_INTERPRET is 1")
BF16, FP16, INT8 = torch.bfloat16, torch.float16, torch.int8


def attend(dim, dtype, lq=140, lk=140, **options):
    """Edges of tiles crossed by a few rows, two heads that share keys."""
    flash.compare("triton", *flash.tensors(1, lq, lk, 2, 1, dim, dtype=dtype), **options)


def decode(dim, group, dtype, kept, slots=300):
    """Lengths around the edges of splits; unused slots hold NaN."""
    cache = decoding.poisoned(2, slots, 2, dim, kept, start=[0, 3])
    decoding.fill(cache, [slots - 1, 130])
    tokens = decoding.tokens(2, 1, 2 * group, 2, dim, dtype)
    decoding.step("triton", cache, *tokens, **decoding.table(slots, dim))


def draw(codes, **options):
    logits = 3 * torch.randn(2, 1, codes)
    drawing.both("triton", logits, drawing.SEEDS[:2], drawing.POSITIONS[:2], **options)


def classify(rows, classes, dim, dtype):
    cross_entropy.compare("triton", *cross_entropy.problem(rows, classes, dim, dtype, ignored=[3]))


def half(*shape):
    return torch.randn(shape).to(BF16)


# name: (architectures, call, most wavefronts and most sectors by needed ones). Reading back what
# int8 was widened to has bank conflicts; rows of 8 fp32 are read a number a thread.
CASES = {
    "flash d 64 bf16 causal": ((80, 90), lambda: attend(64, BF16, causal=True), 1, 1.01),
    "flash d 128 bf16 causal": ((80, 90), lambda: attend(128, BF16, 70, 140, causal=True), 1, 1.01),
    "flash d 64 fp16 window": ((80,), lambda: attend(64, FP16, window=(70, 0)), 1, 1.01),
    "flash d 128 fp16": ((80,), lambda: attend(128, FP16, 70, 70), 1, 1.01),
    "vq_nearest l2": (
        (80,), lambda: nearest.compare("triton", *nearest.trained(130, 150, 8), "l2"), 1, 5.5
    ),
    "vq_nearest cosine": (
        (80,), lambda: nearest.compare("triton", *nearest.gaussian(130, 150, 8), "cosine"), 1, 5.5
    ),
    "decode bf16": ((80, 90), lambda: decode(64, 3, BF16, BF16), 1, 1.15),
    "decode int8": ((80, 90), lambda: decode(64, 3, BF16, INT8), 1.3, 1.5),
    "decode fp16 int8": ((80,), lambda: decode(128, 1, FP16, INT8), 1.3, 1.5),
    "decode d 128 bf16": ((80,), lambda: decode(128, 4, BF16, BF16), 1, 1.25),
    "rms_norm": ((80,), lambda: norm.compare("triton", half(3, 576), half(576)), 1, 1),
    "swiglu": ((80,), lambda: gating.compare("triton", half(3, 576), half(3, 576)), 1, 1),
    "rotary": (
        (80,), lambda: rotation.compare("triton", half(1, 3, 9, 64), *rotation.tables(5, 32)), 1, 1
    ),
    "draw": ((80,), lambda: draw(1000), 1, 1),
    "draw top-k top-p": ((80,), lambda: draw(1000, top_k=50, top_p=0.9), 1, 1.05),
    "linear_cross_entropy": ((80, 90), lambda: classify(140, 160, 80, BF16), 1, 1.5),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "architecture"), [(name, a) for name, (many, *_) in CASES.items() for a in many]
)
def test_against_the_oracle(name, architecture):
    from triton_ptx import interpreted

    _, call, *most = CASES[name]
    with interpreted(architecture) as reports:
        call()
    assert reports
    for kernel, report in reports:
        for what, bound in zip(("wavefronts", "sectors"), most, strict=True):
            ratio = report.ratio(what)
            assert ratio <= bound, f"{kernel}: {ratio:.3f}\n{report.offenders(what)}"


@pytest.mark.parametrize(
    ("architecture", "left_out", "message"),
    [
        (80, "bar.sync", "race"),
        (80, "cp.async.wait_group", "in flight"),
        (90, "bar.sync", "race"),
        (90, "cp.async.wait_group", "in flight"),
        (90, "fence.proxy.async", "no fence.proxy.async"),
        (90, "wgmma.wait_group", "never waited for|while a wgmma reads it"),
    ],
)
def test_instructions_that_are_left_out_are_missed(architecture, left_out, message):
    from parse import PtxError
    from triton_ptx import interpreted

    q, k, v = flash.tensors(1, 140, 140, 1, 1, 64, dtype=BF16)
    with interpreted(architecture, lambda text: text.replace(left_out, "//")):
        with pytest.raises(PtxError, match=message):
            flash.flash_attention(q, k, v, causal=True, backend="triton")
