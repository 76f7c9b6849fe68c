"""Training of an image tokenizer: a VQ autoencoder on the pictures of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from t2i.data import ImageTextDataset
from t2i.data.tokens import to_float
from t2i.grid import draw_grid
from t2i.tokenizer import TOKENIZER_CONFIGS, build_tokenizer, load_tokenizer
from t2i.tokenizer.emoji64 import Emoji64Config
from t2i.tokenizer.vqgan import VQGANConfig

from .adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss
from .config import TokenizerTraining, updated
from .data import DataOrder, augmented, local_batch, spread
from .loop import Outcome, holds_run, load_run, run_task
from .machine import autocast
from .optim import Ema, adamw, apply_gradients, learning_rate, mean_metrics
from .perceptual import PerceptualLoss


def train_tokenizer(config: TokenizerTraining, **options: Any) -> Outcome:
    """Train an image tokenizer as ``config`` says; ``options`` are those of ``loop.train``."""
    return run_task(TokenizerTask, config, **options)


def load_image_tokenizer(path: str | Path, name: str | None = None) -> nn.Module:
    """A tokenizer in fp32 on the CPU: the averaged weights in the newest intact checkpoint of a
    run, or what ``t2i.tokenizer.load_tokenizer`` reads; ``name`` is for that.

    Raises:
        FileNotFoundError: nothing at ``path``.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no image tokenizer at {path}")
    if not holds_run(path):
        return load_tokenizer(path, name)
    checkpoint = load_run(path)
    tokenizer = build_tokenizer(_architecture(updated(TokenizerTraining(), checkpoint.config)))
    tokenizer.load_state_dict(checkpoint.weights["ema"])
    return tokenizer.eval()


class TokenizerTask:
    """The modules, the step and the evaluation of a run; see ``loop.Task``."""

    def __init__(self, config: TokenizerTraining, device: torch.device):
        self.config, self.device = config, device
        self.batch_size = config.optim.batch_size
        data = config.data
        self.images = ImageTextDataset(data.path, verify=True).images
        self.order = DataOrder(ImageTextDataset(data.path, "train").rows, config.run.seed)
        self.splits = {
            "train": spread(self.order.indices, config.evaluation.images),
            "unseen_labels": spread(
                ImageTextDataset(data.path, "unseen_labels").rows, config.evaluation.images
            ),
        }

        # Convolutions are faster on channels-last memory, on the CPU and on the GPU.
        self.tokenizer = _build(config).to(device, memory_format=torch.channels_last)
        self.decoder_alone = config.model.train == "decoder"
        if self.decoder_alone:
            for name, parameter in self.tokenizer.named_parameters():
                parameter.requires_grad_(name.startswith(self.tokenizer.decoder_parts))
        self.ema = Ema(self.tokenizer, config.optim.ema)
        if config.run.compile:
            self.tokenizer.encoder.compile()
            if not config.loss.gan:  # its weight differentiates the decoder twice, see _balance
                self.tokenizer.decoder.compile()
        self.parameters = [p for p in self.tokenizer.parameters() if p.requires_grad]
        self.modules = {"model": self.tokenizer, "ema": self.ema.module}
        self.optimizers = {"model": adamw(self.tokenizer, config.optim)}
        self.perceptual = self.discriminator = None
        if config.loss.perceptual:
            self.perceptual = PerceptualLoss().to(device)
        if config.loss.gan:
            self.discriminator = PatchDiscriminator(config.loss.gan_channels)
            self.discriminator.to(device, memory_format=torch.channels_last)
            self.modules["discriminator"] = self.discriminator
            self.optimizers["discriminator"] = adamw(
                self.discriminator, config.optim, config.loss.gan_lr
            )
            # The layer at which the adversarial loss is balanced: the one that makes pixels.
            convolutions = [m for m in self.tokenizer.decoder.modules() if isinstance(m, nn.Conv2d)]
            self.last_layer = convolutions[-1].weight

    def step(self, step: int, position: int) -> dict[str, Tensor]:
        optim = self.config.optim
        self.tokenizer.train()
        metrics = mean_metrics(
            [self._backward(images, step) for images in self._micro_batches(position)]
        )
        lr = learning_rate(optim, step, self.config.run.steps)
        metrics["grad_norm"] = apply_gradients(
            self.parameters, self.optimizers["model"], lr, optim.grad_clip
        )
        metrics["lr"] = torch.tensor(lr)
        if "discriminator" in metrics:
            apply_gradients(
                list(self.discriminator.parameters()),
                self.optimizers["discriminator"],
                self.config.loss.gan_lr,
                optim.grad_clip,
            )
        self.ema.update(self.tokenizer, step)
        return metrics

    def _micro_batches(self, position: int) -> tuple[Tensor, ...]:
        data, optim = self.config.data, self.config.optim
        samples, generators = local_batch(self.order, position, optim.batch_size)
        images = augmented(self.images[samples], generators, flip=data.flip, shift=data.shift)
        return self._to_float(images).chunk(optim.accumulate)

    def _to_float(self, images: np.ndarray) -> Tensor:
        return to_float(torch.from_numpy(images).to(self.device))

    def _backward(self, images: Tensor, step: int) -> dict[str, Tensor]:
        """Add the gradient of all losses on one micro-batch to the tokenizer's.

        The losses on pixels are differentiated down to the reconstruction first, where their
        gradients are images: the adversarial one is scaled, both are added, and one pass through
        the decoder serves all.
        """
        config = self.config
        share = 1 / config.optim.accumulate
        reconstruction, vq_loss = self._reconstruct(images)
        leaf = reconstruction.detach().float().requires_grad_()
        quality, metrics = self._quality(leaf, images, step)
        (gradient,) = torch.autograd.grad(quality, leaf)
        if self.discriminator is not None and self._reached(config.loss.gan_from, step):
            adversarial = -self.discriminator(leaf).mean()
            (direction,) = torch.autograd.grad(adversarial, leaf)
            weight = config.loss.gan * self._balance(reconstruction, gradient, direction)
            gradient = gradient + weight * direction
            verdict = discriminator_loss(
                self.discriminator(images), self.discriminator(leaf.detach())
            )
            (share * verdict).backward()
            metrics |= {"gan": adversarial, "gan_weight": weight, "discriminator": verdict}
        ends, gradients = [reconstruction], [(share * gradient).to(reconstruction.dtype)]
        if vq_loss is not None:
            metrics["vq"] = vq_loss
            ends.append(vq_loss)
            gradients.append(vq_loss.new_tensor(share))
        torch.autograd.backward(ends, gradients)
        return metrics

    def _reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images as they come back, and the quantizer's own loss if it is trained."""
        precision = autocast(self.device, self.config.run.precision)
        if self.decoder_alone:
            with torch.no_grad():  # and in fp32: the codes that it is going to be given
                codes = self.tokenizer.encode(images)
            with precision:
                return self.tokenizer.decode(codes), None
        with precision:
            reconstruction, vq = self.tokenizer(images)
        return reconstruction, vq.loss

    def _reached(self, share: float, step: int) -> bool:
        return step >= share * self.config.run.steps

    def _quality(self, images: Tensor, target: Tensor, step: int) -> tuple[Tensor, dict]:
        """The weighted loss on pixels and features, and its terms."""
        loss = self.config.loss
        metrics = {"l2": F.mse_loss(images, target)}
        total = loss.l2 * metrics["l2"]
        if loss.l1:
            metrics["l1"] = F.l1_loss(images, target)
            total = total + loss.l1 * metrics["l1"]
        if self.perceptual is not None and self._reached(loss.perceptual_from, step):
            with autocast(self.device, self.config.run.precision):
                metrics["perceptual"] = self.perceptual(images, target)
            total = total + loss.perceptual * metrics["perceptual"]
        return total, metrics

    def _balance(self, reconstruction: Tensor, gradient: Tensor, direction: Tensor) -> Tensor:
        at_last_layer = (
            torch.autograd.grad(
                reconstruction, self.last_layer, g.to(reconstruction.dtype), retain_graph=True
            )[0]
            for g in (gradient, direction)
        )
        return adaptive_weight(*at_last_layer)

    def describe(self, folder: Path) -> None:
        """Nothing: a checkpoint says it all."""

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR (dB) of the averaged weights on images as they are, and the share of codes in use:
        by the images evaluated and, where codes are trained, by the training batches of late."""
        metrics, used = {}, []
        for split, rows in self.splits.items():
            if not len(rows):
                continue
            psnr = []
            for part in np.array_split(rows, -(-len(rows) // 64)):
                images = self._to_float(self.images[part])
                reconstruction, vq = self.ema.module(images)
                error = (reconstruction.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
                psnr.append(10 * torch.log10(4 / error.clamp_min(1e-10)))  # a pixel's range is 2
                used.append(vq.indices.flatten())
            metrics[f"psnr_{split}"] = torch.cat(psnr).mean().item()
        quantizer = self.tokenizer.quantizer
        metrics["codes_evaluated"] = len(torch.cat(used).unique()) / quantizer.num_codes
        if not self.decoder_alone:
            metrics["codes_training"] = quantizer.usage()
            metrics["perplexity_training"] = quantizer.perplexity()
        return metrics

    @torch.no_grad()
    def draw(self) -> Image.Image:
        """Held-out images with their reconstructions below."""
        rows = self.splits["unseen_labels"]
        rows = spread(rows if len(rows) else self.splits["train"], self.config.evaluation.drawn)
        images = self._to_float(self.images[rows])
        reconstruction, _ = self.ema.module(images)
        columns = min(12, len(rows))
        blank = Image.new("RGB", images.shape[:1:-1], "white")
        pictures = []
        for i in range(0, len(rows), columns):
            for line in (images[i : i + columns], reconstruction[i : i + columns]):
                pictures += [*_pictures(line), *[blank] * (columns - len(line))]
        return draw_grid(pictures, columns=columns)


def _build(config: TokenizerTraining) -> nn.Module:
    """The tokenizer, random or pre-trained."""
    model, architecture = config.model, _architecture(config)
    if model.init == "random":
        return build_tokenizer(architecture)
    published = model.name if Path(model.pretrained).is_file() else None
    tokenizer = load_image_tokenizer(model.pretrained, published)
    if tokenizer.config != architecture:
        raise ValueError(
            f"model.pretrained={model.pretrained!r} holds {tokenizer.config}, not what model.name "
            f"and model.overrides ask for: {architecture}"
        )
    return tokenizer


def _architecture(config: TokenizerTraining) -> Emoji64Config | VQGANConfig:
    name = config.model.name
    if name not in TOKENIZER_CONFIGS:
        build_tokenizer(name)  # raises, naming the choices
    return updated(TOKENIZER_CONFIGS[name], config.model.overrides, "model.overrides.")


def _pictures(images: Tensor) -> list[Image.Image]:
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
