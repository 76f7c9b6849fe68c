"""A dataset from any folder of pictures with captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageOps

from .build import Entry, Rejected, Summary, build_dataset
from .dataset import SPLITS, unit_hash

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}
FILE_COLUMNS = ("file", "file_name", "image", "path")
CAPTION_COLUMNS = ("caption", "text")


def build_folder(
    source: str | Path,
    path: str | Path,
    *,
    captions: str | Path | None = None,
    size: int = 64,
    held_out: float = 0.05,
    progress: bool = True,
    report: Callable[[str], None] = print,
) -> Summary:
    """Write the pictures of a folder and their captions as a dataset; goes on where it stopped.

    A caption is in a ``.txt`` beside its picture (``cat.png``, ``cat.txt``), or in a table: JSONL
    or CSV with a column ``file`` (or file_name, image, path; relative to the table's folder) and a
    column ``caption`` (or text). Other columns are kept; one named ``split`` is obeyed, ``tags``
    are a list or a text with commas. Pictures are turned as their EXIF tag says, cut to their
    central square, and put on white.

    A picture or caption that is missing or broken is skipped and reported, at once and in
    ``rejected.jsonl``.

    Args:
        source: folder, searched with its subfolders.
        path: folder to write.
        captions: the table; by default the only ``.jsonl`` or ``.csv`` directly in ``source``, and
            ``.txt`` files if there is none.
        size: side of the square pictures, pixels.
        held_out: share of the labels, or of the captions where there are none, whose pictures
            become the split ``unseen_labels``.
        report: told of each rejection.

    Raises:
        FileNotFoundError: no such folder or table.
        ValueError: nothing usable, several tables to choose from, one that is not UTF-8 or CSV,
            or an argument out of range.
        FileExistsError: ``path`` holds another dataset.
    """
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder")
    if not 8 <= size <= 4096:
        raise ValueError(f"size={size}: expected 8 to 4096 pixels")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out}: expected 0 to 1, without 1")
    table = _table(source) if captions is None else Path(captions)
    if table is not None and not table.is_file():
        raise FileNotFoundError(f"{table} is not a file")
    found = _beside(source) if table is None else _listed(source, table)
    entries, rejected, stamps = [], [], []
    for name, file, fields in found:
        try:
            entries.append(_entry(name, file, fields, held_out))
            stamps.append([file.stat().st_size, file.stat().st_mtime_ns])
        except Rejected as error:
            rejected.append({"file": name, "reason": str(error)})
    if not entries and not rejected:
        raise ValueError(f"{source} holds no picture ({', '.join(sorted(SUFFIXES))})")
    return build_dataset(
        Path(path),
        entries,
        lambda file: load_square(file, size),
        size=size,
        info={"name": f"folder {source.resolve().name}", "source": str(source.resolve())},
        inputs=[size, stamps],
        rejected=rejected,
        progress=progress,
        report=report,
    )


def load_square(file: Path, size: int) -> Image.Image:
    """The central square of a picture as RGB, ``size`` pixels a side."""
    with Image.open(file) as image:
        # Lets a JPEG decoder skip detail that reducing would remove; others ignore it.
        image.draft("RGB", (2 * size, 2 * size))
        image = on_white(ImageOps.exif_transpose(image))
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def on_white(image: Image.Image) -> Image.Image:
    """Any kind of picture as RGB, what is transparent in it as white."""
    if image.mode.startswith("I"):  # 16 bits, which older Pillow gives 32
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise Rejected(f"pixels from {low} to {high}: expected at most 16 bits")
        # Rounded down: 65535 is white.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "F":
        raise Rejected("floating-point pixels, whose white is not known")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


# Of each picture: its name for messages, its file, and its fields or why it has none.
Found = Iterator[tuple[str, Path, "dict | Rejected"]]


def _beside(source: Path) -> Found:
    """Pictures with a .txt beside them."""
    for file in _pictures(source):
        text = file.with_suffix(".txt")
        try:
            fields = {"caption": text.read_text(encoding="utf-8-sig")}
        except FileNotFoundError:
            fields = Rejected(f"no {text.name} beside it")
        except UnicodeDecodeError as error:
            fields = Rejected(f"{text.name} is not UTF-8: {error}")
        yield str(file.relative_to(source)), file, fields


def _listed(source: Path, table: Path) -> Found:
    """Pictures named by a table, then those in the folder that it does not name."""
    listed = set()
    for line, fields in _rows(table):
        name, file = f"{table.name}:{line}", table
        if isinstance(fields, dict):
            given = next((fields.pop(column) for column in FILE_COLUMNS if column in fields), None)
            if isinstance(given, str) and given:
                name, file = given, table.parent / given
                listed.add(file.resolve())
            else:
                fields = Rejected(f"no file: expected a column {' or '.join(FILE_COLUMNS)}")
        yield name, file, fields
    for file in _pictures(source):
        if file.resolve() not in listed:
            yield str(file.relative_to(source)), file, Rejected(f"not named in {table.name}")


def _rows(table: Path) -> Iterator[tuple[int, dict | Rejected]]:
    """(line number, fields) of each line of a table."""
    try:
        yield from (_csv if table.suffix.lower() == ".csv" else _jsonl)(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: {error}") from None


def _csv(table: Path) -> Iterator[tuple[int, dict]]:
    """(line number, fields) of each row."""
    with open(table, encoding="utf-8-sig", newline="") as f:
        rows = csv.DictReader(f)
        for row in rows:
            row.pop(None, None)  # cells beyond the header
            yield rows.line_num, {name: cell for name, cell in row.items() if cell}


def _jsonl(table: Path) -> Iterator[tuple[int, dict | Rejected]]:
    """(line number, fields) of each line."""
    with open(table, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield number, Rejected(f"not JSON: {error}")
            else:
                yield number, row if isinstance(row, dict) else Rejected("not a JSON object")


def _entry(name: str, file: Path, fields: dict | Rejected, held_out: float) -> Entry:
    if isinstance(fields, Rejected):
        raise fields
    caption = next((fields.pop(column) for column in CAPTION_COLUMNS if column in fields), None)
    if not isinstance(caption, str) or not caption.strip():
        raise Rejected("no caption")
    if not file.is_file():
        raise Rejected("no such file")
    caption = " ".join(caption.split())
    _bring_into_form(fields)
    split = fields.pop("split", None)
    if split is None:
        kind = fields.get("label", caption)
        split = "unseen_labels" if unit_hash(f"caption {kind}") < held_out else "train"
    elif split not in SPLITS:
        raise Rejected(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return Entry(name, {"caption": caption, **fields, "file": name, "split": split}, file)


def _bring_into_form(fields: dict) -> None:
    """The fields that training reads become two texts and a list of texts, or are left out."""
    for name in ("label", "style", "tags"):
        if fields.get(name) in (None, "", []):
            fields.pop(name, None)
    for name in ("label", "style"):
        if not isinstance(fields.get(name, ""), str):
            raise Rejected(f"{name} {fields[name]!r}: expected text")
    tags = fields.get("tags", [])
    if isinstance(tags, str):
        tags = fields["tags"] = [tag.strip() for tag in tags.split(",") if tag.strip()]
    if not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise Rejected(f"tags {tags!r}: expected a list of texts")


def _table(source: Path) -> Path | None:
    tables = sorted(f for f in source.iterdir() if f.suffix.lower() in (".jsonl", ".csv"))
    if len(tables) > 1:
        names = ", ".join(f.name for f in tables)
        raise ValueError(f"{source} holds several tables ({names}): say which has the captions")
    return tables[0] if tables else None


def _pictures(source: Path) -> list[Path]:
    return sorted(
        file
        for file in source.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
