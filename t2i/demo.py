"""A first look: a dozen pictures, what ran where and why, and how fast."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from t2i_kernels import explain
from t2i_kernels.registry import Explanation

from .grid import draw_grid, save_image
from .pipeline import T2I

PROMPTS = (
    "red apple, twemoji style",
    "red apple, noto style",
    "shark, fluent style",
    "cat face, fluent flat style",
    "grinning face with sunglasses, noto style",
    "rainbow, twemoji style",
    "cactus, fluent flat style",
    "rocket, fluent style",
    "mushroom, noto style",
    "hot beverage, twemoji style",
    "green heart, fluent style",
    "house with garden, fluent flat style",
)
OPTIONS = {"cfg": 3.0, "top_k": 200, "seed": 0}


def demo(pipeline: T2I, out: Path, console: Console | None = None) -> None:
    """Draw ``PROMPTS`` into the PNG ``out``, and print backends and speeds."""
    console = console or Console()
    lm, size = pipeline.lm, "×".join(map(str, reversed(pipeline.image_size)))
    console.print(
        f"{pipeline.name}: {lm.num_parameters() / 1e6:.1f} M parameters, {size} pixels, "
        f"{pipeline.grid[0] * pipeline.grid[1]} tokens a picture, on {pipeline.device} "
        f"({torch.get_num_threads()} threads)\n"
    )
    for op, explanation in backends(pipeline).items():
        console.print(backend_table(op, explanation), "")

    pipeline.sample(PROMPTS[0], **OPTIONS)  # what is done once is not timed
    images = pipeline.sample(PROMPTS, progress=console.is_terminal, **OPTIONS)
    fused = pipeline.statistics
    pipeline.sample(PROMPTS, progress=console.is_terminal, backend="reference", **OPTIONS)
    reference = pipeline.statistics

    table = Table("path", "decoding attention", "tokens/s", "s an image", box=None)
    for path, numbers in (("fused (automatic)", fused), ("reference", reference)):
        speeds = f"{numbers.tokens_per_second:.0f}", f"{numbers.seconds_per_image:.3f}"
        table.add_row(path, numbers.backend, *speeds)
    console.print(table, "")
    save_image(draw_grid(images, PROMPTS, columns=4), out)
    console.print(f"{len(images)} pictures are in {out}", soft_wrap=True)


def backends(pipeline: T2I) -> dict[str, Explanation]:
    """What each operator runs on in ``pipeline``, asked with tensors of the shapes it sees."""
    config, weight = pipeline.lm.config, pipeline.lm.output.weight
    rows = 2 * len(PROMPTS)  # with and without caption
    q = weight.new_empty(rows, 1, config.num_heads, config.head_dim)
    k = weight.new_empty(rows, 1, config.num_kv_heads, config.head_dim)
    cache = pipeline.lm.allocate_cache(rows, 1)[0]
    codebook = pipeline.tokenizer.quantizer.codebook
    vectors = torch.empty_like(codebook)
    return {
        "decode_attention": explain("decode_attention", q, k, k, cache),
        "flash_attention": explain("flash_attention", q, k, k, causal=True),
        "vq_nearest": explain("vq_nearest", vectors, codebook, pipeline.tokenizer.quantizer.metric),
    }


def backend_table(op: str, explanation: Explanation) -> Table:
    table = Table(title=op, title_justify="left", title_style="bold", box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in explanation:
        table.add_row(f"{'>' if row.chosen else ' '} {row.backend}", row.reason or "available")
    return table
