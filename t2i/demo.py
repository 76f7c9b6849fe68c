"""A first look: a dozen pictures, what ran where and why, and how fast."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t2i_kernels import explain
from t2i_kernels.registry import Explanation

from .grid import draw_grid, save_image
from .pipeline import T2I
from .sampling import Statistics

PROMPTS = (
    "red apple, twemoji style",
    "red apple, noto style",
    "penguin, fluent style",
    "cat face, fluent flat style",
    "smiling face with sunglasses, noto style",
    "rainbow, twemoji style",
    "cactus, fluent flat style",
    "rocket, fluent style",
    "mushroom, noto style",
    "hot beverage, twemoji style",
    "green heart, fluent style",
    "house with garden, fluent flat style",
)


def demo(pipeline: T2I, out: Path, console: Console | None = None) -> None:
    """Draw ``PROMPTS`` into the PNG ``out``, and print backends and speeds."""
    console = console or Console()
    lm, size = pipeline.lm, "×".join(map(str, reversed(pipeline.image_size)))
    console.print(
        f"{pipeline.name}: {lm.num_parameters() / 1e6:.1f} M parameters, {size} pixels, "
        f"{pipeline.grid[0] * pipeline.grid[1]} tokens a picture, on {pipeline.device} "
        f"({torch.get_num_threads()} threads)\n"
    )
    for title, explanation in backends(pipeline).items():
        console.print(backend_table(title, explanation), "")

    images = pipeline.sample(PROMPTS, progress=console.is_terminal)  # warms up, too
    table = Table("path", "ran", "tokens/s", "s an image", box=None)
    paths = {"automatic": None, "reference": "reference"}
    best = dict(zip(paths, measure(pipeline, list(paths.values())), strict=True))
    for path, numbers in best.items():
        speeds = f"{numbers.tokens_per_second:.0f}", f"{numbers.seconds_per_image:.3f}"
        table.add_row(path, f"{numbers.path}, {numbers.backend} attention", *speeds)
    console.print(table, "")
    if best["automatic"].backend == "reference":
        console.print("No fused decoding is there for this machine yet.\n")
    save_image(draw_grid(images, PROMPTS, columns=4), out)
    console.print(f"{len(images)} pictures are in {out}", soft_wrap=True)


def measure(pipeline: T2I, paths: list[str | None]) -> list[Statistics]:
    """The faster of two runs on each backend, taken in turns."""
    best: list[Statistics] = []
    for _ in range(2):
        runs = []
        for backend in paths:
            pipeline.sample(PROMPTS, backend=backend)
            runs.append(pipeline.statistics)
        pairs = zip(best or runs, runs, strict=True)
        best = [min(pair, key=lambda numbers: numbers.seconds_per_image) for pair in pairs]
    return best


def backends(pipeline: T2I) -> dict[str, Explanation]:
    """What each operator runs on in ``pipeline``, and where it is used."""
    config, weight = pipeline.lm.config, pipeline.lm.output.weight
    rows = 2 * len(PROMPTS)  # with and without caption
    q = weight.new_empty(rows, 1, config.num_heads, config.head_dim)
    k = weight.new_empty(rows, 1, config.num_kv_heads, config.head_dim)
    cache = pipeline.lm.allocate_cache(rows, 1)[0]
    quantizer = pipeline.tokenizer.quantizer
    vectors = torch.empty_like(quantizer.codebook)
    return {
        "decode_step (draws the tokens, on the CPU)": explain("decode_step"),
        "decode_attention (draws the tokens elsewhere)": explain(
            "decode_attention", q, k, k, cache
        ),
        "flash_attention (tokens to pixels; training)": explain("flash_attention", q, k, k),
        "vq_nearest (pixels to tokens; training)": explain(
            "vq_nearest", vectors, quantizer.codebook, quantizer.metric
        ),
    }


def backend_table(title: str, explanation: Explanation) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in explanation:
        name = f"{'>' if row.chosen else ' '} {row.backend}"
        table.add_row(name, escape(row.reason or "available"))
    return table
