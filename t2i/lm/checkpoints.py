"""Published weights under this project's names: Hugging Face Llama, GGUF Llama, open_lm, LlamaGen.

Every reader returns ``(config, state_dict)`` with fp32 tensors and accounts for each tensor of the
file: one that is missing, left over, or of another shape is an error that lists it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i.weights import read_safetensors, read_state_dict

from .config import LMConfig, with_caption_prefix
from .model import TransformerLM

State = dict[str, Tensor]

# Our name of a weight -> theirs; several of theirs are stacked. {} is the layer.
_HUGGINGFACE = {
    "tok_embeddings.weight": ["model.embed_tokens.weight"],
    "layers.{}.attention_norm.weight": ["model.layers.{}.input_layernorm.weight"],
    "layers.{}.attention.qkv.weight": [
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ],
    "layers.{}.attention.out.weight": ["model.layers.{}.self_attn.o_proj.weight"],
    "layers.{}.ffn_norm.weight": ["model.layers.{}.post_attention_layernorm.weight"],
    "layers.{}.feed_forward.gate_up.weight": [
        "model.layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight",
    ],
    "layers.{}.feed_forward.down.weight": ["model.layers.{}.mlp.down_proj.weight"],
    "norm.weight": ["model.norm.weight"],
    "output.weight": ["lm_head.weight"],
}
_GGUF = {
    "tok_embeddings.weight": ["token_embd.weight"],
    "layers.{}.attention_norm.weight": ["blk.{}.attn_norm.weight"],
    "layers.{}.attention.qkv.weight": [
        "blk.{}.attn_q.weight",
        "blk.{}.attn_k.weight",
        "blk.{}.attn_v.weight",
    ],
    "layers.{}.attention.out.weight": ["blk.{}.attn_output.weight"],
    "layers.{}.ffn_norm.weight": ["blk.{}.ffn_norm.weight"],
    "layers.{}.feed_forward.gate_up.weight": ["blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"],
    "layers.{}.feed_forward.down.weight": ["blk.{}.ffn_down.weight"],
    "norm.weight": ["output_norm.weight"],
    "output.weight": ["output.weight"],
}
# Weights that are not listed here have the same name on both sides (norms, embeddings, output).
_OPEN_LM = {
    "layers.{}.attention.qkv.weight": ["layers.{}.attention.in_proj.weight"],
    "layers.{}.attention.out.weight": ["layers.{}.attention.out_proj.weight"],
    "layers.{}.feed_forward.gate_up.weight": ["layers.{}.feed_forward.w12.weight"],
    "layers.{}.feed_forward.down.weight": ["layers.{}.feed_forward.w3.weight"],
}
_LLAMAGEN = {
    "prefix_embedding.table.weight": ["cls_embedding.embedding_table.weight"],
    "prefix_embedding.uncond_embedding": ["cls_embedding.uncond_embedding"],
    "prefix_embedding.fc1.weight": ["cls_embedding.cap_proj.fc1.weight"],
    "prefix_embedding.fc2.weight": ["cls_embedding.cap_proj.fc2.weight"],
    "layers.{}.attention.qkv.weight": ["layers.{}.attention.wqkv.weight"],
    "layers.{}.attention.out.weight": ["layers.{}.attention.wo.weight"],
    "layers.{}.feed_forward.gate_up.weight": [
        "layers.{}.feed_forward.w1.weight",
        "layers.{}.feed_forward.w3.weight",
    ],
    "layers.{}.feed_forward.down.weight": ["layers.{}.feed_forward.w2.weight"],
}


def read_checkpoint(path: str | Path, config: LMConfig | None = None) -> tuple[LMConfig, State]:
    """Read any supported checkpoint; the kind is told from the file itself.

    Args:
        path: a folder with ``config.json`` and safetensors (Hugging Face Llama), a ``.gguf`` file,
            or a ``.pt``, ``.pth`` or ``.safetensors`` file of open_lm or LlamaGen.
        config: needed for open_lm and LlamaGen, whose files do not say how many heads they have,
            nor on which grid LlamaGen's images were: 16×16 for 256 pixels, 24×24 for 384. For the
            others it is checked against what the file says, and decides what weights leave open:
            ``init``, ``dropout``, ``max_positions``.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: an unknown kind of file, a variant that this model does not cover, or weights
            that do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir() or path.suffix == ".gguf":
        found, state = read_huggingface(path) if path.is_dir() else read_gguf(path)
        return (found if config is None else same_architecture(config, found, path)), state
    if config is None:
        raise ValueError(f"{path.name} does not say how many heads it has: name its configuration")
    tensors = read_state_dict(path)
    is_llamagen = any(name.startswith("cls_embedding.") for name in tensors)
    convert = _convert_llamagen if is_llamagen else _convert_open_lm
    return convert(tensors, config, path)


def read_huggingface(folder: str | Path) -> tuple[LMConfig, State]:
    """A ``LlamaForCausalLM`` folder: ``config.json`` with ``model.safetensors`` or its shards."""
    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.exists():
        raise ValueError(f"{folder} holds no config.json: not a Hugging Face model")
    config = _huggingface_config(json.loads(config_file.read_text()), config_file)
    shards = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: State = {}
    for shard in shards:
        if not (folder / shard).exists():
            raise ValueError(f"{folder} lacks {shard} (only safetensors are read)")
        tensors.update(read_safetensors(folder / shard))
    # Old versions of transformers wrote the rotary frequencies; some repeat a tied output.
    ignored = r".*\.rotary_emb\.inv_freq" + (r"|lm_head\.weight" if config.tied else "")
    return config, _convert(tensors, config, _HUGGINGFACE, folder, ignored)


def _huggingface_config(fields: dict[str, Any], source: Path) -> LMConfig:
    covered = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    for name, value in covered.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{source}: {name}={fields[name]!r} is not supported, only {value!r}")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{source}: rope type {kind!r} is not supported, only 'default'")
    return LMConfig(
        dim=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields.get("num_key_value_heads") or 0,
        head_dim=fields.get("head_dim") or 0,
        ffn_dim=fields["intermediate_size"],
        text_vocab_size=fields["vocab_size"],
        max_positions=fields["max_position_embeddings"],
        tied=fields.get("tie_word_embeddings", False),
        norm_eps=fields["rms_norm_eps"],
        rotary_theta=float(rope.get("rope_theta", fields.get("rope_theta", 10000.0))),
        init="normal",
        init_std=fields.get("initializer_range", 0.02),
    )


def read_gguf(path: str | Path) -> tuple[LMConfig, State]:
    """A GGUF file of the llama architecture, dequantised. Needs ``pip install gguf``."""
    reader = open_gguf(path)
    from gguf.quants import dequantize

    fields = {
        name.removeprefix("llama."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(("llama.", "general.architecture"))
    }
    covered = {"general.architecture": "llama", "rope.scaling.type": "none"}
    for name, value in covered.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{path}: {name}={fields[name]!r} is not supported, only {value!r}")
    heads = fields["attention.head_count"]
    kv_heads = fields.get("attention.head_count_kv", heads)
    tensors: State = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        weight = weight.reshape([int(size) for size in reversed(tensor.shape)])
        if tensor.name.endswith("attn_q.weight"):
            weight = _unpermute(weight, heads)
        if tensor.name.endswith("attn_k.weight"):
            weight = _unpermute(weight, kv_heads)
        tensors[tensor.name] = weight
    config = LMConfig(
        dim=fields["embedding_length"],
        num_layers=fields["block_count"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.get("attention.key_length", 0),
        ffn_dim=fields["feed_forward_length"],
        text_vocab_size=len(tensors.get("token_embd.weight", ())),
        max_positions=fields["context_length"],
        tied="output.weight" not in tensors,
        norm_eps=_shortest(fields["attention.layer_norm_rms_epsilon"]),
        rotary_theta=fields.get("rope.freq_base", 10000.0),
        init="normal",
    )
    return config, _convert(tensors, config, _GGUF, path)


def open_gguf(path: str | Path):
    """A ``gguf.GGUFReader``, or an error that says what to do."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install gguf") from error
    if not Path(path).exists():
        raise FileNotFoundError(f"no GGUF file at {path}")
    return GGUFReader(str(path))


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp stores the q and k rows of a head for interleaved rotary pairs; undo that."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _shortest(value: float) -> float:
    """The number that was meant: 1e-5 read from a float32 field is 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _convert_open_lm(tensors: State, config: LMConfig, path: Path) -> tuple[LMConfig, State]:
    """The file tells the kind of norm; ``config.rotary`` the positions, which are not in it."""
    config = config.replace(
        norm_bias="norm.bias" in tensors,
        qk_norm="full" if "layers.0.attention.q_norm.weight" in tensors else "none",
    )
    ignored = r".*\.pos_embed\.inv_freq"
    return config, _convert(tensors, config, _OPEN_LM, path, ignored)


def _convert_llamagen(tensors: State, config: LMConfig, path: Path) -> tuple[LMConfig, State]:
    """The file tells the kind of prefix; ``config.image_grid`` the positions."""
    caption = tensors.get("cls_embedding.uncond_embedding")
    if caption is not None and config.prefix == "class":
        length, dim = caption.shape
        config = with_caption_prefix(config, config.image_grid, length=length, dim=dim)
    config = config.replace(prefix_rotary="zero")
    return config, _convert(tensors, config, _LLAMAGEN, path)


def _convert(
    tensors: State, config: LMConfig, names: dict[str, list[str]], source: Any, ignored: str = ""
) -> State:
    """Rename and stack ``tensors`` as ``names`` says, in fp32; report all that does not fit."""
    with torch.device("meta"):
        expected = TransformerLM(config).state_dict()
    if config.tied:
        del expected["output.weight"]
    left = {name: t for name, t in tensors.items() if not re.fullmatch(ignored, name)}
    state: State = {}
    missing, misshapen = [], []
    for ours, weight in expected.items():
        layer = re.match(r"layers\.(\d+)\.", ours)
        pattern = f"layers.{{}}.{ours[layer.end() :]}" if layer else ours
        theirs = [name.format(layer[1] if layer else "") for name in names.get(pattern, [pattern])]
        parts = [left.pop(name, None) for name in theirs]
        absent = [name for name, part in zip(theirs, parts, strict=True) if part is None]
        missing += absent
        if absent:
            continue
        rows = sum(len(part) for part in parts)
        shapes = {(rows, *part.shape[1:]) for part in parts}
        if shapes != {tuple(weight.shape)}:
            found = " + ".join(str(list(part.shape)) for part in parts)
            misshapen.append(f"{' + '.join(theirs)} is {found}, expected {list(weight.shape)}")
            continue
        state[ours] = torch.cat(parts).float()
    problems = {"missing": missing, "wrong shape": misshapen, "unknown": list(left)}
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{source} does not fit the configuration; {listed}")
    return state


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


FREE = ("init", "init_std", "zero_init_output", "max_positions", "dropout")


def same_architecture(asked: LMConfig, found: LMConfig, path: Path) -> LMConfig:
    """``found`` with what ``asked`` may change about given weights: how new rows start, dropout,
    and how long a sequence may grow.

    Raises:
        ValueError: they differ in something that weights depend on.
    """
    asked_fields, found_fields = asked.to_dict(), found.to_dict()
    differ = [
        f"{name}={found_fields[name]} (asked: {value})"
        for name, value in asked_fields.items()
        if name not in FREE and found_fields[name] != value
    ]
    if differ:
        raise ValueError(f"{path} is another model than the one asked for: {', '.join(differ)}")
    return found.replace(**{name: asked_fields[name] for name in FREE})
