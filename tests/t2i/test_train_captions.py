"""How captions vary from epoch to epoch, and what they are tokenized by."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from t2i.train.captions import make_text_tokenizer, vary_caption
from t2i.train.config import Captions, Text

PAIR = {
    "caption": "owl, noto style",
    "label": "owl",
    "style": "noto",
    "tags": ["bird", "night", "wise", "eyes", "wood", "hoot"],
}
AS_IT_IS = Captions(drop=0, article=0, tags=0, no_style=0)


def varied(pair, options, count=400):
    return [vary_caption(pair, options, np.random.default_rng(i)) for i in range(count)]


def test_each_variation_by_itself():
    assert set(varied(PAIR, AS_IT_IS)) == {"owl, noto style"}
    assert set(varied(PAIR, Captions(drop=1))) == {None}
    assert set(varied(PAIR, Captions(0, article=1, tags=0, no_style=1))) == {"an owl"}
    shark = {**PAIR, "caption": "shark, noto style", "label": "shark"}
    assert set(varied(shark, Captions(0, article=1, tags=0, no_style=0))) == {"a shark, noto style"}
    texts = varied(PAIR, Captions(0, article=0, tags=1, no_style=1))
    chosen = [text.removeprefix("owl: ").split(", ") for text in texts]
    assert {len(tags) for tags in chosen} == {1, 2, 3, 4}
    assert {tag for tags in chosen for tag in tags} == set(PAIR["tags"])
    assert all(len(set(tags)) == len(tags) for tags in chosen)


def test_variations_come_as_often_as_asked():
    found = Counter(varied(PAIR, Captions(drop=0.25, article=0, tags=0, no_style=0.5), 4000))
    assert abs(found[None] / 4000 - 0.25) < 0.03
    assert abs(found["owl"] / (4000 - found[None]) - 0.5) < 0.03


def test_what_lacks_a_style_or_tags_is_varied_without():
    pair = {"caption": "owl", "label": "owl"}
    assert set(varied(pair, Captions(0, article=0.5, tags=1, no_style=0.5))) == {"owl", "an owl"}


@pytest.mark.parametrize("change", [{"label": None}, {"caption": "an owl that looks at the moon"}])
def test_a_caption_that_says_something_else_is_kept(change):
    pair = {**PAIR, **change}
    everything = Captions(drop=0, article=1, tags=1, no_style=1)
    assert set(varied(pair, everything)) == {pair["caption"]}


def test_a_trained_tokenizer_knows_captions_and_tags():
    text = make_text_tokenizer(Text(vocab_size=300), [PAIR, {"caption": "a fox"}])
    assert text.decode(text.encode("hoot owl fox")) == "hoot owl fox"
    assert len(text.encode("noto style")) < len("noto style")
    with pytest.raises(FileNotFoundError):
        make_text_tokenizer(Text(tokenizer="nothing-here.json"), [])
