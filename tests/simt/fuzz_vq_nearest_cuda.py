"""Random problems for vq_nearest of csrc/cuda, run by csrc/simt, until enough vectors were checked
against the native operator, and where the two differ against fp64.

    python tests/simt/fuzz_vq_nearest_cuda.py --queries 10000000 --seed 0

Prints what is wrong, with the seed that makes it again; exits with 1 if anything is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1]),
             str(Path(__file__).parents[1] / "kernels")]  # fmt: skip
import fuzz_vq_nearest as problems  # noqa: E402
from test_vq_nearest_cuda import run  # noqa: E402

import build  # noqa: E402
from t2i_kernels import vq_nearest  # noqa: E402

DIMS = (1, 2, 3, 4, 4, 4, 5, 8, 8, 8, 16, 32, 64, 128)
MOST_PRODUCTS = 3e8  # N · padded K · depth of a problem, about
MAX_VECTORS = 200_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    options = parser.parse_args()
    module = build.build(checked=False)
    done, scores, spent, failures, seed = 0, 0, 0.0, 0, options.seed
    kinds, began = Counter(), time.monotonic()

    def summary() -> str:
        return (f"{done:,} queries, {scores:.3g} scores, {scores / max(spent, 1e-9):.3g} a second, "
                f"{failures} wrong; next seed {seed}")  # fmt: skip

    while done < options.queries and time.monotonic() - began < options.seconds:
        torch.manual_seed(seed)
        dim = DIMS[int(torch.randint(len(DIMS), ()))]
        codes = int(2 ** (12 * torch.rand(())))
        products = MOST_PRODUCTS * torch.rand(()) / (max(codes, 256) * (dim + 4))
        n = max(1, int(min(MAX_VECTORS, products)))
        kind = problems.KINDS[int(torch.randint(len(problems.KINDS), ()))]
        metric = ("l2", "cosine")[int(torch.rand(()) < 0.3)]
        dtype = (torch.float32, torch.bfloat16, torch.float16)[int(6 * torch.rand(())) // 4]
        if kind in problems.TIED:  # all codes are measured, and judged one by one
            n = min(n, 200)
        z, codebook = kind(n, codes, dim)
        if dtype != torch.float32 and kind.__name__ in ("near_codes", "gaussian", "clustered"):
            z, codebook = z.to(dtype), codebook.to(dtype)
        distance = bool(seed % 2)
        start = time.perf_counter()
        found, _, counts, invalid = run(module, z[None], codebook, metric, distance)
        spent += time.perf_counter() - start
        assert invalid == [-1, -1] and torch.equal(counts, torch.bincount(found, minlength=codes))
        doubtful = found != vq_nearest(z, codebook, metric, backend="cpu")
        if doubtful.any():
            count = problems.wrong(z[doubtful], codebook, metric, found[doubtful])
            failures += count
            if count:
                print(f"seed {seed}: {count} of {n} wrong: {kind.__name__}, K {codes}, d {dim}, "
                      f"{metric}, {z.dtype}", flush=True)  # fmt: skip
        done, scores = done + n, scores + n * codes
        kinds[kind.__name__] += n
        seed += 1
    print(summary(), dict(kinds))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
