"""Making an image tokenizer: by name, from this project's own files, from published weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from t2i.weights import read_safetensors

from .emoji64 import Emoji64, Emoji64Config
from .vqgan import VQGAN, VQGANConfig, load_published

FORMAT_VERSION = 1

_LLAMAGEN = VQGANConfig()
_MOVQGAN = VQGANConfig(
    channel_multipliers=(1, 2, 2, 4),
    latent_channels=4,
    code_dim=4,
    metric="l2",
    spatial_norm=True,
)


TOKENIZER_CONFIGS: dict[str, Emoji64Config | VQGANConfig] = {
    "emoji64": Emoji64Config(),
    "llamagen-vq16": _LLAMAGEN,
    "llamagen-vq8": replace(_LLAMAGEN, channel_multipliers=(1, 2, 2, 4)),
    "movqgan-67m": _MOVQGAN,
    "movqgan-102m": replace(_MOVQGAN, num_res_blocks=4),
    "movqgan-270m": replace(_MOVQGAN, channels=256),
}
_MODELS = {"emoji64": (Emoji64, Emoji64Config), "vqgan": (VQGAN, VQGANConfig)}


def build_tokenizer(name_or_config: str | Emoji64Config | VQGANConfig) -> nn.Module:
    """An image tokenizer with random weights from torch's global generator.

    Raises:
        ValueError: no tokenizer of that name.
    """
    config = _config(name_or_config)
    return next(model(config) for model, kind in _MODELS.values() if isinstance(config, kind))


def save_tokenizer(
    tokenizer: nn.Module, folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write ``tokenizer.json`` and ``tokenizer.safetensors``; ``dtype`` is the storage type of the
    floating-point weights."""
    from safetensors.torch import save_file

    kind = next(kind for kind, (model, _) in _MODELS.items() if type(tokenizer) is model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (t.to(dtype) if dtype and t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in tokenizer.state_dict().items()
    }
    # tokenizer.json is what marks a folder as complete.
    (folder / "tokenizer.json").unlink(missing_ok=True)
    part = folder / "tokenizer.safetensors.part"
    save_file(state, part)
    os.replace(part, folder / "tokenizer.safetensors")
    description = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": asdict(tokenizer.config),
    }
    part = folder / "tokenizer.json.part"
    part.write_text(json.dumps(description, indent=2) + "\n")
    os.replace(part, folder / "tokenizer.json")


def load_tokenizer(path: str | Path, name: str | VQGANConfig | None = None) -> nn.Module:
    """Read what ``save_tokenizer`` wrote, or a published checkpoint, in fp32 on the CPU.

    Args:
        path: a folder with ``tokenizer.json``, or a LlamaGen or MoVQGAN checkpoint file.
        name: of ``TOKENIZER_CONFIGS``, or a configuration; needed for a published checkpoint, and
            checked for a folder.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: another version's file, or weights that do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no image tokenizer at {path}")
    config = None if name is None else _config(name)
    if not path.is_dir():
        if not isinstance(config, VQGANConfig):
            published = [n for n, c in TOKENIZER_CONFIGS.items() if isinstance(c, VQGANConfig)]
            raise ValueError(
                f"name {name!r}: {path.name} is a single file; say which published tokenizer it "
                f"is: {', '.join(published)}"
            )
        return load_published(config, path)
    description_file = path / "tokenizer.json"
    if not description_file.exists():
        raise FileNotFoundError(f"{path} holds no tokenizer.json")
    description = json.loads(description_file.read_text())
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{description_file}: format version {description.get('format_version')}, "
            f"this t2i reads {FORMAT_VERSION}"
        )
    if description.get("kind") not in _MODELS:
        raise ValueError(
            f"{description_file}: kind {description.get('kind')!r}, expected {' or '.join(_MODELS)}"
        )
    model, kind = _MODELS[description["kind"]]
    try:
        fields = description["config"].items()
        tokenizer = model(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{description_file} is damaged: {error!r}") from error
    if config is not None and config != tokenizer.config:
        raise ValueError(f"{path} holds another tokenizer than {name!r}: {tokenizer.config}")
    weights = path / "tokenizer.safetensors"
    state = read_safetensors(weights)
    try:
        tokenizer.load_state_dict(
            {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
        )
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit {description_file}: {error}") from error
    return tokenizer.eval()


def _config(name_or_config):
    if not isinstance(name_or_config, str):
        return name_or_config
    if name_or_config not in TOKENIZER_CONFIGS:
        raise ValueError(
            f"no image tokenizer named {name_or_config!r}: "
            f"choose one of {', '.join(TOKENIZER_CONFIGS)}"
        )
    return TOKENIZER_CONFIGS[name_or_config]
