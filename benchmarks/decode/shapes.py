"""The models that every engine decodes: random weights of some shapes, in Hugging Face's format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# With the usual 0.02 a tied model repeats its last token whatever its layers do: engines that are
# wrong would give the same tokens.
INIT_STD = 0.05
CODES = 16384  # of an image tokenizer, the last tokens of a vocabulary that has text, too


@dataclass(frozen=True)
class Shape:
    config: dict[str, Any]  # of LlamaConfig
    prompt: int = 64  # tokens
    tokens: int = 256  # that are decoded
    ours: str = ""  # for pictures with guidance: the name of this project's model of that shape
    trained: bool = False  # whose weights ship with it: other engines have random ones

    def prompts(self, batch: int) -> list[list[int]]:
        """Tokens that are the same for every engine."""
        room = min(40000, self.config["vocab_size"] - 300)
        return [
            [300 + (7919 * i + 104729 * b) % room for i in range(self.prompt)] for b in range(batch)
        ]


def _llama(
    dim: int, layers: int, heads: int, ffn_dim: int, vocabulary: int, kv_heads: int = 0,
    tied: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return dict(
        hidden_size=dim,
        intermediate_size=ffn_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=dim // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


_B, _L = _llama(768, 12, 12, 2048, CODES), _llama(1024, 24, 16, 2816, CODES)
SHAPES = {
    # SmolLM2-135M with the 16,384 codes of an image tokenizer in its vocabulary, and open_lm-1b.
    "135m": Shape(_llama(576, 30, 9, 1536, 49152 + CODES, kv_heads=3, tied=True)),
    "1b": Shape(_llama(2048, 24, 16, 5632, 50432 + CODES)),
    # Whole pictures. LlamaGen's rotary positions in two dimensions are ours alone: the work is the
    # same.
    "emoji": Shape(_llama(320, 8, 5, 864, 4096), prompt=10, tokens=64, ours="emoji", trained=True),
    "llamagen-b": Shape(_B, prompt=1, tokens=256, ours="llamagen-b"),
    "llamagen-b-512": Shape(_B, prompt=1, tokens=1024, ours="llamagen-b"),
    "llamagen-l": Shape(_L, prompt=1, tokens=256, ours="llamagen-l"),
    "llamagen-l-512": Shape(_L, prompt=1, tokens=1024, ours="llamagen-l"),
}


def step_bytes(case: dict[str, Any], row: dict[str, Any]) -> float:
    """What a step of a measured case reads of weights and cache, the mean of its steps."""
    slots = case["prompt"] + case["tokens"] / 2
    return row["bytes"] + case["batch"] * row["slot_bytes"] * slots


def make_model(shape: str, folder: Path) -> None:
    """Weights and a tokenizer that has a token for every row, for converters that insist on one."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "done").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=1,
        initializer_range=INIT_STD, **SHAPES[shape].config,
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(folder, max_shard_size="20GB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    merges = []
    for pair in ((a, b) for a in alphabet for b in alphabet):
        if len(vocabulary) < config.vocab_size // 2 and "".join(pair) not in vocabulary:
            vocabulary["".join(pair)] = len(vocabulary)
            merges.append(pair)
    for i in range(len(vocabulary), config.vocab_size):
        vocabulary[f"<code_{i}>"] = i
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    (folder / "done").write_text(json.dumps(SHAPES[shape].config))
