"""Any folder of pictures with captions: what is read how, what is refused and said so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from t2i.data import ImageTextDataset, build, build_folder
from t2i.data.folder import load_square

RED, WHITE = (255, 0, 0), (255, 255, 255)


def picture(path, color=RED, size=(40, 40), caption=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def build_it(source, path, **options):
    said = []
    summary = build_folder(source, path, size=16, progress=False, report=said.append, **options)
    return summary, said


def rejections(path) -> dict[str, str]:
    lines = (path / "rejected.jsonl").read_text().splitlines()
    return {row["file"]: row["reason"] for row in map(json.loads, lines)}


def test_text_beside_the_picture(tmp_path):
    source, path = tmp_path / "in", tmp_path / "out"
    picture(source / "a.png", caption=" a red\n square ")
    picture(source / "deep" / "b.JPG", (0, 0, 255), caption="blue", format="JPEG")
    picture(source / ".hidden.png", caption="not seen")
    summary, said = build_it(source, path, held_out=0)
    assert (summary.images, summary.rejected, said) == (2, [], [])
    data = ImageTextDataset(path, verify=True)
    assert [(p["file"], p["caption"], p["split"]) for p in data.pairs] == [
        ("a.png", "a red square", "train"),
        ("deep/b.JPG", "blue", "train"),
    ]
    assert data.images.shape == (2, 16, 16, 3)
    assert np.abs(data.images[1].astype(int) - (0, 0, 255)).max() < 5
    assert data.info["name"] == "folder in" and data.info["splits"]["train"] == 2


def test_tables(tmp_path):
    for name, text in {
        "one.csv": 'file,caption,label\nx/a.png,"a, b",thing\nx/b.png,c,\n',
        "two.jsonl": '{"file_name": "x/a.png", "text": "a, b", "label": "thing"}\n'
        '{"image": "x/b.png", "caption": "c", "tags": ["t"], "split": "unseen_pairs"}\n',
    }.items():
        source = tmp_path / name.split(".")[0]
        picture(source / "x" / "a.png")
        picture(source / "x" / "b.png", (0, 255, 0))
        (source / name).write_text("\ufeff" + text, encoding="utf-8")
        summary, _ = build_it(source, tmp_path / f"{name}-out", held_out=0)
        a, b = ImageTextDataset(tmp_path / f"{name}-out").pairs
        assert a == {"caption": "a, b", "label": "thing", "file": "x/a.png", "split": "train"}
        assert (b["caption"], b["file"]) == ("c", "x/b.png") and "label" not in b
    assert b["tags"] == ["t"] and b["split"] == "unseen_pairs"


def test_what_is_broken_is_named_and_skipped(tmp_path):
    source, path = tmp_path / "in", tmp_path / "out"
    picture(source / "good.png", caption="good")
    picture(source / "silent.png")
    picture(source / "empty.png", caption="  \n")
    picture(source / "latin.png")
    (source / "latin.txt").write_bytes("café".encode("latin-1"))
    (source / "text.png").write_text("this is no picture")
    (source / "text.txt").write_text("caption")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "cut.png")
    data = (source / "cut.png").read_bytes()
    (source / "cut.png").write_bytes(data[: len(data) // 2])
    (source / "cut.txt").write_text("caption")
    Image.fromarray(np.ones((20, 20), np.float32)).save(source / "float.tiff")
    (source / "float.txt").write_text("caption")

    summary, said = build_it(source, path)
    reasons = rejections(path)
    assert reasons == {row["file"]: row["reason"] for row in summary.rejected}
    assert reasons["silent.png"] == "no silent.txt beside it"
    assert reasons["empty.png"] == "no caption"
    assert "latin.txt is not UTF-8" in reasons["latin.png"]
    assert "cannot identify" in reasons["text.png"]
    assert "OSError" in reasons["cut.png"] or "SyntaxError" in reasons["cut.png"]
    assert "floating-point" in reasons["float.tiff"]
    assert len(reasons) == 6 and summary.images == 1
    assert sorted(said) == sorted(f"rejected {file}: {why}" for file, why in reasons.items())
    assert str(summary) == "built: 1 pictures, 6 rejected"
    kept = ImageTextDataset(path, verify=True)
    assert [pair["file"] for pair in kept.pairs] == ["good.png"] and len(kept.images) == 1
    assert kept.info["rejected"] == 6
    # Again: nothing is drawn, and the rejections are still known.
    again, _ = build_it(source, path)
    assert not again.built and again.rejected == summary.rejected


def test_tags_may_be_one_text_and_empty_fields_are_none(tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.csv").write_text('file,caption,tags,style\na.png,shark,"fish, sea,",\n')
    build_it(tmp_path / "in", tmp_path / "out", held_out=0)
    (pair,) = ImageTextDataset(tmp_path / "out").pairs
    assert pair["tags"] == ["fish", "sea"] and "style" not in pair


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.csv").write_bytes(b"file,caption\na.png,\xff\n")
    with pytest.raises(ValueError, match="a.csv: .*utf-8"):
        build_it(tmp_path / "in", tmp_path / "out")


def test_what_is_wrong_in_a_table(tmp_path):
    source, path = tmp_path / "in", tmp_path / "out"
    picture(source / "a.png")
    picture(source / "unlisted.png")
    rows = [
        '{"file": "a.png", "caption": "a"}',
        '{"file": "a.png", "caption": ',
        "[1, 2]",
        '{"caption": "lost"}',
        "",
        '{"file": "gone.png", "caption": "gone"}',
        '{"file": "a.png", "caption": 7}',
        '{"file": "a.png", "caption": "a", "split": "validation"}',
        '{"file": "a.png", "caption": "a", "label": 7}',
        '{"file": "a.png", "caption": "a", "tags": [7]}',
    ]
    (source / "list.jsonl").write_text("\n".join(rows))
    _, said = build_it(source, path)
    assert len(said) == 9 and len(ImageTextDataset(path)) == 1
    text = "\n".join(said)
    for expected in (
        "list.jsonl:2: not JSON",
        "list.jsonl:3: not a JSON object",
        "list.jsonl:4: no file: expected a column file or file_name or image or path",
        "gone.png: no such file",
        "a.png: no caption",
        "a.png: split 'validation': expected one of train",
        "a.png: label 7: expected text",
        "a.png: tags [7]: expected a list of texts",
        "unlisted.png: not named in list.jsonl",
    ):
        assert f"rejected {expected}" in text


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: None, "holds no picture"),
        (lambda s: picture(s / "a.png"), "no usable picture among 1"),
        (lambda s: [(s / n).write_text("") for n in ("a.csv", "b.jsonl")], "several tables"),
    ],
)
def test_nothing_to_build_from(tmp_path, make, message):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        build_it(tmp_path / "in", tmp_path / "out")


def test_bad_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        build_it(tmp_path / "none", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="none.csv is not a file"):
        build_it(tmp_path, tmp_path / "out", captions=tmp_path / "none.csv")
    with pytest.raises(ValueError, match="held_out=1"):
        build_it(tmp_path, tmp_path / "out", held_out=1)
    with pytest.raises(ValueError, match="size=0"):
        build_folder(tmp_path, tmp_path / "out", size=0)


def save(tmp_path, image, name="x.png", **options):
    """What is read of a picture 16 pixels high, at that size: nothing is resampled."""
    image.save(tmp_path / name, **options)
    return np.asarray(load_square(tmp_path / name, 16))


def test_transparency_becomes_white(tmp_path):
    """In every form that PNG has for it."""
    rgba = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    rgba.paste((0, 0, 0, 0), (0, 0, 8, 16))
    gray = Image.new("LA", (16, 16), (0, 0))
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    palette.paste(1, (8, 0, 16, 16))
    keyed = Image.new("RGB", (16, 16), (1, 2, 3))
    keyed.paste(RED, (8, 0, 16, 16))
    for image, options in (
        (rgba, {}),
        (palette, {"transparency": 0}),
        (keyed, {"transparency": (1, 2, 3)}),
    ):
        out = save(tmp_path, image, **options)
        assert (out[:, :8] == WHITE).all(), image.mode
        assert (out[:, 8:] == RED).all(), image.mode
    assert (save(tmp_path, gray) == WHITE).all()
    half = save(tmp_path, Image.new("RGBA", (16, 16), (255, 0, 0, 128)))
    assert np.abs(half.astype(int) - (255, 127, 127)).max() <= 1


def test_other_depths_and_colour_spaces(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for value in (0, 65535, 0x8000):
        out = save(tmp_path, Image.fromarray(np.full((16, 16), value, np.uint16)))
        assert (out == value >> 8).all(), value
    assert (save(tmp_path, Image.fromarray(ramp))[..., 1] == ramp >> 8).all()
    assert (save(tmp_path, Image.new("1", (16, 16), 1)) == 255).all()
    assert (save(tmp_path, Image.new("L", (16, 16), 77)) == 77).all()
    cmyk = save(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "x.jpg", quality=95)
    assert np.abs(cmyk.astype(int) - RED).max() < 20
    wide = Image.fromarray(np.full((16, 16), 1 << 20, np.int32))
    with pytest.raises(ValueError, match="expected at most 16 bits"):
        save(tmp_path, wide, "x.tiff")


def test_exif_orientation_and_central_crop(tmp_path):
    wide = Image.new("RGB", (48, 16), "white")
    wide.paste(RED, (16, 0, 32, 16))
    assert (save(tmp_path, wide) == RED).all()
    left_red = Image.new("RGB", (16, 16), "white")
    left_red.paste(RED, (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise: left becomes top
    out = save(tmp_path, left_red, exif=exif)
    assert (out[:8] == RED).all() and (out[8:] == WHITE).all()


def test_a_stopped_build_goes_on(tmp_path, monkeypatch):
    source, path = tmp_path / "in", tmp_path / "out"
    for i in range(10):
        picture(source / f"{i}.png", (i, 0, 0), caption=f"number {i}")
    (source / "3.png").write_text("broken")
    monkeypatch.setattr(build, "PART", 2)
    monkeypatch.setattr(build, "_cores", lambda: 1)
    from t2i.data import folder

    opened = []

    def stopping(file, size, at=7):
        opened.append(file.name)
        if len(opened) == at:
            raise KeyboardInterrupt
        return load_square(file, size)

    monkeypatch.setattr(folder, "load_square", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_it(source, path)
    assert not (path / "dataset.json").exists()
    del opened[:]  # three parts were complete; the fourth is lost
    summary, said = build_it(source, path)
    assert opened == ["6.png", "7.png", "8.png", "9.png"]
    assert summary.images == 9 and [row["file"] for row in summary.rejected] == ["3.png"]
    assert len(said) == 1
    data = ImageTextDataset(path, verify=True)
    assert [int(image[0, 0, 0]) for image in data.images] == [0, 1, 2, 4, 5, 6, 7, 8, 9]

    # A picture that changes is drawn again; the old dataset stands until the new one is complete.
    picture(source / "3.png", (33, 0, 0))
    del opened[:]
    with pytest.raises(KeyboardInterrupt):
        build_it(source, path)
    assert len(ImageTextDataset(path, verify=True)) == 9
    build_it(source, path)
    assert ImageTextDataset(path, verify=True).images[3, 0, 0, 0] == 33


def test_another_dataset_is_not_replaced(tmp_path, dataset):
    picture(tmp_path / "in" / "a.png", caption="a")
    before = (dataset / "dataset.json").read_bytes()
    with pytest.raises(FileExistsError, match="holds the dataset 'folder pictures"):
        build_it(tmp_path / "in", dataset)
    assert (dataset / "dataset.json").read_bytes() == before


def test_held_out_captions_are_in_no_other_split(tmp_path):
    for i in range(60):
        picture(tmp_path / "in" / f"{i}.png", caption=f"caption {i % 30}")
    build_it(tmp_path / "in", tmp_path / "out", held_out=0.3)
    split: dict[str, set] = {}
    for pair in ImageTextDataset(tmp_path / "out").pairs:
        split.setdefault(pair["caption"], set()).add(pair["split"])
    assert all(len(names) == 1 for names in split.values())
    assert 3 <= sum("unseen_labels" in names for names in split.values()) <= 15


def test_held_out_labels_are_in_no_other_split(tmp_path):
    (tmp_path / "in").mkdir()
    rows = []
    for i in range(60):
        picture(tmp_path / "in" / f"{i}.png")
        rows.append({"file": f"{i}.png", "caption": f"{i} of {i % 30}", "label": f"{i % 30}"})
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_it(tmp_path / "in", tmp_path / "out", held_out=0.3)
    split: dict[str, set] = {}
    for pair in ImageTextDataset(tmp_path / "out").pairs:
        split.setdefault(pair["label"], set()).add(pair["split"])
    assert all(len(names) == 1 for names in split.values())
    assert 3 <= sum("unseen_labels" in names for names in split.values()) <= 15


def test_reading(dataset, tmp_path):
    data = ImageTextDataset(dataset, "unseen_pairs")
    assert 0 < len(data) < len(data.pairs)
    image, pair = data[0]
    assert image.shape == (16, 16, 3) and pair["split"] == "unseen_pairs"
    assert (image == data.images[data.rows[0]]).all()
    with pytest.raises(ValueError, match="split 'test': expected one of train, unseen_pairs"):
        ImageTextDataset(dataset, "test")
    with pytest.raises(FileNotFoundError, match="holds no finished dataset.json"):
        ImageTextDataset(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format version 99, expected 1"):
        ImageTextDataset(tmp_path)
