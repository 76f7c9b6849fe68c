"""Configurations: sizes against the published tables, and what contradicts itself is refused."""

from __future__ import annotations

import json

import pytest
import torch

from t2i.lm import LM_CONFIGS, LMConfig, TransformerLM, build_lm

TINY = dict(dim=32, num_layers=2, num_heads=4, ffn_dim=48, text_vocab_size=20)


def millions(name: str) -> float:
    with torch.device("meta"):
        return TransformerLM(LM_CONFIGS[name]).num_parameters() / 1e6


@pytest.mark.parametrize(
    "name, published",
    [
        ("open_lm_11m", 11.0),
        ("open_lm_25m", 24.7),
        ("open_lm_41m", 41.0),
        ("open_lm_79m_v2", 78.9),
        ("open_lm_160m", 162.4),
        ("open_lm_410m", 411.7),
        ("open_lm_1b", 1439.9),
        ("open_lm_1b_old", 1439.9),
        ("smollm2-135m", 134.5),
    ],
)
def test_parameters_equal_the_published_count(name, published):
    assert round(millions(name), 1) == published


@pytest.mark.parametrize(
    "name, published",
    [
        ("llamagen-b", 111),
        ("llamagen-l", 343),
        ("llamagen-xl", 775),
        ("llamagen-xxl", 1411),
        ("llamagen-3b", 3097),
    ],
)
def test_llamagen_parameters_equal_the_published_count(name, published):
    assert round(millions(name)) == published


def test_the_adapted_open_lm_1b_has_the_papers_size():
    with torch.device("meta"):
        lm = build_lm("open_lm_1b", image_vocab=16384)
    assert round(lm.num_parameters() / 1e6) == 1507
    assert lm.config.image_tokens == slice(50432, 50432 + 16384)


@pytest.mark.parametrize("name", LM_CONFIGS)
def test_a_configuration_survives_json(name):
    config = LM_CONFIGS[name]
    assert LMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_replacing_keeps_what_followed_from_other_fields():
    changed = LM_CONFIGS["emoji"].replace(dim=384, num_heads=6)
    assert (changed.num_kv_heads, changed.head_dim) == (6, 64)
    grouped = LM_CONFIGS["smollm2-135m"].replace(num_layers=2)
    assert (grouped.num_kv_heads, grouped.head_dim) == (3, 64)


def test_unknown_fields_and_names_are_errors():
    with pytest.raises(ValueError, match="num_experts"):
        LMConfig.from_dict({**TINY, "num_experts": 8})
    with pytest.raises(ValueError, match="'gpt5'.*smollm2-135m"):
        build_lm("gpt5")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(norm="batchnorm"), "norm='batchnorm'.*rmsnorm"),
        (dict(rotary="learned"), "rotary='learned'"),
        (dict(num_heads=0), "num_heads=0: expected at least 1"),
        (dict(num_heads=5), "dim=32 is not a multiple of num_heads=5"),
        (dict(num_kv_heads=3), "num_kv_heads=3"),
        (dict(num_kv_heads=2, rotary="head"), "rotary='head'"),
        (dict(head_dim=5), "head_dim=5"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(prefix="class"), "all three or none"),
        (dict(prefix="class", prefix_dim=10, prefix_length=2), "prefix_length=2"),
        (dict(image_grid=(4, 4)), "image_grid needs a prefix"),
        (dict(image_grid=(4, 4), rotary="none"), "rotary='none'"),
    ],
)
def test_a_contradiction_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LMConfig(**{**TINY, **changes})
