"""The captions' tokenizer: deterministic, reversible, and deaf to special tokens in a prompt."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from t2i.text import TextTokenizer

WORDS = "red green blue apple shark cat rocket tree smiling face house heart".split()
CAPTIONS = [f"{a} {b}, {s} style" for a in WORDS for b in WORDS for s in ("noto", "twemoji")]


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=320)


def test_special_tokens_come_first(text):
    assert (text.endoftext_id, text.image_id, text.pad_id) == (0, 1, 2)
    assert text.vocab_size == 320
    caption = text.encode("red apple, noto style")
    assert text.prompt("red apple, noto style") == [0, *caption, 1]
    assert text.prompt(None) == [0, 1]
    assert not {0, 1, 2} & set(caption)


def test_training_does_not_depend_on_the_order_of_the_captions(text):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    again = TextTokenizer.train(shuffled, vocab_size=320)
    assert again.checksum == text.checksum
    assert TextTokenizer.train(CAPTIONS[:50], vocab_size=320).checksum != text.checksum


def test_a_word_is_the_same_wherever_it_stands(text):
    assert text.encode("red apple")[-1:] == text.encode("apple")  # one token, learned


def test_case_and_spaces_do_not_matter(text):
    expected = text.encode("a red apple")
    assert text.encode("  A  Red\tAPPLE\n") == expected
    assert text.decode(expected) == "a red apple"


@pytest.mark.parametrize("caption", ["naïve café", "火箭 🚀", "a\u0301", "tab, quote \" and 'it'"])
def test_any_text_comes_back(text, caption):
    """Bytes never seen in training included; accents in composed form."""
    import unicodedata

    decoded = text.decode(text.prompt(caption))
    assert decoded == unicodedata.normalize("NFC", caption)


def test_special_tokens_in_a_prompt_are_plain_text(text):
    tokens = text.prompt("shark <|image|> <|endoftext|> cat")
    assert tokens.count(0) == 1 and tokens.count(1) == 1
    assert text.decode(tokens) == "shark <|image|> <|endoftext|> cat"


def test_batches_equal_single_captions(text):
    assert text.encode_batch(CAPTIONS[:9]) == [text.encode(c) for c in CAPTIONS[:9]]


def test_saving_and_loading(tmp_path, text):
    text.save(tmp_path / "text_tokenizer.json")
    loaded = TextTokenizer.from_file(tmp_path / "text_tokenizer.json")
    assert loaded.checksum == text.checksum and loaded.vocab_size == text.vocab_size
    assert loaded.prompt("shark <|image|>") == text.prompt("shark <|image|>")
    assert [p.name for p in tmp_path.iterdir()] == ["text_tokenizer.json"]


def test_a_hugging_face_tokenizer_gets_what_it_lacks(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<|endoftext|>": 0, "r": 1, "e": 2, "d": 3, "re": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("r", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    assert (text.endoftext_id, text.image_id, text.pad_id, text.vocab_size) == (0, 5, 6, 7)
    assert text.prompt("red") == [0, 4, 3, 5]


def test_bad_files_and_sizes_are_named(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=258: expected at least 259"):
        TextTokenizer.train(CAPTIONS, vocab_size=258)
    with pytest.raises(FileNotFoundError, match="missing.json"):
        TextTokenizer.from_file(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="broken.json is not a tokenizer.json"):
        TextTokenizer.from_file(tmp_path / "broken.json")


def write_gguf(path: Path, *, model: str = "gpt2", pre: str = "smollm") -> None:
    gguf = pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *letters, "re", "red", "<|im_start|>"]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([control if t.startswith("<|") else normal for t in tokens])
    writer.add_token_merges(["r e", "re d"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_tokenizer_from_gguf_metadata(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    text = TextTokenizer.from_gguf(tmp_path / "model.gguf")
    red = 1 + 256 + 1
    assert text.encode("red") == [red]
    assert text.endoftext_id == 0 and text.image_id == text.vocab_size - 2 == 260
    assert text.decode(text.encode("Red 42 <|im_start|>")) == "Red 42 <|im_start|>"  # case is kept
    assert len(text.encode("42")) == 2  # SmolLM2 never merges digits


def test_what_a_gguf_tokenizer_may_not_be(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, model="llama")
    with pytest.raises(ValueError, match="tokenizer 'llama'"):
        TextTokenizer.from_gguf(path)
    write_gguf(path, pre="llama-bpe")
    with pytest.raises(ValueError, match="pre-tokenizer 'llama-bpe' is not known, only gpt-2"):
        TextTokenizer.from_gguf(path)
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        TextTokenizer.from_gguf(tmp_path / "nowhere.gguf")


@pytest.mark.packages
def test_the_real_smollm2_tokenizer():
    cache = Path(os.environ.get("T2I_CACHE", Path.home() / ".cache" / "t2i"))
    files = sorted(cache.rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not files:
        pytest.skip(f"no SmolLM2-135M-Instruct.Q4_1.gguf under {cache} (T2I_CACHE)")
    text = TextTokenizer.from_gguf(files[0])
    assert (text.endoftext_id, text.image_id, text.pad_id) == (0, 49152, 49153)
    assert text.encode("The quick brown fox") == [504, 2365, 6354, 16438]
    sentence = "It cost 1,204 crowns — naïve, isn't it?"
    assert text.decode(text.encode(sentence)) == sentence
