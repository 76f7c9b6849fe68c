"""LlamaGen's and MoVQGAN's checkpoints: every name, every shape, and the numbers of their networks.

The networks are written down a second time here, as functions of a published state dict in fp64.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from t2i.tokenizer import TOKENIZER_CONFIGS, build_tokenizer, load_tokenizer

FIXTURE = Path(__file__).parent / "fixtures" / "tokenizers.json"
NAMES = ["llamagen-vq16", "llamagen-vq8", "movqgan-67m", "movqgan-102m", "movqgan-270m"]
every_name = pytest.mark.parametrize("name", NAMES)
torch.set_num_threads(1)


def published_shapes(name: str) -> dict[str, list[int]]:
    modules = json.loads(FIXTURE.read_text())[name]
    return {f"{m}.{leaf}": shape for m, leaves in modules.items() for leaf, shape in leaves.items()}


def narrow(name: str):
    """(configuration, state dict with published names) at a fraction of the width, 64 codes."""
    config = TOKENIZER_CONFIGS[name]
    divisor = config.channels // 32

    def less(size: int) -> int:
        return {16384: 64, 65536: 65536}.get(size, size // divisor if size >= 128 else size)

    config = replace(
        config, channels=32, latent_channels=less(config.latent_channels), num_codes=64
    )
    torch.manual_seed(0)
    state = {}
    for key, shape in published_shapes(name).items():
        value = torch.randn([less(size) for size in shape])
        if len(shape) == 4:
            value /= math.sqrt(value[0].numel())
        elif key.endswith(".weight") and len(shape) == 1:
            value = 1 + 0.3 * value
        elif key.endswith(".bias"):
            value *= 0.3
        state[key] = value
    state["encoder.conv_in.bias"].zero_()  # dark pictures then show the epsilon of the norms
    return config, state


class Network:
    """encode and decode of the original code, from a state dict with its names."""

    def __init__(self, state: dict[str, Tensor]):
        self.w = {name: value.double() for name, value in state.items()}
        self.llamagen = "quantize.codebook_used" in state

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.w[f"{name}.weight"]
        pad = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride, pad)

    def norm(self, name: str, x: Tensor, zq: Tensor | None) -> Tensor:
        modulated = f"{name}.norm_layer.weight" in self.w
        inner = f"{name}.norm_layer" if modulated else name
        groups = x.reshape(len(x), 32, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        y = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
        y = y * self.w[f"{inner}.weight"][:, None, None] + self.w[f"{inner}.bias"][:, None, None]
        if modulated:
            zq = zq.repeat_interleave(x.shape[2] // zq.shape[2], 2)
            zq = zq.repeat_interleave(x.shape[3] // zq.shape[3], 3)
            y = y * self.conv(f"{name}.conv_y", zq) + self.conv(f"{name}.conv_b", zq)
        return y

    def res(self, name: str, x: Tensor, zq: Tensor | None) -> Tensor:
        y = x
        for i in (1, 2):
            y = self.norm(f"{name}.norm{i}", y, zq)
            y = self.conv(f"{name}.conv{i}", y * y.sigmoid())
        if f"{name}.nin_shortcut.weight" in self.w:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + y

    def attention(self, name: str, x: Tensor, zq: Tensor | None) -> Tensor:
        y = self.norm(f"{name}.norm", x, zq)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view(x.shape))

    def level(self, name: str, x: Tensor, zq: Tensor | None) -> Tensor:
        block = "res" if self.llamagen else "block"
        i = 0
        while f"{name}.{block}.{i}.conv1.weight" in self.w:
            x = self.res(f"{name}.{block}.{i}", x, zq)
            if f"{name}.attn.{i}.q.weight" in self.w:
                x = self.attention(f"{name}.attn.{i}", x, zq)
            i += 1
        assert i > 1
        if f"{name}.downsample.conv.weight" in self.w:
            zeros = torch.zeros_like
            x = torch.cat([x, zeros(x[:, :, :1])], 2)  # a row below, a column to the right
            x = torch.cat([x, zeros(x[:, :, :, :1])], 3)
            x = self.conv(f"{name}.downsample.conv", x, stride=2)
        if f"{name}.upsample.conv.weight" in self.w:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = self.conv(f"{name}.upsample.conv", x)
        return x

    def middle(self, side: str, x: Tensor, zq: Tensor | None) -> Tensor:
        names = ("0", "1", "2") if self.llamagen else ("block_1", "attn_1", "block_2")
        x = self.res(f"{side}.mid.{names[0]}", x, zq)
        x = self.attention(f"{side}.mid.{names[1]}", x, zq)
        return self.res(f"{side}.mid.{names[2]}", x, zq)

    def end(self, side: str, x: Tensor, zq: Tensor | None) -> Tensor:
        y = self.norm(f"{side}.norm_out", x, zq)
        return self.conv(f"{side}.conv_out", y * y.sigmoid())

    def levels(self, side: str) -> list[str]:
        """In the order in which they run."""
        part = "conv_blocks" if self.llamagen else {"encoder": "down", "decoder": "up"}[side]
        start = f"{side}.{part}."
        numbers = {int(n.removeprefix(start).split(".")[0]) for n in self.w if n.startswith(start)}
        return [f"{start}{i}" for i in sorted(numbers, reverse=part == "up")]

    def latents(self, images: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", images.double())
        for name in self.levels("encoder"):
            x = self.level(name, x, None)
        x = self.end("encoder", self.middle("encoder", x, None), None)
        return self.conv("quant_conv", x)

    def codebook(self) -> Tensor:
        codes = self.w["quantize.embedding.weight"]
        return codes / codes.norm(dim=1, keepdim=True) if self.llamagen else codes

    def encode(self, images: Tensor) -> Tensor:
        z = self.latents(images).permute(0, 2, 3, 1)
        z = z / z.norm(dim=-1, keepdim=True) if self.llamagen else z
        return (z[..., None, :] - self.codebook()).square().sum(-1).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        zq = self.codebook()[codes].permute(0, 3, 1, 2)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", zq))
        x = self.middle("decoder", x, zq)
        for name in self.levels("decoder"):
            x = self.level(name, x, zq)
        return self.end("decoder", x, zq)


def assert_close(ours: Tensor, exact: Tensor) -> None:
    scale = exact.abs().max()
    torch.testing.assert_close(ours.double() / scale, exact / scale, rtol=1e-4, atol=1e-5)


# --- Names and numbers


@every_name
def test_every_published_weight_has_its_place(name):
    from t2i.tokenizer.vqgan import rename

    shapes = published_shapes(name)
    shapes.pop("quantize.codebook_used", None)
    with torch.device("meta"):
        model = build_tokenizer(name)
    ours = {key: list(t.shape) for key, t in model.named_parameters()}
    places = rename(shapes, model.config)
    assert {places[key]: shape for key, shape in shapes.items()} == ours
    millions = sum(p.numel() for p in model.parameters()) // 10**6
    assert millions == dict(zip(NAMES, (71, 70, 67, 101, 270), strict=True))[name]


@every_name
@pytest.mark.parametrize("brightness", [1.0, 1e-3])
def test_the_numbers_are_those_of_the_original(name, brightness, tmp_path):
    config, state = narrow(name)
    torch.save(state, tmp_path / "weights.ckpt")
    model, network = load_tokenizer(tmp_path / "weights.ckpt", config), Network(state)
    f = model.downsampling
    images = brightness * (2 * torch.rand(2, 3, 3 * f, 2 * f) - 1)  # oblong, other than 256
    with torch.no_grad():
        assert_close(model.quant_conv(model.encoder(images)), network.latents(images))
        codes = model.encode(images)
        assert torch.equal(codes, network.encode(images)) and len(codes.unique()) > 1
        exact = network.decode(codes)
        assert_close(model.decode(codes), exact)
        assert_close(model(images)[0], exact)


def test_movqgan_can_be_trained_further_with_the_loss_it_had(tmp_path):
    config, state = narrow("movqgan-67m")
    torch.save(state, tmp_path / "weights.ckpt")
    images = 2 * torch.rand(1, 3, 16, 16) - 1
    losses = []
    for legacy in (False, True):
        model = load_tokenizer(tmp_path / "weights.ckpt", replace(config, legacy_beta=legacy))
        model(images)[1].loss.backward()
        losses.append(model.quantizer.codebook.grad)
    torch.testing.assert_close(losses[1], 0.25 * losses[0])
    assert losses[0].any()


# --- Files


def at_full_size(name: str) -> dict[str, Tensor]:
    """A state dict of the real shapes that takes no memory."""
    return {key: torch.ones(1).expand(shape) for key, shape in published_shapes(name).items()}


@every_name
def test_files_of_the_real_size_load_by_name(name, tmp_path):
    path = tmp_path / "published.pt"
    torch.save(at_full_size(name), path)
    rng = torch.get_rng_state()
    model = load_tokenizer(path, name)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.config == TOKENIZER_CONFIGS[name] and not model.training
    assert all((p == 1).all() and p.requires_grad for p in model.parameters())
    assert all((b == 0).all() and b.device.type == "cpu" for b in model.buffers())
    assert model.num_codes == 16384


@pytest.mark.parametrize("container", ["ema", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_containers_and_prefixes(container, prefix, tmp_path):
    config, state = narrow("llamagen-vq8")
    wrapped = {container: {prefix + key: value for key, value in state.items()}, "steps": 7}
    if container == "ema":  # the averages are the ones to use
        wrapped["model"] = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save(wrapped, tmp_path / "file.pt")
    model = load_tokenizer(tmp_path / "file.pt", config)
    assert torch.equal(model.encoder.conv_in.weight, state["encoder.conv_in.weight"])


def test_safetensors_in_half_precision(tmp_path):
    config, state = narrow("movqgan-67m")
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "file.safetensors")
    model = load_tokenizer(tmp_path / "file.safetensors", config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.quantizer.codebook, state["quantize.embedding.weight"].half().float())


def test_what_training_left_in_a_file_is_reported(tmp_path, recwarn):
    config, state = narrow("movqgan-67m")
    path = tmp_path / "file.ckpt"
    extra = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "ema_encoder.conv_inweight": torch.zeros(2),
        "ema_encoder.decay": torch.zeros(()),
    }
    torch.save({"state_dict": {**state, **extra}}, path)
    load_tokenizer(path, config)
    (warning,) = recwarn
    assert str(warning.message) == f"{path}: not of the model, left out: ema_encoder, loss"
    assert warning.filename == __file__


def test_a_complete_file_loads_without_a_word(tmp_path, recwarn):
    for name in NAMES[:3]:
        config, state = narrow(name)
        torch.save(state, tmp_path / "file.pt")
        load_tokenizer(tmp_path / "file.pt", config)
    assert not list(recwarn)


def test_files_that_do_not_fit_say_where(tmp_path):
    config, state = narrow("llamagen-vq16")
    path = tmp_path / "file.pt"

    def message(changed, config=config) -> str:
        torch.save(changed, path)
        with pytest.raises(ValueError) as error:
            load_tokenizer(path, config)
        return str(error.value)

    key = "decoder.conv_blocks.0.attn.1.q.weight"
    assert "attentions.1.q.weight is missing" in message(
        {name: value for name, value in state.items() if name != key}
    )
    assert "surplus.weight is unknown" in message({**state, "surplus.weight": torch.zeros(1)})
    reshaped = message({**state, "quantize.embedding.weight": torch.zeros(64, 9)})
    assert "quantizer.codebook is [64, 9], expected [64, 8]" in reshaped
    other = message(state, narrow("movqgan-67m")[0])
    assert "is missing" in other and " more" in other and str(path) in other
    assert "holds no state dict" in message({"steps": 3})
    assert "holds no state dict" in message([torch.zeros(1)])
    assert "is not a file of plain tensors" in message({"model": Path("object")})


def test_a_file_needs_a_name_and_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image tokenizer at .*nothing.pt"):
        load_tokenizer(tmp_path / "nothing.pt", "llamagen-vq16")
    torch.save({}, tmp_path / "file.pt")
    for name in (None, "emoji64"):
        with pytest.raises(ValueError, match="which published tokenizer.*llamagen-vq16.*movqgan"):
            load_tokenizer(tmp_path / "file.pt", name)
    with pytest.raises(ValueError, match="no image tokenizer named 'vqgan'"):
        load_tokenizer(tmp_path / "file.pt", "vqgan")
