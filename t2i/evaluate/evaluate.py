"""``t2i eval``: what a model's tokenizer loses, and what its pictures are worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i.data import ImageTextDataset
from t2i.data.dataset import SPLITS
from t2i.data.files import write_json
from t2i.data.tokens import to_float
from t2i.grid import draw_grid

from .efficientnet import load_efficientnet
from .features import image_features
from .metrics import (
    Ridge,
    frechet_distance,
    kernel_distance,
    nearest_psnr,
    psnr,
    ssim,
)
from .text_features import text_features

FOLDS = 5  # of the concepts: each is scored by a map that was fit on the other folds
COPY_PSNR = 22.0  # dB to the nearest training picture from which a picture counts as a copy of it
SHOWN = 6  # prompts a split on the sheet
BATCH = 64

Generate = Callable[[Sequence[str], int], list[Image.Image]]  # (captions, seed) -> pictures


@dataclass(frozen=True)
class Prompts:
    """The prompts of a split: rows of the dataset."""

    split: str
    rows: np.ndarray


def evaluate_model(
    generate: Generate,
    tokenizer: torch.nn.Module,
    dataset: str | Path,
    out: str | Path,
    *,
    prompts: int = 300,
    seed: int = 0,
    settings: dict | None = None,
    progress: bool = True,
) -> dict:
    """Score pictures for captions of each split, and write ``eval.json`` and ``eval.png``.

    Beside the samples stand the real pictures of the same captions and their reconstructions by
    ``tokenizer``: what the measures give to the best that this tokenizer could draw.

    Args:
        generate: draws one picture a caption, from a seed.
        tokenizer: image tokenizer of the model.
        dataset: folder of an ``ImageTextDataset`` with labels, styles and tags.
        out: folder to write.
        prompts: captions a split, drawn evenly from it; fewer where it has fewer.
        seed: of the samples.
        settings: how ``generate`` draws; copied into the result.

    Returns:
        What ``eval.json`` holds: for each split and each of "samples", "reconstructions" and
        "real", ``ridge`` (share whose own caption is found first, within five, within ten, by a
        ridge map that never saw the concept; ``candidates`` of them), ``fd_efflite0`` and ``kid``
        to the real pictures of the same captions, and ``copies`` (share within 22 dB of a training
        picture); ``reconstruction`` has PSNR, SSIM and codebook usage.
    """
    data, out = ImageTextDataset(dataset), Path(out)
    network = load_efficientnet()
    real = image_features(network, data.images, title="features of the set", progress=progress)
    judge = _Judge(data, real)
    train_rows = ImageTextDataset(dataset, "train").rows
    train = torch.from_numpy(data.images[train_rows])
    result = {
        "settings": {"prompts": prompts, "seed": seed, **(settings or {})},
        "reconstruction": {},
        "splits": {},
    }
    shown: list[tuple[Image.Image, str]] = []
    for chosen in [_choose(data, dataset, split, prompts) for split in SPLITS]:
        captions = [data.pairs[row]["caption"] for row in chosen.rows]
        pictures = {
            "samples": np.stack([np.asarray(image) for image in generate(captions, seed)]),
            "reconstructions": reconstructions(tokenizer, data.images[chosen.rows]),
            "real": data.images[chosen.rows],
        }
        scores = {}
        for kind, images in pictures.items():
            features = real[chosen.rows]
            if kind != "real":
                features = image_features(network, images, title=kind, progress=progress)
            nearest, _ = nearest_psnr(torch.from_numpy(images), train)
            distance = kernel_distance(features, real[chosen.rows])
            scores[kind] = {
                "ridge": judge(chosen.rows, features),
                "fd_efflite0": frechet_distance(features, real[chosen.rows]),
                "kid": distance.mean,
                "kid_std": distance.std,
                "copies": (nearest >= COPY_PSNR).float().mean().item(),
            }
        result["splits"][chosen.split] = {"prompts": len(captions), **scores}
        result["reconstruction"][chosen.split] = reconstruction_quality(
            tokenizer, data, ImageTextDataset(dataset, chosen.split).rows
        )
        step = max(1, len(captions) // SHOWN)
        for i in range(0, min(len(captions), SHOWN * step), step):
            shown.append((Image.fromarray(pictures["samples"][i]), captions[i]))
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "eval.json", result)
    images, captions = zip(*shown, strict=True)
    draw_grid(images, captions, columns=SHOWN).save(out / "eval.png")
    return result


class _Judge:
    """Ridge alignment with every concept scored by a map that was fit without it."""

    def __init__(self, data: ImageTextDataset, features: Tensor) -> None:
        self.concepts = [pair["base"] for pair in data.pairs]
        self.names = sorted(set(self.concepts))
        described = {}
        for pair in data.pairs:
            described.setdefault(pair["base"], f"{pair['base']}: {', '.join(pair['tags'][:5])}")
        self.texts = text_features([described[name] for name in self.names])
        order = np.random.default_rng(0).permutation(len(self.names))
        self.fold = np.empty(len(self.names), dtype=np.int64)
        self.fold[order] = np.arange(len(self.names)) % FOLDS
        index = {name: i for i, name in enumerate(self.names)}
        self.concept = np.array([index[name] for name in self.concepts])
        self.maps = []
        for fold in range(FOLDS):
            fit = self.fold[self.concept] != fold
            self.maps.append(Ridge(features[fit], self.texts[self.concept[fit]]))

    def __call__(self, rows: np.ndarray, features: Tensor) -> dict:
        """Scores of pictures that were drawn for the captions of ``rows``."""
        ranks, candidates = [], []
        for fold in range(FOLDS):
            mine = self.fold[self.concept[rows]] == fold
            names = np.flatnonzero(self.fold == fold)
            answers = np.searchsorted(names, self.concept[rows[mine]])
            if len(answers):
                ranks.append(
                    self.maps[fold].ranks(
                        features[mine], self.texts[names], torch.from_numpy(answers)
                    )
                )
                candidates.append(len(names))
        ranks = torch.cat(ranks)
        within = {f"top{k}": (ranks < k).float().mean().item() for k in (1, 5, 10)}
        return {**within, "candidates": max(candidates)}


def _choose(data: ImageTextDataset, dataset: str | Path, split: str, prompts: int) -> Prompts:
    """Rows spread evenly over a split."""
    rows = ImageTextDataset(dataset, split).rows
    if len(rows) < 2:
        raise ValueError(f"{dataset}: split {split} has {len(rows)} pictures, expected at least 2")
    picked = np.linspace(0, len(rows) - 1, min(prompts, len(rows))).round().astype(np.int64)
    return Prompts(split, rows[picked])


@torch.no_grad()
def reconstructions(tokenizer: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, 3] through the tokenizer and back."""
    drawn = []
    for first in range(0, len(images), BATCH):
        pixels = to_float(torch.from_numpy(np.array(images[first : first + BATCH])))
        decoded = tokenizer.decode(tokenizer.encode(pixels)).clamp(-1, 1)
        drawn.append(((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(drawn)


@torch.no_grad()
def reconstruction_quality(
    tokenizer: torch.nn.Module, data: ImageTextDataset, rows: np.ndarray
) -> dict:
    """Mean PSNR and SSIM of pictures after the tokenizer, and the share of its codes in use."""
    noise, structure, used = [], [], []
    for first in range(0, len(rows), BATCH):
        images = data.images[rows[first : first + BATCH]]
        pixels = to_float(torch.from_numpy(images))
        codes = tokenizer.encode(pixels)
        decoded = tokenizer.decode(codes)
        noise.append(psnr(decoded, pixels))
        structure.append(ssim(decoded, pixels))
        used.append(codes.flatten())
    return {
        "pictures": len(rows),
        "psnr": torch.cat(noise).mean().item(),
        "ssim": torch.cat(structure).mean().item(),
        "codebook_usage": len(torch.cat(used).unique()) / tokenizer.num_codes,
    }


def summary(result: dict) -> str:
    """The numbers of ``evaluate_model`` that matter most, as a Markdown table."""
    lines = [
        "| captions | pictures | found first | within ten | FD-EffLite0 | KID | copies |",
        "|---|---|---|---|---|---|---|",
    ]
    for split, scores in result["splits"].items():
        for kind in ("samples", "reconstructions", "real"):
            row = scores[kind]
            lines.append(
                f"| {split.replace('_', ' ')} | {kind} | {row['ridge']['top1']:.1%} | "
                f"{row['ridge']['top10']:.1%} | {row['fd_efflite0']:.1f} | {row['kid']:.4f} | "
                f"{row['copies']:.1%} |"
            )
    return "\n".join(lines)


def read_result(path: str | Path) -> dict:
    """What ``evaluate_model`` wrote."""
    return json.loads(Path(path).read_text())
