"""Nearest codebook vector on the CPU, beside exact brute force and exact trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contest import Contender, contest
from t2i_kernels import VectorQuantizer, explain, vq_nearest

SHAPES = {  # K, d, on the unit sphere
    "MoVQGAN, K 16384 d 4": (16384, 4, False),
    "LlamaGen, K 16384 d 8": (16384, 8, True),
    "K 8192 d 32": (8192, 32, False),
    "K 16384 d 256": (16384, 256, False),
    "K 1024 d 256": (1024, 256, False),
}
VECTORS = [1024, 32768]
CODES = [256, 1024, 4096, 16384, 65536]  # of a sweep over K
DIMS = [2, 4, 8, 16, 32, 64, 128]  # of a sweep over d
MAX_TREE_DIM = 16  # beyond, trees of others are far behind brute force


def make(n: int, codes: int, dim: int, sphere: bool, kind: str):
    """(z [n, d], codebook [K, d]): gaussian, or "realistic": a mixture of clusters with decaying
    variances, a codebook that k-means has fitted to it, vectors half way to their code."""

    def onto(x):
        return F.normalize(x, dim=-1) if sphere else x

    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "gaussian":
        return onto(randn(n, dim)), onto(randn(codes, dim))
    directions = randn(dim, dim) * torch.arange(1, dim + 1).float() ** -0.7
    centres = randn(64, dim)

    def draw(count: int):
        chosen = centres[torch.randint(0, 64, (count,), generator=generator)]
        return onto(randn(count, dim) * (0.5 * randn(count, 1)).exp() @ directions.T + chosen)

    data = draw(4 * codes)
    codebook = data[:codes].clone()
    for _ in range(4):
        found = vq_nearest(data, codebook, "l2", return_counts=True)
        sums = torch.zeros_like(codebook).index_add_(0, found.indices, data)
        used = found.counts[:, None]
        codebook = onto(torch.where(used > 0, sums / used.clamp(min=1), codebook))
    z = draw(n)
    code = codebook[vq_nearest(z, codebook, "l2")]
    return onto(code + 0.5 * (z - code)), codebook


def least_distances(z, codebook):
    """Squared, of each vector, in fp64: off by some 1e-15 of the norms."""
    norms = codebook.square().sum(1)
    scores = [(norms - 2 * part @ codebook.T).amin(1) for part in z.split(512)]
    return torch.cat(scores) + z.square().sum(1)


def chunked(z, codebook):
    """The best plain form in torch: a matrix of scores for 512 vectors at a time."""
    half_norm = codebook.square().sum(1) / 2
    parts = [torch.addmm(half_norm, part, codebook.T, alpha=-1).argmin(1) for part in z.split(512)]
    return torch.cat(parts)


def fused(z, codebook):
    """For torch.compile, which fuses the sum over few dimensions with the argmin."""
    score = (codebook.square().sum(1) / 2)[None]
    for j in range(z.shape[1]):
        score = score - z[:, j : j + 1] * codebook[:, j]
    return score.argmin(1)


def contenders(z, codebook, threads: int) -> list[Contender]:
    dim = z.shape[1]
    rows, codes = z.numpy(), codebook.numpy()

    def few_dimensions() -> None:
        if dim > MAX_TREE_DIM:
            raise NotImplementedError(f"no match for brute force at d {dim}")

    def faiss():
        import faiss

        faiss.omp_set_num_threads(threads)
        # By default it leaves its fast kernel for fewer than 10,000 vectors or so.
        faiss.cvar.distance_compute_blas_threshold = 20
        index = faiss.IndexFlatL2(dim)
        index.add(codes)
        return lambda: index.search(rows, 1)[1][:, 0]

    def ckdtree():
        from scipy.spatial import cKDTree

        few_dimensions()
        tree = cKDTree(codes)
        return lambda: tree.query(rows, workers=threads)[1]

    def pykdtree():
        from pykdtree.kdtree import KDTree

        few_dimensions()
        tree = KDTree(codes)
        return lambda: tree.query(rows)[1].astype(np.int64)

    def scikit_tree():
        from sklearn.neighbors import KDTree

        few_dimensions()
        tree = KDTree(codes)
        return lambda: tree.query(rows, return_distance=False)[:, 0]

    def scikit():
        from sklearn.metrics import pairwise_distances_argmin

        return lambda: pairwise_distances_argmin(rows, codes)

    def compiled():
        if dim > MAX_TREE_DIM:
            raise NotImplementedError(f"unrolls {dim} dimensions")
        torch._dynamo.reset()
        run = torch.compile(fused, dynamic=False)
        return lambda: run(z, codebook)

    def changing():
        """With codes that are new in every call, as in training."""
        books = [codebook.clone() for _ in range(3)]
        turn = iter(range(1 << 60))

        def call():
            step = next(turn)
            book = books[step % 3]
            book[-1, 0] = book[-1, 0].nextafter(torch.tensor(torch.inf if step % 2 else 0.0))
            return vq_nearest(z, book, "l2")

        return call

    return [
        Contender("t2i", lambda: lambda: vq_nearest(z, codebook, "l2"), ours=True),
        Contender("t2i, new codes every call", changing),
        Contender("faiss IndexFlatL2", faiss),
        Contender("scipy cKDTree", ckdtree),
        Contender("pykdtree", pykdtree),
        Contender("scikit-learn KDTree", scikit_tree),
        Contender("scikit-learn argmin", scikit),
        Contender("torch, chunks of 512", lambda: lambda: chunked(z, codebook)),
        Contender("torch, compiled", compiled),
    ]


def race(benchmark, peaks, threads, n, codes, dim, sphere, kind) -> None:
    z, codebook = make(n, codes, dim, sphere, kind)
    best = None

    def gate(found) -> str | None:
        """Chosen distances are the least, by fp64, up to the rounding of fp32 inputs' products."""
        nonlocal best
        found = torch.as_tensor(found)
        if not ((0 <= found) & (found < codes)).all():
            return "an index outside the codebook"
        distance = (z.double() - codebook[found].double()).square().sum(1)
        if best is None:
            best = least_distances(z.double(), codebook.double())
        slack = 1e-5 * (best + z.double().square().sum(1))
        wrong = int((distance > best + slack).sum())
        return f"{wrong} of {n} codes are not the nearest" if wrong else None

    contest(
        benchmark,
        contenders(z, codebook, threads),
        gate=gate,
        flops=2 * n * codes * dim,
        case={
            "op": "vq_nearest",
            "vectors": n,
            "codes": codes,
            "dim": dim,
            "data": kind,
            "path": explain("vq_nearest", z, codebook, "l2").chosen,
            "peaks": peaks,
        },
    )


@pytest.mark.parametrize("kind", ["realistic", "gaussian"])
@pytest.mark.parametrize("n", VECTORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(benchmark, peaks, threads, shape, n, kind):
    race(benchmark, peaks, threads, n, *SHAPES[shape], kind)


@pytest.mark.parametrize("codes", CODES)
def test_over_codes(benchmark, peaks, threads, codes):
    race(benchmark, peaks, threads, 8192, codes, 8, True, "realistic")


@pytest.mark.parametrize("dim", DIMS)
def test_over_dimensions(benchmark, peaks, threads, dim):
    race(benchmark, peaks, threads, 8192, 4096, dim, False, "realistic")


def test_training_step(benchmark, peaks, threads):
    """Assign, straight-through, EMA of the codebook."""
    n, codes, dim = 8192, 16384, 8
    z, codebook = make(n, codes, dim, True, "realistic")

    def ours():
        quantizer = VectorQuantizer(codes, dim, metric="l2")
        quantizer.codebook.data.copy_(codebook)
        x = z.clone().requires_grad_()

        def step():
            out = quantizer(x)
            (out.quantized.sum() + out.loss).backward()
            return out.indices

        return step

    def plain(assign):
        book = codebook.clone()
        size, total = torch.ones(codes), codebook.clone()
        x = z.clone().requires_grad_()

        def step():
            with torch.no_grad():
                indices = assign(x, book)
            quantized = book[indices]
            loss = F.mse_loss(x, quantized)
            (x + (quantized - x).detach()).sum().add(loss).backward()
            with torch.no_grad():
                counts = torch.bincount(indices, minlength=codes).float()
                sums = torch.zeros_like(book).index_add_(0, indices, x)
                size.lerp_(counts, 0.01)
                total.lerp_(sums, 0.01)
                book.copy_(total / size.clamp(min=1e-5)[:, None])
            return indices

        return step

    def compiled():
        torch._dynamo.reset()
        return plain(torch.compile(fused, dynamic=False))

    contest(
        benchmark,
        [
            Contender("t2i VectorQuantizer", ours, ours=True),
            Contender("torch, chunks of 512", lambda: plain(chunked)),
            Contender("torch, compiled", compiled),
        ],
        gate=lambda indices: None if len(indices) == n else "wrong shape",
        flops=2 * n * codes * dim,
        case={"op": "VectorQuantizer step", "vectors": n, "codes": codes, "dim": dim,
              "data": "realistic", "path": "cpu", "peaks": peaks},
    )  # fmt: skip
