"""Training of a language model on captions and the tokens of their images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from t2i.data import SPLITS, TokenDataset
from t2i.data.files import write_json
from t2i.data.tokens import encoder_checksum
from t2i.grid import draw_grid
from t2i.lm import LMConfig, TransformerLM, build_lm
from t2i.lm.build import get_config
from t2i.pipeline import T2I
from t2i.text import TextTokenizer

from .captions import make_text_tokenizer, vary_caption
from .config import LMTraining, checked
from .data import DataOrder, LengthGroups, spread
from .loop import Outcome, holds_run, load_run, run_task
from .machine import autocast
from .optim import Ema, adamw, apply_gradients, learning_rate, mean_metrics
from .tokenizer import load_image_tokenizer

TEXT, IMAGE = 1, 2  # what a position predicts; 0 is nothing
TEXT_TOKENIZER, MODEL = "text_tokenizer.json", "model.json"  # in the folder of the run


def train_lm(config: LMTraining, **options: Any) -> Outcome:
    """Train a language model as ``config`` says; ``options`` are those of ``loop.train``."""
    return run_task(LMTask, config, **options)


def load_trained_lm(path: str | Path) -> tuple[TransformerLM, TextTokenizer, dict[str, Any]]:
    """What a run has trained: the averaged weights of its newest intact checkpoint (fp32, on the
    CPU), its text tokenizer, and what it says about the images: their ``image_size`` (height,
    width), their ``sources`` and the ``tokenizer_sha256`` of what turned them into tokens."""
    checkpoint, path = load_run(path), Path(path)
    model = json.loads((path / MODEL).read_text())
    lm = TransformerLM(LMConfig.from_dict(model["lm"]))
    lm.load_state_dict(checkpoint.weights["ema"])
    text = TextTokenizer.from_file(path / TEXT_TOKENIZER)
    return lm.eval(), text, model


class LMTask:
    """The modules, the step and the evaluation of a run; see ``loop.Task``."""

    def __init__(self, config: LMTraining, device: torch.device):
        self.config, self.device = config, device
        self.batch_size = config.optim.batch_size
        self.data = TokenDataset(config.data.path)
        written = self.data.tokens.shape[1]
        self.views = config.data.views or written
        if self.views > written:
            raise ValueError(
                f"data.views={self.views}: {config.data.path} holds {written} of each picture; "
                "t2i tokenize --views writes more"
            )
        self.order = DataOrder(self.data.rows("train"), config.run.seed)
        self.splits = {
            split: spread(self.data.rows(split), config.evaluation.pairs) for split in SPLITS
        }
        self.text = self._text_tokenizer()
        self.batches = LengthGroups(
            self.order, self.batch_size, self._draw, lambda item: len(self.text.prompt(item[0]))
        )
        self.lm = _build(config, self.text, self.data.num_codes).to(device)
        self.ema = Ema(self.lm, config.optim.ema)
        if config.run.compile:  # the lengths of batches differ: one graph for all of them
            self.lm.features = torch.compile(self.lm.features, dynamic=True)
        self.parameters = list(self.lm.parameters())
        self.modules = {"model": self.lm, "ema": self.ema.module}
        self.optimizers = {"model": adamw(self.lm, config.optim)}
        self.pipeline = self._pipeline()

    def step(self, step: int, position: int) -> dict[str, Tensor]:
        optim = self.config.optim
        self.lm.train()
        metrics = mean_metrics([self._backward(*batch) for batch in self._micro_batches(position)])
        lr = learning_rate(optim, step, self.config.run.steps)
        metrics["grad_norm"] = apply_gradients(
            self.parameters, self.optimizers["model"], lr, optim.grad_clip
        )
        metrics["lr"] = torch.tensor(lr)
        self.ema.update(self.lm, step)
        return metrics

    def _draw(self, sample: int, rng: np.random.Generator) -> tuple[str | None, np.ndarray]:
        """A caption of a sample, and the codes of one view of its image."""
        caption = vary_caption(self.data.pairs[sample], self.config.captions, rng)
        return caption, self.data.tokens[sample, rng.integers(self.views)]

    def _micro_batches(self, position: int) -> Iterator[tuple[Tensor, Tensor]]:
        captions, images = zip(*self.batches(position), strict=True)
        size = len(captions) // self.config.optim.accumulate
        for i in range(0, len(captions), size):
            yield self._collate(captions[i : i + size], np.stack(images[i : i + size]))

    def _collate(self, captions: Sequence[str | None], images: np.ndarray) -> tuple[Tensor, Tensor]:
        """A batch of sequences, and which modality each of their tokens is.

        A sequence is the prompt of its caption and the image's tokens; the shorter ones are padded
        behind, where causal attention never looks.

        Args:
            captions: B of them; None trains the image alone. Tokens that exceed the model's
                positions are cut.
            images: codes [B, T].

        Returns:
            tokens int64 [B, L]; kinds int64 [B, L]: TEXT, IMAGE, or 0 for what is not to be
            predicted: the first token, padding, and what stands for a caption that was dropped.
        """
        lm, text = self.lm.config, self.text
        room = lm.max_positions - images.shape[1] + 1  # the last token is no input
        prompts = [self._cut(text.prompt(caption), room) for caption in captions]
        shape = len(prompts), max(map(len, prompts)) + images.shape[1]
        tokens, kinds = np.full(shape, text.pad_id), np.zeros(shape, dtype=np.int64)
        for i, (prompt, caption, codes) in enumerate(zip(prompts, captions, images, strict=True)):
            begin, end = len(prompt), len(prompt) + len(codes)
            tokens[i, :begin], kinds[i, 1:begin] = prompt, 0 if caption is None else TEXT
            # In int64: codes are stored in 16 bits, which the rows of a large vocabulary exceed.
            tokens[i, begin:end] = codes.astype(np.int64) + lm.text_vocab_size
            kinds[i, begin:end] = IMAGE
        return torch.from_numpy(tokens).to(self.device), torch.from_numpy(kinds).to(self.device)

    @staticmethod
    def _cut(prompt: list[int], room: int) -> list[int]:
        return prompt if len(prompt) <= room else [*prompt[: room - 1], prompt[-1]]

    def _backward(self, tokens: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch."""
        loss = self.config.loss
        smoothed, nll, kinds = self._losses(self.lm, tokens, kinds, loss.label_smoothing)
        weights = torch.where(kinds == IMAGE, loss.image, loss.text)
        total = (weights * smoothed).sum() / weights.sum()
        (total / self.config.optim.accumulate).backward()
        image, text = (nll[kinds == kind].detach() for kind in (IMAGE, TEXT))
        # A batch without any caption has no text loss: count it as 0 rather than as NaN.
        return {
            "loss": total,
            "image": image.mean(),
            "text": text.sum() / max(1, len(text)),
        }

    def _losses(
        self, lm: nn.Module, tokens: Tensor, kinds: Tensor, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(smoothed, plain) cross entropy in nats of each token that is to be predicted, fp32 [N],
        and its kind. Only their positions go through the output layer."""
        predicted = kinds[:, 1:] > 0
        targets = tokens[:, 1:][predicted]
        with autocast(self.device, self.config.run.precision):
            features = lm.features(tokens[:, :-1])[predicted]
            smoothed, nll = lm.cross_entropy(features, targets, smoothing)
        return smoothed, nll, kinds[:, 1:][predicted]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss of the averaged weights in nats a token, by split and modality, on captions and
        images as they are."""
        metrics = {}
        for split, rows in self.splits.items():
            if not len(rows):
                continue
            losses: dict[int, list[Tensor]] = {IMAGE: [], TEXT: []}
            for part in np.array_split(rows, -(-len(rows) // 64)):
                captions = [self.data.pairs[i]["caption"] for i in part]
                tokens, kinds = self._collate(captions, self.data.tokens[part, 0])
                _, nll, kinds = self._losses(self.ema.module, tokens, kinds)
                for kind in losses:
                    losses[kind].append(nll[kinds == kind])
            metrics[f"image_{split}"] = torch.cat(losses[IMAGE]).mean().item()
            metrics[f"text_{split}"] = torch.cat(losses[TEXT]).mean().item()
        return metrics

    def draw(self) -> Image.Image | None:
        """Pictures for the prompts of the configuration, or for a few captions of each split."""
        if self.pipeline is None:
            return None
        options = self.config.evaluation
        prompts = list(options.prompts) or [
            self.data.pairs[i]["caption"] for split in SPLITS for i in spread(self.splits[split], 8)
        ]
        images = self.pipeline.sample(
            prompts, cfg=options.cfg, top_k=options.top_k, seed=options.seed
        )
        return draw_grid(images, prompts, columns=8)

    def _text_tokenizer(self) -> TextTokenizer:
        folder = Path(self.config.run.folder)
        if holds_run(folder):  # the rows of its embedding belong to these very tokens
            return TextTokenizer.from_file(folder / TEXT_TOKENIZER)
        pairs = (self.data.pairs[i] for i in self.data.rows("train"))
        return make_text_tokenizer(self.config.text, pairs)

    def _pipeline(self) -> T2I | None:
        """The averaged weights between text and pixels; None without an image tokenizer."""
        data = self.config.data
        if not data.tokenizer:
            return None
        tokenizer = load_image_tokenizer(data.tokenizer, data.tokenizer_name or None)
        if encoder_checksum(tokenizer) != self.data.info["tokenizer_sha256"]:
            raise ValueError(
                f"the tokens in {data.path} were not written by the tokenizer in {data.tokenizer}: "
                "run t2i tokenize again, or name the right one as data.tokenizer"
            )
        size = self.data.info["image_size"]
        tokenizer.to(self.device)
        return T2I(tokenizer, self.ema.module, self.text, image_size=(size, size))

    def describe(self, folder: Path) -> None:
        """Write what ``load_trained_lm`` needs beside a checkpoint."""
        size = self.data.info["image_size"]
        self.text.save(folder / TEXT_TOKENIZER)
        model = {
            "lm": self.lm.config.to_dict(),
            "image_size": [size, size],
            "tokenizer_sha256": self.data.info["tokenizer_sha256"],
            "sources": self.data.info.get("sources", []),
        }
        write_json(folder / MODEL, model)


def _build(config: LMTraining, text: TextTokenizer, num_codes: int) -> TransformerLM:
    """The model with rows for every text token and image code, random or pre-trained."""
    model = config.model
    architecture = get_config(model.name)
    if architecture.prefix != "none":
        raise ValueError(
            f"model.name={model.name!r} reads classes or caption features instead of text: it "
            "can be sampled, not trained on captions"
        )
    architecture = architecture.replace(
        **checked(architecture, model.overrides, "model.overrides.")
    )
    has_images = architecture.image_vocab_size > 0
    pretrained = model.pretrained if model.init == "pretrained" else None
    if pretrained is not None and holds_run(pretrained):
        pretrained, _, _ = load_trained_lm(pretrained)
    lm = build_lm(
        architecture,
        pretrained=pretrained,
        image_vocab=None if has_images else num_codes,
        image_init=model.image_init,
        text_vocab=None if has_images else text.vocab_size,
    )
    for name, rows, needed in (
        ("image_vocab_size", lm.config.image_vocab_size, num_codes),
        ("text_vocab_size", lm.config.text_vocab_size, text.vocab_size),
    ):
        if rows < needed or (name == "image_vocab_size" and rows != needed):
            raise ValueError(
                f"{name}={rows} of the model {model.name!r}, but there are {needed} tokens: set "
                f"model.overrides.{name}={needed}"
            )
    return lm
