"""The default set: the emoji of four openly licensed designs, with their names as captions."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from . import packages
from .dataset import read_jsonl, write_array, write_dataset, write_jsonl

STYLES = {
    "noto": "noto",
    "fluent-emoji-flat": "fluent flat",
    "fluent-emoji": "fluent",
    "twemoji": "twemoji",
}
UNSEEN_LABELS = 0.10  # share of the labels of which no picture is trained on
UNSEEN_PAIRS = 0.20  # share of the other labels of which one style is not trained on


def build_emoji(
    path: str | Path,
    *,
    size: int = 64,
    tones: bool = False,
    cache: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Draw the set into a dataset folder; goes on where an earlier call stopped.

    Args:
        path: folder to write; finished parts of an interrupted call are in its ``parts``.
        size: side of the square pictures, pixels. Drawn at twice that on white, then reduced.
        tones: keep the variants with a skin tone: 13,956 pictures instead of 6,806.
        cache: folder of the packages' archives (``packages.cache_folder``).

    Splits are by a hash of the label, so they never change: of 10 % of the labels no picture is in
    train; of a fifth of the others one style is in ``unseen_pairs``, where at least two are left.

    Raises:
        ImportError: the renderer ``resvg_py`` is not installed.
        RuntimeError, ValueError: a package cannot be fetched, or is not the pinned one.
    """
    path = Path(path)
    if not 8 <= size <= 512:
        raise ValueError(f"size={size}: expected 8 to 512 pixels")
    archives = {key: packages.fetch(key, cache) for key in (*STYLES, "emojibase")}
    emoji = _emojibase(archives["emojibase"])
    code_points = _code_points(archives["fluent-emoji-flat"])
    parts = path / "parts" / f"{size}{'-tones' if tones else ''}"
    images, pairs = [], []
    for key in STYLES:
        images_file, pairs_file = parts / f"{key}.npy", parts / f"{key}.jsonl"
        if not pairs_file.exists():
            parts.mkdir(parents=True, exist_ok=True)
            icons = _icons(archives[key], code_points)
            drawn, described = _draw(key, icons, emoji, size, tones, progress)
            write_array(images_file, drawn)
            write_jsonl(pairs_file, described)
        images.append(np.load(images_file))
        pairs += read_jsonl(pairs_file)
    _split(pairs)
    sources = [
        {"package": str(packages.PACKAGES[key]), "license": packages.PACKAGES[key].license,
         "sha256": packages.PACKAGES[key].sha256}
        for key in archives
    ]  # fmt: skip
    info = {"name": "emoji", "size": size, "tones": tones, "sources": sources}
    write_dataset(path, np.concatenate(images), pairs, info)
    shutil.rmtree(path / "parts")


def _emojibase(archive: Path) -> dict[str, dict]:
    """Code points -> label, tags and skin tone."""
    emoji = {}
    for entry in json.loads(packages.read_member(archive, "package/en/data.json")):
        common = {"tags": entry.get("tags") or [], "base": entry["label"].lower()}
        for variant in (entry, *entry.get("skins", [])):
            emoji[_normal(variant["hexcode"])] = {
                "label": variant["label"].lower(),
                "tone": variant.get("tone"),
                **common,
            }
    return emoji


def _normal(hexcode: str) -> str:
    """Code points without the variation selector, which sets disagree on."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def _code_points(fluent_flat: Path) -> dict[str, str]:
    """Icon name -> code points, for the set that lists none: it shares names with this one."""
    return {
        name: points
        for points, name in json.loads(packages.read_member(fluent_flat, "chars.json")).items()
    }


def _icons(archive: Path, code_points: dict[str, str]) -> list[tuple[str, str]]:
    """(code points, SVG) of each icon of a set, once, in the set's order."""
    icons = json.loads(packages.read_member(archive, "package/icons.json"))
    chars = json.loads(packages.read_member(archive, "package/chars.json") or "{}")
    if not chars:
        chars = {code_points[name]: name for name in icons["icons"] if name in code_points}
    found, seen = [], set()
    for points, name in chars.items():
        while name in icons.get("aliases", {}):
            name = icons["aliases"][name]["parent"]
        if name in icons["icons"] and name not in seen:
            seen.add(name)
            found.append((points, _svg(icons, icons["icons"][name])))
    return found


def _svg(icons: dict, icon: dict) -> str:
    left, top, width, height = (
        icon.get(field, icons.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _draw(key, icons, emoji, size, tones, progress) -> tuple[np.ndarray, list[dict]]:
    from rich.progress import track

    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("drawing the emoji set needs resvg_py: pip install t2i[data]") from error
    known = [(emoji[_normal(points)], svg) for points, svg in icons if _normal(points) in emoji]
    wanted = [(entry, svg) for entry, svg in known if tones or entry["tone"] is None]
    images = np.empty((len(wanted), size, size, 3), dtype=np.uint8)
    pairs, style = [], STYLES[key]
    for i, (entry, svg) in enumerate(
        track(wanted, f"drawing {style}", disable=not progress, transient=True)
    ):
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True
        )
        drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
        white.alpha_composite(drawn)
        images[i] = np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
        pairs.append({"caption": f"{entry['label']}, {style} style", "style": style, **entry})
    return images, pairs


def _split(pairs: list[dict]) -> None:
    """Give each pair its split. Skin tones of a label go with it."""
    styles: dict[str, set[str]] = {}
    for pair in pairs:
        styles.setdefault(pair["base"], set()).add(pair["style"])
    for pair in pairs:
        base = pair["base"]
        pair["split"] = "train"
        if _unit_hash(f"label {base}") < UNSEEN_LABELS:
            pair["split"] = "unseen_labels"
        elif len(styles[base]) >= 3 and _unit_hash(f"pair {base}") < UNSEEN_PAIRS:
            held_out = min(styles[base], key=lambda style: _unit_hash(f"{base} {style}"))
            if pair["style"] == held_out:
                pair["split"] = "unseen_pairs"


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
