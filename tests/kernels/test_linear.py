"""linear with packed weights, on every backend and with every instruction set."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from t2i_kernels import native
from t2i_kernels.linear import WEIGHT_TYPES, PackedLinear, PackedWeight, linear
from t2i_kernels.linear.packed import GROUP, quantize_inputs

CPU = native.cpu_capabilities()


@pytest.fixture(params=["reference", *CPU])
def backend(request):
    """The reference, or the native kernels with one instruction set."""
    native_one = request.param in CPU
    with native.use_cpu_capability(request.param) if native_one else contextlib.nullcontext():
        yield "cpu" if native_one else "reference"


SHAPES = [(1, 1), (16, 64), (5, 3), (33, 65), (128, 96), (17, 577), (98, 1100)]  # outputs, inputs


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_product(backend, weight_type, outputs, inputs):
    """Of the packed weights, and of the inputs in 8 bits where weights are integers, up to the
    rounding of sums in fp32."""
    weight = PackedWeight.pack(torch.randn(outputs, inputs), weight_type)
    w = weight.unpack().double()
    for rows in (1, 2, 3, 4, 7, 20, 200):
        x = 3 * torch.randn(rows, inputs)
        out = linear(x, weight, backend=backend)
        assert out.shape == (rows, outputs) and out.dtype == torch.float32
        seen = x if weight_type in ("fp32", "bf16") else quantize_inputs(x)
        exact = seen.double() @ w.T
        bound = 1e-6 * (seen.double().abs() @ w.abs().T)
        assert ((out - exact).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
@pytest.mark.parametrize("capability", CPU)
def test_a_row_does_not_depend_on_the_others(capability, weight_type):
    """To the bit, whatever their number and the threads are."""
    weight = PackedWeight.pack(torch.randn(100, 1100), weight_type)
    x = torch.randn(200, 1100)
    with native.use_cpu_capability(capability):
        together = linear(x, weight, backend="cpu")
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 5, 16, 33):
                assert torch.equal(linear(x[:rows], weight, backend="cpu"), together[:rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_and_shapes(backend, dtype):
    weight = PackedWeight.pack(torch.randn(24, 32).to(dtype), "bf16")
    x = torch.randn(2, 3, 32).to(dtype)
    out = linear(x, weight, backend=backend)
    assert out.dtype == dtype and out.shape == (2, 3, 24)
    assert torch.equal(out, linear(x.float(), weight, backend=backend).to(dtype))
    assert linear(x[:0], weight, backend=backend).shape == (0, 3, 24)


def test_what_is_not_finite_stays_in_its_row(backend):
    for weight_type in WEIGHT_TYPES:
        weight = PackedWeight.pack(torch.randn(20, 70), weight_type)
        x = torch.randn(6, 70)
        clean = linear(x, weight, backend=backend)
        x[2, 3], x[4, 66] = torch.nan, torch.inf
        out = linear(x, weight, backend=backend)
        assert not out[[2, 4]].isfinite().any()
        others = [0, 1, 3, 5]
        assert torch.equal(out[others], clean[others])


def test_tiny_and_huge_inputs(backend):
    for weight_type in WEIGHT_TYPES:
        weight = PackedWeight.pack(torch.randn(20, 64), weight_type)
        for size in (0.0, 1e-44, 1e-38, 1e37):
            x = size * torch.randn(3, 64)
            seen = x if weight_type in ("fp32", "bf16") else quantize_inputs(x)
            exact = seen.double() @ weight.unpack().double().T
            bound = 1e-6 * (seen.double().abs() @ weight.unpack().double().abs().T)
            assert ((linear(x, weight, backend=backend) - exact).abs() <= bound + 2e-42).all()


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_weights_survive_packing(weight_type):
    """fp32 to the bit, bf16 rounded once, integers within half a step of the largest of 32."""
    w = torch.randn(37, 100) * torch.logspace(-4, 4, 37)[:, None]
    w[3, 32:64] = 0
    weight = PackedWeight.pack(w, weight_type)
    back = weight.unpack()
    assert back.shape == w.shape
    assert weight.error == pytest.approx(float((back - w).norm() / w.norm()), rel=1e-4, abs=1e-9)
    if weight_type == "fp32":
        assert torch.equal(back, w) and weight.error == 0
        return
    if weight_type == "bf16":
        assert torch.equal(back, w.bfloat16().float())
        return
    padded = nn.functional.pad(w, (0, -100 % GROUP)).unflatten(1, (-1, GROUP))
    largest = padded.abs().amax(-1, keepdim=True).expand_as(padded).flatten(1)[:, :100]
    step = {"int8": 1 / 127, "int4": 1 / 6.5}[weight_type]
    slack = {"int8": 0.505, "int4": 1.01}[weight_type]  # a scale is rounded; int4 may cut off
    assert ((back - w).abs() <= slack * step * largest).all()


def test_huge_weights_are_packed_as_others():
    """Whose squared errors overflow."""
    w = torch.randn(16, 64)
    for scale in (2.0**70, 2.0**120):
        huge = w.clone()
        huge[3, :32] *= scale
        back = PackedWeight.pack(huge, "int4").unpack()
        expected = PackedWeight.pack(w, "int4").unpack()
        expected[3, :32] *= scale
        assert torch.equal(back, expected)


def test_errors_of_int4_are_what_least_squares_can_reach():
    """Better than the plain scale max / 7 by far more than chance."""
    w = torch.randn(64, 640)
    groups = w.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)
    assert PackedWeight.pack(w, "int4").error < 0.93 * float((plain - w).norm() / w.norm())


def test_packed_linear():
    layer = nn.Linear(48, 40, bias=False)
    packed = PackedLinear.from_linear(layer, "fp32")
    x = torch.randn(5, 48)
    torch.testing.assert_close(packed(x), layer(x))
    assert "fp32" in repr(packed)
    with pytest.raises(ValueError, match="bias"):
        PackedLinear.from_linear(nn.Linear(4, 4), "fp32")


def test_errors_name_the_argument():
    weight = PackedWeight.pack(torch.randn(4, 8), "int8")
    for wrong in (130, 9):  # one of as many bytes
        with pytest.raises(ValueError, match=r"x: expected \[..., 8\] for this weight, got"):
            linear(torch.randn(2, wrong), weight)
    for backend in ("cpu", "reference") if native.reason() is None else ("reference",):
        op = getattr(torch.ops.t2i.linear, backend)
        with pytest.raises((ValueError, RuntimeError)):
            op(torch.randn(2, 130), weight.data, 4, "int8")
    with pytest.raises(TypeError, match="weight: expected a PackedWeight"):
        linear(torch.randn(2, 8), torch.randn(4, 8))
    with pytest.raises(TypeError, match="x: expected"):
        linear(torch.ones(2, 8, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match="weight_type 'int3': expected one of"):
        PackedWeight.pack(torch.randn(4, 8), "int3")
    with pytest.raises(ValueError, match="weight: expected finite"):
        PackedWeight.pack(torch.full((4, 8), torch.nan), "int8")
    with pytest.raises(ValueError, match=r"weight: expected a floating \[outputs, inputs\]"):
        PackedWeight.pack(torch.randn(4), "int8")
