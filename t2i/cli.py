"""The command line. What a command needs is imported when it runs: ``t2i --help`` is quick."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from t2i.pipeline import T2I
    from t2i.train.loop import Outcome

OUT_OF_TIME = 75  # exit status of a run that max_hours ended: EX_TEMPFAIL, "try again later"

app = typer.Typer(
    help="Train and sample auto-regressive text-to-image models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make a dataset.", no_args_is_help=True)
train = typer.Typer(
    help="Train from a configuration file. Every key of it can be changed: optim.lr=3e-4.",
    no_args_is_help=True,
)
app.add_typer(data, name="data")
app.add_typer(train, name="train")


class Init(str, Enum):
    random = "random"
    pretrained = "pretrained"


Model = Annotated[
    Path | None, typer.Option("--model", help="Folder of a model. Default: the shipped weights.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the CPU; 0: torch's own choice.")]
# Options of sampling; by default the model's own.
Cfg = Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely code.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely codes; 0: all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likely codes up to this probability.")]
Weights = Annotated[str | None, typer.Option(help="fp32, bf16, int8 or int4, on the CPU.")]
Cache = Annotated[str | None, typer.Option(help="Of keys and values: fp32, bf16, fp16 or int8.")]
Seed = Annotated[int, typer.Option(help="Of the first picture; the next has the next seed.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Changes to the configuration.", metavar="[KEY=VALUE]...")
]
Config = Annotated[Path, typer.Argument(help="TOML or YAML.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")]


@data.command("emoji")
def data_emoji(
    path: Annotated[Path, typer.Argument(help="Folder to write.")] = Path("data/emoji"),
    size: Annotated[int, typer.Option(help="Side of the pictures, pixels.")] = 64,
    tones: Annotated[bool, typer.Option("--tones", help="Keep variants by skin tone.")] = False,
    archives: Annotated[Path | None, typer.Option(help="Folder of downloaded packages.")] = None,
) -> None:
    """Build the default set: emoji in four styles, with their names as captions."""
    from t2i.data.emoji import build_emoji

    print(f"{path} {build_emoji(path, size=size, tones=tones, archives=archives)}")


@data.command("folder")
def data_folder(
    source: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    path: Annotated[
        Path | None, typer.Argument(help="Folder to write. Default: data/ and the same name.")
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="JSONL or CSV, if not .txt files.")] = None,
    size: Annotated[int, typer.Option(help="Side of the pictures, pixels.")] = 64,
    held_out: Annotated[float, typer.Option(help="Share of the labels to keep aside.")] = 0.05,
) -> None:
    """Build a set from any folder of pictures with captions."""
    from t2i.data.folder import build_folder

    path = path or Path("data") / source.resolve().name
    print(f"{path} {build_folder(source, path, captions=captions, size=size, held_out=held_out)}")


@app.command()
def tokenize(
    dataset: Annotated[Path, typer.Argument(help="Folder of a dataset.")],
    tokenizer: Annotated[Path, typer.Option(help="Run, folder or file of an image tokenizer.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    name: Annotated[str | None, typer.Option(help="Which one a published file is.")] = None,
    views: Annotated[int, typer.Option(help="Shifted variants of each picture.")] = 8,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images as well.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Turn the pictures of a dataset into tokens, once, for training a language model."""
    from t2i.data import tokenize_dataset
    from t2i.train.tokenizer import load_image_tokenizer

    model = load_image_tokenizer(tokenizer, name).to(_device(device, threads))
    new = tokenize_dataset(dataset, model, out, views=views, flip=flip)
    print(f"tokens in {out}{'' if new else ' (up to date)'}")


@train.command("tokenizer")
def train_tokenizer(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Train an image tokenizer."""
    from t2i.train.config import TokenizerTraining, load_config
    from t2i.train.tokenizer import train_tokenizer

    settings = load_config(TokenizerTraining(), config, overrides or [])
    command = _resume_command("tokenizer", config, overrides)
    _exit(train_tokenizer(settings, resume=resume, resume_command=command))


@train.command("lm")
def train_lm(
    config: Config,
    overrides: Overrides = None,
    init: Annotated[Init | None, typer.Option(help="Overrides model.init.")] = None,
    resume: Resume = False,
) -> None:
    """Train a language model on captions and image tokens."""
    from t2i.train.config import LMTraining, load_config
    from t2i.train.lm import train_lm

    overrides = [*(overrides or []), *([f"model.init={init.value}"] if init else [])]
    settings = load_config(LMTraining(), config, overrides)
    command = _resume_command("lm", config, overrides)
    _exit(train_lm(settings, resume=resume, resume_command=command))


@app.command()
def export(
    tokenizer: Annotated[Path, typer.Option(help="Run of the image tokenizer.")],
    lm: Annotated[Path, typer.Option(help="Run of the language model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    name: Annotated[str, typer.Option(help="Of the model.")] = "",
    cfg: Cfg = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
) -> None:
    """Join two finished runs into one model: averaged weights, fp16, with a model card.

    The options of sampling become the model's own, which it draws with unless told otherwise.
    """
    from t2i.pipeline import Sampling
    from t2i.train.export import export

    sampling = Sampling(**_given(cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p))
    export(tokenizer, lm, out, name=name or out.name, sampling=sampling)
    print(f"model in {out}")


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One caption or several.")],
    n: Annotated[int, typer.Option("-n", help="Pictures a prompt.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="One .png of all, or a folder for single ones.")
    ] = Path("samples.png"),
    cfg: Cfg = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn together.")] = 16,
    scale: Annotated[int, typer.Option(min=1, help="Enlarge by whole pixels.")] = 2,
    weights: Weights = None,
    cache: Cache = None,
    speculate: Annotated[
        int | None, typer.Option(help="Guess so many tokens ahead in every pass; 0 is off.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="What guesses: weights in int8, int4, bf16, or jacobi.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Of the operators, by name.")] = None,
    model: Model = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Draw pictures for captions."""
    from t2i.grid import draw_grid, save_image

    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ValueError(f"--out {out}: expected a name that ends in .png, or a folder")
    # What cannot be written to is told of before anything is drawn.
    single = out.suffix.lower() == ".png"
    if single and out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder: its name must not end in .png")
    folder = out.parent if single else out
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--out {out}: nothing may be written to {folder}")
    pipeline = _load(model, device, threads)
    images = pipeline.sample(
        prompts,
        n,
        cfg=cfg,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        weights=weights,
        cache=cache,
        speculate=speculate,
        draft=draft,
        backend=backend,
        progress=sys.stderr.isatty(),
    )
    captions = [prompt for prompt in prompts for _ in range(n)]
    if single:
        columns = n if n > 1 else 0
        save_image(draw_grid(images, captions, columns=columns, scale=scale), out)
    else:
        for i, image in enumerate(images):
            width, height = image.size
            name = f"{i // n:03d}-seed{seed + i % n}.png"
            save_image(image.resize((width * scale, height * scale), 0), out / name)
    print(f"{out}: {describe(pipeline)}")


@app.command("eval")
def evaluate(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a model. Default: the shipped weights.")
    ] = None,
    dataset: Annotated[Path, typer.Option(help="Folder of the dataset.")] = Path("data/emoji"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("eval"),
    prompts: Annotated[int, typer.Option(help="Captions of each split.")] = 300,
    cfg: Cfg = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    weights: Weights = None,
    cache: Cache = None,
    seed: Seed = 0,
    card: Annotated[bool, typer.Option("--card", help="Write it into the model's card.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Measure a model's tokenizer and its pictures, for captions that it saw and did not see."""
    from t2i.data.tokens import weights_checksum
    from t2i.evaluate import evaluate_model, summary
    from t2i.pipeline import SHIPPED
    from t2i.train.export import add_evaluation

    pipeline = _load(model, device, threads)
    if card and not (model or SHIPPED).joinpath("README.md").exists():
        raise FileNotFoundError(f"--card: {model or SHIPPED} holds no README.md")
    given = _given(
        cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p, weights=weights, cache=cache
    )
    options = asdict(pipeline.sampling) | given
    checksums = [weights_checksum(part) for part in (pipeline.tokenizer, pipeline.lm)]
    result = evaluate_model(
        lambda captions, seeds: pipeline.sample(captions, seed=seeds, **options),
        pipeline.tokenizer,
        dataset,
        out,
        prompts=prompts,
        seed=seed,
        loss=lambda captions, codes: pipeline.loss(captions, codes, weights=weights, cache=cache),
        settings={"model": pipeline.name, "weights_sha256": checksums, **options},
        progress=sys.stderr.isatty(),
    )
    tables = summary(result)
    if card:
        add_evaluation(model or SHIPPED, tables, out / "eval.png")
    print(f"{tables}\n\n{out}/eval.json, {out}/eval.png")


@app.command()
def doctor() -> None:
    """Say what this machine has, what runs where and why, and how to get what is missing."""
    from t2i.doctor import doctor

    doctor()


@app.command()
def tune() -> None:
    """Measure how the Triton kernels are best cut up on this GPU, and keep it for later runs."""
    import torch

    from t2i.tune import problems, tune
    from t2i_kernels import tuning

    if not torch.cuda.is_available():
        raise RuntimeError("tune: measures on a GPU, and torch finds none here")
    file = tuning.path(torch.cuda.get_device_name())
    tune("cuda", file, chosen=problems())
    print(f"{file}; delete it to measure again")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("demo.png"),
    model: Model = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Draw a dozen prompts, and measure the fused path beside the reference."""
    from t2i.demo import demo

    demo(_load(model, device, threads), out)


def main() -> None:
    """Run the command line. Errors that a user can mend are one line; T2I_TRACEBACK=1 shows where
    they come from."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("T2I_TRACEBACK", "0") not in ("", "0"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def describe(pipeline: T2I) -> str:
    """How long the last pictures took, and what share of the speed of memory that was."""
    import torch

    from t2i_kernels import native

    numbers = pipeline.statistics
    text = (
        f"{numbers.images} pictures, {numbers.tokens_per_second:.0f} tokens/s, "
        f"{numbers.seconds_per_image:.3f} s an image ({numbers.path}, {numbers.backend} attention"
    )
    if pipeline.device.type == "cpu" and native.reason() is None and numbers.passes:
        # How fast as many bytes as a pass reads can be read again and again, up to 1 GiB of them.
        size = min(numbers.bytes_read // (numbers.passes + numbers.drafts), 1 << 30)
        limit = native.read_bandwidth(torch.get_num_threads(), size)
        if limit:
            share = numbers.bytes_read / numbers.decode_seconds / limit
            text += f", {share:.0%} of {limit / 1e9:.0f} GB/s in {numbers.passes} passes"
            if numbers.drafts:
                text += f" and {numbers.drafts} drafts"
    return f"{text})"


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _load(model: Path | None, device: str, threads: int) -> T2I:
    from t2i.pipeline import SHIPPED, T2I

    if model is None and not (SHIPPED / "model.json").exists():
        raise FileNotFoundError(
            f"no weights ship with this copy of t2i ({SHIPPED} is missing): name the folder of a "
            "model with --model, or train one (t2i train, then t2i export)"
        )
    return T2I.from_pretrained(model, device=_device(device, threads))


def _device(name: str, threads: int) -> Any:
    import torch

    from t2i.train.distributed import local_device

    if threads:
        torch.set_num_threads(threads)
    return local_device(name)


def _resume_command(kind: str, config: Path, overrides: list[str] | None) -> str:
    return shlex.join(["t2i", "train", kind, str(config), *(overrides or []), "--resume"])


def _exit(outcome: Outcome) -> None:
    """Exit as the run ended, so that a script does not go on with half a model."""
    if outcome.stopped_by is None:
        return
    number = getattr(signal, outcome.stopped_by, None)
    raise typer.Exit(OUT_OF_TIME if number is None else 128 + number)
