"""vq_nearest in plain PyTorch: exact by construction, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_SCORES = 1 << 22  # of a chunk of vectors against all codes: 32 MB


def vq_nearest(
    z: Tensor, codebook: Tensor, metric: str, return_distance: bool, return_counts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    vectors, codes = z.reshape(-1, z.shape[-1]).double(), codebook.double()
    for name, values in (("z", vectors), ("codebook", codes)):
        if not values.isfinite().all():
            raise RuntimeError(
                f"vq_nearest: {name} holds NaN or infinite values: no distance is defined"
            )
    if metric == "cosine":
        vectors, codes = _unit(vectors), _unit(codes)
    chunks = vectors.split(max(1, MAX_SCORES // max(1, len(codes))))
    found = [_nearest(chunk, codes, metric) for chunk in chunks]
    indices = torch.cat([indices for indices, _ in found])
    distance = counts = None
    if return_distance:
        distance = torch.cat([distance for _, distance in found]).float().view(z.shape[:-1])
    if return_counts:
        counts = torch.bincount(indices, minlength=len(codes))
    return (
        indices.view(z.shape[:-1]),
        z.new_empty(0, dtype=torch.float32) if distance is None else distance,
        indices.new_empty(0) if counts is None else counts,
    )


def _nearest(vectors: Tensor, codes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """(indices int64 [n], distance fp64 [n]) of vectors [n, d] in codes [K, d].

    |z − c|² orders codes as |c|² − 2 z·c does, up to the rounding of a dot product of d terms
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). All codes within that
    bound of the best are measured again, term by term.
    """
    if not len(vectors):
        return vectors.new_empty(0, dtype=torch.int64), vectors.new_empty(0)
    norms = codes.square().sum(dim=1)
    offset = norms if metric == "l2" else torch.zeros_like(norms)
    scores = torch.addmm(offset, vectors, codes.T, alpha=-2)
    terms = codes.shape[1] + 2
    magnitude = vectors.square().sum(dim=1, keepdim=True) + norms.max()
    bound = terms * torch.finfo(torch.float64).eps * magnitude
    near = scores <= scores.amin(dim=1, keepdim=True) + 4 * bound
    row, code = near.nonzero(as_tuple=True)
    a, b = vectors[row], codes[code]
    exact = (a - b).square().sum(dim=1) if metric == "l2" else 2 - 2 * (a * b).sum(dim=1)
    distance = exact.new_full((len(vectors),), torch.inf).scatter_reduce_(0, row, exact, "amin")
    best = exact == distance[row]
    lowest = code.new_full((len(vectors),), len(codes))
    lowest.scatter_reduce_(0, row[best], code[best], "amin")
    return lowest, distance


def _unit(vectors: Tensor) -> Tensor:
    """Rows at length 1; a zero row stays zero, so its cosine with all others is 0."""
    # Scaled by the largest entry first: the square of a subnormal fp32 number is fine in fp64, that
    # of a subnormal fp64 one is not.
    largest = vectors.abs().amax(dim=-1, keepdim=True) if vectors.shape[-1] else vectors
    vectors = vectors / torch.where(largest > 0, largest, 1)
    norm = vectors.square().sum(dim=-1, keepdim=True).sqrt()
    return vectors / torch.where(norm > 0, norm, 1)
