"""A trainable codebook on top of ``vq_nearest``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .vq_nearest import vq_nearest


class VQOutput(NamedTuple):
    """What ``VectorQuantizer`` returns; ``loss`` is already weighted."""

    quantized: Tensor  # [..., d]
    indices: Tensor  # int64 [...]
    loss: Tensor  # scalar


class VectorQuantizer(nn.Module):
    """Replace each vector by its nearest code, and learn the codes (VQ-VAE, arXiv 1711.00937).

    Args:
        num_codes, code_dim: the codebook is [num_codes, code_dim], fp32.
        metric: "l2", or "cosine": vectors and codes are brought to length 1 first (improved VQGAN,
            arXiv 2110.04627).
        update: "ema" moves codes to the running mean of their vectors (arXiv 1711.00937, appendix
            A.1); "gradient" makes the codebook a parameter with a loss of its own.
        gradient: how the encoder gets a gradient through the choice: "straight_through" copies it;
            "rotation" turns and scales it as the vector was (arXiv 2410.06424).
        beta: weight of the commitment term |z − sg(q)|²; the codebook term |sg(z) − q|² has weight
            1. ``legacy_beta`` swaps the weights, as taming-transformers and its descendants do, and
            exists for their checkpoints.
        ema_decay: of the running sums.
        restart_after: a code that no vector chose in that many training batches starts again as a
            vector of the current batch, its running state with it; 0 never. What an optimizer
            keeps about a code is out of reach, and stays.
        usage_window: batches that ``usage`` and ``perplexity`` look back on, at least; at most
            twice as many.

    All state is in buffers, so a checkpoint continues to the bit. Under ``torch.distributed`` ranks
    that start with the same codebook keep the same, learned from the vectors of all, at the cost of
    one all-reduce a training batch.

    Raises:
        ValueError: an option outside its choices.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        metric: str = "l2",
        update: str = "ema",
        gradient: str = "straight_through",
        beta: float = 0.25,
        legacy_beta: bool = False,
        ema_decay: float = 0.99,
        restart_after: int = 0,
        usage_window: int = 100,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("metric", metric, ("l2", "cosine")),
            ("update", update, ("ema", "gradient")),
            ("gradient", gradient, ("straight_through", "rotation")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
        for name, value, least in (
            ("num_codes", num_codes, 1),
            ("code_dim", code_dim, 1),
            ("beta", beta, 0),
            ("restart_after", restart_after, 0),
            ("usage_window", usage_window, 1),
        ):
            if not value >= least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if legacy_beta and update == "ema":
            raise ValueError("legacy_beta: with update='ema' there is no codebook term to swap")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 <= ema_decay < 1, got {ema_decay}")
        self.metric, self.update, self.gradient = metric, update, gradient
        self.beta, self.legacy_beta, self.ema_decay = beta, legacy_beta, ema_decay
        self.restart_after, self.usage_window = restart_after, usage_window

        codebook = torch.empty(num_codes, code_dim)
        nn.init.uniform_(codebook, -1 / num_codes, 1 / num_codes)
        if metric == "cosine":
            codebook = F.normalize(nn.init.normal_(codebook), dim=-1)
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_counts", torch.ones(num_codes))
            self.register_buffer("ema_sums", codebook.clone())
        # Batches since a code was last chosen. An untrained codebook is all stale: the first batch
        # re-seeds what it does not choose.
        self.register_buffer("stale", torch.full((num_codes,), restart_after, dtype=torch.int32))
        # Two windows of counts, the running one first, so that metrics never start from nothing.
        self.register_buffer("window_counts", torch.zeros(2, num_codes, dtype=torch.int64))
        self.register_buffer("window_batches", torch.zeros((), dtype=torch.int64))

    @property
    def num_codes(self) -> int:
        return self.codebook.shape[0]

    @property
    def code_dim(self) -> int:
        return self.codebook.shape[1]

    def forward(self, z: Tensor) -> VQOutput:
        """z [..., d] -> ``VQOutput``; in training mode also learns from z.

        Computed in fp32 whatever the type of z, also under autocast; ``quantized`` has the type of
        z, and its values are those of ``lookup(indices)``.

        Raises:
            TypeError, ValueError: a wrong type or shape; NaN or infinity in z.
        """
        # No operation below is one that autocast lowers.
        found = vq_nearest(z.float(), self.codebook, self.metric, return_counts=True)
        vectors = self._normalize(z.float())
        quantized = self._codes(found.indices)
        loss = self._loss(vectors, quantized)
        carrier = vectors
        if self.gradient == "rotation":
            carrier = rotate_onto(vectors, quantized.detach())
        # The difference is exactly 0: the carrier lends its gradient and no rounding.
        out = quantized.detach() + (carrier - carrier.detach())
        if self.training:
            self._learn(vectors.detach().flatten(0, -2), found.indices, found.counts)
        return VQOutput(out.to(z.dtype), found.indices, loss)

    def encode(self, z: Tensor) -> Tensor:
        """z [..., d] -> indices int64 [...]; learns nothing, also in training mode.

        Raises:
            TypeError, ValueError: as ``forward``.
        """
        return vq_nearest(z.float(), self.codebook, self.metric)

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes of indices int64 [...]: fp32 [..., d], at length 1 for "cosine".

        Raises:
            TypeError: indices of another type.
            IndexError: an index that is not in [0, num_codes).
        """
        if indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices: expected int64, got {indices.dtype}")
        # A look at the values; a compiled graph has the check of the embedding alone.
        if not torch.compiler.is_compiling() and indices.numel():
            low, high = (bound.item() for bound in indices.aminmax())
            if low < 0 or high >= self.num_codes:
                raise IndexError(
                    f"indices: expected 0 to {self.num_codes - 1}, got {low} to {high} in "
                    f"{tuple(indices.shape)}"
                )
        return self._codes(indices)

    def usage(self) -> float:
        """Share of the codes chosen at least once within the window of training batches."""
        return (self.window_counts.sum(dim=0) > 0).double().mean().item()

    def perplexity(self) -> float:
        """exp of the entropy of the choice of codes within the window: ``num_codes`` if even."""
        counts = self.window_counts.sum(dim=0).double()
        p = counts / counts.sum().clamp_min(1)
        return torch.special.entr(p).sum().exp().item()

    def extra_repr(self) -> str:
        return (
            f"{self.num_codes}, {self.code_dim}, metric={self.metric}, update={self.update}, "
            f"gradient={self.gradient}"
        )

    def _codes(self, indices: Tensor) -> Tensor:
        return self._normalize(F.embedding(indices, self.codebook))

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.metric == "cosine" else vectors

    def _loss(self, vectors: Tensor, quantized: Tensor) -> Tensor:
        if not vectors.numel():  # the mean of nothing is NaN
            return vectors.sum() + quantized.sum()
        commitment = F.mse_loss(vectors, quantized.detach())
        if self.update == "ema":
            return self.beta * commitment
        codebook = F.mse_loss(quantized, vectors.detach())
        if self.legacy_beta:
            return commitment + self.beta * codebook
        return codebook + self.beta * commitment

    @torch.no_grad()
    def _learn(self, vectors: Tensor, indices: Tensor, counts: Tensor) -> None:
        sums = seeds = offered = None
        if self.update == "ema":
            sums = torch.zeros_like(self.codebook).index_add_(0, indices.flatten(), vectors)
        if self.restart_after:
            seeds, offered = self._offer_seeds(vectors)
        counts, sums, seeds, offered = _all_reduce(counts, sums, seeds, offered)
        if sums is not None:
            self._move_codes(counts, sums)
        self._record(counts)
        self.stale.copy_(torch.where(counts > 0, 0, self.stale + 1))
        if seeds is not None:
            self._restart(seeds, offered > 0)

    def _move_codes(self, counts: Tensor, sums: Tensor) -> None:
        self.ema_counts.lerp_(counts.to(self.ema_counts.dtype), 1 - self.ema_decay)
        self.ema_sums.lerp_(sums, 1 - self.ema_decay)
        # Counts and sums of a code that nothing chooses decay together: their ratio, the code,
        # stays, until both underflow. Laplace smoothing, the usual guard against 0 / 0, would draw
        # rare codes to the origin.
        alive = self.ema_counts > 1e-20
        means = self.ema_sums / self.ema_counts.clamp_min(1e-20)[:, None]
        self.codebook.copy_(torch.where(alive[:, None], self._normalize(means), self.codebook))

    def _offer_seeds(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(seeds [K, d], 1 where there is one [K]): a vector of the batch for each code, of which
        only dead codes take theirs.

        Ranks take turns over the codes, each draws for its own from its generator, and the rest is
        0: the sum over ranks is the choice. A rank without vectors offers none.
        """
        if not len(vectors):
            return torch.zeros_like(self.codebook), torch.zeros_like(self.codebook[:, 0])
        drawn = torch.randint(len(vectors), (self.num_codes,), device=vectors.device)
        turn = torch.arange(self.num_codes, device=vectors.device) % _world_size() == _rank()
        return torch.where(turn[:, None], vectors[drawn], 0), turn.to(vectors.dtype)

    def _restart(self, seeds: Tensor, offered: Tensor) -> None:
        dead = offered & (self.stale >= self.restart_after)
        self.codebook.copy_(torch.where(dead[:, None], seeds, self.codebook))
        if self.update == "ema":
            self.ema_sums.copy_(torch.where(dead[:, None], seeds, self.ema_sums))
            self.ema_counts.masked_fill_(dead, 1)
        self.stale.masked_fill_(dead, 0)

    def _record(self, counts: Tensor) -> None:
        full = self.window_batches >= self.usage_window
        self.window_counts[1] = torch.where(full, self.window_counts[0], self.window_counts[1])
        self.window_counts[0] = torch.where(full, 0, self.window_counts[0]) + counts
        self.window_batches.copy_(torch.where(full, 0, self.window_batches) + 1)


def rotate_onto(z: Tensor, q: Tensor) -> Tensor:
    """q as a rotation and scaling of z [..., d] that takes part in no gradient (arXiv 2410.06424,
    equation 4): (|q|/|z|)·(I − 2 r rᵀ + 2 q̂ ẑᵀ) z with r the unit vector along ẑ + q̂.

    Where one of the two is zero, or they are opposite, there is no such rotation: the gradient is
    copied straight through instead.
    """
    with torch.no_grad():
        z_norm, q_norm = z.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
        tiny = torch.finfo(z.dtype).tiny
        z_unit, q_unit = z / z_norm.clamp_min(tiny), q / q_norm.clamp_min(tiny)
        r = z_unit + q_unit
        r_norm = r.norm(dim=-1, keepdim=True)
        defined = (z_norm > tiny) & (q_norm > tiny) & (r_norm > 1e-6)
        r = r / r_norm.clamp_min(tiny)
        scale = q_norm / z_norm.clamp_min(tiny)
    along_r, along_z = (r * z).sum(dim=-1, keepdim=True), (z_unit * z).sum(dim=-1, keepdim=True)
    turned = scale * (z - 2 * r * along_r + 2 * q_unit * along_z)
    return torch.where(defined, turned, z + (q - z).detach())


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(*tensors: Tensor | None) -> list[Tensor | None]:
    """The sum over ranks of each tensor, in one fp32 message; None stays None."""
    if _world_size() == 1:
        return list(tensors)
    present = [t for t in tensors if t is not None]
    message = torch.cat([t.flatten().float() for t in present])
    dist.all_reduce(message)
    parts = iter(message.split([t.numel() for t in present]))
    return [None if t is None else next(parts).view_as(t).to(t.dtype) for t in tensors]
