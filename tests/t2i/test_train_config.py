"""Configuration files, and changes to them on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i.train.config import (
    ConfigError,
    LMTraining,
    TokenizerTraining,
    differences,
    load_config,
    updated,
)

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("base", "name"),
    [(TokenizerTraining(), "emoji64-tokenizer.toml"), (LMTraining(), "emoji64-lm.toml")],
)
def test_shipped_configurations_are_valid(base, name):
    config = load_config(base, CONFIGS / name)
    assert config != base and type(config) is type(base)


def test_file_then_overrides(tmp_path):
    toml, yaml = tmp_path / "a.toml", tmp_path / "a.yaml"
    toml.write_text('[optim]\nlr = 1\nbetas = [0.5, 0.6]\n[run]\nfolder = "x"\n')
    yaml.write_text("optim: {lr: 1, betas: [0.5, 0.6]}\nrun: {folder: x}\n")
    for path in (toml, yaml):
        config = load_config(
            LMTraining(),
            path,
            ["optim.lr=3e-4", "run.folder=a b", 'text.tokenizer="c"', "model.overrides.dim=64"],
        )
        assert config.optim.lr == 3e-4 and config.optim.betas == (0.5, 0.6)
        assert config.run.folder == "a b" and config.text.tokenizer == "c"
        assert config.model.overrides == {"dim": 64}
        assert config.optim.batch_size == LMTraining().optim.batch_size


def test_values_that_need_each_other_may_come_in_any_order():
    ways = ["model.init=pretrained", "model.pretrained=a"]
    assert load_config(LMTraining(), None, ways) == load_config(LMTraining(), None, ways[::-1])


def test_a_whole_number_is_a_float_but_no_other_conversion_is_made():
    config = updated(LMTraining(), {"optim": {"lr": 1}})
    assert type(config.optim.lr) is float


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.weight_dacay=1", "no key optim.weight_dacay: did you mean optim.weight_decay"),
        ("optm.lr=1", "no key optm: did you mean optim?"),
        ("text.xyz=1", "no key text.xyz: text has tokenizer, vocab_size"),
        ("optim=1", "optim=1: expected a section"),
        ("optim.batch_size=1.5", "optim.batch_size=1.5: expected int, got float"),
        ("optim.batch_size=true", "optim.batch_size=True: expected int, got bool"),
        ("optim.lr=true", "optim.lr=True: expected float, got bool"),
        ("optim.betas=[0.9]", r"optim.betas=\[0.9\]: expected tuple\[float, float\]"),
        ("optim.betas=[0.9, 'x']", r"optim.betas\[1\]='x': expected float, got str"),
        ("run.folder=3", "run.folder=3: expected str, got int"),
        ("optim.batch_size=0", "optim.batch_size=0: expected at least 1"),
        ("optim.ema=1.0", "optim.ema=1.0: expected less than 1"),
        ("optim.lr=nan", "optim.lr=nan: expected at least 0"),
        ("captions.drop=1.1", "captions.drop=1.1: expected at most 1"),
        ("run.precision=fp8", "run.precision='fp8': expected auto or bf16 or fp32"),
        ("model.init=pretrained", "model.init='pretrained' needs pretrained, the path"),
        ("optim.lr", "override 'optim.lr': expected key=value"),
        ("=3", "override '=3': expected key=value"),
    ],
)
def test_a_mistake_names_its_key(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(LMTraining(), None, [override])


def test_random_codes_are_no_reason_to_train_a_decoder():
    with pytest.raises(ConfigError, match="train='decoder' needs init='pretrained'"):
        load_config(TokenizerTraining(), None, ["model.train=decoder"])
    with pytest.raises(ConfigError, match="model.train='lm': expected all or decoder"):
        load_config(TokenizerTraining(), None, ["model.train=lm"])


def test_a_probability_is_at_most_one():
    with pytest.raises(ConfigError, match="data.flip=5.0: expected at most 1"):
        load_config(TokenizerTraining(), None, ["data.flip=5"])


def test_yaml_writes_small_numbers_without_a_point(tmp_path):
    (tmp_path / "a.yaml").write_text("optim:\n  lr: 1e-3\n")
    assert load_config(LMTraining(), tmp_path / "a.yaml").optim.lr == 1e-3


def test_a_broken_file_is_named(tmp_path):
    for name, content in (("a.toml", "lr = "), ("b.yaml", "a: [1"), ("c.yaml", "- a")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=name):
            load_config(LMTraining(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no configuration at .*none.toml"):
        load_config(LMTraining(), tmp_path / "none.toml")


def test_differences_name_each_key():
    old = {"a": {"b": 1, "c": 2}, "d": [1, 2]}
    new = {"a": {"b": 1, "c": 3}, "d": [1, 2], "e": 4}
    assert differences(old, new) == ["a.c: 2 -> 3", "e: None -> 4"]
    assert differences(old, old) == []
