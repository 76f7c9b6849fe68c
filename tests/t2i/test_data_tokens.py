"""Token folders: what is in them, views, resuming, checksums."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from t2i.data import ImageTextDataset, TokenDataset, tokenize_dataset
from t2i.data import tokens as module


class MeanTokenizer(nn.Module):
    """The code of a 4×4 patch is its mean red, from 0 to ``num_codes`` − 1."""

    downsampling = 4

    def __init__(self, num_codes: int = 256):
        super().__init__()
        self.num_codes = num_codes
        self.scale = nn.Parameter(torch.ones(1))
        self.calls, self.stop_at = 0, None

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        red = nn.functional.avg_pool2d((images[:, 0] + 1) / 2, 4) * self.scale
        return (red * (self.num_codes - 1)).round().long()


def codes(images: np.ndarray) -> np.ndarray:
    """What MeanTokenizer makes of uint8 [N, 16, 16, 3], in plain numpy."""
    red = images[..., 0].reshape(len(images), 4, 4, 4, 4).mean(axis=(2, 4))
    return red.round().astype(int).reshape(len(images), 16)


def test_tokens_are_those_of_the_pictures(dataset, tmp_path):
    assert tokenize_dataset(dataset, MeanTokenizer(), tmp_path, batch_size=5, progress=False)
    data, tokens = ImageTextDataset(dataset), TokenDataset(tmp_path)
    assert tokens.tokens.shape == (len(data), 1, 16) and tokens.tokens.dtype == np.uint16
    assert isinstance(tokens.tokens, np.memmap)
    assert np.abs(tokens.tokens[:, 0].astype(int) - codes(data.images)).max() <= 1
    assert tokens.pairs == data.pairs and len(tokens) == len(data)
    assert (tokens.grid, tokens.num_codes) == ((4, 4), 256)
    assert (tokens.rows("unseen_pairs") == ImageTextDataset(dataset, "unseen_pairs").rows).all()
    assert (tokens.rows() == np.arange(len(data))).all()


def test_large_codebooks_get_wide_tokens(dataset, tmp_path):
    tokenize_dataset(dataset, MeanTokenizer(1 << 17), tmp_path, progress=False)
    tokens = TokenDataset(tmp_path).tokens
    assert tokens.dtype == np.uint32 and tokens.max() == (1 << 17) - 1


def test_views_are_shifted_and_mirrored(dataset, tmp_path):
    tokenize_dataset(dataset, MeanTokenizer(), tmp_path, views=3, flip=True, progress=False)
    images, tokens = ImageTextDataset(dataset).images, TokenDataset(tmp_path).tokens.astype(int)
    assert tokens.shape == (len(images), 6, 16)
    moved = 0
    for view in range(3):
        shifted = np.stack([module.shifted(image, i, view) for i, image in enumerate(images)])
        assert np.abs(tokens[:, view] - codes(shifted)).max() <= 1
        assert np.abs(tokens[:, 3 + view] - codes(shifted[:, :, ::-1])).max() <= 1
        moved += (shifted != images).any()
    assert moved == 2  # the first view is the picture as it is


def test_shifts_repeat_the_edge():
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    offsets = set()
    for row in range(40):
        y, x = np.random.default_rng([row, 1]).integers(-3, 4, size=2)
        offsets.add((y, x))
        rows, columns = (np.clip(np.arange(16) + d, 0, 15) for d in (y, x))
        assert (module.shifted(image, row, 1) == image[rows][:, columns]).all()
    assert len(offsets) > 20


def test_a_stopped_call_goes_on(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 8)
    tokenizer = MeanTokenizer()
    tokenizer.stop_at = 4  # a batch a part, two views: in the second part
    with pytest.raises(KeyboardInterrupt):
        tokenize_dataset(dataset, tokenizer, tmp_path / "a", views=2, batch_size=8, progress=False)
    with pytest.raises(FileNotFoundError, match="holds no finished tokens.json"):
        TokenDataset(tmp_path / "a")
    tokenizer.calls, tokenizer.stop_at = 0, None
    tokenize_dataset(dataset, tokenizer, tmp_path / "a", views=2, batch_size=8, progress=False)
    assert tokenizer.calls == 2 * (len(ImageTextDataset(dataset)) // 8 - 1)
    tokenize_dataset(dataset, tokenizer, tmp_path / "b", views=2, progress=False)
    assert (TokenDataset(tmp_path / "a").tokens == TokenDataset(tmp_path / "b").tokens).all()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "pairs.jsonl",
        "tokens.json",
        "tokens.npy",
    ]


def test_only_what_changed_is_done_again(dataset, tmp_path):
    def run(tokenizer, **options):
        return tokenize_dataset(dataset, tokenizer, tmp_path, progress=False, **options)

    tokenizer = MeanTokenizer()
    assert run(tokenizer) and not run(tokenizer)
    assert run(tokenizer, views=2) and run(tokenizer, views=2, flip=True)
    assert not run(tokenizer, views=2, flip=True)
    before = TokenDataset(tmp_path).tokens[:].copy()
    with torch.no_grad():
        tokenizer.scale.fill_(0.5)
    assert run(tokenizer, views=2, flip=True)
    assert (TokenDataset(tmp_path).tokens != before).any()


@pytest.mark.parametrize("file", ["tokens.npy", "pairs.jsonl"])
def test_damage_is_noticed_and_mended(dataset, tmp_path, file):
    tokenize_dataset(dataset, MeanTokenizer(), tmp_path, progress=False)
    data = bytearray((tmp_path / file).read_bytes())
    data[-9] ^= 1
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} missing or not matching the checksum in tokens"):
        TokenDataset(tmp_path)
    assert tokenize_dataset(dataset, MeanTokenizer(), tmp_path, progress=False)
    TokenDataset(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"{file} missing"):
        TokenDataset(tmp_path)


def test_what_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="views=0"):
        tokenize_dataset(dataset, MeanTokenizer(), tmp_path, views=0)
    with pytest.raises(FileExistsError, match="holds a dataset of pictures"):
        tokenize_dataset(dataset, MeanTokenizer(), dataset)
    tokenizer = MeanTokenizer()
    tokenizer.downsampling = 5
    with pytest.raises(ValueError, match="pictures of 16 pixels.*multiple of 5"):
        tokenize_dataset(dataset, tokenizer, tmp_path)
    tokenize_dataset(dataset, MeanTokenizer(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="split 'all'"):
        TokenDataset(tmp_path).rows("all")
    info = json.loads((tmp_path / "tokens.json").read_text())
    (tmp_path / "tokens.json").write_text(json.dumps({**info, "format_version": 0}))
    with pytest.raises(ValueError, match="format version 0, expected 1"):
        TokenDataset(tmp_path)
