"""Image tokenizers: what every one keeps to, and what is saved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i.tokenizer import TOKENIZER_CONFIGS, build_tokenizer, load_tokenizer, save_tokenizer

# Each architecture at a fraction of its width; test_tokenizer_published.py has the sizes of each.
NARROW = {
    "emoji64": {"channels": (16, 16, 32), "num_codes": 32, "code_dim": 4},
    "llamagen-vq16": {"channels": 32, "latent_channels": 8, "num_codes": 32},
    "movqgan-67m": {"channels": 32, "num_codes": 32},
}
DOWNSAMPLING = {"emoji64": 8, "llamagen-vq16": 16, "movqgan-67m": 8}
torch.set_num_threads(1)


def narrow(name: str, **changes):
    return replace(TOKENIZER_CONFIGS[name], **NARROW[name], **changes)


def build(name: str):
    """With codes far enough apart to be told."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(narrow(name))
    with torch.no_grad():
        tokenizer.quantizer.codebook.normal_()
    return tokenizer.eval()


def pictures(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


@pytest.fixture(params=NARROW)
def name(request) -> str:
    return request.param


def test_the_names():
    assert list(TOKENIZER_CONFIGS) == [
        "emoji64",
        "llamagen-vq16",
        "llamagen-vq8",
        "movqgan-67m",
        "movqgan-102m",
        "movqgan-270m",
    ]


def test_pictures_to_codes_and_back(name):
    tokenizer, f = build(name), DOWNSAMPLING[name]
    assert tokenizer.downsampling == f and tokenizer.num_codes == 32
    assert tokenizer.config == narrow(name)
    for batch, h, w in ((2, 3, 2), (1, 1, 4), (0, 2, 2)):
        images = pictures(batch, h * f, w * f)
        codes = tokenizer.encode(images)
        assert codes.shape == (batch, h, w) and codes.dtype == torch.int64
        decoded = tokenizer.decode(codes)
        assert decoded.shape == images.shape and decoded.isfinite().all()
        reconstruction, vq = tokenizer(images)
        assert torch.equal(vq.indices, codes)
        assert torch.equal(reconstruction, decoded)
    codes = tokenizer.encode(pictures(2, 4 * f, 4 * f))
    assert codes.unique().numel() > 1 and codes.min() >= 0 and codes.max() < 32


def test_each_picture_of_a_batch_is_on_its_own(name):
    # In fp64: convolutions round with the size of the batch.
    tokenizer, f = build(name).double(), DOWNSAMPLING[name]
    images = pictures(3, 2 * f, 3 * f).double()
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(tokenizer.encode(images), alone)
    decoded = torch.cat([tokenizer.decode(codes[None]) for codes in alone])
    torch.testing.assert_close(tokenizer.decode(alone), decoded, rtol=1e-9, atol=1e-11)


def test_bad_inputs_are_named(name):
    tokenizer, f = build(name), DOWNSAMPLING[name]
    for shape in ((1, 3, f, f + 1), (1, 3, f // 2, f), (1, 4, f, f), (3, f, f)):
        with pytest.raises(ValueError, match=f"images: .*multiples of {f}, got .*{shape[-1]}"):
            tokenizer.encode(torch.zeros(shape))
        with pytest.raises(ValueError, match=f"multiples of {f}"):
            tokenizer(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"images: expected floating point.*torch\.uint8"):
        tokenizer.encode(torch.zeros(1, 3, f, f, dtype=torch.uint8))
    with pytest.raises(ValueError, match="z"):
        tokenizer.encode(torch.full((1, 3, f, f), torch.nan))
    with pytest.raises(ValueError, match=r"codes: expected \[B, h, w\], got \(4,\)"):
        tokenizer.decode(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexError, match="indices: expected 0 to 31, got 0 to 32"):
        tokenizer.decode(torch.tensor([[[0, 32]]]))


def test_training_reaches_every_parameter_and_encoding_changes_nothing(name):
    tokenizer, f = build(name).train(), DOWNSAMPLING[name]
    with torch.no_grad():
        for parameter in tokenizer.parameters():  # some start at zero and stop gradients
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = {key: t.clone() for key, t in tokenizer.state_dict().items()}
    images = pictures(2, 2 * f, 2 * f)
    tokenizer.encode(images)
    for key, tensor in tokenizer.state_dict().items():
        assert torch.equal(tensor, before[key]), key

    reconstruction, vq = tokenizer(images)
    ((reconstruction - images).square().mean() + vq.loss).backward()
    for key, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        # A key's bias adds the same to all scores of a query: it never has a gradient.
        assert parameter.grad.any() or key.endswith(".k.bias"), key
    assert tokenizer.quantizer.usage() > 0


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_what_is_saved_comes_back(name, dtype, tmp_path):
    tokenizer, f = build(name), DOWNSAMPLING[name]
    tokenizer.train()(pictures(1, 2 * f, f))  # the counters have something to say
    save_tokenizer(tokenizer, tmp_path / "saved", dtype=dtype)
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "tokenizer.json",
        "tokenizer.safetensors",
    ]
    loaded = load_tokenizer(tmp_path / "saved")
    assert type(loaded) is type(tokenizer) and loaded.config == tokenizer.config
    assert not loaded.training
    read = loaded.state_dict()
    for key, tensor in tokenizer.state_dict().items():
        back = read[key]
        assert back.dtype == tensor.dtype
        if dtype and tensor.is_floating_point():
            tensor = tensor.to(dtype).float()
        assert torch.equal(back, tensor), key
    if dtype:
        stored = load_file(tmp_path / "saved" / "tokenizer.safetensors")
        assert {t.dtype for t in stored.values() if t.is_floating_point()} == {dtype}


def test_folders_that_do_not_load_say_why(tmp_path):
    save_tokenizer(build("emoji64"), tmp_path)
    description, weights = tmp_path / "tokenizer.json", tmp_path / "tokenizer.safetensors"
    fields = json.loads(description.read_text())

    fields["config"]["num_codes"] = 64
    description.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="tokenizer.safetensors does not fit(.|\n)*codebook"):
        load_tokenizer(tmp_path)
    fields["config"]["num_codes"] = 32
    description.write_text(json.dumps(fields))

    state = load_file(weights)
    del state["decoder.0.weight"]
    save_file(state, weights)
    with pytest.raises(ValueError, match="decoder.0.weight"):
        load_tokenizer(tmp_path)

    description.write_text(json.dumps({**fields, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        load_tokenizer(tmp_path)
    description.write_text(json.dumps({**fields, "kind": "vae"}))
    with pytest.raises(ValueError, match="kind 'vae', expected emoji64 or vqgan"):
        load_tokenizer(tmp_path)
    for config in (None, {"codes": 3}):
        description.write_text(json.dumps({**fields, "config": config}))
        with pytest.raises(ValueError, match="tokenizer.json is damaged"):
            load_tokenizer(tmp_path)
    description.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="holds another tokenizer than 'llamagen-vq16'"):
        load_tokenizer(tmp_path, "llamagen-vq16")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="tokenizer.safetensors is damaged"):
        load_tokenizer(tmp_path)
    description.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_names_that_do_not_exist_are_listed():
    with pytest.raises(ValueError, match="'emoji'.*emoji64, llamagen-vq16.*movqgan-270m"):
        build_tokenizer("emoji")


def test_the_same_seed_builds_the_same_tokenizer(name):
    a, b = build(name).state_dict(), build(name).state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
