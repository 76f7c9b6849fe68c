"""Making a language model: by name, from published weights, or from this project's own files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from t2i.weights import read_safetensors

from .checkpoints import read_checkpoint, same_architecture
from .config import LM_CONFIGS, LMConfig
from .model import TransformerLM

FORMAT_VERSION = 1


def build_lm(
    name_or_config: str | LMConfig | None,
    pretrained: str | Path | TransformerLM | None = None,
    *,
    image_vocab: int | None = None,
    image_init: str = "random",
    text_vocab: int | None = None,
) -> TransformerLM:
    """A random model (``pretrained=None``) or a pre-trained one, fp32 on the CPU.

    Args:
        name_or_config: a name of ``LM_CONFIGS`` or a configuration. None takes it from the
            checkpoint, where that says.
        pretrained: path of a checkpoint (``checkpoints.read_checkpoint``, or a folder written by
            ``save_lm``), or a model, whose weights are copied.
        image_vocab: append that many image rows, started as ``image_init`` says; see
            ``TransformerLM.extend_vocabulary``.
        image_init: "random" or "mean".
        text_vocab: rows that the text tokenizer needs; see ``TransformerLM.extend_vocabulary``.

    Random numbers come from torch's global generator: seed it with ``torch.manual_seed``.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
    """
    config = get_config(name_or_config)
    if pretrained is None:
        if config is None:
            raise ValueError("give a name, a configuration or pretrained weights")
        lm = TransformerLM(config)
    elif isinstance(pretrained, TransformerLM):
        state = {
            name: tensor.detach().to("cpu", torch.float32, copy=True)
            for name, tensor in pretrained.state_dict().items()
        }
        lm = _continued(config, pretrained.config, state, "pretrained")
    elif (Path(pretrained) / "lm.json").exists():
        lm = _continued(config, *_read_lm(Path(pretrained)), pretrained)
    else:
        lm = _with_weights(*read_checkpoint(pretrained, config), pretrained)
    if image_vocab is None and text_vocab is not None:
        raise ValueError(f"text_vocab={text_vocab} without image_vocab: both are appended together")
    if image_vocab is not None:
        lm.extend_vocabulary(image_vocab, image_init, text_vocab=text_vocab)
    return lm


def get_config(name_or_config: str | LMConfig | None) -> LMConfig | None:
    if not isinstance(name_or_config, str):
        return name_or_config
    if name_or_config not in LM_CONFIGS:
        raise ValueError(
            f"no language model named {name_or_config!r}: choose one of {', '.join(LM_CONFIGS)}"
        )
    return LM_CONFIGS[name_or_config]


def save_lm(lm: TransformerLM, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write ``lm.json`` and ``lm.safetensors``; ``dtype`` (torch.float16) is the storage type."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in lm.state_dict().items()
    }
    if lm.config.tied:
        del state["output.weight"]
    # lm.json is what marks a folder as complete.
    (folder / "lm.json").unlink(missing_ok=True)
    part = folder / "lm.safetensors.part"
    save_file(state, part)
    os.replace(part, folder / "lm.safetensors")
    part = folder / "lm.json.part"
    part.write_text(
        json.dumps({"format_version": FORMAT_VERSION, "config": lm.config.to_dict()}, indent=2)
        + "\n"
    )
    os.replace(part, folder / "lm.json")


def load_lm(folder: str | Path) -> TransformerLM:
    """Read what ``save_lm`` wrote, into fp32 on the CPU whatever the storage type.

    Raises:
        FileNotFoundError: ``folder`` holds no language model.
        ValueError: another version's file, or weights that are damaged or do not fit.
    """
    return _with_weights(*_read_lm(Path(folder)), folder)


def _read_lm(folder: Path) -> tuple[LMConfig, dict[str, Tensor]]:
    description = json.loads((folder / "lm.json").read_text())
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder / 'lm.json'}: format version {version}, this t2i reads {FORMAT_VERSION}"
        )
    state = read_safetensors(folder / "lm.safetensors")
    state = {name: tensor.float() for name, tensor in state.items()}
    try:
        config = LMConfig.from_dict(description["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'lm.json'} is damaged: {error!r}") from error
    return config, state


def _continued(
    asked: LMConfig | None, found: LMConfig, state: dict[str, Tensor], source: str | Path
) -> TransformerLM:
    """A model of this project, with what ``asked`` may change about it."""
    config = found if asked is None else same_architecture(asked, found, Path(source))
    return _with_weights(config, state, source)


def _with_weights(config: LMConfig, state: dict[str, Tensor], source: str | Path) -> TransformerLM:
    with torch.device("meta"):  # no time spent on random weights
        lm = TransformerLM(config)
    if config.tied and "tok_embeddings.weight" in state:
        state = {**state, "output.weight": state["tok_embeddings.weight"]}
    try:
        lm.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {source} do not fit its configuration: {error}") from None
    if config.tied:
        lm.output.weight = lm.tok_embeddings.weight
    return lm.to("cpu")  # brings the rotary tables along
