"""The tokens of a dataset's pictures, computed once and mapped into memory.

A folder: ``tokens.npy`` uint16 or uint32 [N, views, T], ``pairs.jsonl`` as in the dataset, and
``tokens.json``, written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from .build import progress_bar
from .dataset import ImageTextDataset, rows_of
from .files import concatenate, finish, read_info, read_jsonl, write_array, write_jsonl

FORMAT_VERSION = 1
MAX_SHIFT = 3  # pixels, of the views behind the first
PART = 1024  # pictures; what an interrupted call may lose


class TokenDataset:
    """Read-only view of a folder that ``tokenize_dataset`` wrote; its checksums are verified.

    ``tokens`` [N, views, T], ``pairs`` (N dicts), ``grid`` (h, w) with T = h·w, ``num_codes``.

    Raises:
        FileNotFoundError: no finished folder at ``path``.
        ValueError: another version, or a file that does not match its checksum.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = read_info(
            self.path, "tokens.json", FORMAT_VERSION, verify=True, maker="t2i tokenize"
        )
        self.tokens = np.load(self.path / "tokens.npy", mmap_mode="r")
        self.pairs = read_jsonl(self.path / "pairs.jsonl")
        self.grid = tuple(self.info["grid"])
        self.num_codes = self.info["num_codes"]

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, split: str | None = None) -> np.ndarray:
        """Indices int64 of the pairs of a split; of all by default."""
        return rows_of(self.pairs, split)


def tokenize_dataset(
    dataset: str | Path,
    tokenizer: torch.nn.Module,
    out: str | Path,
    *,
    views: int = 1,
    flip: bool = False,
    batch_size: int = 64,
    progress: bool = True,
) -> bool:
    """Write the tokens of every picture of a dataset; goes on where an earlier call stopped.

    Args:
        dataset: folder of an ``ImageTextDataset``.
        tokenizer: from ``t2i.tokenizer``.
        out: folder to write.
        views: token sequences a picture. The first is the picture as it is; the others are shifted
            by up to 3 pixels, a fixed way each, the edge repeated. One picture then has several
            spellings, which keeps a language model from learning one by heart.
        flip: the mirror image of each view as well, behind the views. Captions that name a side,
            and pictures of letters, then lie.
        batch_size: pictures encoded together.

    Returns:
        False if ``out`` holds these tokens already.

    Raises:
        ValueError: ``views`` below 1, or pictures whose size the tokenizer does not divide.
        FileExistsError: ``out`` holds a dataset of pictures.
    """
    if views < 1:
        raise ValueError(f"views={views}: expected at least 1")
    data, out = ImageTextDataset(dataset, verify=True), Path(out)
    if data.image_size % tokenizer.downsampling:
        raise ValueError(
            f"{dataset}: pictures of {data.image_size} pixels, the tokenizer needs a multiple of "
            f"{tokenizer.downsampling}"
        )
    if (out / "dataset.json").exists():
        raise FileExistsError(f"{out} holds a dataset of pictures: name another folder")
    side = data.image_size // tokenizer.downsampling
    info = {
        "grid": [side, side],
        "image_size": data.image_size,
        "views": views,
        "flip": flip,
        "num_codes": tokenizer.num_codes,
        "tokenizer_sha256": encoder_checksum(tokenizer),
        "dataset_sha256": data.checksum,
        "sources": data.info.get("sources", []),
    }
    with contextlib.suppress(FileNotFoundError, ValueError):
        old = read_info(out, "tokens.json", FORMAT_VERSION, verify=True)
        pairs = data.info["sha256"]["pairs.jsonl"]
        if {**old, **info} == old and old["sha256"]["pairs.jsonl"] == pairs:
            return False
    # A part belongs to one tokenizer and one dataset; others start anew.
    parts = out / f"parts-{info['tokenizer_sha256'][:12]}-{data.checksum[:12]}-{views}{'f' * flip}"
    parts.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if tokenizer.num_codes <= 1 << 16 else np.uint32
    tokens = []
    with progress_bar(progress, "tokens", len(data)) as advance:
        for start in range(0, len(data), PART):
            rows = range(start, min(start + PART, len(data)))
            file = parts / f"{start:08d}.npy"
            if not file.exists():
                write_array(file, _encode(data, rows, tokenizer, views, flip, batch_size, dtype))
            tokens.append(np.load(file, mmap_mode="r"))
            advance(len(rows))
    (out / "tokens.json").unlink(missing_ok=True)
    concatenate(out / "tokens.npy", tokens)
    write_jsonl(out / "pairs.jsonl", data.pairs)
    finish(out, "tokens.json", info, ["tokens.npy", "pairs.jsonl"], FORMAT_VERSION)
    for leftover in out.glob("parts-*"):
        shutil.rmtree(leftover)
    return True


def encoder_checksum(tokenizer: torch.nn.Module) -> str:
    """SHA-256 of what gives a tokenizer's codes their meaning: all weights but the decoder's."""
    return weights_checksum(tokenizer, without=getattr(tokenizer, "decoder_parts", ()))


def weights_checksum(module: torch.nn.Module, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of a module's parameters and buffers, but for names that start like one of
    ``without``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(without):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _encode(data, rows, tokenizer, views, flip, batch_size, dtype) -> np.ndarray:
    """Tokens [rows, views, T]."""
    device = next(tokenizer.parameters()).device
    sequences = []
    for mirrored in (False, True)[: 1 + flip]:
        for view in range(views):
            codes = []
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                images = np.stack([shifted(data.images[row], row, view) for row in batch])
                images = images[:, :, ::-1].copy() if mirrored else images
                pixels = to_float(torch.from_numpy(images).to(device))
                codes.append(tokenizer.encode(pixels).flatten(1).cpu().numpy())
            sequences.append(np.concatenate(codes))
    return np.stack(sequences, axis=1).astype(dtype)


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
