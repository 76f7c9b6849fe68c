"""``t2i eval``: what a model's tokenizer loses, and what its pictures are worth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from t2i.data import SPLITS, ImageTextDataset
from t2i.data.dataset import rows_of, unit_hash
from t2i.data.files import write_array, write_json
from t2i.data.tokens import to_float, weights_checksum
from t2i.grid import draw_grid, save_image

from .alignment import RidgeAlignment
from .copies import CopyCheck
from .features import SIDE, Features, cached_features, load_features
from .metrics import codebook_use, frechet_distance, kernel_distance, psnr, ssim

CHUNK = 64  # pictures drawn or reconstructed together
SHOWN = 8  # prompts a split in the picture

# One picture for each caption, from the seed beside it.
Generate = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
# Nats a token for the codes int64 [N, h, w] of pictures with these captions: [N].
Loss = Callable[[Sequence[str], Tensor], Tensor]


def evaluate_model(
    generate: Generate,
    tokenizer: torch.nn.Module,
    dataset: str | Path,
    out: str | Path,
    *,
    prompts: int = 300,
    seed: int = 0,
    loss: Loss | None = None,
    settings: dict[str, Any] | None = None,
    features: Features | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score pictures for captions of each split; writes ``eval.json`` and ``eval.png``.

    Beside the samples stand the reconstructions of the real pictures of the same captions, the best
    that a model on this tokenizer could draw, and the real pictures themselves. For each:

    - ``top1``, ``top5``, ``top10``: ridge alignment (``alignment.py``), and what chance gives;
    - ``fd_efflite0``, ``kid``, ``kid_std``: distance to the real pictures of all *other* prompts.
      That of the real pictures is what no model needs to beat; the Fréchet distance depends on the
      number of pictures and is comparable only with it;
    - ``near_copies``, ``nearest_cosine``, ``nearest_psnr``: of training pictures (``copies.py``);
      a real training picture is compared with the others.

    Samples are kept in ``out`` and not drawn again while nothing that they depend on changes.

    Args:
        generate: the model.
        tokenizer: the model's, from ``t2i.tokenizer``.
        dataset: folder of an ``ImageTextDataset``.
        out: folder to write.
        prompts: captions a split, picked by a hash; fewer where it has fewer.
        seed: of the first picture; the next has the next one.
        loss: the model's, of real pictures; adds ``perplexity``, the exponential of its mean over
            those that are chosen.
        settings: what else ``generate`` depends on: options, a checksum of the weights. JSON.
        features: those to judge by; by default the ones of the packages.

    Returns:
        What ``eval.json`` holds.

    Raises:
        ValueError: ``prompts`` below 2, nothing in train, or a split with one picture. Splits
            without any are left out.
        ImportError, RuntimeError: the default features cannot be had.
    """
    if prompts < 2:
        raise ValueError(f"prompts={prompts}: expected at least 2")
    data, out = ImageTextDataset(dataset, verify=True), Path(out)
    splits = [split for split in SPLITS if len(rows_of(data.pairs, split))]
    chosen = {split: _choose(data, split, prompts) for split in splits}
    if "train" not in chosen:
        raise ValueError(f"{data.path}: no picture in train")
    if features is None:
        features = load_features(progress=progress)
        name = f"efficientnet-lite0 {SIDE} {data.checksum}"
        real = cached_features(name, lambda: features.images(data.images))
    else:
        real = features.images(data.images)
    out.mkdir(parents=True, exist_ok=True)

    def sample(split: str) -> np.ndarray:
        captions = [data.pairs[row]["caption"] for row in chosen[split]]
        seeds = list(range(seed, seed + len(captions)))
        inputs = [settings, weights_checksum(tokenizer), captions, seeds]
        return _samples(generate, captions, seeds, out / f"samples-{_key(inputs)}")

    samples = {split: sample(split) for split in splits}
    rebuilt, codes = reconstruct(tokenizer, data.images, progress=progress)

    alignment = RidgeAlignment(data.pairs, real, features.texts)
    train = rows_of(data.pairs, "train")
    calibration = chosen["train"]
    copies = CopyCheck(
        _pixels(data.images[train]),
        real[train],
        _pixels(rebuilt[calibration]),
        features.images(rebuilt[calibration]),
    )
    place = np.full(len(data.pairs), -1)  # of a row among the training pictures
    place[train] = np.arange(len(train))

    scores = {}
    for split, rows in chosen.items():
        others = np.setdiff1d(np.arange(len(data.pairs)), rows)
        kinds = {
            "samples": (samples[split], features.images(samples[split])),
            "reconstructions": (rebuilt[rows], features.images(rebuilt[rows])),
            "real": (data.images[rows], real[rows]),
        }
        scores[split] = {"prompts": len(rows)}
        if loss is not None:
            captions = [data.pairs[row]["caption"] for row in rows]
            scores[split]["perplexity"] = loss(captions, codes[rows]).mean().exp().item()
        for kind, (images, found) in kinds.items():
            kid, kid_std = kernel_distance(found, real[others])
            own = torch.from_numpy(place[rows]) if kind == "real" else None
            scores[split][kind] = {
                **alignment(torch.from_numpy(rows), found),
                "fd_efflite0": frechet_distance(found, real[others]),
                "kid": kid,
                "kid_std": kid_std,
                **copies(_pixels(images), found, own),
            }
    result = {
        "dataset": {"name": data.info["name"], "sha256": data.checksum},
        "settings": {"prompts": prompts, "seed": seed, **(settings or {})},
        "reconstruction": _reconstruction_quality(tokenizer, data, rebuilt, codes),
        "ridge_alignment": {"candidates": alignment.candidates, "chance": alignment.chance()},
        "near_copy": {"cosine": copies.cosine, "psnr": copies.psnr},
        "splits": scores,
    }
    write_json(out / "eval.json", result)
    save_image(_sheet(data, chosen, samples), out / "eval.png")
    return result


@torch.no_grad()
def reconstruct(
    tokenizer: torch.nn.Module, images: np.ndarray, *, progress: bool = False
) -> tuple[np.ndarray, Tensor]:
    """(uint8 [N, S, S, 3], codes int64 [N, h, w]) of pictures through the tokenizer and back."""
    from rich.console import Console
    from rich.progress import track

    device = next(tokenizer.parameters()).device
    drawn, codes = np.empty_like(images), []
    starts = range(0, len(images), CHUNK)
    bar = {"console": Console(stderr=True), "disable": not progress, "transient": True}
    for start in track(starts, "reconstructions", **bar):
        part = slice(start, start + CHUNK)
        found = tokenizer.encode(_pixels(images[part]).to(device))
        pixels = (tokenizer.decode(found).clamp(-1, 1) + 1) * 127.5
        drawn[part] = pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        codes.append(found.cpu())
    return drawn, torch.cat(codes)


def summary(result: dict[str, Any]) -> str:
    """The numbers that matter most, as two Markdown tables."""
    lines = ["| pictures of | PSNR, dB | SSIM | codes in use |", "|---|---|---|---|"]
    for split, row in result["reconstruction"].items():
        lines.append(f"| {split} | {row['psnr']:.2f} | {row['ssim']:.3f} | {row['usage']:.1%} |")
    lines += [
        "",
        "| captions | pictures | found first | within ten | FD-EffLite0 | KID | near copies |",
        "|---|---|---|---|---|---|---|",
    ]
    for split, scores in result["splits"].items():
        for kind in ("samples", "reconstructions", "real"):
            row = scores[kind]
            lines.append(
                f"| {split} | {kind} | {row['top1']:.1%} | {row['top10']:.1%} | "
                f"{row['fd_efflite0']:.1f} | {row['kid']:.4f} | {row['near_copies']:.1%} |"
            )
    perplexity = {k: v["perplexity"] for k, v in result["splits"].items() if "perplexity" in v}
    chance = result["ridge_alignment"]["chance"]
    lines.append(f"| | chance | {chance['top1']:.1%} | {chance['top10']:.1%} | | | |")
    if perplexity:
        each = ", ".join(f"{split} {value:.2f}" for split, value in perplexity.items())
        lines += ["", f"Perplexity of the tokens of real pictures: {each}."]
    lines += [
        "",
        "Found: ridge alignment. All but PSNR and SSIM is judged by features of EfficientNet-Lite0,"
        " the network of the perceptual loss: a tokenizer trained with it has seen its judge.",
    ]
    return "\n".join(lines)


def _choose(data: ImageTextDataset, split: str, prompts: int) -> np.ndarray:
    """Rows of a split that look random and stay the same when ``prompts`` grows."""
    rows = rows_of(data.pairs, split)
    if len(rows) < 2:
        raise ValueError(f"{data.path}: {len(rows)} pictures in {split}, expected at least 2")
    by_hash = sorted(rows, key=lambda row: unit_hash(f"eval {data.pairs[row]['caption']} {row}"))
    return np.array(by_hash[:prompts])


def _samples(
    generate: Generate, captions: Sequence[str], seeds: Sequence[int], folder: Path
) -> np.ndarray:
    """uint8 [N, S, S, 3]; drawn in chunks, of which those in ``folder`` are read."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in range(0, len(captions), CHUNK):
        file = folder / f"{start:06d}.npy"
        if not file.exists():
            images = generate(captions[start : start + CHUNK], seeds[start : start + CHUNK])
            write_array(file, np.stack([np.asarray(image.convert("RGB")) for image in images]))
        chunks.append(np.load(file))
    return np.concatenate(chunks)


def _reconstruction_quality(tokenizer, data, rebuilt: np.ndarray, codes: Tensor) -> dict[str, Any]:
    """Mean PSNR and SSIM, and use of the codebook, for each split and for all."""
    noise, structure = [], []
    for start in range(0, len(rebuilt), CHUNK):
        part = slice(start, start + CHUNK)
        pair = _pixels(rebuilt[part]), _pixels(data.images[part])
        noise.append(psnr(*pair))
        structure.append(ssim(*pair))
    noise, structure = torch.cat(noise), torch.cat(structure)
    quality = {}
    for split in (*SPLITS, None):
        rows = torch.from_numpy(rows_of(data.pairs, split))
        if not len(rows):
            continue
        quality[split or "all"] = {
            "pictures": len(rows),
            "psnr": noise[rows].mean().item(),
            "ssim": structure[rows].mean().item(),
            **codebook_use(codes[rows], tokenizer.num_codes),
        }
    return quality


def _sheet(data, chosen: dict[str, np.ndarray], samples: dict[str, np.ndarray]) -> Image.Image:
    """For some captions of each split, what was drawn above what is real."""
    titles, grids = [], []
    for split, rows in chosen.items():
        shown = rows[:SHOWN]
        drawn = [Image.fromarray(image) for image in samples[split][: len(shown)]]
        real = [Image.fromarray(data.images[row]) for row in shown]
        captions = [data.pairs[row]["caption"] for row in shown] + ["(real)"] * len(shown)
        titles.append(f"captions of the split {split}: drawn above, real below")
        grids.append(draw_grid([*drawn, *real], captions, columns=len(shown)))
    font, bar = ImageFont.load_default(16), 28
    width = max(grid.width for grid in grids)
    sheet = Image.new("RGB", (width, sum(grid.height + bar for grid in grids)), "white")
    top = 0
    for title, grid in zip(titles, grids, strict=True):
        ImageDraw.Draw(sheet).text((6, top + bar - 4), title, "black", font, anchor="ls")
        sheet.paste(grid, (0, top + bar))
        top += bar + grid.height
    return sheet


def _pixels(images: np.ndarray) -> Tensor:
    return to_float(torch.from_numpy(np.array(images)))


def _key(inputs: object) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
