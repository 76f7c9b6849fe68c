"""Captions to tokens and back, on top of Hugging Face's ``tokenizers``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

END_OF_TEXT = "<|endoftext|>"
IMAGE = "<|image|>"
PAD = "<|pad|>"

# How GGUF names the way a vocabulary cuts text before its merges apply (``tokenizer.ggml.pre``).
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_GGUF_PRE_TOKENIZERS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}


class TextTokenizer:
    """Byte-level BPE with the separators that a text-image pair needs.

    A pair is ``<|endoftext|>``, the caption's tokens, ``<|image|>``, the image's tokens; without
    its caption it is ``<|endoftext|> <|image|>`` and the image. ``<|pad|>`` fills rows of a batch.
    A tokenizer that lacks one of the three gets it at the end of its vocabulary.

    Text that spells a special token stays text: a prompt cannot end its own caption.
    """

    def __init__(self, tokenizer: Tokenizer):
        missing = [t for t in (END_OF_TEXT, IMAGE, PAD) if tokenizer.token_to_id(t) is None]
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in missing]
        )
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.endoftext_id = tokenizer.token_to_id(END_OF_TEXT)
        self.image_id = tokenizer.token_to_id(IMAGE)
        self.pad_id = tokenizer.token_to_id(PAD)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Learn merges from captions; the same captions in any order give the same tokenizer.

        Case and runs of spaces are dropped. ``vocab_size`` counts everything: the three special
        tokens (ids 0, 1, 2), the 256 bytes, the merges. Few captions may yield fewer merges.

        Raises:
            ValueError: ``vocab_size`` has no room for the bytes and the special tokens.
        """
        specials = [END_OF_TEXT, IMAGE, PAD]
        smallest = 256 + len(specials)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size={vocab_size}: expected at least {smallest}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.NFC(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(r"\s+"), " "),
                normalizers.Strip(),
            ]
        )
        # A word gets the same tokens at the start of a caption as behind another word.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        """Read a ``tokenizer.json``: one that ``save`` wrote, or a Hugging Face model's.

        Raises:
            FileNotFoundError: no file at ``path``.
            ValueError: it is not a tokenizer.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            return cls(Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error

    @classmethod
    def from_gguf(cls, path: str | Path) -> TextTokenizer:
        """Rebuild the tokenizer that a GGUF file carries in its metadata. Needs ``gguf``.

        Raises:
            ValueError: it is not byte-level BPE, or cuts text in a way that is not known here.
        """
        from .lm.checkpoints import open_gguf

        fields = open_gguf(path).fields

        def field(name: str):
            if f"tokenizer.ggml.{name}" not in fields:
                raise ValueError(f"{path} has no tokenizer.ggml.{name}")
            return fields[f"tokenizer.ggml.{name}"].contents()

        if field("model") != "gpt2":
            raise ValueError(f"{path}: tokenizer {field('model')!r}, only byte-level BPE ('gpt2')")
        pre = field("pre")
        if pre not in _GGUF_PRE_TOKENIZERS:
            known = ", ".join(_GGUF_PRE_TOKENIZERS)
            raise ValueError(f"{path}: pre-tokenizer {pre!r} is not known, only {known}")
        tokens, kinds = field("tokens"), field("token_type")
        merges = [tuple(merge.split(" ")) for merge in field("merges")]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = _GGUF_PRE_TOKENIZERS[pre]
        tokenizer.decoder = decoders.ByteLevel()
        control = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind == control
            ]
        )
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write a ``tokenizer.json``, whole or not at all."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        part.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        os.replace(part, path)

    @property
    def vocab_size(self) -> int:
        """Ids in use, special tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def checksum(self) -> str:
        """SHA-256 of the tokenizer: equal where every text gets the same tokens."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a caption, without separators."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def prompt(self, caption: str | None) -> list[int]:
        """What stands in front of an image's tokens; ``None`` is the caption left out."""
        tokens = [] if caption is None else self.encode(caption)
        return [self.endoftext_id, *tokens, self.image_id]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones are left out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)
