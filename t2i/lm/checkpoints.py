"""Published weights under this project's names: Hugging Face Llama, GGUF Llama, open_lm, LlamaGen.

Every reader returns ``(config, state_dict)`` with fp32 tensors and accounts for each tensor of the
file: one that is missing, left over, or of another shape is an error that lists it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import LMConfig, with_caption_prefix

State = dict[str, Tensor]


def read_checkpoint(path: str | Path, config: LMConfig | None = None) -> tuple[LMConfig, State]:
    """Read any supported checkpoint; the kind is told from the file itself.

    Args:
        path: a folder with ``config.json`` and safetensors (Hugging Face Llama), a ``.gguf`` file,
            or a ``.pt``/``.pth`` file of open_lm or LlamaGen.
        config: needed for open_lm and LlamaGen, whose files do not say how many heads they have.
            For the others it is checked against what the file says.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: an unknown kind of file, a variant that this model does not cover, or weights
            that do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        found, state = read_huggingface(path)
    elif path.suffix == ".gguf":
        found, state = read_gguf(path)
    else:
        if config is None:
            raise ValueError(
                f"{path.name} does not say how many heads it has: name a configuration for it"
            )
        tensors = _read_torch(path)
        is_llamagen = any(name.startswith("cls_embedding.") for name in tensors)
        read = _read_llamagen if is_llamagen else _read_open_lm
        return read(tensors, config, str(path))
    if config is not None:
        _check_same_architecture(config, found, path)
    return found, state


def read_huggingface(folder: str | Path) -> tuple[LMConfig, State]:
    """A ``LlamaForCausalLM`` folder: ``config.json`` with ``model.safetensors`` or its shards."""
    from safetensors.torch import load_file

    folder = Path(folder)
    config_file = folder / "config.json"
    if not config_file.exists():
        raise ValueError(f"{folder} holds no config.json: not a Hugging Face model")
    config = _config_from_huggingface(json.loads(config_file.read_text()), config_file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)} (weights are read from safetensors only)"
        )
    tensors: State = {}
    for shard in shards:
        tensors.update(load_file(folder / shard))
    return config, _from_llama(_Tensors(tensors, str(folder)), config)


def read_gguf(path: str | Path) -> tuple[LMConfig, State]:
    """A GGUF file of the llama architecture, dequantised. Needs ``pip install gguf``."""
    reader = open_gguf(path)
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith(("llama.", "general."))
    }
    if fields.get("general.architecture") != "llama":
        raise ValueError(
            f"{path}: architecture {fields.get('general.architecture')!r}, expected 'llama'"
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{path}: rope scaling {scaling!r} is not supported, only 'none'")

    import gguf

    tensors: State = {}
    for tensor in reader.tensors:
        name = _gguf_name(tensor.name)
        values = torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        ).float()
        values = values.reshape([int(size) for size in tensor.shape[::-1]])
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            heads = "llama.attention.head_count" + ("_kv" if ".k_proj." in name else "")
            values = _unpermute(values, fields.get(heads, fields["llama.attention.head_count"]))
        tensors[name] = values
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise ValueError(f"{path} has no token_embd.weight")
    config = LMConfig(
        dim=fields["llama.embedding_length"],
        num_layers=fields["llama.block_count"],
        num_heads=fields["llama.attention.head_count"],
        num_kv_heads=fields.get("llama.attention.head_count_kv", 0),
        head_dim=fields.get("llama.attention.key_length", 0),
        ffn_dim=fields["llama.feed_forward_length"],
        text_vocab_size=embedding.shape[0],
        max_positions=fields["llama.context_length"],
        tied="lm_head.weight" not in tensors,
        norm_eps=_shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        rotary_theta=fields.get("llama.rope.freq_base", 10000.0),
        init="normal",
    )
    return config, _from_llama(_Tensors(tensors, str(path)), config)


def open_gguf(path: str | Path):
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the package gguf: pip install gguf") from error
    if not Path(path).exists():
        raise FileNotFoundError(f"no GGUF file at {path}")
    return gguf.GGUFReader(str(path))


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor -> Hugging Face's. An unknown one stays, to be reported."""
    outer = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    inner = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in inner:
        return f"model.layers.{match[1]}.{inner[match[2]]}.weight"
    return outer.get(name, name)


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp stores the q and k rows of a head for interleaved rotary pairs; undo that."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _shortest(value: float) -> float:
    """The number that was meant: 1e-5 read from a float32 field is 9.999999747378752e-06."""
    return float(f"{value:.6g}")


def _config_from_huggingface(fields: dict[str, Any], source: Path) -> LMConfig:
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


def _from_llama(tensors: _Tensors, config: LMConfig) -> State:
    """Hugging Face's Llama names -> ours; q, k, v and gate, up are stacked."""
    dim, ffn = config.dim, config.ffn_dim
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Old versions of transformers wrote the rotary frequencies; they are computed here.
    tensors.ignore(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
    state = {
        "tok_embeddings.weight": tensors.take("model.embed_tokens.weight", config.vocab_size, dim),
        "norm.weight": tensors.take("model.norm.weight", dim),
    }
    if not config.tied:
        state["output.weight"] = tensors.take("lm_head.weight", config.vocab_size, dim)
    else:
        tensors.ignore(r"lm_head\.weight")  # some files repeat the tied matrix
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        state[ours + "attention.qkv.weight"] = torch.cat(
            [
                tensors.take(attention + "q_proj.weight", q, dim),
                tensors.take(attention + "k_proj.weight", kv, dim),
                tensors.take(attention + "v_proj.weight", kv, dim),
            ]
        )
        state[ours + "attention.out.weight"] = tensors.take(attention + "o_proj.weight", dim, q)
        state[ours + "feed_forward.gate_up.weight"] = torch.cat(
            [
                tensors.take(mlp + "gate_proj.weight", ffn, dim),
                tensors.take(mlp + "up_proj.weight", ffn, dim),
            ]
        )
        state[ours + "feed_forward.down.weight"] = tensors.take(mlp + "down_proj.weight", dim, ffn)
        state[ours + "attention_norm.weight"] = tensors.take(theirs + "input_layernorm.weight", dim)
        state[ours + "ffn_norm.weight"] = tensors.take(
            theirs + "post_attention_layernorm.weight", dim
        )
    tensors.finish()
    return state


def _read_torch(path: Path) -> State:
    """The state dict of a .pt file, out of its container and without the prefixes of wrappers."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a file of plain tensors ({type(error).__name__}); pickled objects are "
            "not loaded: save its state dict alone and try again"
        ) from error
    for container in ("state_dict", "model", "module"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(container), dict):
            checkpoint = checkpoint[container]
    tensors = {
        re.sub(r"^((module|model|_orig_mod)\.)+", "", name): value
        for name, value in checkpoint.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(f"{path} holds no tensors")
    return tensors


def _read_open_lm(tensors: State, config: LMConfig, source: str) -> tuple[LMConfig, State]:
    """open_lm. The file tells the kind of norm; ``config`` tells the positions."""
    config = config.replace(
        norm_bias="norm.bias" in tensors,
        qk_norm="full" if "layers.0.attention.q_norm.weight" in tensors else "none",
    )
    source_tensors = _Tensors(tensors, source)
    source_tensors.ignore(r"layers\.\d+\.attention\.pos_embed\.inv_freq")
    dim, ffn, channels = config.dim, config.ffn_dim, config.num_heads * config.head_dim
    state: State = {}

    def take_norm(name: str, channels: int) -> None:
        for part in ("weight", "bias") if config.norm_bias else ("weight",):
            state[f"{name}.{part}"] = source_tensors.take(f"{name}.{part}", channels)

    def take(ours: str, theirs: str, *shape: int) -> None:
        state[ours] = source_tensors.take(theirs, *shape)

    for end in ("tok_embeddings.weight", "output.weight"):
        take(end, end, config.vocab_size, dim)
    take_norm("norm", dim)
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        take(layer + "attention.qkv.weight", layer + "attention.in_proj.weight", 3 * channels, dim)
        take(layer + "attention.out.weight", layer + "attention.out_proj.weight", dim, channels)
        take(layer + "feed_forward.gate_up.weight", layer + "feed_forward.w12.weight", 2 * ffn, dim)
        take(layer + "feed_forward.down.weight", layer + "feed_forward.w3.weight", dim, ffn)
        take_norm(layer + "attention_norm", dim)
        take_norm(layer + "ffn_norm", dim)
        if config.qk_norm == "full":
            take_norm(layer + "attention.q_norm", channels)
            take_norm(layer + "attention.k_norm", channels)
    source_tensors.finish()
    return config, state


def _read_llamagen(tensors: State, config: LMConfig, source: str) -> tuple[LMConfig, State]:
    """LlamaGen's GPT. The file tells the kind of prefix; ``config`` the grid of image tokens."""
    config = config.replace(prefix_rotary="zero")
    uncond = tensors.get("cls_embedding.uncond_embedding")
    if uncond is not None and config.prefix != "caption" and config.image_grid is not None:
        config = with_caption_prefix(
            config, config.image_grid, length=uncond.shape[0], dim=uncond.shape[1]
        )
    source_tensors = _Tensors(tensors, source)
    dim, ffn = config.dim, config.ffn_dim
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    state: State = {}

    def take(ours: str, theirs: str, *shape: int) -> None:
        state[ours] = source_tensors.take(theirs, *shape)

    if config.prefix == "caption":
        shape = (config.prefix_length, config.prefix_dim)
        take("prefix_embedding.uncond_embedding", "cls_embedding.uncond_embedding", *shape)
        take(
            "prefix_embedding.fc1.weight",
            "cls_embedding.cap_proj.fc1.weight",
            dim,
            config.prefix_dim,
        )
        take("prefix_embedding.fc2.weight", "cls_embedding.cap_proj.fc2.weight", dim, dim)
    else:
        take(
            "prefix_embedding.table.weight",
            "cls_embedding.embedding_table.weight",
            config.prefix_dim + 1,
            dim,
        )
    for end in ("tok_embeddings.weight", "output.weight"):
        take(end, end, config.vocab_size, dim)
    take("norm.weight", "norm.weight", dim)
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        take(layer + "attention.qkv.weight", layer + "attention.wqkv.weight", q + 2 * kv, dim)
        take(layer + "attention.out.weight", layer + "attention.wo.weight", dim, q)
        state[layer + "feed_forward.gate_up.weight"] = torch.cat(
            [
                source_tensors.take(f"{layer}feed_forward.{name}.weight", ffn, dim)
                for name in ("w1", "w3")
            ]
        )
        take(layer + "feed_forward.down.weight", layer + "feed_forward.w2.weight", dim, ffn)
        take(layer + "attention_norm.weight", layer + "attention_norm.weight", dim)
        take(layer + "ffn_norm.weight", layer + "ffn_norm.weight", dim)
    source_tensors.finish()
    return config, state


def _check_same_architecture(asked: LMConfig, found: LMConfig, path: Path) -> None:
    """Everything that changes what the weights compute; how a random model starts, and how long,
    may differ."""
    fields = (
        "dim",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "ffn_dim",
        "text_vocab_size",
        "tied",
    )
    fields += ("norm", "norm_bias", "norm_eps", "qk_norm", "rotary", "rotary_theta")
    differ = [
        f"{f}={getattr(found, f)} (asked: {getattr(asked, f)})"
        for f in fields
        if getattr(found, f) != getattr(asked, f)
    ]
    if differ:
        raise ValueError(f"{path} is another model than the one asked for: {', '.join(differ)}")


class _Tensors:
    """The tensors of a file, each to be taken once or ignored by name."""

    def __init__(self, tensors: State, source: str):
        self.left, self.source = dict(tensors), source
        self.missing: list[str] = []
        self.misshapen: list[str] = []

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor as fp32. A wrong one is noted, so that ``finish`` reports all of them
        together."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            self.missing.append(name)
        elif tuple(tensor.shape) != shape:
            self.misshapen.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        else:
            return tensor.float()
        return torch.empty(shape)

    def ignore(self, pattern: str) -> None:
        self.left = {
            name: tensor for name, tensor in self.left.items() if not re.fullmatch(pattern, name)
        }

    def finish(self) -> None:
        problems = [
            f"{title}: {_some(names)}"
            for title, names in (
                ("missing", self.missing),
                ("wrong shape", self.misshapen),
                ("unknown", self.left),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"{self.source} does not fit the configuration; " + "; ".join(problems)
            )


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
