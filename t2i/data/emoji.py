"""The default set: the emoji of four openly licensed designs, with their names as captions.

Icons come from iconify's packages as SVG, names and tags from emojibase; they are joined by code
points. Pictures are drawn on white.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from . import packages
from .build import Entry, Summary, build_dataset
from .dataset import plain_caption, unit_hash

STYLES = {
    "noto": "noto",
    "fluent-emoji-flat": "fluent flat",
    "fluent-emoji": "fluent",
    "twemoji": "twemoji",
}
UNSEEN_LABELS = 0.10  # share of the labels of which no picture is trained on
UNSEEN_PAIRS = 0.25  # share of the other labels of which one style is not trained on
DRAWING = 1  # to be raised when the same icon comes out as other pixels


def build_emoji(
    path: str | Path,
    *,
    size: int = 64,
    tones: bool = False,
    archives: str | Path | None = None,
    progress: bool = True,
) -> Summary:
    """Draw the set into a dataset folder; goes on where an earlier call stopped.

    Args:
        path: folder to write.
        size: side of the square pictures, pixels. Drawn at twice that, then reduced.
        tones: keep the variants with a skin tone: 13,956 pictures instead of 6,806.
        archives: a folder that has the packages' archives already (``packages.fetch``).

    Splits are by a hash of the label, so they never change: of 10 % of the labels no picture is in
    train (``unseen_labels``); of a quarter of the others, about 5 % of all pictures, one style is
    not (``unseen_pairs``), where at least two styles of the label are left to learn from.

    Raises:
        ImportError: the renderer ``resvg_py`` is not installed.
        RuntimeError, ValueError: a package cannot be fetched, or is not the pinned one.
        FileExistsError: ``path`` holds another dataset.
    """
    if not 8 <= size <= 512:
        raise ValueError(f"size={size}: expected 8 to 512 pixels")
    _renderer()  # an error now, not one a picture
    files = {key: packages.fetch(key, archives) for key in (*STYLES, "emojibase")}
    entries = emoji_entries(files, tones)
    info = {
        "name": "emoji",
        "size": size,
        "tones": tones,
        "drawing": DRAWING,
        "sources": [packages.PACKAGES[key].describe() for key in files],
    }
    return build_dataset(
        Path(path),
        entries,
        lambda svg: draw_svg(svg, size),
        size=size,
        info=info,
        progress=progress,
    )


def draw_svg(svg: str, size: int) -> Image.Image:
    """An icon on white, RGB, ``size`` pixels a side; drawn at twice that and reduced."""
    png = _renderer().svg_to_bytes(
        svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    white = Image.new("RGBA", drawn.size, "white")
    white.alpha_composite(drawn)
    return white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def _renderer():
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("drawing the emoji set needs resvg_py: pip install t2i[data]") from error
    return resvg_py


def emoji_entries(files: dict[str, Path], tones: bool) -> list[Entry]:
    """What there is to draw: icons with their pairs, SVG as the source. ``files``: package key ->
    archive."""
    emoji = _emojibase(files["emojibase"])
    code_points = _code_points(files["fluent-emoji-flat"])
    entries = []
    for key, style in STYLES.items():
        for name, points, svg in _icons(files[key], code_points):
            known = emoji.get(_normal(points))
            if known is not None and (tones or known["tone"] is None):
                pair = {"caption": plain_caption(known["label"], style), "style": style, **known}
                entries.append(Entry(f"{key}:{name}", pair, svg))
    _split([entry.pair for entry in entries])
    return entries


def _emojibase(archive: Path) -> dict[str, dict]:
    """Code points -> label, tags, skin tone, and the label without the tone as ``base``."""
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
    chars = json.loads(packages.read_member(fluent_flat, "package/chars.json"))
    return {name: points for points, name in chars.items()}


def _icons(archive: Path, code_points: dict[str, str]) -> list[tuple[str, str, str]]:
    """(name, code points, SVG) of each icon of a set, once, in the set's order."""
    icons = json.loads(packages.read_member(archive, "package/icons.json"))
    chars = json.loads(packages.read_member(archive, "package/chars.json", default=b"{}"))
    if not chars:
        chars = {code_points[name]: name for name in icons["icons"] if name in code_points}
    found = {}
    for points, name in chars.items():
        while name in icons.get("aliases", {}):
            name = icons["aliases"][name]["parent"]
        if name in icons["icons"] and name not in found:
            found[name] = (name, points, _svg(icons, icons["icons"][name]))
    return list(found.values())


def _svg(icons: dict, icon: dict) -> str:
    left, top, width, height = (
        icon.get(field, icons.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _split(pairs: list[dict]) -> None:
    """Give each pair its split. Skin tones of a label go with it."""
    styles: dict[str, set[str]] = {}
    for pair in pairs:
        if pair["tone"] is None:  # so that the set with tones is split alike
            styles.setdefault(pair["base"], set()).add(pair["style"])
    for pair in pairs:
        base, pair["split"] = pair["base"], "train"
        known = styles.get(base, ())
        if unit_hash(f"label {base}") < UNSEEN_LABELS:
            pair["split"] = "unseen_labels"
        elif len(known) >= 3 and unit_hash(f"pair {base}") < UNSEEN_PAIRS:
            if pair["style"] == min(known, key=lambda style: unit_hash(f"{base} {style}")):
                pair["split"] = "unseen_pairs"
