"""The tokens of a dataset's pictures, computed once and mapped into memory.

A folder: ``tokens.npy`` uint16 or uint32 [N, views, T], ``pairs.jsonl`` as in the dataset, and
``tokens.json``, written last.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from .dataset import ImageTextDataset
from .files import finish, read_info, read_jsonl, write_array, write_jsonl

FORMAT_VERSION = 1
MAX_SHIFT = 3  # pixels, of the views behind the first


class TokenDataset:
    """Read-only view of a folder that ``tokenize_dataset`` wrote; its checksums are verified.

    ``tokens`` [N, views, T], ``pairs`` (N dicts), ``grid`` (h, w) with T = h·w, ``num_codes``.

    Raises:
        FileNotFoundError: no finished folder at ``path``.
        ValueError: another version, or a file that does not match its checksum.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = read_info(self.path, "tokens.json", FORMAT_VERSION, verify=True)
        self.tokens = np.load(self.path / "tokens.npy", mmap_mode="r")
        self.pairs = read_jsonl(self.path / "pairs.jsonl")
        self.grid = tuple(self.info["grid"])
        self.num_codes = self.info["num_codes"]

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, split: str) -> np.ndarray:
        """Indices of the pairs of a split."""
        return np.array([i for i, p in enumerate(self.pairs) if p["split"] == split], np.int64)


def tokenize_dataset(
    dataset: str | Path,
    tokenizer: torch.nn.Module,
    out: str | Path,
    *,
    views: int = 1,
    batch_size: int = 64,
    progress: bool = True,
) -> None:
    """Write the tokens of every picture of a dataset; goes on where an earlier call stopped.

    Args:
        dataset: folder of an ``ImageTextDataset``.
        tokenizer: from ``t2i.tokenizer``.
        out: folder to write.
        views: token sequences a picture. The first is the picture as it is; the others are shifted
            by up to 3 pixels, a fixed way each, the edge repeated. One picture then has several
            spellings, which keeps a language model from learning one by heart.
        batch_size: pictures encoded together.

    Raises:
        ValueError: ``views`` below 1, or pictures whose size the tokenizer does not divide.
    """
    if views < 1:
        raise ValueError(f"views={views}: expected at least 1")
    data, out = ImageTextDataset(dataset), Path(out)
    checksum = tokenizer_checksum(tokenizer)
    # A part belongs to one tokenizer and one dataset; others start anew.
    parts = out / f"parts-{checksum[:12]}-{data.checksum[:12]}"
    parts.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if tokenizer.num_codes <= 1 << 16 else np.uint32
    for view in range(views):
        file = parts / f"{view}.npy"
        if not file.exists():
            write_array(file, _encode(data, tokenizer, view, batch_size, progress).astype(dtype))
    write_array(
        out / "tokens.npy", np.stack([np.load(parts / f"{v}.npy") for v in range(views)], 1)
    )
    write_jsonl(out / "pairs.jsonl", data.pairs)
    side = data.image_size // tokenizer.downsampling
    info = {
        "grid": [side, side],
        "image_size": data.image_size,
        "views": views,
        "num_codes": tokenizer.num_codes,
        "tokenizer_sha256": checksum,
        "dataset_sha256": data.checksum,
    }
    finish(out, "tokens.json", info, ["tokens.npy", "pairs.jsonl"], FORMAT_VERSION)
    shutil.rmtree(parts)


def tokenizer_checksum(tokenizer: torch.nn.Module) -> str:
    """SHA-256 of a tokenizer's parameters and codebook."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _encode(data, tokenizer, view, batch_size, progress) -> np.ndarray:
    from rich.progress import track

    device = next(tokenizer.parameters()).device
    codes = []
    starts = range(0, len(data.pairs), batch_size)
    for start in track(starts, f"view {view}", disable=not progress, transient=True):
        rows = range(start, min(start + batch_size, len(data.pairs)))
        images = np.stack([shifted(data.images[row], row, view) for row in rows])
        pixels = to_float(torch.from_numpy(images).to(device))
        codes.append(tokenizer.encode(pixels).flatten(1).cpu().numpy())
    return np.concatenate(codes)


def shifted(image: np.ndarray, row: int, view: int) -> np.ndarray:
    """View ``view`` of picture ``row``: moved by a fixed draw of up to MAX_SHIFT pixels."""
    if view == 0:
        return image
    dy, dx = np.random.default_rng([row, view]).integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2)
    padded = np.pad(image, ((MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)), mode="edge")
    top, left = MAX_SHIFT + dy, MAX_SHIFT + dx
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
