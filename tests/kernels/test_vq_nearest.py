"""vq_nearest, on every backend, against distances in fp64.

``CHECKS`` are also run against planted bugs (test_mutations.py).
"""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from backends import backends, skip_unless_supported, skip_where_it_asserts

from t2i_kernels import NearestCodes, vq_nearest

BACKENDS = backends("vq_nearest")
METRICS = ("l2", "cosine")
# (N, K, d) around the edges of vectors and blocks; the last is more than one chunk or panel.
SIZES = [(1, 1, 1), (17, 63, 2), (65, 64, 3), (130, 65, 4), (70, 129, 33), (200, 700, 8)]


def compare(backend, z, codebook, metric, exact=False):
    """Hold one call to the contract. ``exact``: fp64 has these distances without rounding, so that
    equal ones are ties.

    The chosen code is nearest up to the rounding of fp64, and the very one that is nearest where
    another is not as near.
    """
    skip_unless_supported(backend, "vq_nearest", z, codebook, metric)
    found = vq_nearest(
        z, codebook, metric, return_distance=True, return_counts=True, backend=backend
    )
    assert found.indices.dtype == found.counts.dtype == torch.int64
    assert found.distance.dtype == torch.float32
    distances, bound = oracle.distances(z, codebook, metric)
    best = distances.amin(1, keepdim=True)
    first = torch.from_numpy(distances.cpu().numpy().argmin(1)).to(z.device)
    chosen = distances.gather(1, found.indices[:, None])
    assert (chosen <= best + bound).all(), "a nearer code exists"
    decided = ((distances <= best + bound).sum(1) == 1) | exact
    assert torch.equal(found.indices[decided], first[decided]), "not the lowest index of the best"
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(best[:, 0].cpu().numpy().astype(np.float32)).to(z.device)
    atol = 2 * float(bound.max()) if metric == "cosine" else 0
    torch.testing.assert_close(found.distance, expected, rtol=2**-22, atol=atol)
    assert torch.equal(found.counts, torch.bincount(found.indices, minlength=len(codebook)))


# ---- Data: (n, k, d) -> (z, codebook) -----------------------------------------------------------


def gaussian(n, k, d):
    return torch.randn(n, d), torch.randn(k, d)


def shifted(n, k, d):
    """|z|² − 2 z·c + |c|² in fp32 would be all rounding."""
    return torch.randn(n, d) + 100, torch.randn(k, d) + 100


def clustered(n, k, d):
    """Tight clusters far apart, each vector inside one."""
    centers = 100 * torch.randn(8, d)
    codes = centers[torch.randint(8, (k,))] + 1e-3 * torch.randn(k, d)
    return codes[torch.randint(k, (n,))] + 1e-3 * torch.randn(n, d), codes


def trained(n, k, d):
    """Vectors close to codes of length 1, as a trained tokenizer has them."""
    codes = torch.nn.functional.normalize(torch.randn(k, d), dim=-1)
    return 0.9 * codes[torch.randint(k, (n,))] + 0.05 * torch.randn(n, d), codes


def anisotropic(n, k, d):
    scales = 10.0 ** torch.linspace(3, -3, d)
    return scales * torch.randn(n, d), scales * torch.randn(k, d)


def huge(n, k, d):
    """Squares overflow fp32."""
    return 1e30 * torch.randn(n, d), 1e30 * torch.randn(k, d)


def tiny(n, k, d):
    """Squares underflow fp32."""
    return 1e-30 * torch.randn(n, d), 1e-30 * torch.randn(k, d)


def outlier(n, k, d):
    z, codes = gaussian(n, k, d)
    codes[k // 2] = 1e30
    return z, codes


def zeros(n, k, d):
    z, codes = gaussian(n, k, d)
    codes[k // 2 :: 5] = 0
    z[::3] = 0
    return z, codes


def duplicated(n, k, d):
    """Integers: distances are exact, and each code is there twice."""
    codes = torch.randint(-3, 4, (k, d)).float()
    codes[k // 2 :] = codes[: k - k // 2].clone()
    return torch.randint(-3, 4, (n, d)).float(), codes


def lattice(n, k, d):
    """Vectors halfway between points of a lattice, off the origin: many equal distances."""
    z = torch.randint(-2, 3, (n, d)) + 0.5
    return z + 1000, torch.randint(-2, 3, (k, d)).float() + 1000


def far_lattice(n, k, d):
    """The same where fp64 holds the distances, but neither |c|² nor z·c: a unit of one dimension is
    2²⁰ of another."""
    z, codes = 2 * torch.randint(-2, 3, (n, d)) + 1, 2 * torch.randint(-2, 3, (k, d))
    unit = 2.0 ** torch.linspace(-10, 10, d).round()
    return unit * (2.0**22 + z), unit * (2.0**22 + codes)


def identical(n, k, d):
    return torch.randn(n, d).half().float(), torch.full((k, d), 0.25)


# ---- Checks: (backend) -> None, or AssertionError -----------------------------------------------


def check_data(backend):
    kinds = gaussian, shifted, clustered, trained, anisotropic, huge, tiny, outlier, zeros
    for metric in METRICS:
        for kind in kinds:
            for size in SIZES:
                compare(backend, *kind(*size), metric)


def check_ties(backend):
    """The lowest index among equals."""
    for kind in (duplicated, lattice, far_lattice, identical):
        for size in SIZES:
            compare(backend, *kind(*size), "l2", exact=True)


def check_cosine_ties(backend):
    codes = torch.tensor([[0.0, 1.0], [4.0, 4.0], [2.0, 2.0], [0.5, 0.5], [0.0, 0.0]])
    z = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0], [0.0, 3.0]])
    found = vq_nearest(z, codes, "cosine", return_distance=True, backend=backend)
    assert found.indices.tolist() == [1, 0, 4, 0]
    torch.testing.assert_close(found.distance, torch.tensor([0.0, 2.0, 2.0, 0.0]))
    assert (found.distance >= 0).all()


def check_cosine_ignores_length(backend):
    z, codes = gaussian(100, 50, 4)
    scaled = 2.0 ** torch.randint(-20, 20, (50, 1)) * codes
    calls = [(z, scaled), (z * 2.0**60, codes)]
    if backend == "reference":  # squares underflow fp64 too
        calls.append((z.double() * 2.0**-700, codes.double() * 2.0**-700))
    expected = vq_nearest(z, codes, "cosine", backend=backend)
    for call in calls:
        assert torch.equal(vq_nearest(*call, "cosine", backend=backend), expected)


def check_many_codes(backend):
    """More than one chunk, block or panel, the nearest at both ends and in the middle."""
    z, codes = gaussian(600, 2 * 16384 + 70, 3)
    codes[-1], codes[20000], codes[0] = z[0], z[1], z[-1]
    for metric in METRICS:
        found = vq_nearest(z, codes, metric, backend=backend)
        assert found[[0, 1, -1]].tolist() == [len(codes) - 1, 20000, 0]
        for chosen in (slice(0, 8), slice(592, 600)):
            compare(backend, z[chosen], codes, metric)


def check_types(backend):
    """Each type against each: the values as given, the sums never in their type."""
    types = torch.float32, torch.bfloat16, torch.float16
    for z_type in types:
        for code_type in types:
            for metric in METRICS:
                z, codes = gaussian(100, 300, 8)
                compare(backend, z.to(z_type), codes.to(code_type), metric)
    z, codes = shifted(100, 300, 8)
    compare(backend, z.bfloat16(), codes.bfloat16(), "l2", exact=True)


def check_layouts(backend):
    """Channels first, transposed codebooks, rows skipped, vectors expanded, one vector."""
    images, codes = torch.randn(3, 8, 5, 7).permute(0, 2, 3, 1), torch.randn(8, 130).T
    flat = images.reshape(-1, 8).clone()
    options = dict(return_distance=True, return_counts=True, backend=backend)
    found = vq_nearest(images, codes, "l2", **options)
    expected = vq_nearest(flat, codes.contiguous(), "l2", **options)
    assert found.indices.shape == found.distance.shape == (3, 5, 7)
    for got, value in zip(found, expected, strict=True):
        assert torch.equal(got.flatten(), value)
    for part, rows in ((flat[::2], slice(0, None, 2)), (flat[:1].expand(9, 8), [0] * 9)):
        assert torch.equal(vq_nearest(part, codes, "l2", backend=backend), expected.indices[rows])
    assert vq_nearest(flat[4], codes, "l2", backend=backend) == expected.indices[4]


def check_batch_independence(backend):
    z, codes = trained(300, 200, 8)
    options = dict(return_distance=True, backend=backend)
    whole = vq_nearest(z, codes, "l2", **options)
    for part in (slice(0, 1), slice(37, 90), slice(299, 300)):
        alone = vq_nearest(z[part], codes, "l2", **options)
        assert torch.equal(alone.indices, whole.indices[part])
        assert torch.equal(alone.distance, whole.distance[part])


def check_returns(backend):
    """Indices alone, or a named tuple with None for what was not asked for."""
    z, codes = gaussian(5, 3, 2)
    call = z, codes, "l2"
    indices = vq_nearest(*call, backend=backend)
    assert isinstance(indices, torch.Tensor)
    for distance in (False, True):
        for counts in (False, True):
            if not (distance or counts):
                continue
            found = vq_nearest(
                *call, return_distance=distance, return_counts=counts, backend=backend
            )
            assert isinstance(found, NearestCodes) and torch.equal(found.indices, indices)
            assert (found.distance is not None) == distance
            assert (found.counts is not None) == counts


def check_empty(backend):
    options = dict(return_distance=True, return_counts=True, backend=backend)
    for metric in METRICS:
        found = vq_nearest(torch.empty(2, 0, 8), torch.randn(5, 8), metric, **options)
        assert found.indices.shape == found.distance.shape == (2, 0)
        assert found.counts.tolist() == [0] * 5
        found = vq_nearest(torch.empty(0, 8), torch.empty(0, 8), metric, **options)
        assert found.indices.shape == found.counts.shape == (0,)
    found = vq_nearest(torch.empty(3, 0), torch.empty(2, 0), "l2", **options)
    assert found.indices.tolist() == found.distance.tolist() == [0, 0, 0]


def check_no_gradient(backend):
    """Indices have none, and a distance that pretended to have one would be worse."""
    z, codes = (t.requires_grad_() for t in gaussian(5, 3, 2))
    found = vq_nearest(z, codes, "l2", return_distance=True, backend=backend)
    assert not found.distance.requires_grad


def check_not_finite(backend):
    """NaN and infinity have no nearest code: the error says where they are."""
    skip_where_it_asserts()
    for metric in METRICS:
        for value in (math.nan, math.inf, -math.inf):
            for row in (0, 64, 129):
                z, codes = gaussian(130, 131, 5)
                z[row, 3] = value
                message = f"z holds NaN or infinite values, in row {row} of 130"
                with pytest.raises(ValueError, match=message):
                    vq_nearest(z, codes, metric, backend=backend)
                z, codes = gaussian(130, 131, 5)
                codes[row, 4] = value
                message = f"codebook holds NaN or infinite values, in row {row} of 131"
                with pytest.raises(ValueError, match=message):
                    vq_nearest(z, codes, metric, backend=backend)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_contract(check, backend):
    check(backend)


def test_fp64_beyond_its_range_stays_inside_the_codebook():
    """Squares of 10²⁰⁰ overflow: any answer is as good, but it must be an index."""
    z, codes = 1e200 * torch.randn(9, 4).double(), 1e200 * torch.randn(7, 4).double()
    for metric in METRICS:
        indices = vq_nearest(z, codes, metric, backend="reference")
        assert ((indices >= 0) & (indices < 7)).all()


# ---- As an operator of torch --------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", [(False, False), (True, True)])
def test_opcheck(backend, flags):
    operator = getattr(torch.ops.t2i.vq_nearest, backend)
    torch.library.opcheck(operator, (torch.randn(3, 5, 8), torch.randn(7, 8), "l2", *flags))
    torch.library.opcheck(operator, (torch.randn(0, 8), torch.randn(7, 8).half(), "cosine", *flags))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    encoder = torch.nn.Linear(8, 8)

    def model(x, codes):
        z = encoder(x)
        found = vq_nearest(z, codes, "l2", return_counts=True, backend=backend)
        return (z - codes[found.indices]).square().sum(), found.counts

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    codes = torch.randn(12, 8)
    for n in (5, 9):
        x = torch.randn(n, 8)
        (loss, counts), (expected, expected_counts) = compiled(x, codes), model(x, codes)
        assert torch.equal(counts, expected_counts)
        grads = [torch.autograd.grad(value, encoder.weight)[0] for value in (loss, expected)]
        torch.testing.assert_close(*grads)


# ---- Errors -------------------------------------------------------------------------------------

Z, C = torch.zeros(3, 4), torch.zeros(5, 4)
BAD_CALLS = {
    "z no tensor": (([1.0], C, "l2"), TypeError, "z: expected a tensor, got list"),
    "codebook no tensor": ((Z, None, "l2"), TypeError, "codebook: expected a tensor, got NoneType"),
    "z integers": ((Z.int(), C, "l2"), TypeError, r"z: expected float32.*torch.int32 \(3, 4\)"),
    "codebook integers": ((Z, C.int(), "l2"), TypeError, "codebook: expected float32.*torch.int32"),
    "metric": ((Z, C, "dot"), ValueError, "metric: expected 'l2' or 'cosine', got 'dot'"),
    "codebook dims": ((Z, C[None], "l2"), ValueError, r"codebook: expected \[K, d\], got \(1, 5"),
    "scalar": ((torch.tensor(1.0), C, "l2"), ValueError, r"z: expected \[..., 4\] .*got \(\)"),
    "width": ((Z, C[:, :3], "l2"), ValueError, r"z: expected \[..., 3\] .*\(5, 3\), got \(3, 4\)"),
    "no codes": ((Z, C[:0], "l2"), ValueError, r"codebook: \(0, 4\) has no codes for z \(3, 4\)"),
    "device": ((Z, C.to("meta"), "l2"), ValueError, "codebook: on meta, but z is on cpu"),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(call):
    args, error, message = call
    with pytest.raises(error, match=message):
        vq_nearest(*args)


def test_metric_is_always_explicit():
    with pytest.raises(TypeError, match="metric"):
        vq_nearest(Z, C)


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend 'fast': expected one of cuda, triton, cpu"):
        vq_nearest(Z, C, "l2", backend="fast")
