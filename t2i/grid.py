"""Many pictures with their captions in one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MARGIN = 6
FONT_SIZE = 12


def draw_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    columns: int = 0,
    scale: int = 2,
) -> Image.Image:
    """Pictures in rows on white, captions below them, wrapped at words to the width of a cell.

    Args:
        images: RGB, of one size.
        captions: one an image, or none at all.
        columns: 0 makes the grid about square.
        scale: enlarges small pictures by whole pixels.

    Raises:
        ValueError: no images or of several sizes, another number of captions, or an argument out of
            range.
    """
    if not images:
        raise ValueError("images: expected at least one")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"images: expected one size, got {sorted({i.size for i in images})}")
    if columns < 0 or scale < 1:
        raise ValueError(f"columns={columns}, scale={scale}: expected at least 0 and 1")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    columns = columns or max(1, round(len(images) ** 0.5))
    width, height = (side * scale for side in images[0].size)
    font = ImageFont.load_default(FONT_SIZE)
    lines = [wrap(caption, font, width) for caption in captions or [""] * len(images)]
    line_height = FONT_SIZE + 3
    rows = [slice(i, i + columns) for i in range(0, len(images), columns)]
    # Each row is as high as its longest caption.
    heights = [height + line_height * max(map(len, lines[row])) + 2 * MARGIN for row in rows]
    grid = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    top = MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for column, (image, text) in enumerate(zip(images[row], lines[row], strict=True)):
            left = MARGIN + column * (width + MARGIN)
            grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
            for i, line in enumerate(text):
                x = left + (width - font.getlength(line)) / 2
                draw.text((x, top + height + 2 + i * line_height), line, "black", font)
        top += row_height
    return grid


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    image.save(part, format="PNG")
    os.replace(part, path)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than ``width`` pixels, cut at spaces; a longer word is cut anywhere."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
