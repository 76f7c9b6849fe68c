"""linear_cross_entropy, on every backend, against torch's in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import backends, skip_unless_supported, skip_where_it_asserts
from oracle import assert_no_worse

from t2i_kernels import linear_cross_entropy
from t2i_kernels.linear_cross_entropy import reference

BACKENDS = backends("linear_cross_entropy")
IGNORED = -100


@pytest.fixture(autouse=True)
def parts_of_the_reference(monkeypatch):
    """Small problems have several."""
    monkeypatch.setattr(reference, "MAX_ELEMENTS", 1 << 10)


def plain(x, weight, targets, ignore_index=IGNORED):
    logits = x @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    return loss, logits.logsumexp(dim=-1)


def run(backend):
    def function(x, weight, targets, ignore_index=IGNORED):
        return linear_cross_entropy(
            x, weight, targets, ignore_index=ignore_index, return_lse=True, backend=backend
        )

    return function


def differentiate(function, x, weight, targets, dloss, dlse, **options):
    """(loss, lse, dx, dweight) for gradients dloss, and dlse unless it is None."""
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    loss, lse = function(x, weight, targets, **options)
    outputs, grads = [loss], [dloss.to(loss.dtype)]
    if dlse is not None:
        outputs, grads = [loss, lse], [*grads, dlse.to(lse.dtype)]
    return loss.detach(), lse.detach(), *torch.autograd.grad(outputs, (x, weight), grads)


def problem(rows, classes, dim, dtype=torch.float32, ignored=()):
    x, weight = torch.randn(rows, dim).to(dtype), torch.randn(classes, dim).to(dtype)
    targets = torch.randint(classes, (rows,))
    targets[list(ignored)] = IGNORED
    return x, weight, targets


def compare(backend, x, weight, targets, with_dlse=True, **options):
    """Loss, logsumexp and gradients are no worse than the plain formula's."""
    skip_unless_supported(backend, "linear_cross_entropy", x, weight, targets, **options)
    call = targets, torch.randn(len(x)), torch.randn(len(x)) if with_dlse else None
    exact = differentiate(plain, x.double(), weight.double(), *call, **options)
    same = differentiate(plain, x, weight, *call, **options)
    got = differentiate(run(backend), x, weight, *call, **options)
    assert [t.dtype for t in got] == [torch.float32, torch.float32, x.dtype, x.dtype]
    # A backward pass takes exp(s − lse): the rounding of lse to fp32 is a relative error there.
    fp32 = torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps
    largest = max(8, exact[1].abs().max().item())
    logits = (x.double() @ weight.double().T).abs().max() * torch.finfo(torch.float32).eps
    for name, *values in zip(("loss", "logsumexp", "dx", "dweight"), got, same, exact, strict=True):
        if name[0] == "d":
            assert_no_worse(name, *values, factor=3, rounding=1 + largest * fp32)
        else:  # in units of the largest loss, as far as logits are known
            rounding = 2 * max(1, (logits / (1e-7 * values[2].abs().max() + 1e-30)).item())
            assert_no_worse(name, *values, factor=2, rounding=rounding)


# ---- Checks: (backend) -> None, or AssertionError -----------------------------------------------


def check_sizes(backend):
    for rows, classes, dim in [
        (1, 1, 1), (1, 5, 3), (17, 2, 16), (5, 33, 40), (40, 70, 32), (33, 200, 17), (3, 1000, 8),
        (100, 130, 64),
    ]:  # fmt: skip
        compare(backend, *problem(rows, classes, dim))


def check_low_precision(backend):
    for dtype in (torch.bfloat16, torch.float16):
        compare(backend, *problem(50, 90, 48, dtype, ignored=[3, 49]))


def check_sums_are_fp32(backend):
    """Equal logits: the loss is log V, and gradients are sums of many small terms."""
    rows, classes = 400, 100
    x = torch.ones(rows, 16, dtype=torch.bfloat16)
    weight = torch.zeros(classes, 16, dtype=torch.bfloat16)
    targets = torch.zeros(rows, dtype=torch.int64)
    loss, lse, dx, dweight = differentiate(run(backend), x, weight, targets, torch.ones(rows), None)
    expected = torch.tensor(classes).log().expand(rows)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, expected, rtol=1e-6, atol=0)
    gradient = torch.full((classes,), rows / classes)
    gradient[0] -= rows
    torch.testing.assert_close(dweight.float(), gradient[:, None].expand(-1, 16), rtol=1e-2, atol=0)


def check_ignored(backend):
    """Loss 0 and no gradient, whatever gradient reaches them; the others as without them."""
    for index in (IGNORED, 2, 10**10):
        x, weight, targets = problem(20, 40, 8)
        targets[targets == 2] = 3
        ignored = torch.arange(20) % 3 == 0
        targets[ignored] = index
        dloss = torch.where(ignored, torch.nan, torch.randn(20))
        got = differentiate(run(backend), x, weight, targets, dloss, None, ignore_index=index)
        loss, lse, dx, dweight = got
        assert (loss[ignored] == 0).all() and (dx[ignored] == 0).all() and lse.isfinite().all()
        kept = x[~ignored], weight, targets[~ignored], dloss[~ignored], None
        expected = differentiate(run(backend), *kept, ignore_index=index)
        got = loss[~ignored], lse[~ignored], dx[~ignored], dweight
        torch.testing.assert_close(got, expected)
    x, weight, targets = problem(5, 7, 4, ignored=range(5))
    loss, _, *grads = differentiate(run(backend), x, weight, targets, torch.ones(5), None)
    assert (loss == 0).all() and all((grad == 0).all() for grad in grads)


def check_gradients_alone(backend):
    compare(backend, *problem(20, 50, 8, ignored=[4]), with_dlse=False)
    x, weight, targets = problem(20, 50, 8, ignored=[4])
    grads = []
    for function in (run(backend), plain):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        grads.append(torch.autograd.grad(function(*leaves, targets)[1].sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def check_huge_logits(backend):
    """±10⁵ and more: softmax is an argmax, and nothing overflows."""
    x, weight, targets = problem(30, 70, 16)
    compare(backend, 300 * x, 300 * weight, targets)
    best = (x @ weight.T).argmax(dim=-1)
    call = 1e4 * x, 1e4 * weight, best, torch.ones(30), None
    loss, lse, *grads = differentiate(run(backend), *call)
    assert (loss == 0).all() and (lse > 1e6).all() and all((g == 0).all() for g in grads)


def check_small_losses(backend):
    """A sure and right model: differences from a large logit keep their digits."""
    classes = 40
    weight = torch.eye(classes)
    margins = torch.linspace(2, 12, 20)
    targets = torch.arange(20)
    x = torch.full((20, classes), 1000.0)
    x[targets, targets] += margins
    loss, _ = run(backend)(x, weight, targets)
    exact = ((classes - 1) * (-(x[targets, targets] - 1000).double()).exp()).log1p()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-3, atol=2e-7)


def check_label_smoothing(backend):
    """As the docstring says it is made of loss and logsumexp."""
    x, weight, targets = problem(15, 33, 8)
    loss, lse = run(backend)(x, weight, targets)
    smoothed = 0.9 * loss + 0.1 * (lse - x @ weight.mean(dim=0))
    expected = F.cross_entropy(x @ weight.T, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(smoothed, expected, rtol=1e-5, atol=1e-5)


def check_strides(backend):
    x, weight = torch.randn(20, 3, 24), torch.randn(2, 50, 24)
    targets = torch.randint(50, (40,))[::2]
    ones = torch.ones(())
    for a, b in [
        (x[:, 1], weight[1]), (x[::1, 0, :8], weight[0, :, 8:16]), (x[:, 0], weight[0, ::2]),
        (torch.randn(24, 20).T, torch.randn(24, 50).T), (x[:1, 0].expand(20, 24), weight[0]),
    ]:  # fmt: skip
        t = targets % len(b)
        for dloss, dlse in [(torch.randn(40)[::2], torch.randn(20)), (ones.expand(20),) * 2]:
            got = differentiate(run(backend), a, b, t, dloss, dlse)
            copies = (c.contiguous() for c in (a, b, t, dloss, dlse))
            torch.testing.assert_close(got, differentiate(run(backend), *copies))


def check_nan_reaches_the_output(backend):
    x, weight, targets = problem(20, 40, 8)
    x[3, 2] = torch.nan
    loss, lse, dx, dweight = differentiate(run(backend), x, weight, targets, torch.ones(20), None)
    wrong = torch.arange(20) == 3
    assert torch.equal(loss.isnan(), wrong) and torch.equal(lse.isnan(), wrong)
    assert torch.equal(dx.isnan().any(dim=1), wrong) and dweight.isnan().all()


def check_empty(backend):
    for rows, classes, dim in [(0, 5, 4), (0, 0, 4), (3, 5, 0)]:
        x, weight, targets = problem(rows, classes or 1, dim)
        weight = weight[:classes]
        call = targets, torch.ones(rows), torch.ones(rows)
        loss, lse, dx, dweight = differentiate(run(backend), x, weight, *call)
        assert dx.shape == x.shape and torch.equal(dweight, torch.zeros(classes, dim))
        torch.testing.assert_close(loss, torch.tensor(5.0).log().expand(rows))
        torch.testing.assert_close(lse, torch.tensor(5.0).log().expand(rows))


def check_targets_out_of_range(backend):
    skip_where_it_asserts()
    x, weight, targets = problem(4, 6, 3)
    for value in (6, -1, -99, 2**32 + 1):
        targets[2] = value
        message = f"targets: expected from 0 to 5, or -100, which is ignored, got {value}"
        with pytest.raises(ValueError, match=message):
            run(backend)(x, weight, targets)


def check_same_bits_every_time(backend):
    x, weight, targets = problem(70, 150, 40)
    call = targets, torch.randn(70), torch.randn(70)
    first, second = (differentiate(run(backend), x, weight, *call) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_contract(check, backend):
    check(backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if "triton" in b.values])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_depend_on_the_workspace(backend, dtype, monkeypatch):
    x, weight, targets = problem(40, 150, 40, dtype)
    skip_unless_supported(backend, "linear_cross_entropy", x, weight, targets)
    from t2i_kernels.linear_cross_entropy import triton

    call, grads = (targets, torch.randn(40), torch.randn(40)), []
    for workspace in (1, 40 * 64, 1 << 20):
        monkeypatch.setattr(triton, "WORKSPACE", workspace)
        grads.append(differentiate(run(backend), x, weight, *call)[2:])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


# ---- As an operator of torch --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    x, weight, targets = problem(7, 9, 4, torch.float64, ignored=[2])
    skip_unless_supported(backend, "linear_cross_entropy", x, weight, targets)
    leaves = x.requires_grad_(), weight.requires_grad_()
    torch.autograd.gradcheck(lambda *leaves: run(backend)(*leaves, targets), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend):
    x, weight, targets = problem(4, 6, 3)
    loss, _ = run(backend)(x.requires_grad_(), weight, targets)
    (dx,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight, targets = problem(7, 9, 4, ignored=[2])
    forward = getattr(torch.ops.t2i.linear_cross_entropy, backend)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.library.opcheck(forward, (*leaves, targets, IGNORED))
    _, lse = forward(x, weight, targets, IGNORED)
    backward = getattr(torch.ops.t2i.linear_cross_entropy_backward, backend)
    for dlse in (None, torch.randn(7)):
        call = torch.randn(7), dlse, x, weight, targets, lse, IGNORED
        torch.library.opcheck(backward, call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    def model(x, weight, targets):
        return linear_cross_entropy(x, weight, targets, backend=backend).mean()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 8):
        x, weight, targets = problem(rows, 9, 4)
        leaves = x.requires_grad_(), weight.requires_grad_()
        grads = [
            torch.autograd.grad(function(*leaves, targets), leaves)
            for function in (model, compiled)
        ]
        torch.testing.assert_close(*grads)


# ---- Errors -------------------------------------------------------------------------------------

X, W, T = torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(3, dtype=torch.int64)
BAD_CALLS = {
    "x no tensor": (([1.0], W, T), {}, TypeError, "x: expected a tensor, got list"),
    "weight no tensor": ((X, None, T), {}, TypeError, "weight: expected a tensor, got NoneType"),
    "targets no tensor": ((X, W, [0, 1, 2]), {}, TypeError, "targets: expected a tensor, got list"),
    "integers": ((X.int(), W, T), {}, TypeError, r"x: expected float32.*int32 \(3, 4\)"),
    "types": ((X, W.half(), T), {}, TypeError, "weight: expected torch.float32 as x, got torch"),
    "targets' type": ((X, W, T.int()), {}, TypeError, "targets: expected int64, got torch.int32"),
    "x's dims": ((X[None], W, T), {}, ValueError, r"x: expected \[N, D\], got \(1, 3, 4\)"),
    "widths": ((X, W[:, :3], T), {}, ValueError, r"weight: expected \[V, 4\] .*got \(6, 3\)"),
    "no classes": ((X, W[:0], T), {}, ValueError, r"weight: \(0, 4\) has no rows for x \(3, 4\)"),
    "targets' size": ((X, W, T[:2]), {}, ValueError, r"targets: expected \[N\] .*got \(2,\)"),
    "devices": ((X, W.to("meta"), T), {}, ValueError, "weight: on meta, but x is on cpu"),
    "targets' device": ((X, W, T.to("meta")), {}, ValueError, "targets: on meta, but x is on cpu"),
    "backend": ((X, W, T), dict(backend="fast"), ValueError, "'fast': expected one of cuda, "),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(call):
    args, kwargs, error, message = call
    with pytest.raises(error, match=message):
        linear_cross_entropy(*args, **kwargs)
