"""The command line, from a folder of pictures to a picture."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny import TINY_LM, TINY_TOKENIZER

from t2i import cli
from t2i.pipeline import T2I
from t2i.train.config import LMTraining, load_config
from t2i.train.export import export
from t2i.train.lm import train_lm
from t2i_kernels import native

torch.set_num_threads(1)


@pytest.fixture
def t2i(monkeypatch, capsys):
    """Runs a command in this process; returns (exit status, output, errors)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["t2i", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tokens, tokenizer_run, tmp_path_factory):
    """A model folder."""
    run, out = tmp_path_factory.mktemp("lm"), tmp_path_factory.mktemp("model")
    changes = [f"data.path={tokens}", f"data.tokenizer={tokenizer_run}", f"run.folder={run}"]
    train_lm(load_config(LMTraining(), overrides=[*TINY_LM, *changes, "run.steps=3"]))
    export(tokenizer_run, run, out, name="squares")
    return out


def test_from_pictures_to_a_picture(t2i, pictures, tmp_path, monkeypatch):
    def works(*arguments):
        status, output, errors = t2i(*arguments)
        assert status == 0, errors
        return output

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.toml").write_text('run.steps = 2\nrun.folder = "runs/tokenizer"\n')
    (tmp_path / "lm.yaml").write_text("run: {steps: 2, folder: runs/lm}\n")
    output = works("data", "folder", pictures, "data", "--size", 16)
    assert "32 pictures" in output
    works("train", "tokenizer", "tokenizer.toml", *TINY_TOKENIZER, "data.path=data")
    works("tokenize", "data", "--tokenizer", "runs/tokenizer", "-o", "tokens", "--views", 2)
    works("train", "lm", "lm.yaml", *TINY_LM, "data.path=tokens", "--init", "random")
    works("export", "--tokenizer", "runs/tokenizer", "--lm", "runs/lm", "-o", "model")

    card = (tmp_path / "model" / "README.md").read_text()
    assert "2 steps" in card and "psnr_unseen_labels" in card and "image_unseen_pairs" in card
    options = ("--model", "model", "--device", "cpu", "--threads", 1, "--top-k", 5, "--seed", 3)
    output = works("sample", "red square 1, full style", "blue", "-n", 3, *options, "-o", "a.png")
    assert "6 pictures" in output and "tokens/s" in output
    if native.reason() is None:
        assert "decode_step, fp32 weights, cpu attention" in output and "% of " in output
        more = ("--speculate", 2, "--draft", "int4", "--weights", "bf16", "--cache", "int8")
        output = works("sample", "blue", *options, *more, "-o", "b.png")
        assert "decode_step, bf16 weights" in output and " drafts" in output
    assert Image.open(tmp_path / "a.png").width > 3 * 2 * 16
    # -o without .png is a folder.
    works("sample", "red square 1, full style", "-n", 2, *options, "--scale", 1, "-o", "some")
    assert [file.name for file in sorted((tmp_path / "some").iterdir())] == [
        "000-seed3.png",
        "000-seed4.png",
    ]
    assert Image.open(tmp_path / "some" / "000-seed3.png").size == (16, 16)

    output = works("demo", "--model", "model", "--device", "cpu", "-o", "demo.png")
    for op in ("decode_attention", "flash_attention", "vq_nearest"):
        assert op in output
    assert "reference" in output and "12 pictures are in demo.png" in output
    assert Image.open(tmp_path / "demo.png").height > 3 * 2 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tokenizer", "none.toml"], "no configuration at none.toml"),
        (["train", "lm", "{toml}", "optim.lr=fast"], "optim.lr='fast': expected float, got str"),
        (["train", "lm", "{toml}", "optim.rl=1"], "no key optim.rl: did you mean optim.lr?"),
        (["train", "lm", "{toml}", "--init", "pretrained"], "needs pretrained, the path"),
        (["train", "lm", "{toml}", "model.name=gpt5"], "no language model named 'gpt5'"),
        (["train", "tokenizer", "{toml}", "model.name=vq"], "no image tokenizer named 'vq'"),
        (["train", "tokenizer", "{toml}", "run.device=tpu"], "device='tpu': expected auto"),
        (["train", "tokenizer", "{toml}", "run.device=xpu"], "device='xpu': expected auto"),
        (["sample", "a cat", "--model", "nowhere"], "nowhere holds no model.json"),
        (["sample", "caf\udce9"], "prompts[0]='caf\\udce9' is not text"),
        (["sample", "a cat", "-o", "a.jpg"], "--out a.jpg: expected a name that ends in .png"),
        (["sample", "a cat", "-o", "ok.toml"], "File exists: 'ok.toml'"),
        (["sample", "a cat", "-o", "ok.toml/a.png"], "File exists: 'ok.toml'"),
        (["sample", "a cat", "-o", "folder.png"], "--out folder.png is a folder"),
        (["tokenize", "nowhere", "--tokenizer", "{run}", "-o", "x"], "nowhere holds no finished"),
        (["export", "--tokenizer", "{run}", "--lm", "b", "-o", "c"], "b holds no checkpoint"),
    ],
)
def test_mistakes_are_one_line(
    t2i, arguments, message, tmp_path, dataset, tokens, tokenizer_run, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    kind = dataset if "tokenizer" in arguments else tokens
    (tmp_path / "ok.toml").write_text(f'data.path = "{kind}"\nrun.folder = "run"\n')
    (tmp_path / "folder.png").mkdir()
    status, _, errors = t2i(*(a.format(toml="ok.toml", run=tokenizer_run) for a in arguments))
    assert status == 1
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_eval_draws_as_it_says(t2i, model, tmp_path, monkeypatch):
    calls = []

    def evaluate_model(generate, tokenizer, dataset, out, **options):
        pictures = generate(["red square 1, full style", "blue"], [5, 9])
        calls.append((pictures, dataset, out, options))
        return {}

    monkeypatch.setattr("t2i.evaluate.evaluate_model", evaluate_model)
    monkeypatch.setattr("t2i.evaluate.summary", lambda result: "| table |")
    options = ("--dataset", "d", "-o", tmp_path, "--prompts", 7, "--cfg", 2, "--top-k", 4)
    status, output, _ = t2i("eval", model, *options, "--seed", 5, "--device", "cpu")
    assert status == 0 and "| table |" in output and str(tmp_path) in output
    ((pictures, dataset, out, given),) = calls
    expected = T2I.from_pretrained(model, device="cpu").sample(
        ["red square 1, full style", "blue"], seed=[5, 9], cfg=2.0, top_k=4
    )
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in expected]
    assert (str(dataset), out, given["prompts"], given["seed"]) == ("d", tmp_path, 7, 5)
    codes = torch.zeros(1, 4, 4, dtype=torch.int64)
    assert given["loss"](["blue"], codes).shape == (1,)
    assert given["settings"]["cfg"] == 2.0 and len(given["settings"]["weights_sha256"]) == 2


def test_a_run_is_not_overwritten(t2i, dataset, tmp_path):
    (tmp_path / "a.toml").write_text(f'run.folder = "{tmp_path / "run"}"\n')
    command = ["train", "tokenizer", tmp_path / "a.toml", *TINY_TOKENIZER, f"data.path={dataset}"]
    status, output, _ = t2i(*command, "run.steps=2", "run.max_hours=1e-9")
    assert status == cli.OUT_OF_TIME
    assert "run.max_hours after step 1 of 2" in output and "--resume" in output
    status, _, errors = t2i(*command, "run.steps=2")
    assert status == 1 and "holds a run already: continue it with --resume" in errors
    status, output, _ = t2i(*command, "run.steps=3", "--resume")
    assert status == 0 and "changed since: run.steps: 2 -> 3" in output


def test_demo_without_weights_says_so(t2i, monkeypatch, tmp_path):
    monkeypatch.setattr("t2i.pipeline.SHIPPED", tmp_path / "none")
    status, _, errors = t2i("demo")
    assert status == 1 and "--model" in errors and str(tmp_path / "none") in errors


def test_help_imports_no_torch():
    code = "import sys, t2i.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_metrics_are_json(tokenizer_run):
    lines = [json.loads(line) for line in (tokenizer_run / "metrics.jsonl").open()]
    assert {line["split"] for line in lines} == {"train", "evaluation"}
    assert lines[-1]["step"] == 3
