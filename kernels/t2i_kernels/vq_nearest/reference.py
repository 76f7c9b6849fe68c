"""vq_nearest in plain PyTorch: exact by construction, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ELEMENTS = 1 << 22  # of a chunk of vectors beside all codes: 32 MB


def vq_nearest(
    z: Tensor, codebook: Tensor, metric: str, return_distance: bool, return_counts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = z.reshape(z.shape[:-1].numel(), z.shape[-1]).double()
    codes = codebook.double()
    check_finite("z", vectors)
    check_finite("codebook", codes)
    if metric == "cosine":
        vectors, codes = _unit(vectors), _unit(codes)
    # Where all codes are equally near, each pair of a chunk is measured at all d terms.
    chunks = vectors.split(max(1, MAX_ELEMENTS // max(1, codes.numel())))
    found = [_nearest(chunk, codes, metric) for chunk in chunks]
    indices = torch.cat([indices for indices, _ in found])
    distance = z.new_empty(0, dtype=torch.float32)
    counts = indices.new_empty(0)
    if return_distance:
        distance = torch.cat([distance for _, distance in found]).float().view(z.shape[:-1])
    if return_counts:
        counts = torch.bincount(indices, minlength=len(codes))
    return indices.view(z.shape[:-1]), distance, counts


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
    far = scores > scores.amin(dim=1, keepdim=True) + 4 * bound  # false where fp64 overflows
    row, code = (~far).nonzero(as_tuple=True)
    a, b = vectors[row], codes[code]
    exact = (a - b).square().sum(dim=1) if metric == "l2" else 2 - 2 * (a * b).sum(dim=1)
    exact = exact.clamp_min(0)  # 2 − 2 cos of the same direction may round below
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


def check_finite(name: str, vectors: Tensor) -> None:
    finite = vectors.isfinite().all(dim=-1)
    if not finite.all():
        row = int(finite.int().argmin())
        raise ValueError(
            f"vq_nearest: {name} holds NaN or infinite values, in row {row} of {len(vectors)}: "
            "no distance is defined"
        )
