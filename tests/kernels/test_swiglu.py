"""swiglu, on every backend, against torch's formula in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import backends, skip_unless_supported
from oracle import assert_no_worse

from t2i_kernels import swiglu

BACKENDS = backends("swiglu")


def plain(gate, up):
    return F.silu(gate) * up


def differentiate(function, gate, up, dout):
    """(out, dgate, dup)."""
    gate, up = (t.detach().requires_grad_() for t in (gate, up))
    out = function(gate, up)
    return out.detach(), *torch.autograd.grad(out, (gate, up), dout)


def run(backend):
    def function(gate, up):
        return swiglu(gate, up, backend=backend)

    return function


def compare(backend, gate, up, dout=None):
    skip_unless_supported(backend, "swiglu", gate, up)
    dout = torch.randn(gate.shape).to(gate.dtype) if dout is None else dout
    got = differentiate(run(backend), gate, up, dout)
    assert all(t.dtype == gate.dtype for t in got)
    exact = differentiate(plain, gate.double(), up.double(), dout.double())
    same = differentiate(plain, gate, up, dout)
    for name, *values in zip(("out", "dgate", "dup"), got, same, exact, strict=True):
        assert_no_worse(name, *values, factor=3 if name[0] == "d" else 2, rounding=2)


# ---- Checks: (backend) -> None, or AssertionError -----------------------------------------------


def check_shapes(backend):
    for shape in [(1,), (7,), (1, 1), (3, 33), (50, 5), (2, 3, 100), (2, 3, 2, 4), (9, 1100)]:
        compare(backend, torch.randn(shape), torch.randn(shape))


def check_low_precision(backend):
    for dtype in (torch.bfloat16, torch.float16):
        compare(backend, *torch.randn(2, 30, 70, dtype=dtype).unbind(0))


def check_large(backend):
    """e⁻ˣ overflows; the products do not."""
    for gate in (-200.0, -20.0, 0.0, 20.0, 200.0):
        compare(backend, torch.full((3, 5), gate), torch.randn(3, 5))
    compare(backend, torch.linspace(-110, 110, 221)[None], torch.ones(1, 221))


def check_known(backend):
    """Zeros give zeros and half of up; large gates go through."""
    up, one = torch.tensor([3.0, -2.0]), torch.ones(2)
    out, dgate, dup = differentiate(run(backend), torch.zeros(2), up, one)
    assert (out == 0).all() and torch.equal(dgate, up / 2) and (dup == 0).all()
    out, dgate, dup = differentiate(run(backend), torch.full((2,), 100.0), up, one)
    assert torch.equal(out, 100 * up) and torch.equal(dgate, up) and torch.equal(dup, 100 * one)


def check_strides(backend):
    """Halves of a projection, rows skipped, dimensions swapped."""
    both = torch.randn(4, 6, 2, 10)
    swapped = both.transpose(0, 1)
    for gate, up in [
        both.flatten(2).chunk(2, dim=-1),
        both[:, ::2].unbind(2),
        (swapped[:, :, 0], both[:, :4, 1].reshape(4, 4, 10).repeat(2, 1, 1)[:6]),
        (swapped, swapped.flip(0)),
        (torch.randn(10, 3).T, torch.randn(10).expand(3, 10)),
    ]:
        dout = torch.randn(gate.shape)
        expected = differentiate(run(backend), gate.contiguous(), up.contiguous(), dout)
        got = differentiate(
            run(backend), gate, up, dout.T.contiguous().T if dout.dim() == 2 else dout
        )
        torch.testing.assert_close(got, expected)
        assert got[0].is_contiguous()
        compare(backend, gate, up, dout=torch.ones(()).expand(gate.shape))


def check_nan_stays_where_it_is(backend):
    gate, up = torch.randn(2, 5, 7).unbind(0)
    gate[2, 3], up[4, 5] = torch.nan, torch.inf
    out, dgate, dup = differentiate(run(backend), gate, up, torch.ones(5, 7))
    wrong = torch.zeros(5, 7, dtype=torch.bool)
    wrong[2, 3] = True
    assert torch.equal(dup.isnan(), wrong)
    wrong[4, 5] = True
    assert torch.equal(~out.isfinite(), wrong) and torch.equal(~dgate.isfinite(), wrong)


def check_empty(backend):
    for shape in [(0, 4), (2, 0, 4), (3, 0)]:
        x = torch.randn(shape)
        assert all(t.shape == shape for t in differentiate(run(backend), x, x, x))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_contract(check, backend):
    check(backend)


# ---- As an operator of torch --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    call = tuple(t.requires_grad_() for t in torch.randn(2, 3, 5).double().unbind(0))
    skip_unless_supported(backend, "swiglu", *call)
    torch.autograd.gradcheck(run(backend), call)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    gate, up = (t.requires_grad_() for t in torch.randn(2, 3, 5).unbind(0))
    out = swiglu(gate, up, backend=backend)
    (dgate,) = torch.autograd.grad(out.square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dgate.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    gate, up = torch.randn(3, 4, 10).chunk(2, dim=-1)
    for call in [(gate, up), (gate.transpose(0, 1), up.transpose(0, 1))]:
        forward = getattr(torch.ops.t2i.swiglu, backend)
        torch.library.opcheck(forward, tuple(t.detach().requires_grad_() for t in call))
        backward = getattr(torch.ops.t2i.swiglu_backward, backend)
        torch.library.opcheck(backward, (torch.randn(call[0].shape), *call))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    def model(both):
        return swiglu(*both.chunk(2, dim=-1), backend=backend).square().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 8):
        both = torch.randn(rows, 3, 8, requires_grad=True)
        grads = [torch.autograd.grad(function(both), both) for function in (model, compiled)]
        torch.testing.assert_close(*grads)


# ---- Errors -------------------------------------------------------------------------------------

X = torch.zeros(2, 4)
BAD_CALLS = {
    "gate no tensor": (([1.0], X), {}, TypeError, "gate: expected a tensor, got list"),
    "up no tensor": ((X, 1), {}, TypeError, "up: expected a tensor, got int"),
    "integers": ((X.int(), X), {}, TypeError, r"gate: expected float32.*int32 \(2, 4\)"),
    "types": ((X, X.half()), {}, TypeError, "up: expected torch.float32 as gate, got torch.flo"),
    "a number": ((X[0, 0], X[0, 0]), {}, ValueError, r"gate: expected \[..., D\], got \(\)"),
    "shapes": ((X, X[:1]), {}, ValueError, r"up: expected \(2, 4\) as gate, got \(1, 4\)"),
    "devices": ((X, X.to("meta")), {}, ValueError, "up: on meta, but gate is on cpu"),
    "backend": ((X, X), dict(backend="fast"), ValueError, "'fast': expected one of cuda, "),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(call):
    args, kwargs, error, message = call
    with pytest.raises(error, match=message):
        swiglu(*args, **kwargs)
