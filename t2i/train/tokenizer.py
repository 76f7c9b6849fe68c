"""Training of an image tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from t2i.data import ImageTextDataset
from t2i.data.tokens import to_float
from t2i.grid import draw_grid, save_image
from t2i.tokenizer import build_tokenizer, save_tokenizer

from .config import TokenizerConfig
from .data import Order
from .loop import Metrics, Trainer, mixed_precision, start
from .perceptual import PerceptualLoss

PICTURES = 16  # held-out ones on a sample sheet
BATCH = 64  # of evaluation


def train_tokenizer(config: TokenizerConfig, *, resume: bool = False) -> bool:
    """Train ``config.model`` on the train split; writes the averaged weights to ``config.out``.

    Loss: mean squared error, the quantizer's own, and in the last part of the run a perceptual
    term: it costs a third of a step and sharpens what is already in place.

    Returns:
        True if the run reached its last step.

    Raises:
        FileExistsError: the run exists and ``resume`` is not asked for.
        FileNotFoundError: no dataset, or nothing to resume.
    """
    device = start(config)
    train = ImageTextDataset(config.data, "train")
    held_out = ImageTextDataset(config.data, "unseen_labels")
    model = build_tokenizer(config.model).to(device, memory_format=torch.channels_last)
    trainer = Trainer(config, model)
    begin(trainer, resume)
    order = Order(len(train), config.batch_size, config.seed)
    perceptual_from = int(config.perceptual_from * config.steps)
    # Loaded at the start: a package that cannot be fetched should not end a run in its last hour.
    perceptual = PerceptualLoss().to(device) if config.perceptual_weight > 0 else None

    def loss(step: int) -> dict[str, Tensor]:
        images = np.stack([train[i][0] for i in order.batch(step)])
        images = augment(images, order.rng(step), flip=config.flip, shift=config.shift)
        pixels = to_float(torch.from_numpy(images).to(device))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with mixed_precision(device):
            reconstruction, vq = model.train()(pixels)
            squared = F.mse_loss(reconstruction.float(), pixels)
            total = squared + vq.loss
            values = {"mse": squared.detach(), "vq": vq.loss.detach()}
            if perceptual is not None and step >= perceptual_from:
                distance = perceptual(reconstruction.float(), pixels)
                total = total + config.perceptual_weight * distance
                values["perceptual"] = distance.detach()
        return {"loss": total, **values}

    def evaluate(ema: nn.Module) -> Metrics:
        seen = np.arange(0, len(train), 10)
        psnr_seen, codes_seen = reconstruct(ema, train, seen, device)
        psnr, codes = reconstruct(ema, held_out, np.arange(len(held_out)), device)
        used = len(np.union1d(codes, codes_seen)) / ema.num_codes
        return {"psnr_train": psnr_seen, "psnr_held_out": psnr, "codebook_usage": used}

    def picture(ema: nn.Module, path: Path) -> None:
        rows = np.linspace(0, len(held_out) - 1, min(PICTURES, len(held_out))).astype(int)
        originals = np.stack([held_out[i][0] for i in rows])
        with torch.no_grad():
            drawn = ema(to_float(torch.from_numpy(originals).to(device)))[0]
        images = [Image.fromarray(image) for image in (*originals, *to_uint8(drawn))]
        save_image(draw_grid(images, columns=len(rows), scale=1), path)

    finished = trainer.fit(loss, evaluate, picture)
    save_tokenizer(trainer.ema, config.out)
    return finished


def begin(trainer: Trainer, resume: bool) -> None:
    """Start a new run, or go on with an old one; never overwrite one by accident."""
    exists = (trainer.out / "checkpoints").exists()
    if resume and not trainer.resume():
        raise FileNotFoundError(f"{trainer.out} holds no checkpoint to resume from")
    if exists and not resume:
        raise FileExistsError(f"{trainer.out} holds a run: add --resume to go on, or name another")


def augment(images: np.ndarray, rng: np.random.Generator, *, flip: float, shift: int) -> np.ndarray:
    """Mirror some of uint8 [B, S, S, 3] and move each by up to ``shift`` pixels."""
    out = np.empty_like(images)
    size = images.shape[1]
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    offsets = rng.integers(0, 2 * shift + 1, size=(len(images), 2))
    mirrored = rng.random(len(images)) < flip
    for i, (top, left) in enumerate(offsets):
        moved = padded[i, top : top + size, left : left + size]
        out[i] = moved[:, ::-1] if mirrored[i] else moved
    return out


@torch.no_grad()
def reconstruct(model, data, rows, device) -> tuple[float, np.ndarray]:
    """(mean PSNR in dB over pictures, the codes in use) of some rows of a dataset."""
    psnr, codes = [], []
    for part in np.array_split(rows, max(1, -(-len(rows) // BATCH))):
        images = to_float(torch.from_numpy(np.stack([data[i][0] for i in part])).to(device))
        reconstruction, vq = model(images)
        # On the scale [0, 1]: the images are in [-1, 1].
        error = ((reconstruction.float().clamp(-1, 1) - images) / 2).square().mean(dim=(1, 2, 3))
        psnr.append(-10 * error.clamp_min(1e-10).log10())
        codes.append(vq.indices.flatten())
    return torch.cat(psnr).mean().item(), torch.cat(codes).unique().cpu().numpy()


def to_uint8(images: Tensor) -> np.ndarray:
    """fp32 [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
