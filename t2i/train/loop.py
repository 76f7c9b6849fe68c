"""The loop around every training step: metrics, evaluation, pictures, checkpoints, interruption.

A run is a folder::

    checkpoints/step-…/   see checkpoint.py
    metrics.jsonl         one line every ``log_every`` steps and one an evaluation
    samples/step-….png    what the model makes at that step
    tensorboard/          the same metrics, where TensorBoard is installed

A run that is resumed from a checkpoint continues to the bit: weights, optimizer and metrics become
what they would have been without the interruption (on the CPU, with the same number of threads;
with ``run.compile`` up to rounding).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from t2i.grid import save_image

from .checkpoint import (
    Checkpoint,
    load_latest,
    rng_state,
    save_checkpoint,
    seed_generators,
    set_rng_state,
)
from .config import ConfigError, Optim, Run, differences
from .distributed import (
    any_rank,
    gather,
    local_device,
    mean_over_ranks,
    process_group,
    rank,
    world_size,
)
from .machine import prepare

CHECKPOINTS = "checkpoints"


def holds_run(path: str | Path) -> bool:
    """Whether the folder holds a checkpoint, intact or not."""
    return any(Path(path, CHECKPOINTS).glob("step-*"))


def load_run(path: str | Path) -> Checkpoint:
    """The newest intact checkpoint of the run in the folder ``path``.

    Raises:
        FileNotFoundError: no run there, or one without a checkpoint yet.
        CorruptCheckpoint: every checkpoint is damaged.
    """
    found = load_latest(Path(path) / CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(f"{path} holds no checkpoint of a run")
    return found[1]


class Task(Protocol):
    """What a run trains. Everything that changes from step to step is in ``modules``, in
    ``optimizers`` and in the generators of ``rng_state``."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    batch_size: int
    device: torch.device

    def step(self, step: int, position: int) -> dict[str, Tensor]:
        """Train on the samples at ``position`` and return metrics, 0-d tensors."""

    def describe(self, folder: Path) -> None:
        """Write what belongs beside the checkpoints. Called on one rank, once the folder is this
        process's."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on data that is not trained on. Draws nothing from the generators."""

    def draw(self) -> Image.Image | None:
        """A picture of how far the model is, if there is any. Draws nothing from the
        generators."""


@dataclass(frozen=True)
class Outcome:
    """How ``train`` ended: ``stopped_by`` is None after the last step, else why it was earlier."""

    step: int
    stopped_by: str | None = None


def run_task(build: Callable[[Any, torch.device], Task], config: Any, **options: Any) -> Outcome:
    """Build a task from its configuration on the device that this asks for, and ``train`` it."""
    run = config.run
    device = local_device(run.device)
    prepare(run.threads)
    with process_group(device):
        _check_batch(config.optim)
        seed_generators(run.seed)  # equal weights on every rank
        task = build(config, device)
        seed_generators(run.seed + rank())
        return train(task, run, dataclasses.asdict(config), **options)


def _check_batch(optim: Optim) -> None:
    parts = world_size() * optim.accumulate
    if optim.batch_size % parts:
        raise ConfigError(
            f"optim.batch_size={optim.batch_size}: expected a multiple of {parts}, "
            f"optim.accumulate={optim.accumulate} micro-batches on each of {world_size()} ranks"
        )


def train(
    task: Task,
    run: Run,
    config: dict[str, Any],
    *,
    resume: bool = False,
    resume_command: str = "the same call with resume=True",
    console: Console | None = None,
) -> Outcome:
    """Train until ``run.steps``, a signal, or ``run.max_hours``; leave a checkpoint in each case.

    Args:
        task: what to train, built from ``config``.
        run: folder, intervals, limits.
        config: of the whole run, kept in its checkpoints.
        resume: go on from the newest intact checkpoint, if there is one. Without it, a folder that
            holds a run is an error.
        resume_command: shown when the run stops early.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is False.
        RuntimeError: another process trains in the folder.
        FloatingPointError: a metric became infinite or NaN; the last checkpoint is from before.
        CorruptCheckpoint: every checkpoint is damaged.
    """
    folder = Path(run.folder)
    console = console or Console(quiet=rank() != 0, soft_wrap=True, highlight=False)
    with _only_process(folder), Stop() as stop:
        means, clock = Means(task.device), Clock(run)
        step, position = 0, 0
        if holds_run(folder):
            if not resume:
                raise FileExistsError(
                    f"{folder} holds a run already: continue it with --resume, or choose another "
                    "run.folder"
                )
            step, position = _restore(task, means, folder, config, console)
        if rank() == 0:
            task.describe(folder)
        with Log(folder, step, run.steps, console) as log:
            while step < run.steps:
                began = time.perf_counter()
                metrics = task.step(step, position)
                step, position = step + 1, position + task.batch_size
                means.add(metrics)
                log.advance(step, time.perf_counter() - began)
                _report(task, run, means, log, step)

                stopping, late, due = any_rank(
                    [stop.requested is not None, clock.out_of_time(), clock.checkpoint_due()],
                    task.device,
                )
                last = step == run.steps
                if due or stopping or late or last or step % run.checkpoint_every == 0:
                    _check_finite(step, {name: m.item() for name, m in metrics.items()})
                    _save(task, means, run, config, step, position)
                    clock.saved()
                if (stopping or late) and not last:
                    reason = stop.requested or ("run.max_hours" if late else "another rank")
                    console.print(
                        f"stopped by {reason} after step {step} of {run.steps}, with a checkpoint "
                        f"in {folder}. Continue with: {resume_command}"
                    )
                    return Outcome(step, reason)
        console.print(f"finished: {step} steps in {folder}")
        return Outcome(step)


def _report(task: Task, run: Run, means: Means, log: Log, step: int) -> None:
    """Metrics, evaluation and pictures, each at its interval and after the last step."""

    def due(interval: int) -> bool:
        return step % interval == 0 or step == run.steps

    if due(run.log_every):
        metrics = means.take()
        _check_finite(step, metrics)
        log.write(step, "train", metrics, seconds_per_step=log.take_seconds())
    if rank() == 0 and due(run.evaluate_every):
        log.write(step, "evaluation", task.evaluate())
    if rank() == 0 and due(run.draw_every):
        picture = task.draw()
        if picture is not None:
            save_image(picture, Path(run.folder, "samples", f"step-{step:08d}.png"))


def _restore(
    task: Task, means: Means, folder: Path, config: dict[str, Any], console: Console
) -> tuple[int, int]:
    """Bring everything back to the newest intact checkpoint; returns its (step, position)."""
    path, checkpoint = load_latest(folder / CHECKPOINTS, report=console.print)
    console.print(f"resuming from {path}")
    for line in differences(checkpoint.config, json.loads(json.dumps(config))):
        console.print(f"  changed since: {line}")
    missing = [name for name in task.modules if name not in checkpoint.weights]
    if missing:
        raise ValueError(
            f"{path} holds no {' or '.join(missing)}: take back the change that asks for it, or "
            "choose another run.folder"
        )
    for name, module in task.modules.items():
        module.load_state_dict(checkpoint.weights[name])
    for name, optimizer in task.optimizers.items():
        options = [_options(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint.state["optimizers"][name])
        for group, now in zip(optimizer.param_groups, options, strict=True):
            group.update(now)  # the state is the run's, the options are the configuration's
    generators = checkpoint.state["rng"]
    if rank() < len(generators):  # of a run on other ranks, the rest starts anew
        means.load_state_dict(checkpoint.state["means"][rank()])
        set_rng_state(generators[rank()], task.device)
    return checkpoint.step, checkpoint.position


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Of a group of an optimizer's parameters, all but these."""
    return {key: value for key, value in group.items() if key != "params"}


def _save(
    task: Task, means: Means, run: Run, config: dict[str, Any], step: int, position: int
) -> None:
    generators, all_means = gather(rng_state(task.device)), gather(means.state_dict())
    if rank() != 0:
        return
    state = {
        "optimizers": {name: o.state_dict() for name, o in task.optimizers.items()},
        "means": all_means,
        "rng": generators,
    }
    weights = {name: module.state_dict() for name, module in task.modules.items()}
    checkpoint = Checkpoint(step, position, weights, state, config)
    save_checkpoint(Path(run.folder, CHECKPOINTS), checkpoint, run.keep)


class Means:
    """Running means of the metrics between two lines of the log. The host does not wait for the
    device while they add up. They are part of a checkpoint."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            value = value.detach().to(self.device, torch.float64)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means over steps and ranks, starting anew."""
        means = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        values = mean_over_ranks(means).tolist()
        names = list(self.sums)
        self.sums, self.counts = {}, {}
        return dict(zip(names, values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"sums": sums, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])


class Log:
    """Metrics to metrics.jsonl, to TensorBoard and to the terminal, where a bar shows the rest.

    Lines behind ``step``, of a run that went on after its last checkpoint, are removed.
    """

    def __init__(self, folder: Path, step: int, steps: int, console: Console):
        self.steps, self.console = steps, console
        self.seconds, self.timed = 0.0, 0
        self.path = folder / "metrics.jsonl"
        self.board = None
        if rank() == 0:
            _truncate(self.path, step)
            self.board = _tensorboard(folder / "tensorboard", step, console)
        # Refreshed by hand: a thread that draws would take time from the cores that compute.
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self.job = self.bar.add_task("", total=steps, completed=step)
        self.drawn = 0.0

    def __enter__(self) -> Log:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()
        if self.board is not None:
            self.board.close()

    def advance(self, step: int, seconds: float) -> None:
        self.seconds, self.timed = self.seconds + seconds, self.timed + 1
        self.bar.update(self.job, completed=step)
        if time.monotonic() - self.drawn > 1:
            self.bar.refresh()
            self.drawn = time.monotonic()

    def take_seconds(self) -> float:
        """Seconds a step since the last call, evaluation and checkpoints left out."""
        seconds, self.seconds, self.timed = self.seconds / max(1, self.timed), 0.0, 0
        return seconds

    def write(self, step: int, split: str, metrics: dict[str, float], **timing: float) -> None:
        if rank() != 0:
            return
        metrics = {**metrics, **timing}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(f"{split}/{name}", value, step)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        self.console.print(f"{step}/{self.steps} {split}: {numbers}")


class Clock:
    """The two limits of a run in real time."""

    def __init__(self, run: Run):
        self.run = run
        self.start = self.last = time.monotonic()

    def out_of_time(self) -> bool:
        return 0 < self.run.max_hours <= (time.monotonic() - self.start) / 3600

    def checkpoint_due(self) -> bool:
        return 0 < self.run.checkpoint_minutes <= (time.monotonic() - self.last) / 60

    def saved(self) -> None:
        self.last = time.monotonic()


class Stop:
    """Turns the first SIGINT or SIGTERM into a request to finish the step; a second one acts as
    it always does."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python's own condition
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: Any) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, self._before[number])


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold the folder: two runs in one would overwrite each other. The lock ends with the process,
    however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank() != 0 or os.name != "posix":
        yield
        return
    import fcntl

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process trains in {folder}") from None
        yield


def _truncate(path: Path, step: int) -> None:
    """Keep the lines up to ``step``; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept), encoding="utf-8")
    os.replace(part, path)


def _tensorboard(folder: Path, step: int, console: Console) -> Any | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("TensorBoard is not installed: metrics go to metrics.jsonl alone")
        return None
    return SummaryWriter(folder, purge_step=step + 1)


def _check_finite(step: int, metrics: dict[str, float]) -> None:
    """Infinity and NaN spread to the weights and stay there: seen in any later step."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}; nothing was saved since the last checkpoint. "
                "Lower optim.lr, or clip harder (optim.grad_clip)"
            )
