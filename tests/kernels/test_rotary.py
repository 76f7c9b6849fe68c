"""rotary, on every backend, against an fp64 oracle."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from backends import backends, skip_unless_supported, skip_where_it_asserts
from oracle import assert_no_worse

from t2i_kernels import rotary

BACKENDS = backends("rotary")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def tables(positions, pairs):
    """(cos, sin) of random angles, fp32 [positions, pairs]."""
    angles = 10 * torch.randn(positions, pairs)
    return angles.cos(), angles.sin()


def turned(x, cos, sin, positions, interleaved):
    """fp64, one token at a time."""
    rows, out = x if x.dim() == 4 else x[None], torch.empty(x.shape, dtype=torch.float64)
    places = torch.arange(rows.shape[1]) if positions is None else positions
    places = places.expand(rows.shape[:2])
    view = out.view(rows.shape)
    for b, i in itertools.product(range(rows.shape[0]), range(rows.shape[1])):
        place = places[b, i]
        view[b, i] = oracle.rotate(rows[b, i], cos[place], sin[place], interleaved)
    return out


def compare(backend, x, cos, sin, positions=None):
    """Forward is the oracle's to within roundings; backward is the rotation back."""
    for interleaved in (False, True):
        call = cos, sin, positions, interleaved
        skip_unless_supported(backend, "rotary", x, *call)
        dout = torch.randn(x.shape).to(x.dtype)
        leaf = x.detach().requires_grad_()
        out = rotary(leaf, *call, backend=backend)
        (dx,) = torch.autograd.grad(out, leaf, dout)
        assert out.dtype == dx.dtype == x.dtype
        exact = turned(x, *call)
        assert_no_worse("out", out.detach(), exact.to(x.dtype), exact, factor=2, rounding=1)
        exact = turned(dout, cos, -sin, positions, interleaved)
        assert_no_worse("dx", dx, exact.to(x.dtype), exact, factor=3, rounding=1)
        rest = slice(2 * cos.shape[1], None)
        assert torch.equal(out[..., rest], x[..., rest])
        assert torch.equal(dx[..., rest], dout[..., rest])


# ---- Checks: (backend) -> None, or AssertionError -----------------------------------------------


def check_sizes(backend):
    for batch, length, heads, dim, pairs in [
        (1, 1, 1, 2, 1), (2, 5, 3, 8, 4), (1, 3, 9, 6, 3), (3, 2, 2, 11, 5), (1, 4, 5, 64, 32),
        (2, 3, 2, 12, 2), (1, 2, 3, 5, 0), (1, 2, 1, 1, 0),
    ]:  # fmt: skip
        compare(backend, torch.randn(batch, length, heads, dim), *tables(length + 2, pairs))


def check_packed(backend):
    compare(backend, torch.randn(7, 3, 10), *tables(9, 4))
    compare(backend, torch.randn(7, 3, 10), *tables(9, 5), torch.tensor([0, 1, 2, 0, 1, 0, 8]))


def check_positions(backend):
    x, (cos, sin) = torch.randn(2, 4, 3, 8), tables(20, 3)
    for places in (torch.tensor([3, 19, 0, 7]), torch.randint(20, (2, 4))):
        for dtype in (torch.int64, torch.int32):
            compare(backend, x, cos, sin, places.to(dtype))
    compare(backend, x, cos, sin, torch.randint(20, (4, 2)).T)
    compare(backend, x, cos, sin, torch.randint(20, (8,))[::2])
    compare(backend, x, cos, sin, torch.tensor(5).expand(2, 4))


def check_low_precision(backend):
    for dtype in TYPES[1:]:
        compare(backend, torch.randn(2, 5, 4, 34, dtype=dtype), *tables(5, 16))


def check_known(backend):
    """The angle 0 changes nothing, a quarter turn swaps, both numbers 0 erase."""
    x = torch.randn(1, 3, 2, 6)
    one, zero = torch.ones(3, 3), torch.zeros(3, 3)
    for interleaved in (False, True):

        def turn(cos, sin, interleaved=interleaved):
            return rotary(x, cos, sin, None, interleaved, backend=backend)

        assert torch.equal(turn(one, zero), x)
        assert (turn(zero, zero) == 0).all()
        pairs = x.unflatten(-1, (3, 2)).mT if interleaved else x.unflatten(-1, (2, 3))
        swapped = torch.stack([-pairs[..., 1, :], pairs[..., 0, :]], dim=-2)
        expected = (swapped.mT if interleaved else swapped).flatten(-2)
        assert torch.equal(turn(zero, one), expected)


def check_scores_depend_on_distance(backend):
    """What rotary positions are for."""
    angles = torch.outer(torch.arange(30.0), 10000 ** -(torch.arange(8) / 8))
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 30, 1, 16)
    q, k = (rotary(t, angles.cos(), angles.sin(), backend=backend).squeeze() for t in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5], rtol=1e-4, atol=1e-4)


def check_strides(backend):
    """Heads of a projection, heads before length, tokens skipped; tables that are views."""
    qkv = torch.randn(2, 6, 7, 10)
    views = qkv[:, :, :4], qkv.transpose(1, 2)[:, :6], qkv[:, ::2], qkv[:1].expand(3, -1, -1, -1)
    cos, sin = tables(8, 8)[0][:, :3], tables(16, 3)[1][::2]
    for x in (*views, qkv[0, :, 2:5], qkv.mT[:, :5]):
        compare(backend, x, cos, sin)
        call = cos, sin, None, True
        out = rotary(x, *call, backend=backend)
        assert torch.equal(out, rotary(x.contiguous(), *call, backend=backend))
        assert out.is_contiguous()
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(rotary(leaf, *call, backend=backend).sum(), leaf)
        exact = turned(torch.ones(x.shape), cos, -sin, None, True)
        torch.testing.assert_close(dx.double(), exact, rtol=1e-6, atol=1e-6)


def check_empty(backend):
    cos, sin = tables(4, 2)
    for shape in [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (0, 2, 4)]:
        assert rotary(torch.zeros(shape), cos, sin, backend=backend).shape == shape
    none = torch.zeros(0, dtype=torch.int64)
    assert rotary(torch.zeros(0, 2, 4), cos[:0], sin[:0], none, backend=backend).shape == (0, 2, 4)
    x = torch.zeros(2, 3, 2, 0)
    assert rotary(x, cos[:, :0], sin[:, :0], backend=backend).shape == x.shape


def check_positions_outside(backend):
    skip_where_it_asserts()
    x, (cos, sin) = torch.zeros(1, 2, 1, 4), tables(5, 2)
    for places in ([0, 5], [-1, 0]):
        with pytest.raises(IndexError, match="positions from .* are outside the tables, .* have 5"):
            rotary(x, cos, sin, torch.tensor(places), backend=backend)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_contract(check, backend):
    check(backend)


# ---- As an operator of torch --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """Twice: it is linear in x."""
    x = torch.randn(1, 3, 2, 6).double().requires_grad_()
    skip_unless_supported(backend, "rotary", x, *tables(3, 2))
    for interleaved in (False, True):
        call = *tables(5, 2), torch.tensor([1, 4, 2]), interleaved

        def function(x, call=call):
            return rotary(x, *call, backend=backend)

        torch.autograd.gradcheck(function, x)
        torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, (cos, sin) = torch.randn(2, 3, 4, 6), tables(5, 2)
    forward = getattr(torch.ops.t2i.rotary, backend)
    for call in [
        (x, cos, sin, None, False, False),
        (x[:, :, :2], cos, sin, torch.tensor([3, 1, 4]), True, False),
        (x[0], cos, sin, None, True, True),
    ]:
        torch.library.opcheck(forward, (call[0].clone().requires_grad_(), *call[1:]))
        torch.library.opcheck(forward, call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    cos, sin = tables(9, 4)

    def model(x, places):
        return rotary(x, cos, sin, places, backend=backend).pow(3).sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 8):
        x = torch.randn(2, length, 3, 8, requires_grad=True)
        places = torch.randint(9, (length,))
        grads = [torch.autograd.grad(function(x, places), x) for function in (model, compiled)]
        torch.testing.assert_close(*grads)


# ---- Errors -------------------------------------------------------------------------------------

X, COS = torch.zeros(2, 3, 4, 6), torch.zeros(5, 2)
PLACES = torch.zeros(3, dtype=torch.int64)
BAD_CALLS = {
    "x no tensor": (([1.0], COS, COS), {}, TypeError, "x: expected a tensor, got list"),
    "integers": ((X.int(), COS, COS), {}, TypeError, "x: expected float32.*int32"),
    "dims": ((X[0, 0], COS, COS), {}, ValueError, r"x: expected \[batch, .*got \(4, 6\)"),
    "no table": ((X, None, COS), {}, TypeError, "cos: expected a tensor, got NoneType"),
    "table's type": ((X, COS, COS.half()), {}, TypeError, "sin: expected float32, got torch.flo"),
    "table's dims": ((X, COS[0], COS), {}, ValueError, r"cos: expected \[positions, R/2\].*\(2,\)"),
    "table's width": (
        (X, torch.zeros(5, 4), COS), {}, ValueError, r"cos: .* at most head_dim, 6, got \(5, 4\)"
    ),
    "tables differ": ((X, COS, COS[1:]), {}, ValueError, r"sin: expected \(5, 2\) .*got \(4, 2\)"),
    "devices": ((X, COS.to("meta"), COS), {}, ValueError, "cos: on meta, but x is on cpu"),
    "too long": ((X, COS[:2], COS[:2]), {}, ValueError, r"cos: 2 positions, but x has 3: \(2, 3,"),
    "empty tables": ((X, COS[:0], COS[:0], PLACES), {}, ValueError, "cos: 0 positions, but x has"),
    "positions": ((X, COS, COS, [0, 1]), {}, TypeError, "positions: expected a tensor, got list"),
    "positions' type": ((X, COS, COS, PLACES.float()), {}, TypeError, "positions: expected int64"),
    "positions' size": (
        (X, COS, COS, PLACES[1:]), {}, ValueError, r"positions: .*\(2, 3\) of x .*got \(2,\)"
    ),
    "positions' device": (
        (X, COS, COS, PLACES.to("meta")), {}, ValueError, "positions: on meta, but x is on cpu"
    ),
    "backend": ((X, COS, COS), dict(backend="fast"), ValueError, "'fast': expected one of cuda, "),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(call):
    args, kwargs, error, message = call
    with pytest.raises(error, match=message):
        rotary(*args, **kwargs)
