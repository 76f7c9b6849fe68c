"""T2I: captions in, pictures out; what is saved draws the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from t2i.lm import LMConfig, TransformerLM, save_lm
from t2i.pipeline import T2I, Sampling
from t2i.text import TextTokenizer
from t2i.tokenizer import build_tokenizer, save_tokenizer
from t2i_kernels import explain, native

CAPTIONS = [f"{a} {b}" for a in ("red", "blue", "tiny") for b in ("apple", "shark", "house")]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    tokenizer = build_tokenizer("emoji64")
    tokenizer.quantizer.codebook.data.normal_()  # codes far enough apart to be told in pixels
    config = LMConfig(
        dim=32,
        num_layers=2,
        num_heads=2,
        ffn_dim=48,
        text_vocab_size=300,
        image_vocab_size=tokenizer.num_codes,
        max_positions=90,
    )
    return tokenizer, TransformerLM(config), TextTokenizer.train(CAPTIONS, 280)


@pytest.fixture
def model(parts) -> T2I:
    return T2I(*parts, image_size=(64, 64), name="test")


def same(a, b) -> bool:
    """Up to one step of 255: convolutions may round with the batch size."""
    difference = np.asarray(a).astype(int) - np.asarray(b).astype(int)
    return np.abs(difference).max() <= 1


def test_pictures_come_prompt_by_prompt(model):
    images = model.sample(["red apple", "a tiny blue shark"], n=2)
    assert [(image.size, image.mode) for image in images] == [((64, 64), "RGB")] * 4
    assert same(images[0], model.sample("red apple")[0])
    assert same(images[2], model.sample("a tiny blue shark")[0])
    assert not same(images[0], images[1]) and not same(images[0], images[2])


def test_a_picture_depends_on_its_seed_whatever_is_drawn_beside_it(model):
    images = model.sample("blue house", n=5, seed=10)
    assert same(images[3], model.sample("blue house", seed=13)[0])
    in_twos = model.sample("blue house", n=5, seed=10, batch_size=2)
    assert all(same(a, b) for a, b in zip(images, in_twos, strict=True))


def test_the_loss_does_not_depend_on_the_batch(model):
    codes = torch.arange(3 * 16).view(3, 4, 4) % model.tokenizer.num_codes
    prompts = ["red apple", "blue", "tiny shark house"]
    losses = model.loss(prompts, codes, batch_size=2)
    assert losses.shape == (3,)
    assert torch.allclose(model.loss(prompts[2], codes[2:]), losses[2:], atol=1e-5)
    with pytest.raises(ValueError, match="2 pictures for 3 prompts"):
        model.loss(prompts, codes[:2])


def test_one_seed_a_prompt(model):
    prompts = ["blue house", "tiny shark"]
    images = model.sample(prompts, seed=[5, 9])
    for image, prompt, seed in zip(images, prompts, (5, 9), strict=True):
        assert same(image, model.sample(prompt, seed=seed)[0])


def test_other_sizes_than_the_trained_one(parts):
    model = T2I(*parts, image_size=(32, 64))
    assert model.grid == (4, 8)
    assert model.sample("red apple")[0].size == (64, 32)  # PIL says width first


def test_saving_and_loading(model, tmp_path):
    expected = model.sample("red apple", n=2)
    model.save_pretrained(tmp_path / "full", dtype=torch.float32, card="# A model\n")
    loaded = T2I.from_pretrained(tmp_path / "full", device="cpu")
    assert (loaded.name, loaded.image_size, loaded.grid) == ("test", (64, 64), (8, 8))
    assert all(same(a, b) for a, b in zip(loaded.sample("red apple", n=2), expected, strict=True))
    assert {path.name for path in (tmp_path / "full").iterdir()} == {
        "README.md",
        "lm.json",
        "lm.safetensors",
        "model.json",
        "text_tokenizer.json",
        "tokenizer.json",
        "tokenizer.safetensors",
    }
    model.save_pretrained(tmp_path / "half")
    half = T2I.from_pretrained(tmp_path / "half", device="cpu")
    for module in (half.lm, half.tokenizer):
        assert all(p.dtype == torch.float32 for p in module.parameters())
    for name in ("lm.safetensors", "tokenizer.safetensors"):
        sizes = [(tmp_path / folder / name).stat().st_size for folder in ("half", "full")]
        assert sizes[0] < 0.6 * sizes[1], name


def test_a_model_brings_its_own_options(parts, tmp_path):
    own = Sampling(cfg=1.0, temperature=0.0)
    T2I(*parts, image_size=(64, 64), sampling=own).save_pretrained(tmp_path, dtype=torch.float32)
    model = T2I.from_pretrained(tmp_path, device="cpu")
    assert model.sampling == own
    image, *others = model.sample("red apple", n=3)
    assert all(same(image, other) for other in others)  # at temperature 0 whatever the seed
    warm = model.sample("red apple", n=3, temperature=1.0)
    assert not same(warm[0], warm[1])


def test_what_cannot_be_loaded(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model.json"):
        T2I.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**description, "format_version": 7}))
    with pytest.raises(ValueError, match="format version 7"):
        T2I.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_no_mixture(model, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model.save_pretrained(tmp_path)
    monkeypatch.setattr("t2i.pipeline.save_lm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no model.json"):
        T2I.from_pretrained(tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", interrupt)
    for save, part, file in [
        (save_lm, model.lm, "lm.json"),
        (save_tokenizer, model.tokenizer, "tokenizer.json"),
    ]:
        (tmp_path / file).touch()
        with pytest.raises(KeyboardInterrupt):
            save(part, tmp_path)
        assert not (tmp_path / file).exists()


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        "{}",
        dict(image_size=8),
        dict(image_size=["64", "64"]),
        dict(sampling={"topk": 5}),
        dict(sampling={"top_p": 0}),
    ],
)
def test_a_damaged_description_is_named(model, tmp_path, damage):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.json"
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(file.read_text()) | damage)
    file.write_text(damage)
    message = "format version None" if damage == "{}" else "model.json is damaged"
    with pytest.raises(ValueError, match=message):
        T2I.from_pretrained(tmp_path, device="cpu")


def test_options_of_a_model_are_checked():
    with pytest.raises(ValueError, match="top_p: expected 0 < top_p <= 1, got 0"):
        Sampling(top_p=0)
    with pytest.raises(ValueError, match="cfg: expected a finite number .*, got -1"):
        Sampling(cfg=-1)


def test_a_backend_draws_pixels_too(model, monkeypatch):
    chosen, decode = [], model.tokenizer.decode

    def watched(codes):
        q = torch.zeros(1, 1, 1, 16)
        chosen.append(explain("flash_attention", q, q, q).chosen)
        return decode(codes)

    monkeypatch.setattr(model.tokenizer, "decode", watched)
    model.sample("red apple", backend="reference")
    model.sample("red apple")
    assert chosen == ["reference", "cpu" if native.reason() is None else "reference"]


def test_statistics_and_progress(model, capsys):
    calls = []
    model.sample("red apple", n=3, batch_size=2, progress=lambda *call: calls.append(call))
    assert calls[:2] == [(2, 192), (18, 192)]
    middle = calls.index((128, 192))
    assert calls[middle + 1] == (129, 192) and calls[-1] == (192, 192)
    statistics = model.statistics
    assert (statistics.images, statistics.tokens) == (3, 192)
    assert statistics.pixel_seconds > 0 and statistics.seconds_per_image > 0
    model.sample("red apple", progress=True)
    written = capsys.readouterr()
    assert "drawing" in written.err and not written.out


@pytest.mark.parametrize(
    "prompts, options, error, message",
    [
        ([], {}, ValueError, "at least one"),
        (["red apple", "  "], {}, ValueError, r"prompts\[1\] is empty"),
        (["red apple", None], {}, TypeError, r"prompts\[1\]: expected text, got NoneType"),
        (7, {}, TypeError, "prompts: expected text"),
        (["shark " * 40], {}, ValueError, r"prompts\[0\] has \d+ tokens.*room for 26"),
        ("red apple", {"n": 0}, ValueError, "n=0"),
        ("red apple", {"batch_size": 0}, ValueError, "batch_size=0"),
        ("red apple", {"seed": [1, 2]}, ValueError, "2 seeds for 1 prompts"),
        ("red apple", {"top_p": 2.0}, ValueError, "top_p: expected .*, got 2.0"),
    ],
)
def test_bad_requests_are_named(model, prompts, options, error, message):
    with pytest.raises(error, match=message):
        model.sample(prompts, **options)


def test_parts_that_do_not_fit(parts):
    tokenizer, lm, text = parts
    with pytest.raises(ValueError, match="image_size=60x64: expected multiples of 8"):
        T2I(tokenizer, lm, text, image_size=(60, 64))
    with pytest.raises(ValueError, match="text tokenizer has 280 tokens.*rows for 270"):
        T2I(
            tokenizer,
            TransformerLM(lm.config.replace(text_vocab_size=270)),
            text,
            image_size=(64, 64),
        )
    with pytest.raises(ValueError, match="image tokenizer has 4096 codes.*rows for 16"):
        T2I(
            tokenizer,
            TransformerLM(lm.config.replace(image_vocab_size=16)),
            text,
            image_size=(64, 64),
        )
