"""Training runs: what a step does, and that an interrupted run ends as an uninterrupted one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY_LM, TINY_TOKENIZER
from torch._dynamo.utils import counters as compiled

import t2i.train.loop as loop
from t2i.data.tokens import encoder_checksum, weights_checksum
from t2i.lm import LM_CONFIGS, build_lm, save_lm
from t2i.train.checkpoint import load_latest
from t2i.train.config import LMTraining, TokenizerTraining, load_config
from t2i.train.lm import LMTask, load_trained_lm, train_lm
from t2i.train.tokenizer import TokenizerTask, load_image_tokenizer, train_tokenizer

torch.set_num_threads(1)
STEPS = 7  # crosses the end of the first epoch: 21 samples, 8 a step
CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")  # without importing torch again


@pytest.fixture
def tokenizer_changes(dataset):
    # Every term is on, and they join at different steps.
    return [
        *TINY_TOKENIZER,
        f"data.path={dataset}",
        f"run.steps={STEPS}",
        "run.log_every=2",
        "run.evaluate_every=3",
        "run.draw_every=4",
        "loss.l1=0.5",
        "loss.gan=0.1",
        "loss.gan_from=0.4",
        "loss.gan_channels=8",
    ]


@pytest.fixture
def lm_changes(tokens, tokenizer_run):
    return [
        *TINY_LM,
        f"data.path={tokens}",
        f"data.tokenizer={tokenizer_run}",
        f"run.steps={STEPS}",
        "run.log_every=2",
        "run.evaluate_every=3",
        "run.draw_every=4",
        "loss.label_smoothing=0.1",
        "optim.accumulate=2",
    ]


@pytest.fixture(params=["tokenizer", "lm"])
def training(request):
    """Each kind of training as a function of the run's folder and of more changes."""
    changes = request.getfixturevalue(f"{request.param}_changes")
    train, base = {
        "tokenizer": (train_tokenizer, TokenizerTraining()),
        "lm": (train_lm, LMTraining()),
    }[request.param]

    def run(folder, *more, resume=False):
        config = load_config(base, overrides=[*changes, f"run.folder={folder}", *more])
        return train(config, resume=resume)

    run.kind, run.changes = request.param, changes
    return run


def final_state(folder: Path) -> tuple:
    """Weights, optimizer, generators and metrics of a run; times left out."""
    _, checkpoint = load_latest(folder / "checkpoints")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        line.pop("seconds_per_step", None)
    return checkpoint.step, checkpoint.position, checkpoint.weights, checkpoint.state, metrics


def assert_same(a, b, where="state"):
    """Equal to the bit, through containers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Killed(BaseException):
    """Ends a run where nothing catches it."""


def test_resumed_run_equals_uninterrupted_run(training, tmp_path, monkeypatch):
    training(tmp_path / "whole")

    # The limit stops the run behind step 1. The next one dies as it writes the checkpoint of step
    # 6: the work since step 5 is lost, its metrics are there already.
    outcome = training(tmp_path / "parts", "run.max_hours=1e-9")
    assert (outcome.step, outcome.stopped_by) == (1, "run.max_hours")
    save, saved = loop.save_checkpoint, []

    def save_until_killed(folder, checkpoint, keep):
        if checkpoint.step == 6:
            raise Killed
        saved.append(checkpoint.step)
        return save(folder, checkpoint, keep)

    monkeypatch.setattr(loop, "save_checkpoint", save_until_killed)
    with pytest.raises(Killed):
        training(tmp_path / "parts", "run.checkpoint_every=1", resume=True)
    monkeypatch.undo()
    assert saved == [2, 3, 4, 5]
    outcome = training(tmp_path / "parts", resume=True)
    assert (outcome.step, outcome.stopped_by) == (STEPS, None)

    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    drawn = [{f.name: f.read_bytes() for f in (tmp_path / run / "samples").iterdir()}
             for run in ("whole", "parts")]  # fmt: skip
    assert len(drawn[0]) == 2 and drawn[0] == drawn[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_ended_by_a_signal_can_be_resumed(number, training, tmp_path):
    """At whatever moment it comes: none of the steps, files and lines waits for it."""
    many = ["run.steps=40", "run.checkpoint_every=3", "run.draw_every=1000"]
    folder, outcomes = tmp_path / "parts", FORK.SimpleQueue()
    process = FORK.Process(target=lambda: outcomes.put(training(folder, *many)))
    process.start()
    until(lambda: any(folder.glob("checkpoints/step-*")))
    os.kill(process.pid, number)
    if number == signal.SIGKILL:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    else:  # the step was finished and kept
        outcome = outcomes.get()
        assert outcome.stopped_by == number.name and 0 < outcome.step < 40
        assert load_latest(folder / "checkpoints")[1].step == outcome.step
        process.join(60)
    assert 0 < load_latest(folder / "checkpoints")[1].step < 40

    training(folder, *many, resume=True)
    training(tmp_path / "whole", *many)
    assert_same(final_state(tmp_path / "whole"), final_state(folder))


def test_a_damaged_checkpoint_costs_only_its_steps(training, tmp_path, capsys):
    training(tmp_path / "whole")
    training(tmp_path / "parts", "run.checkpoint_every=2")
    newest = tmp_path / "parts" / "checkpoints" / f"step-{STEPS:08d}" / "ema.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    training(tmp_path / "parts", resume=True)
    output = capsys.readouterr().out
    assert "ema.safetensors is damaged" in output and "step-00000006" in output
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


def test_two_processes_cannot_share_a_folder(training, tmp_path, monkeypatch):
    def start_another(*_):
        with pytest.raises(RuntimeError, match="another process trains in"):
            training(tmp_path, resume=True)
        raise Killed

    monkeypatch.setattr(loop, "_report", start_another)
    with pytest.raises(Killed):
        training(tmp_path)


@pytest.mark.parametrize(
    "when", [["run.log_every=1"], ["run.log_every=50", "run.checkpoint_every=1"]]
)
def test_what_is_not_finite_is_not_saved(when, training, tmp_path):
    # vq_nearest may notice first.
    with pytest.raises((FloatingPointError, ValueError), match="Lower optim.lr|z holds NaN"):
        training(tmp_path, "optim.lr=1e30", "optim.grad_clip=0", "run.steps=20", *when)
    for checkpoint in tmp_path.glob("checkpoints/step-*/*.safetensors"):
        assert all(w.isfinite().all() for w in load_file(checkpoint).values())


def test_training_learns_and_averages(training, tmp_path):
    training(tmp_path, "run.steps=60", "run.log_every=10", "run.evaluate_every=60")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    train = [line for line in lines if line["split"] == "train"]
    name, share = {"tokenizer": ("l2", 0.5), "lm": ("loss", 0.8)}[training.kind]
    assert train[-1][name] < share * train[0][name]
    assert train[0]["lr"] > train[-1]["lr"] > 0
    _, checkpoint = load_latest(tmp_path / "checkpoints")
    model, ema = checkpoint.weights["model"], checkpoint.weights["ema"]
    assert model.keys() == ema.keys()
    assert any(not torch.equal(model[name], ema[name]) for name in model)


@pytest.mark.parametrize(
    ("change", "tolerance"), [("run.precision=bf16", 0.03), ("run.compile=true", 1e-3)]
)
def test_other_ways_to_compute_train_alike(change, tolerance, training, tmp_path):
    def losses(name, *more):
        changes = ["run.steps=4", "run.log_every=1", "run.evaluate_every=4", *more]
        if training.kind == "lm":
            changes.append("model.overrides.dropout=0.0")
        training(tmp_path / name, *changes)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        keys = ("l2", "vq") if training.kind == "tokenizer" else ("loss", "image", "text")
        return torch.tensor([[line[key] for key in keys] for line in lines[:-1]])

    plain = losses("plain")
    compiled.clear()
    other = losses("other", change)
    torch.testing.assert_close(plain, other, rtol=tolerance, atol=0)
    # It was another way.
    assert compiled["frames"]["ok"] if "compile" in change else not torch.equal(plain, other)


def test_micro_batches_give_the_same_gradient(lm_changes, tmp_path):
    # Without dropout, and with images alone: else each micro-batch has its own weighted mean.
    def first_norm(accumulate):
        changes = [
            *lm_changes,
            f"run.folder={tmp_path / str(accumulate)}",
            f"optim.accumulate={accumulate}",
            "loss.text=0",
        ]
        changes = [change.replace("dropout = 0.1", "dropout = 0.0") for change in changes]
        torch.manual_seed(0)
        return LMTask(load_config(LMTraining(), overrides=changes), CPU).step(0, 0)["grad_norm"]

    torch.testing.assert_close(first_norm(4), first_norm(1), rtol=1e-5, atol=0)


def test_tokenizer_gradient_is_that_of_the_summed_losses(tokenizer_changes, tmp_path):
    """The gradient that goes through the image in two parts equals autograd's on the whole loss."""
    changes = [*tokenizer_changes, f"run.folder={tmp_path}", "loss.gan_from=0"]
    task = TokenizerTask(load_config(TokenizerTraining(), overrides=changes), CPU)
    (images,) = task._micro_batches(0)
    task.tokenizer.eval()  # the codebook does not move between the two
    metrics = task._backward(images, step=0)
    found = [p.grad.clone() for p in task.parameters]

    for p in task.parameters:
        p.grad = None
    reconstruction, vq = task.tokenizer(images)
    error = reconstruction - images
    quality = error.square().mean() + 0.5 * error.abs().mean()
    weight = metrics["gan_weight"]
    (quality + vq.loss - weight * task.discriminator(reconstruction).mean()).backward()
    for gradient, parameter in zip(found, task.parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)

    # And the weight balances the two at the last layer.
    reconstruction, _ = task.tokenizer(images)
    error = reconstruction - images
    quality = error.square().mean() + 0.5 * error.abs().mean()
    adversarial = -task.discriminator(reconstruction).mean()
    norms = [
        torch.autograd.grad(loss, task.last_layer, retain_graph=True)[0].norm()
        for loss in (quality, adversarial)
    ]
    torch.testing.assert_close(weight, 0.1 * norms[0] / (norms[1] + 1e-4), rtol=1e-4, atol=0)


def test_losses_are_of_the_right_tokens(lm_changes, tmp_path):
    changes = [*lm_changes, f"run.folder={tmp_path}"]
    task = LMTask(load_config(LMTraining(), overrides=changes), CPU)
    captions, images = ["red square 1, full style", None], task.data.tokens[:2, 0]
    tokens, kinds = task._collate(captions, images)
    prompt = task.text.prompt(captions[0])
    first = task.lm.config.text_vocab_size
    length = len(prompt) + images.shape[1]
    assert tokens.shape == (2, length)
    assert tokens[0].tolist() == prompt + (images[0].astype(int) + first).tolist()
    assert kinds[0].tolist() == [0] + [1] * (len(prompt) - 1) + [2] * images.shape[1]
    # A dropped caption: the image follows its two separators, and padding comes last.
    assert tokens[1, :2].tolist() == task.text.prompt(None)
    assert kinds[1].tolist() == [0, 0] + [2] * images.shape[1] + [0] * (len(prompt) - 2)
    assert set(tokens[1, 2 + images.shape[1] :].tolist()) == {task.text.pad_id}

    # Each loss is the cross entropy of that row alone: padding changes nothing.
    task.lm.eval()
    _, nll, found = task._losses(task.lm, tokens, kinds)
    for row, kind in ((0, 1), (0, 2), (1, 2)):
        alone = tokens[row : row + 1, kinds[row].ne(0) | (torch.arange(length) < 2)]
        logits = task.lm(alone[:, :-1])[0].log_softmax(-1)
        each = -logits.gather(1, alone[0, 1:, None])[:, 0]
        mask = kinds[row][kinds[row].ne(0) | (torch.arange(length) < 2)][1:] == kind
        rows = torch.arange(2)[:, None].expand_as(kinds[:, 1:])[kinds[:, 1:] > 0]
        torch.testing.assert_close(nll[(found == kind) & (rows == row)], each[mask])


def test_codes_behind_a_large_vocabulary(lm_changes, tmp_path):
    """Stored in 16 bits, they are tokens beyond 65,535 all the same."""
    big = ["model.overrides.text_vocab_size=65530", f"run.folder={tmp_path}"]
    task = LMTask(load_config(LMTraining(), overrides=[*lm_changes, *big]), CPU)
    codes = task.data.tokens[:4, 0]
    tokens, kinds = task._collate(["red"] * 4, codes)
    assert codes.dtype == "uint16" and (codes > 5).any()
    assert torch.equal(tokens[kinds == 2].view(4, -1) - 65530, torch.from_numpy(codes.astype(int)))


def test_a_refused_call_leaves_the_run_alone(lm_changes, tmp_path):
    train_lm(load_config(LMTraining(), overrides=[*lm_changes, f"run.folder={tmp_path}"]))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    for more, resume, error, message in (
        (["model.overrides.dim=64"], False, FileExistsError, "holds a run already"),
        (["model.overrides.dim=64", "run.steps=9"], True, RuntimeError, "size mismatch"),
    ):
        changes = [*lm_changes, f"run.folder={tmp_path}", *more]
        with pytest.raises(error, match=message):
            train_lm(load_config(LMTraining(), overrides=changes), resume=resume)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    load_trained_lm(tmp_path)


def test_a_resumed_run_has_the_options_of_its_configuration(training, tmp_path, monkeypatch):
    training(tmp_path, "run.steps=2", "optim.weight_decay=0.5")
    seen = []

    def report(task, *_):
        groups = task.optimizers["model"].param_groups
        seen.extend((group["weight_decay"], group["betas"]) for group in groups)

    monkeypatch.setattr(loop, "_report", report)
    training(
        tmp_path, "run.steps=3", "optim.weight_decay=0.25", "optim.betas=[0.5,0.6]", resume=True
    )
    assert {decay for decay, _ in seen} == {0.25, 0.0} and {b for _, b in seen} == {(0.5, 0.6)}


def test_a_checkpoint_without_what_is_trained_now_is_named(tokenizer_changes, tmp_path):
    changes = [*tokenizer_changes, f"run.folder={tmp_path}", "run.steps=2"]
    train_tokenizer(load_config(TokenizerTraining(), overrides=[*changes, "loss.gan=0"]))
    with pytest.raises(ValueError, match="step-00000002 holds no discriminator"):
        train_tokenizer(load_config(TokenizerTraining(), overrides=changes), resume=True)


def test_a_batch_that_cannot_be_split_is_named(training, tmp_path):
    with pytest.raises(ValueError, match="optim.batch_size=8: expected a multiple of 3, optim.acc"):
        training(tmp_path, "optim.accumulate=3")


def test_models_that_read_no_text_are_refused(lm_changes, tmp_path):
    changes = [*lm_changes, "model.name=llamagen-b", f"run.folder={tmp_path}"]
    with pytest.raises(ValueError, match="'llamagen-b' reads classes or caption features"):
        train_lm(load_config(LMTraining(), overrides=changes))


def test_label_smoothing_is_torch_s(lm_changes, tmp_path):
    changes = [*lm_changes, f"run.folder={tmp_path}"]
    task = LMTask(load_config(LMTraining(), overrides=changes), CPU)
    tokens, kinds = task._collate(["red"], task.data.tokens[:1, 0])
    task.lm.eval()
    smoothed, _, _ = task._losses(task.lm, tokens, kinds, smoothing=0.1)
    logits = task.lm(tokens[:, :-1])[0]
    expected = torch.nn.functional.cross_entropy(
        logits, tokens[0, 1:], reduction="none", label_smoothing=0.1
    )
    torch.testing.assert_close(smoothed, expected)


def test_long_captions_are_cut_to_the_model_s_positions(lm_changes, tmp_path):
    changes = [*lm_changes, f"run.folder={tmp_path}"]
    task = LMTask(load_config(LMTraining(), overrides=changes), CPU)
    tokens, kinds = task._collate(["red square " * 60], task.data.tokens[:1, 0])
    assert tokens.shape[1] - 1 == task.lm.config.max_positions
    assert tokens[0, -5] == task.text.image_id  # 4 image tokens
    task._losses(task.lm, tokens, kinds)


def test_the_tokens_of_another_tokenizer_are_refused(dataset, lm_changes, tmp_path):
    other = ["run.seed=1", "run.steps=1", f"data.path={dataset}", f"run.folder={tmp_path / 'a'}"]
    train_tokenizer(load_config(TokenizerTraining(), overrides=[*TINY_TOKENIZER, *other]))
    changes = [*lm_changes, f"data.tokenizer={tmp_path / 'a'}", f"run.folder={tmp_path / 'b'}"]
    with pytest.raises(ValueError, match="were not written by the tokenizer"):
        train_lm(load_config(LMTraining(), overrides=changes))


def test_a_model_without_image_rows_gets_them(lm_changes, tokens, tmp_path):
    model = ["model.name=smollm2-135m", "model.overrides.num_kv_heads=1"]
    model += ["model.overrides.text_vocab_size=280", "model.overrides.image_vocab_size=0"]
    changes = [*lm_changes, *model, f"run.folder={tmp_path}"]
    train_lm(load_config(LMTraining(), overrides=[*changes, "run.steps=1"]))
    lm, text, description = load_trained_lm(tmp_path)
    assert lm.config.image_vocab_size == 32
    assert lm.config.text_vocab_size == text.vocab_size > 280
    assert lm.output.weight is lm.tok_embeddings.weight
    assert description["image_size"] == [16, 16]


def test_pretrained_weights_are_where_training_starts(lm_changes, tmp_path):
    changes = [*lm_changes, "model.overrides.image_vocab_size=0", f"run.folder={tmp_path / 'run'}"]
    changes.append(f"model.pretrained={tmp_path / 'lm'}")
    config = load_config(LMTraining(), overrides=changes)
    saved = build_lm(LM_CONFIGS["emoji"].replace(**config.model.overrides))
    save_lm(saved, tmp_path / "lm")
    tasks = [
        LMTask(load_config(LMTraining(), overrides=[*changes, f"model.init={init}"]), CPU)
        for init in ("pretrained", "random")
    ]
    name = "layers.0.attention.qkv.weight"
    assert torch.equal(tasks[0].lm.state_dict()[name], saved.state_dict()[name])
    assert not torch.equal(tasks[1].lm.state_dict()[name], saved.state_dict()[name])
    assert [task.lm.config.image_vocab_size for task in tasks] == [32, 32]


def test_a_run_is_where_another_starts(lm_changes, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train_lm(load_config(LMTraining(), overrides=[*lm_changes, f"run.folder={first}"]))
    changes = [*lm_changes, f"run.folder={second}", "model.init=pretrained"]
    changes.append(f"model.pretrained={first}")
    task = LMTask(load_config(LMTraining(), overrides=changes), CPU)
    averaged = load_latest(first / "checkpoints")[1].weights["ema"]
    assert_same(*(dict(sorted(w.items())) for w in (task.lm.state_dict(), averaged)))
    with pytest.raises(ValueError, match="num_layers=2 .asked: 1."):
        LMTask(load_config(LMTraining(), overrides=[*changes, "model.overrides.num_layers=1"]), CPU)


def test_the_first_view_alone(lm_changes, tmp_path):
    changes = [*lm_changes, f"run.folder={tmp_path}"]
    task = LMTask(load_config(LMTraining(), overrides=[*changes, "data.views=1"]), CPU)
    written = task.data.tokens.shape[1]
    assert written > 1
    for sample in task.order.indices:
        _, codes = task._draw(sample, np.random.default_rng(sample))
        assert np.array_equal(codes, task.data.tokens[sample, 0])
    with pytest.raises(ValueError, match=f"data.views=9: .* holds {written} of each"):
        LMTask(load_config(LMTraining(), overrides=[*changes, "data.views=9"]), CPU)


def test_the_decoder_alone_leaves_the_codes(tokenizer_changes, tokenizer_run, dataset, tmp_path):
    changes = [*tokenizer_changes, f"run.folder={tmp_path}", "model.init=pretrained"]
    changes += [f"model.pretrained={tokenizer_run}", "model.train=decoder", "loss.perceptual=0"]
    train_tokenizer(load_config(TokenizerTraining(), overrides=changes))
    before, after = load_image_tokenizer(tokenizer_run), load_image_tokenizer(tmp_path)
    moved = {
        name
        for name, tensor in after.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    assert moved and all(name.startswith("decoder.") for name in moved)
    assert encoder_checksum(after) == encoder_checksum(before)
    assert weights_checksum(after) != weights_checksum(before)
    with pytest.raises(ValueError, match="not what model.name and model.overrides ask for"):
        TokenizerTask(
            load_config(TokenizerTraining(), overrides=[*changes, "model.overrides.num_codes=64"]),
            CPU,
        )


def test_a_run_s_tokenizer_is_its_averaged_weights(tokenizer_run, tmp_path):
    tokenizer = load_image_tokenizer(tokenizer_run)
    _, checkpoint = load_latest(tokenizer_run / "checkpoints")
    weights = dict(sorted(tokenizer.state_dict().items()))
    assert_same(weights, dict(sorted(checkpoint.weights["ema"].items())))
    with pytest.raises(FileNotFoundError, match="no image tokenizer at"):
        load_image_tokenizer(tmp_path / "none")


def test_two_ranks_train_one_model(training, tmp_path):
    """As under torchrun: the losses of one process on the whole batch, and the run resumes."""
    name, term, tolerance = {
        "lm": ("image", "loss.text=0", 1e-4),
        # Restarted codes are drawn from the batch of the first rank alone.
        "tokenizer": ("l2", "loss.gan=0", 0.05),
    }[training.kind]
    changes = ["run.log_every=1", "run.steps=4", "optim.accumulate=1", term]
    if training.kind == "lm":
        changes.append("model.overrides.dropout=0.0")

    def on_two_ranks(*more):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]

        def run(rank):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
            training(tmp_path / "two", *changes, *more, resume=True)

        processes = [FORK.Process(target=run, args=(rank,)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]

    def losses(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return torch.tensor([line[name] for line in lines if line["split"] == "train"])

    training(tmp_path / "one", *changes)
    on_two_ranks("run.max_hours=1e-9")
    assert load_latest(tmp_path / "two" / "checkpoints")[1].step == 1
    on_two_ranks()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 4
    torch.testing.assert_close(one[:1], two[:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(one, two, rtol=tolerance, atol=0)
