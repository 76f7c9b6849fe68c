"""The models that every engine decodes: random weights of two shapes, in Hugging Face's format."""

from __future__ import annotations

import json
from pathlib import Path

PROMPT = 64  # tokens
TOKENS = 256  # that are decoded
# With the usual 0.02 a tied model repeats its last token whatever its layers do: engines that are
# wrong would give the same tokens.
INIT_STD = 0.05

SHAPES = {
    # SmolLM2-135M with the 16,384 codes of an image tokenizer in its vocabulary.
    "135m": dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152 + 16384,
        tie_word_embeddings=True,
    ),
    # open_lm-1b's.
    "1b": dict(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=50432 + 16384,
        tie_word_embeddings=False,
    ),
}


def prompts(batch: int) -> list[list[int]]:
    """Tokens that are the same for every engine."""
    return [[300 + (7919 * i + 104729 * b) % 40000 for i in range(PROMPT)] for b in range(batch)]


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
        initializer_range=INIT_STD, **SHAPES[shape],
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
    (folder / "done").write_text(json.dumps(SHAPES[shape]))
