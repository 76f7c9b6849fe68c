"""The native vq_nearest against an fp64 oracle, with every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import t2i_kernels  # noqa: F401 - defines the operator's schema
from t2i_kernels import native

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))

# What AVX512_VNNI has of its own is for packed weights.
CAPABILITIES = [name for name in native.cpu_capabilities() if name != "AVX512_VNNI"]
METRICS = ("l2", "cosine")
# (N, K, d): around the edges of vectors, blocks (16 codes), tiles (8 to 48 vectors).
# From 256 codes on, of up to 16 dimensions, there are trees: with leaves of 16 codes, or 9 to 15.
SIZES = [(1, 1, 1), (17, 63, 2), (65, 64, 3), (130, 65, 4), (200, 1000, 8), (70, 129, 33)]
SIZES += [(300, 256, 2), (90, 1025, 4), (40, 700, 16)]


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    with native.use_cpu_capability(request.param):
        yield request.param


def nearest(z, codebook, metric):
    return torch.ops.t2i.vq_nearest.cpu(z, codebook, metric, True, True)


def oracle(z, codebook, metric):
    """(distances [N, K] in fp64, bound on their rounding [N, 1])."""
    z, codes = z.double().numpy(), codebook.double().numpy()
    u, dim = 2.0**-53, z.shape[1]
    if metric == "cosine":
        z_norm, code_norm = np.linalg.norm(z, axis=1), np.linalg.norm(codes, axis=1)
        z = z / np.where(z_norm == 0, 1, z_norm)[:, None]
        codes = codes / np.where(code_norm == 0, 1, code_norm)[:, None]
    distances = np.square(z[:, None] - codes[None]).sum(-1)
    if metric == "cosine":
        distances[z_norm == 0] = 2
        distances[:, code_norm == 0] = 2
        return distances, np.full((len(z), 1), 8 * (dim + 8) * u)
    return distances, 4 * (dim + 4) * u * distances.min(1, keepdims=True)


def check(z, codebook, metric, exact=False):
    """Hold the operator to its contract, on a codebook that is new and on one that it knows: where
    that is worth it, it has a tree by then. ``exact``: fp64 has these distances without rounding.
    """
    first = check_once(z, codebook, metric, exact)
    assert np.array_equal(check_once(z, codebook, metric, exact), first)


def check_once(z, codebook, metric, exact):
    indices, distance, counts = (t.numpy() for t in nearest(z, codebook, metric))
    distances, bound = oracle(z, codebook, metric)
    best = distances.min(1, keepdims=True)
    assert np.all(distances[np.arange(len(z)), indices] <= (best + bound)[:, 0])
    decided = (distances <= best + bound).sum(1) == 1
    if exact:
        decided[:] = True
    assert np.array_equal(indices[decided], distances.argmin(1)[decided])  # the first of equals
    with np.errstate(over="ignore"):
        expected = best[:, 0].astype(np.float32)
    np.testing.assert_allclose(distance, expected, rtol=2.0**-22, atol=float(bound.max()) * 2)
    assert np.array_equal(counts, np.bincount(indices, minlength=len(codebook)))
    return indices


# ---- Data: (n, k, d) -> (z, codebook), drawn from torch's generator ------------------------------


def gaussian(n, k, d):
    return torch.randn(n, d), torch.randn(k, d)


def clustered(n, k, d):
    """Tight clusters far apart: within one, fp32 scores are all noise."""
    centers = 100 * torch.randn(8, d)
    codes = centers[torch.randint(8, (k,))] + 1e-3 * torch.randn(k, d)
    return codes[torch.randint(k, (n,))] + 1e-3 * torch.randn(n, d), codes


def spherical(n, k, d):
    return tuple(torch.nn.functional.normalize(torch.randn(m, d), dim=-1) for m in (n, k))


def anisotropic(n, k, d):
    scales = 10.0 ** torch.linspace(3, -3, d)
    return scales * torch.randn(n, d), scales * torch.randn(k, d)


def shifted(n, k, d):
    return torch.randn(n, d) + 100, torch.randn(k, d) + 100


def equidistant(n, k, d):
    """Codes on a shell around the vectors, at radii that differ in the last bits of fp32 only."""
    directions = torch.nn.functional.normalize(torch.randn(k, d), dim=-1)
    return 1e-6 * torch.randn(n, d), directions * (1 + 1e-6 * torch.rand(k, 1))


def distant(n, k, d):
    """Vectors far outside a codebook of near-duplicates."""
    codes = torch.randn(2, d)[torch.randint(2, (k,))] + 1e-6 * torch.randn(k, d)
    return 1e4 * torch.randn(n, d), codes


def beyond(n, k, d):
    """So far outside that products of scaled coordinates would overflow fp32."""
    return 1e15 * torch.randn(n, d), 1e-8 * torch.randn(k, d)


def huge(n, k, d):
    return 1e30 * torch.randn(n, d), 1e30 * torch.randn(k, d)


def subnormal(n, k, d):
    return 1e-41 * torch.randn(n, d), 1e-41 * torch.randn(k, d)


def outlier(n, k, d):
    z, codes = gaussian(n, k, d)
    codes[k // 2] = 1e30
    return z, codes


def zeros(n, k, d):
    """Zero vectors among both."""
    z, codes = gaussian(n, k, d)
    codes[k // 2 :: 5] = 0
    z[::3] = 0
    return z, codes


def orthant(n, k, d):
    """All vectors point away from all codes but the zeros among them."""
    z, codes = -torch.rand(n, d), torch.rand(k, d)
    codes[k // 2 :: 5] = 0
    return z, codes


KINDS = [gaussian, clustered, spherical, anisotropic, shifted, equidistant, distant]
KINDS += [beyond, huge, subnormal, outlier, zeros, orthant]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_oracle(capability, kind, metric):
    torch.manual_seed(0)
    for size in SIZES:
        check(*kind(*size), metric)


def duplicated(n, k, d):
    codes = torch.randint(-3, 4, (k, d)).float()
    codes[k // 2 :] = codes[: k - k // 2].clone()
    return torch.randint(-3, 4, (n, d)).float(), codes


def lattice(n, k, d):
    """Vectors halfway between lattice points: many codes at exactly the same distance."""
    z = torch.randint(-2, 3, (n, d)) + 0.5
    return z + 1000, torch.randint(-2, 3, (k, d)).float() + 1000


def identical(n, k, d):
    return torch.randn(n, d).half().float(), torch.full((k, d), 0.25)


@pytest.mark.parametrize("kind", [duplicated, lattice, identical], ids=lambda kind: kind.__name__)
def test_ties_go_to_the_lowest_index(capability, kind):
    torch.manual_seed(1)
    for size in SIZES:
        check(*kind(*size), "l2", exact=True)


def test_cosine_ties_go_to_the_lowest_index(capability):
    codes = torch.tensor([[0.0, 1.0], [4.0, 4.0], [2.0, 2.0], [0.5, 0.5], [0.0, 0.0]])
    z = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0], [0.0, 3.0]])
    indices, distance, _ = nearest(z, codes, "cosine")
    assert indices.tolist() == [1, 0, 4, 0]
    torch.testing.assert_close(distance, torch.tensor([0.0, 2.0, 2.0, 0.0]))


def test_equally_near_in_fp64_is_a_tie(capability):
    """Codes too small to make a difference to a distance in fp64: the first of them is found,
    however codes are packed."""
    codes = torch.tensor([1.0, -1.0]).repeat_interleave(32).repeat(64)[:, None]  # of mean 0
    codes[::32, 0] = torch.arange(1, 129) * 1e-30
    for _ in range(2):
        indices, _, _ = nearest(torch.full((5000, 1), 0.3), codes, "l2")
        assert (indices == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_more_codes_than_a_panel(capability, metric):
    torch.manual_seed(2)
    z, codes = gaussian(100, 2 * 16384 + 70, 3)
    codes[-1] = z[0]
    codes[20000] = z[1]
    check(z, codes, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", [gaussian, clustered, outlier], ids=lambda kind: kind.__name__)
def test_deep_codes(capability, kind, metric):
    """Dimensions in three parts, vectors in two groups, blocks of codes loaded in two turns. Codes
    that differ by little, beside an outlier, leave nothing to a first pass in bf16."""
    torch.manual_seed(3)
    check(*kind(250, 400, 300), metric)


@pytest.mark.parametrize("dim", [10, 11, 127, 128, 129, 1024, 1025, 4200])
def test_dimensions_at_the_edges(capability, dim):
    """Of a tile of AMX with three terms, of what is scored at a time, and of a pass in bf16."""
    torch.manual_seed(4)
    check(*gaussian(35, 70, dim), "l2")


def test_codes_changed_in_place_and_two_threads(capability):
    torch.manual_seed(5)
    problems = [gaussian(300, 1000 + i, 4) for i in range(6)]

    def search(problem):
        z, codes = problem
        results = []
        for step in range(6):
            codes[step] = z[step]
            results.append(nearest(z, codes, "l2")[0][step].item())
        return results

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(search, problems)) == [list(range(6))] * 6


def test_roundings_to_bf16_that_add_up(capability):
    """The nearest code loses all that rounding to bf16 can take from it, and another one gains."""
    down, up = 1 + 2**-8 - 2**-14, 1 + 2**-8 + 2**-14  # to 1 and to 1 + 2^-7
    half = torch.ones(32)
    z = torch.cat([down * half, up * half])
    nearest_code = torch.cat([down * half, half * 2**-12])
    second = torch.cat([0 * half, up * half])
    far = torch.tensor([0.125, -0.125]).repeat(32)
    codes = torch.stack([nearest_code, *[far] * 15, second, *[-far] * 15])
    codes = torch.cat([codes, -codes])  # of mean 0
    check(z.repeat(3, 1), codes, "l2")


def test_one_dimension_against_exact_fractions(capability):
    """Python's fractions round nothing: differences of 1 in 2^24 and magnitudes 2^40 apart."""
    from fractions import Fraction

    torch.manual_seed(3)
    z = torch.randn(64, 1) * 2.0 ** torch.randint(-20, 20, (64, 1))
    near = z.repeat(4, 1) * (1 + 2.0**-23 * torch.randint(-4, 5, (256, 1)))
    for codes in (near, torch.randn(300, 1) * 2.0 ** torch.randint(-20, 20, (300, 1))):
        exact_codes = [Fraction(c) for c in codes[:, 0].tolist()]
        for value, index in zip(z[:, 0].tolist(), nearest(z, codes, "l2")[0].tolist(), strict=True):
            gaps = [abs(Fraction(value) - code) for code in exact_codes]
            assert index == gaps.index(min(gaps))


# ---- Types, layouts, threads ---------------------------------------------------------------------


@pytest.mark.parametrize("z_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code_type", [torch.float32, torch.bfloat16, torch.float16])
def test_types(capability, z_type, code_type):
    torch.manual_seed(4)
    for metric in METRICS:
        z, codes = gaussian(100, 300, 8)
        check(z.to(z_type), codes.to(code_type), metric)


def test_layouts(capability):
    torch.manual_seed(5)
    z, codes = torch.randn(3, 8, 5, 7), torch.randn(8, 130)
    images = z.permute(0, 2, 3, 1)  # channels first, as encoders have it
    indices, distance, counts = nearest(images, codes.T, "l2")
    flat = nearest(images.reshape(-1, 8).clone(), codes.T.contiguous(), "l2")
    assert indices.shape == distance.shape == (3, 5, 7)
    for got, expected in zip((indices.flatten(), distance.flatten(), counts), flat, strict=True):
        assert torch.equal(got, expected)
    every_second = nearest(images.reshape(-1, 8)[::2], codes.T, "l2")[0]
    assert torch.equal(every_second, flat[0][::2])
    assert torch.equal(nearest(images[0, 0, 0], codes.T, "l2")[0], flat[0][0])
    expanded = nearest(images[0, 0, :1].expand(9, 8), codes.T, "l2")[0]
    assert torch.equal(expanded, flat[0][0].expand(9))


@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_with_every_thread_count_and_instruction_set(metric):
    torch.manual_seed(6)
    # Enough of each for several threads: of vectors, and of codes to pack.
    for z, codes in (equidistant(1000, 700, 8), gaussian(2000, 7500, 8)):
        results = []
        for name in CAPABILITIES:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)  # back to one behind each test: conftest.py
                with native.use_cpu_capability(name):
                    results.append(nearest(z, codes, metric))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_first_bad_row_is_named_whichever_thread_finds_it(threads):
    torch.set_num_threads(threads)
    z, codes = gaussian(2000, 7500, 8)
    z[[1900, 700, 100], 3] = float("nan")
    for _ in range(5):
        with pytest.raises(ValueError, match="in row 100 of 2000"):
            nearest(z, codes, "l2")


def test_what_is_not_asked_for_is_empty(capability):
    z, codes = gaussian(5, 3, 2)
    indices, distance, counts = torch.ops.t2i.vq_nearest.cpu(z, codes, "l2", False, False)
    assert indices.shape == (5,) and distance.shape == counts.shape == (0,)


def test_empty(capability):
    indices, distance, counts = nearest(torch.empty(2, 0, 8), torch.randn(5, 8), "l2")
    assert indices.shape == distance.shape == (2, 0) and counts.tolist() == [0] * 5
    assert nearest(torch.empty(0, 8), torch.empty(0, 8), "l2")[0].shape == (0,)
    with pytest.raises(ValueError, match="codebook holds NaN"):
        nearest(torch.empty(0, 8), torch.full((5, 8), float("nan")), "l2")
    indices, distance, _ = nearest(torch.empty(3, 0), torch.empty(2, 0), "l2")
    assert indices.tolist() == distance.tolist() == [0, 0, 0]


MEMORY = """
import torch, t2i_kernels, resource
z, codes = torch.randn(32768, 4), torch.randn(16384, 4)
torch.ops.t2i.vq_nearest.cpu(z[:64], codes, "l2", True, True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.ops.t2i.vq_nearest.cpu(z, codes, "l2", True, True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_hold_all_distances():
    """32,768 × 16,384 distances would be 2 GB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024  # KiB


# ---- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(capability, value, metric):
    for row in (0, 64, 129):
        z, codes = gaussian(130, 130, 5)
        z[row, 3] = value
        with pytest.raises(ValueError, match=f"z holds NaN or infinite values, in row {row} "):
            nearest(z, codes, metric)
        z, codes = gaussian(130, 130, 5)
        codes[row, 4] = value
        with pytest.raises(ValueError, match=f"codebook holds NaN .*, in row {row} "):
            nearest(z, codes, metric)


@pytest.mark.parametrize(
    ("z", "codes", "metric", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 3), "l2", r"z \[3, 4\] and codebook \[5, 3\] differ"),
        (torch.zeros(3, 4), torch.zeros(5, 3, 4), "l2", r"codebook must be \[K, d\]"),
        (torch.tensor(1.0), torch.zeros(5, 3), "l2", "got a scalar"),
        (torch.zeros(3, 4), torch.zeros(5, 4), "dot", "metric must be 'l2' or 'cosine', got 'dot'"),
        (torch.zeros(3, 4), torch.zeros(0, 4), "l2", "has no codes"),
        (torch.zeros(3, 4).double(), torch.zeros(5, 4), "l2", "z must be float32"),
        (torch.zeros(3, 4), torch.zeros(5, 4).int(), "l2", "codebook must be float32"),
    ],
)
def test_bad_arguments(z, codes, metric, message):
    with pytest.raises(ValueError, match=message):
        nearest(z, codes, metric)


def test_instruction_set_that_is_not_there():
    with pytest.raises(ValueError, match="'SSE9'.*expected one of"):
        with native.use_cpu_capability("SSE9"):
            pass


def test_instruction_set_forced_from_outside():
    program = "from t2i_kernels import native; print(native.cpu_capability(), native.reason())"
    for name, expected in (("DEFAULT", "DEFAULT None"), ("SSE9", "None T2I_CPU_CAPABILITY='SSE9'")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, "T2I_CPU_CAPABILITY": name},
        )
        assert done.stdout.startswith(expected), done.stdout + done.stderr
