"""rms_norm, on every backend, against torch's in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import backends, skip_unless_supported
from oracle import assert_no_worse

from t2i_kernels import rms_norm

BACKENDS = backends("rms_norm")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def differentiate(function, x, weight, dout, eps):
    """(out, dx, dweight)."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    out = function(x, weight, eps)
    return out.detach(), *torch.autograd.grad(out, (x, weight), dout.to(out.dtype))


def run(backend):
    def function(x, weight, eps):
        return rms_norm(x, weight, eps, backend=backend)

    return function


def compare(backend, x, weight, eps=1e-5, dout=None):
    skip_unless_supported(backend, "rms_norm", x, weight, eps)
    dout = torch.randn(x.shape).to(x.dtype) if dout is None else dout
    got = differentiate(run(backend), x, weight, dout, eps)
    assert [t.dtype for t in got] == [x.dtype, x.dtype, weight.dtype]
    exact = differentiate(plain, x.double(), weight.double(), dout.double(), eps)
    same = differentiate(plain, x, weight.to(x.dtype), dout, eps)
    for name, *values in zip(("out", "dx", "dweight"), got, same, exact, strict=True):
        assert_no_worse(name, *values, factor=3 if name[0] == "d" else 2, rounding=2)


# ---- Checks: (backend) -> None, or AssertionError -----------------------------------------------


def check_sizes(backend):
    for rows, dim in [(1, 1), (1, 7), (3, 16), (37, 5), (50, 33), (9, 200), (2, 1500)]:
        compare(backend, torch.randn(rows, dim), torch.randn(dim))


def check_shapes(backend):
    for shape in [(7,), (2, 3, 5), (2, 3, 2, 4), (1, 1, 6)]:
        compare(backend, torch.randn(shape), torch.randn(shape[-1]))


def check_low_precision(backend):
    for dtype in TYPES[1:]:
        compare(backend, torch.randn(40, 96, dtype=dtype), torch.randn(96, dtype=dtype))


def check_weight_of_another_type(backend):
    for dtype in TYPES:
        compare(backend, torch.randn(9, 24, dtype=torch.bfloat16), torch.randn(24, dtype=dtype))


def check_sums_are_fp32(backend):
    """Thousands of rows and columns: a sum in bf16 would stop growing at 256."""
    x = torch.ones(600, 1000, dtype=torch.bfloat16)
    weight = torch.ones(1000, dtype=torch.bfloat16)
    out, dx, dweight = differentiate(run(backend), x, weight, x, 0.0)
    assert (out == 1).all() and (dx == 0).all() and (dweight == 600).all()


def check_eps(backend):
    """It matters where rows are small, and rows of zeros give zeros."""
    x = torch.randn(5, 8) * 1e-3
    for eps in (0.0, 1e-6, 1.0):
        compare(backend, x, torch.randn(8), eps)
    out, dx, dweight = differentiate(
        run(backend), torch.zeros(3, 8), torch.ones(8), torch.ones(3, 8), 1e-4
    )
    assert (out == 0).all() and (dweight == 0).all()
    torch.testing.assert_close(dx, torch.full((3, 8), 100.0))


def check_magnitudes(backend):
    x = torch.randn(20, 16)
    for scale in (1e-12, 1e12):
        compare(backend, x * scale, torch.randn(16), 0.0)
    compare(backend, x * torch.logspace(-6, 6, 20)[:, None], torch.randn(16))


def check_strides(backend):
    """Heads of a projection, rows skipped, dimensions swapped, a weight that is a column."""
    x = torch.randn(3, 6, 8, 10)
    weight = torch.randn(10, 2)[:, 0]
    views = [x[:, :, 2:5], x[:, ::2], x.transpose(1, 2), x.transpose(0, 2)[::2], x[..., :1, :]]
    for view in [*views, torch.randn(10, 7).T, torch.randn(10).expand(4, 10)]:
        dout = torch.randn(view.shape)
        expected = differentiate(run(backend), view.contiguous(), weight.clone(), dout, 1e-5)
        for gradient in (dout, dout.transpose(0, -2).contiguous().transpose(0, -2)):
            got = differentiate(run(backend), view, weight, gradient, 1e-5)
            torch.testing.assert_close(got, expected)
            assert got[0].is_contiguous()
        compare(backend, view, weight, dout=torch.ones(()).expand(view.shape))


def check_nan_stays_in_its_row(backend):
    x = torch.randn(9, 6)
    x[4, 2] = torch.nan
    out, dx, dweight = differentiate(run(backend), x, torch.ones(6), torch.ones(9, 6), 1e-5)
    others = torch.arange(9) != 4
    assert out[4].isnan().all() and dx[4].isnan().all() and dweight.isnan().all()
    assert out[others].isfinite().all() and dx[others].isfinite().all()


def check_empty(backend):
    for shape in [(0, 4), (2, 0, 4), (3, 0), (0, 0)]:
        x, weight = torch.randn(shape), torch.randn(shape[-1])
        out, dx, dweight = differentiate(run(backend), x, weight, x, 1e-5)
        assert out.shape == dx.shape == x.shape and torch.equal(dweight, torch.zeros(shape[-1]))


def check_same_bits_every_time(backend):
    call = torch.randn(100, 24), torch.randn(24), torch.randn(100, 24), 1e-5
    first, second = (differentiate(run(backend), *call) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = differentiate(run(backend), call[0][7:8], call[1], call[2][7:8], 1e-5)
    assert torch.equal(alone[0], first[0][7:8])


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_contract(check, backend):
    check(backend)


# ---- As an operator of torch --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    call = torch.randn(3, 4, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    skip_unless_supported(backend, "rms_norm", *call, 1e-3)
    torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3, backend=backend), call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    out = rms_norm(x, weight, 1e-5, backend=backend)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight = torch.randn(3, 4, 5), torch.randn(5)
    forward = getattr(torch.ops.t2i.rms_norm, backend)
    for view in (x, x[:, ::2], x.transpose(0, 1)):
        torch.library.opcheck(forward, (view.clone().requires_grad_(), weight, 1e-5))
        backward = getattr(torch.ops.t2i.rms_norm_backward, backend)
        torch.library.opcheck(backward, (torch.randn(view.shape), view, weight, 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    def model(x, weight):
        return rms_norm(x, weight, 1e-5, backend=backend).square().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 8):
        call = torch.randn(rows, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
        grads = [torch.autograd.grad(function(*call), call) for function in (model, compiled)]
        torch.testing.assert_close(*grads)


# ---- Errors -------------------------------------------------------------------------------------

X, W = torch.zeros(2, 4), torch.zeros(4)
BAD_CALLS = {
    "x no tensor": (([1.0], W, 0.1), {}, TypeError, "x: expected a tensor, got list"),
    "weight no tensor": ((X, None, 0.1), {}, TypeError, "weight: expected a tensor, got NoneType"),
    "integers": ((X.int(), W, 0.1), {}, TypeError, r"x: expected float32.*int32 \(2, 4\)"),
    "weight's type": ((X, W.long(), 0.1), {}, TypeError, "weight: expected float32.*int64"),
    "a number": ((X[0, 0], W, 0.1), {}, ValueError, r"weight: .*got \(4,\) for \(\)"),
    "weight's size": ((X, W[1:], 0.1), {}, ValueError, r"weight: .*got \(3,\) for \(2, 4\)"),
    "weight's dims": ((X, X, 0.1), {}, ValueError, r"weight: .*got \(2, 4\) for \(2, 4\)"),
    "devices": ((X, W.to("meta"), 0.1), {}, ValueError, "weight: on meta, but x is on cpu"),
    "eps": ((X, W, -1.0), {}, ValueError, "eps: .*got -1.0"),
    "eps NaN": ((X, W, float("nan")), {}, ValueError, "eps: .*got nan"),
    "backend": ((X, W, 0.1), dict(backend="fast"), ValueError, "'fast': expected one of cuda, "),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(call):
    args, kwargs, error, message = call
    with pytest.raises(error, match=message):
        rms_norm(*args, **kwargs)
