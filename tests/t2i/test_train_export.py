"""From two runs to a model that ``T2I.from_pretrained`` reads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY_LM, TINY_TOKENIZER

from t2i.pipeline import T2I, Sampling
from t2i.train.checkpoint import load_latest
from t2i.train.config import LMTraining, TokenizerTraining, load_config
from t2i.train.export import add_evaluation, export
from t2i.train.lm import train_lm
from t2i.train.tokenizer import train_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lm_run(tokens, tokenizer_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    changes = [f"data.path={tokens}", f"data.tokenizer={tokenizer_run}", f"run.folder={folder}"]
    train_lm(load_config(LMTraining(), overrides=[*TINY_LM, *changes, "run.steps=3"]))
    return folder


def test_exported_model_is_the_averaged_weights(lm_run, tokenizer_run, tmp_path):
    sampling = Sampling(cfg=1.5, top_k=7)
    export(tokenizer_run, lm_run, tmp_path, name="squares", sampling=sampling)
    model = T2I.from_pretrained(tmp_path, device="cpu")
    assert model.sampling == sampling
    assert model.name == "squares" and model.image_size == (16, 16)
    for run, module in ((lm_run, model.lm), (tokenizer_run, model.tokenizer)):
        _, checkpoint = load_latest(run / "checkpoints")
        loaded = module.state_dict()
        assert loaded.keys() == checkpoint.weights["ema"].keys()
        averaged, last = (
            {k: w.half().float() if w.is_floating_point() else w for k, w in weights.items()}
            for weights in (checkpoint.weights["ema"], checkpoint.weights["model"])
        )
        assert all(torch.equal(loaded[k], w) for k, w in averaged.items())
        assert any(not torch.equal(loaded[k], w) for k, w in last.items())


def test_exported_weights_are_half_precision_and_draw(lm_run, tokenizer_run, tmp_path):
    drawn = export(tokenizer_run, lm_run, tmp_path, name="squares").sample(
        "red square 0, full style", n=2
    )
    assert [image.size for image in drawn] == [(16, 16)] * 2
    assert {w.dtype for w in load_file(tmp_path / "lm.safetensors").values()} == {torch.float16}
    (image,) = T2I.from_pretrained(tmp_path, device="cpu").sample("blue square 1")
    assert image.size == (16, 16)


def test_another_tokenizer_of_the_same_sizes_is_refused(dataset, lm_run, tmp_path):
    other = tmp_path / "other"
    changes = [f"data.path={dataset}", f"run.folder={other}", "run.steps=1", "run.seed=1"]
    train_tokenizer(load_config(TokenizerTraining(), overrides=[*TINY_TOKENIZER, *changes]))
    with pytest.raises(ValueError, match="another tokenizer"):
        export(other, lm_run, tmp_path / "out", name="squares")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_run_is_named(lm_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        export(tmp_path / "nothing-here", lm_run, tmp_path / "out", name="squares")


def test_card_says_how_it_was_made_and_what_it_is_worth(lm_run, tokenizer_run, tmp_path):
    export(tokenizer_run, lm_run, tmp_path, name="squares")
    card = (tmp_path / "README.md").read_text()
    assert "3 steps in" in card and '"batch_size"' in card and "psnr_train" in card
    picture = tmp_path / "eval.png"
    for tables in ("| first |", "| second |"):
        picture.write_bytes(tables.encode())
        add_evaluation(tmp_path, tables, picture)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(card) and text.count("## Evaluation") == 1
    assert "| second |" in text and "| first |" not in text
    assert (tmp_path / "samples.png").read_bytes() == b"| second |"
    with pytest.raises(FileNotFoundError, match="README.md"):
        add_evaluation(tmp_path / "nothing-here", "", picture)


def test_card_begins_with_the_runs_before(dataset, lm_run, tokenizer_run, tmp_path):
    changes = [f"data.path={dataset}", f"run.folder={tmp_path / 'tuned'}", "run.steps=1"]
    changes += ["model.init=pretrained", f"model.pretrained={tokenizer_run}", "model.train=decoder"]
    train_tokenizer(load_config(TokenizerTraining(), overrides=[*TINY_TOKENIZER, *changes]))
    # The codes are those that the language model was trained on.
    export(tmp_path / "tuned", lm_run, tmp_path / "out", name="squares")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 0 < card.index(f"### {tokenizer_run.name}") < card.index("### tuned")


def test_card_names_the_licences_of_the_data(lm_run, tokenizer_run, tmp_path):
    model = lm_run / "model.json"
    described = json.loads(model.read_text())
    assert described["sources"] == []  # of pictures that nobody said anything about
    export(tokenizer_run, lm_run, tmp_path, name="squares")
    assert "licence is not known" in (tmp_path / "README.md").read_text()
    described["sources"] = [{"package": "icons 1.2", "license": "MIT", "sha256": "0"}]
    model.write_text(json.dumps(described))
    export(tokenizer_run, lm_run, tmp_path, name="squares")
    assert "| icons 1.2 | MIT |" in (tmp_path / "README.md").read_text()
