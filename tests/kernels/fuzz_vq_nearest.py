"""Random problems for vq_nearest until enough vectors were checked against fp64.

    python tests/kernels/fuzz_vq_nearest.py --vectors 10000000 --seed 0
    TRITON_INTERPRET=1 python tests/kernels/fuzz_vq_nearest.py --backend triton --vectors 1000000 \
        --codes 256

Prints what is wrong, with the seed that makes it again; exits with 1 if anything is.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from t2i_kernels import native, vq_nearest

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import oracle  # noqa: E402
import test_vq_nearest_native as tests  # noqa: E402

DIMS = (1, 2, 3, 4, 5, 8, 12, 16, 17, 32, 64, 128, 512)
PRODUCTS = {"cpu": 3e8, "triton": 3e7}  # N · K · d of a problem, about
MAX_VECTORS = 50_000


def near_codes(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """As encoders make them once they are trained."""
    codes = torch.randn(k, d)
    return codes[torch.randint(k, (n,))] + 0.1 * torch.randn(n, d), codes


TIED = (tests.duplicated, tests.lattice, tests.identical, tests.zeros, tests.orthant, tests.distant)
KINDS = (near_codes, *tests.KINDS, *(kind for kind in TIED if kind not in tests.KINDS))


def wrong(z: Tensor, codebook: Tensor, metric: str, found: Tensor) -> int:
    """Vectors whose code is not the nearest, or not the first of equals. A product in fp64, of
    points around the codebook's mean, leaves few candidates for the oracle."""
    points, codes = z.double(), codebook.double()
    if metric == "cosine":  # a zero vector has cosine 0 with every other
        points, codes = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-300) for x in (points, codes))
        scores, slack = -points @ codes.T, 1e-11
    else:
        centre = codes.mean(0)
        points, codes = points - centre, codes - centre
        scale = torch.maximum(codes.abs().max(), points.abs().max()).clamp_min(1e-300)
        points, codes = points / scale, codes / scale
        scores = torch.addmm(codes.square().sum(1), points, codes.T, alpha=-2)
        slack = 1e-11 * (1 + points.square().sum(1, keepdim=True)) * codes.shape[1]
    candidates = scores <= scores.amin(1, keepdim=True) + slack
    bad = ~candidates.gather(1, found[:, None])[:, 0]
    several = (candidates.sum(1) > 1).nonzero()[:, 0]
    for row in several.tolist():
        columns = candidates[row].nonzero()[:, 0]
        distance, bound = oracle.distances(z[row : row + 1], codebook[columns], metric)
        near = distance[0] <= distance.min() + bound[0, 0]
        mine = columns == found[row]
        bad[row] |= not bool((near & mine).any())
        if near.sum() == 1 or bool(
            (distance[0][near] == distance.min()).all()
            and metric == "l2"
            and exact_in_fp64(z[row], codebook[columns])
        ):
            bad[row] |= int(found[row]) != int(columns[distance[0].argmin()])
    return int(bad.sum())


def exact_in_fp64(z: Tensor, codes: Tensor) -> bool:
    """Whether squares of differences are sums of few bits: of halves up to 2^10."""
    values = torch.cat([z[None], codes]) * 2
    return bool((values == values.round()).all() and values.abs().max() < 2**10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--codes", type=int, default=2**18, help="of a problem, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=PRODUCTS, default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native_ones = options.backend == "cpu"
    capabilities = native.cpu_capabilities() if native_ones else [options.backend]
    done, failures, seed, kinds = 0, 0, options.seed, Counter()

    def summary() -> str:
        return f"{done:,} vectors in {seed - options.seed} problems, {failures} wrong"

    while done < options.vectors:
        torch.manual_seed(seed)
        dim = DIMS[int(torch.randint(len(DIMS), ()))]
        codes = int(2 ** (math.log2(options.codes) * torch.rand(()) ** (1.5 if dim <= 16 else 2)))
        products = PRODUCTS[options.backend]
        n = max(1, int(min(MAX_VECTORS, products / (codes * (dim + 4))) * torch.rand(())))
        kind = KINDS[int(torch.randint(len(KINDS), ()))]
        metric = ("l2", "cosine")[int(torch.rand(()) < 0.3)]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[int(6 * torch.rand(())) // 4]
        if kind in TIED:
            n = min(n, 200)  # the oracle goes through ties one by one
        z, codebook = kind(n, codes, dim)
        if dtype != torch.float32 and kind in (near_codes, tests.gaussian, tests.clustered):
            z, codebook = z.to(dtype), codebook.to(dtype)
        capability = capabilities[seed % len(capabilities)]
        times = 2 if native_ones else 1  # the second time the codebook is known
        with native.use_cpu_capability(capability) if native_ones else contextlib.nullcontext():
            for _ in range(times):
                found = vq_nearest(z, codebook, metric, backend=options.backend)
                count = wrong(z, codebook, metric, found)
                if count:
                    failures += count
                    print(
                        f"seed {seed}: {count} of {n} wrong: {kind.__name__}, K {codes}, d {dim}, "
                        f"{metric}, {z.dtype}, {capability}",
                        flush=True,
                    )
        done += times * n
        kinds[kind.__name__] += times * n
        seed += 1
        if seed % 100 == 0:
            print(summary(), flush=True)
    print(summary(), dict(kinds))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
