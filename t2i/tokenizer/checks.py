"""What tokenizers ask of their inputs."""

from __future__ import annotations

from torch import Tensor


def check_images(images: Tensor, multiple: int) -> None:
    """Floating [B, 3, H, W] with both sides multiples of ``multiple``.

    Raises:
        TypeError: pixels of an integer type.
        ValueError: another shape.
    """
    if not images.is_floating_point():
        raise TypeError(f"images: expected floating point in [-1, 1], got {images.dtype}")
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] % multiple or shape[3] % multiple:
        raise ValueError(
            f"images: expected [B, 3, H, W] with H and W multiples of {multiple}, got {shape}"
        )


def check_codes(codes: Tensor) -> None:
    """[B, h, w]; ``VectorQuantizer.lookup`` looks at type and values.

    Raises:
        ValueError: another shape.
    """
    if codes.dim() != 3:
        raise ValueError(f"codes: expected [B, h, w], got {tuple(codes.shape)}")
