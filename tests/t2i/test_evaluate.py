"""The evaluation: protocols on planted data, the whole of it on made-up generators, the networks
on their packaged weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from t2i.data import SPLITS, ImageTextDataset, build_folder, packages
from t2i.evaluate import Features, evaluate_model, load_features, summary
from t2i.evaluate.alignment import FOLDS, RidgeAlignment, concept, description
from t2i.evaluate.copies import CopyCheck
from t2i.evaluate.efficientnet import EfficientNetLite0, SameConv
from t2i.evaluate.features import cached_features, image_features

CONCEPTS, STYLES = 100, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pairs_of(concepts: int = CONCEPTS) -> list[dict]:
    return [
        {"label": f"thing {i}: red", "base": f"thing {i}", "caption": f"{i} {s}", "tags": ["t"] * 9}
        for i in range(concepts)
        for s in range(STYLES)
    ]


def number(text: str) -> int:
    return int(text.split(":")[0].split()[1])


def test_alignment_of_pictures_that_follow_their_captions():
    vectors = F.normalize(torch.randn(CONCEPTS, 12), dim=1)
    seen = []

    def texts(descriptions):
        seen.extend(descriptions)
        return vectors[[number(d) for d in descriptions]]

    turn = torch.randn(12, 30)
    images = vectors.repeat_interleave(STYLES, 0) @ turn + 0.01 * torch.randn(400, 30)
    alignment = RidgeAlignment(pairs_of(), images, texts)
    rows = torch.arange(0, 400, 3)
    scores = alignment(rows, images[rows])
    assert scores["top1"] > 0.6 and scores["top10"] > 0.95
    assert scores["top1"] <= scores["top5"] <= scores["top10"]
    assert sorted(seen) == sorted(f"thing {i}: t, t, t, t, t" for i in range(CONCEPTS))
    assert alignment.candidates == CONCEPTS / FOLDS
    assert alignment.chance() == {"top1": 0.05, "top5": 0.25, "top10": 0.5}
    # The picture of one concept under the caption of another of its fold is not found.
    order = torch.stack([alignment.concepts[rows], rows])
    wrong = alignment(rows, images[rows[order[0].argsort(stable=True).roll(FOLDS)]])
    assert wrong["top1"] < 0.3
    # Nor is a picture of nothing, more often than by chance.
    found = alignment.ranks(rows, torch.randn(len(rows), 30))
    assert found.max() < CONCEPTS / FOLDS and 6 < found.double().mean() < 13


def test_no_map_has_seen_the_concept_it_scores():
    """With more dimensions than pictures a map learns any text by heart; a concept that it was
    fitted on would be found first every time."""
    images = torch.randn(CONCEPTS, 500).repeat_interleave(STYLES, 0) + 0.01 * torch.randn(400, 500)
    vectors = torch.randn(CONCEPTS, 16)
    alignment = RidgeAlignment(
        pairs_of(), images, lambda texts: vectors[[number(t) for t in texts]]
    )
    rows = torch.arange(400)
    found = alignment.ranks(rows, images)
    assert 7 < found.double().mean() < 12  # of 0 … 19
    # The leak that is guarded against: the same pictures scored by a map of another fold.
    alignment.maps = alignment.maps[1:] + alignment.maps[:1]
    assert alignment(rows, images)["top1"] > 0.95


def test_folds_divide_the_concepts():
    images = torch.randn(CONCEPTS * STYLES, 8)
    alignment = RidgeAlignment(pairs_of(), images, lambda texts: torch.randn(len(texts), 4))
    by_fold = [set(alignment.concepts[alignment.concepts % FOLDS == f].tolist()) for f in range(5)]
    assert [len(fold) for fold in by_fold] == [20] * FOLDS
    again = RidgeAlignment(pairs_of(), images, lambda texts: torch.randn(len(texts), 4))
    assert (alignment.concepts == again.concepts).all()
    with pytest.raises(ValueError, match="9 concepts: expected at least 10"):
        RidgeAlignment(pairs_of(9), images[:36], lambda texts: torch.randn(len(texts), 4))


def test_concepts_of_all_kinds_of_sets():
    assert concept({"caption": "a dog on a sofa"}) == "a dog on a sofa"
    assert concept({"caption": "dog, flat style", "label": "dog"}) == "dog"
    assert description({"label": "dog: dark", "base": "dog", "tags": list("abcdefg")}) == (
        "dog: a, b, c, d, e"
    )


@pytest.fixture
def copies():
    """A check over 50 training pictures whose copies have noise of about 26 dB."""
    train = torch.rand(50, 3, 8, 8) * 2 - 1
    rebuilt = (train[:40] + 0.1 * torch.randn(40, 3, 8, 8)).clamp(-1, 1)
    return train, CopyCheck(train, train.flatten(1), rebuilt, rebuilt.flatten(1))


def test_copies_are_as_near_as_reconstructions(copies):
    train, check = copies
    assert check.psnr == pytest.approx(26, abs=1) and 0.97 < check.cosine < 1
    new = torch.rand(30, 3, 8, 8) * 2 - 1
    assert check(new, new.flatten(1))["near_copies"] == 0
    mixed = torch.cat([train[:10], new[:30]])
    assert check(mixed, mixed.flatten(1))["near_copies"] == 0.25
    exact = check(train, train.flatten(1))
    assert exact == {
        "near_copies": 1,
        "nearest_cosine": pytest.approx(1, abs=1e-5),
        "nearest_psnr": 100,
    }
    # Near in one measure alone is no copy.
    assert check(train, torch.randn(50, 192))["near_copies"] == 0
    assert check(new, train[:30].flatten(1))["near_copies"] == 0


def test_a_training_picture_is_compared_with_the_others(copies):
    train, check = copies
    own = torch.arange(50)
    cosine, noise = check.nearest(train, train.flatten(1), own)
    flat = train.flatten(1).double()
    distance = torch.cdist(flat, flat).square() / flat.shape[1] / 4
    distance.fill_diagonal_(torch.inf)
    torch.testing.assert_close(noise, -10 * distance.min(dim=1).values.log10(), atol=1e-3, rtol=0)
    centred = F.normalize(flat - flat.mean(0), dim=1)
    similar = (centred @ centred.T).fill_diagonal_(-1)
    torch.testing.assert_close(cosine.double(), similar.max(dim=1).values, atol=1e-5, rtol=0)
    assert check(train, train.flatten(1), own)["near_copies"] == 0


class Rounding(nn.Module):
    """A tokenizer: one code of 27 a pixel, three levels a channel, decoded a little too dark or
    too light: 0, 128, 255 become 13, 128, 242."""

    num_codes, downsampling = 27, 1

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def encode(self, images):
        levels = ((images + 1).round().long() * torch.tensor([9, 3, 1]).view(3, 1, 1)).sum(dim=1)
        return levels

    def decode(self, codes):
        return torch.stack([codes // 9, codes // 3 % 3, codes % 3], dim=1) * 0.9 - 0.9


def image_vectors(images: np.ndarray) -> torch.Tensor:
    small = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    return F.adaptive_avg_pool2d(small, 4).flatten(1) / 255


def text_vectors(texts) -> torch.Tensor:
    """Colour and place of "red square 2"."""
    out = torch.zeros(len(texts), 8)
    for row, text in enumerate(texts):
        colour, _, place = text.split(":")[0].split()
        out[row, ["red", "green", "blue", "black"].index(colour)] = 1
        out[row, 4 + int(place)] = 1
    return out


FEATURES = Features(image_vectors, text_vectors)


class Generator:
    """Draws the picture of the caption, or that of another one."""

    def __init__(self, dataset, shift: int = 0):
        data = ImageTextDataset(dataset)
        self.images = {
            pair["caption"]: data.images[(i + shift) % len(data)]
            for i, pair in enumerate(data.pairs)
        }
        self.calls, self.seeds = 0, []

    def __call__(self, captions, seeds):
        self.calls += 1
        self.seeds += seeds
        return [Image.fromarray(self.images[caption]) for caption in captions]


def run(generator, dataset, out, **options):
    options = {"features": FEATURES, "progress": False, **options}
    return evaluate_model(generator, Rounding(), dataset, out, **options)


def test_a_perfect_and_a_wrong_generator(dataset, tmp_path):
    generator = Generator(dataset)
    perfect = run(generator, dataset, tmp_path / "a", prompts=12, seed=7)
    wrong = run(Generator(dataset, shift=9), dataset, tmp_path / "b", prompts=12)
    assert json.loads((tmp_path / "a" / "eval.json").read_text()) == perfect
    assert Image.open(tmp_path / "a" / "eval.png").width > 8 * 2 * 16
    counts = {split: min(12, len(ImageTextDataset(dataset, split))) for split in SPLITS}
    assert generator.seeds == [7 + i for split in SPLITS for i in range(counts[split])]
    for split in SPLITS:
        scores = perfect["splits"][split]
        assert scores["prompts"] == counts[split]
        samples, real = dict(scores["samples"]), dict(scores["real"])
        if split == "train":  # a real one is compared with the others, a sample with all
            assert samples["near_copies"] == 1 and samples["nearest_cosine"] > 0.999
            for field in ("near_copies", "nearest_cosine", "nearest_psnr"):
                del samples[field], real[field]
        assert samples == pytest.approx(real)
        assert wrong["splits"][split]["samples"]["top1"] < scores["samples"]["top1"]
        assert wrong["splits"][split]["real"] == scores["real"]
    quality = perfect["reconstruction"]
    data = ImageTextDataset(dataset)
    assert quality["all"]["pictures"] == len(data) and quality["train"]["usage"] < 1
    error = np.where((data.images == 0) | (data.images == 255), 13 / 255, 0) ** 2
    expected = -10 * np.log10(error.mean(axis=(1, 2, 3)))
    for split in SPLITS:
        rows = ImageTextDataset(dataset, split).rows
        assert quality[split]["psnr"] == pytest.approx(expected[rows].mean(), abs=1e-3)
    assert 0.9 < quality["all"]["ssim"] < 1
    assert perfect["settings"] == {"prompts": 12, "seed": 7}
    assert perfect["ridge_alignment"]["candidates"] == 16 / FOLDS
    table = summary(perfect)
    assert table.count("\n") == 20 and "| unseen_pairs | reconstructions |" in table


def test_perplexity_is_that_of_the_tokens_of_chosen_pictures(dataset, tmp_path):
    data, seen = ImageTextDataset(dataset), []

    def loss(captions, codes):
        seen.extend(captions)
        places = [[p["caption"] for p in data.pairs].index(caption) for caption in captions]
        pixels = torch.from_numpy(data.images[places]).permute(0, 3, 1, 2) / 127.5 - 1
        assert torch.equal(codes, Rounding().encode(pixels))
        return torch.tensor([1.0, 3.0])

    result = run(Generator(dataset), dataset, tmp_path, prompts=2, loss=loss)
    assert [row["perplexity"] for row in result["splits"].values()] == [pytest.approx(np.e**2)] * 3
    assert len(seen) == 2 * 3 and "real pictures: train 7.39, unseen_pairs 7.39" in summary(result)


def test_samples_are_kept_while_nothing_changes(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("t2i.evaluate.evaluate.CHUNK", 4)
    generator = Generator(dataset)

    def stopping(captions, seeds):
        if generator.calls == 3:
            raise KeyboardInterrupt
        return generator(captions, seeds)

    options = {"prompts": 6, "settings": {"cfg": 3.0, "weights": "abc"}}
    with pytest.raises(KeyboardInterrupt):
        run(stopping, dataset, tmp_path, **options)
    assert generator.calls == 3
    first = run(generator, dataset, tmp_path, **options)
    chunks = 2 + 1 + 2  # unseen_pairs has three
    assert generator.calls == chunks and first["settings"]["cfg"] == 3.0
    assert run(generator, dataset, tmp_path, **options) == first and generator.calls == chunks
    run(generator, dataset, tmp_path, **{**options, "settings": {"cfg": 4.0, "weights": "abc"}})
    assert generator.calls == 2 * chunks
    run(generator, dataset, tmp_path, **options, seed=1)
    assert generator.calls == 3 * chunks


def test_a_set_without_held_out_pairs(pictures, tmp_path):
    table = [json.loads(line) for line in (pictures / "captions.jsonl").open()]
    rows = [{**row, "split": row["split"].replace("unseen_pairs", "train")} for row in table]
    lists = tmp_path / "captions.jsonl"
    lists.write_text(
        "".join(json.dumps({**r, "file": str(pictures / r["file"])}) + "\n" for r in rows)
    )
    build_folder(pictures, tmp_path / "data", captions=lists, size=16, progress=False)
    data = tmp_path / "data"
    result = run(Generator(data), data, tmp_path / "out", prompts=5)
    assert list(result["splits"]) == ["train", "unseen_labels"]
    assert list(result["reconstruction"]) == ["train", "unseen_labels", "all"]
    assert "unseen_pairs" not in summary(result)


def test_what_cannot_be_evaluated(dataset, tmp_path):
    with pytest.raises(ValueError, match="prompts=1"):
        run(Generator(dataset), dataset, tmp_path, prompts=1)
    with pytest.raises(FileNotFoundError, match="no finished dataset.json"):
        run(Generator(dataset), tmp_path, tmp_path)


def test_features_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("T2I_CACHE", str(tmp_path))
    first = cached_features("a", lambda: torch.arange(6.0).view(2, 3))
    assert (cached_features("a", lambda: torch.zeros(2, 3)) == first).all()
    assert (cached_features("b", lambda: torch.zeros(2, 3)) == 0).all()


def test_padding_is_tensorflows():
    """ "Same": ceil(size / stride) outputs, the odd pixel of padding behind."""
    for size, kernel, stride, before, after in (
        (8, 3, 2, 0, 1),
        (7, 3, 2, 1, 1),
        (8, 5, 2, 1, 2),
        (8, 3, 1, 1, 1),
        (9, 5, 2, 2, 2),
    ):
        conv = SameConv(2, 3, kernel, stride, bias=False)
        x = torch.randn(1, 2, size, size)
        padded = F.pad(x, (before, after, before, after))
        expected = F.conv2d(padded, conv.weight, stride=stride)
        assert expected.shape[-1] == -(-size // stride)
        torch.testing.assert_close(conv(x), expected)


def test_folded_batch_norms_change_nothing():
    network = EfficientNetLite0()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    network.eval()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = network.maps(images)
    assert [m.shape[1] for m in expected] == [16, 24, 40, 80, 112, 192, 320, 1280]
    network.fold_batch_norms()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network.maps(images), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(network(images), network.maps(images)[-1].flatten(1))


def test_image_features_do_not_depend_on_the_batch(monkeypatch):
    network = EfficientNetLite0().eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    found = image_features(network, images, side=32)
    assert found.shape == (5, 1280) and image_features(network, images[:0]).shape == (0, 1280)
    # At the size of the pictures nothing is resampled: (x − 127) / 128 of what is given.
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    stem = F.relu6(network._bn0(network._conv_stem(x)))
    torch.testing.assert_close(network.stem((x * 128 + 127) / 127.5 - 1), stem)
    monkeypatch.setattr("t2i.evaluate.features.BATCH", 2)
    torch.testing.assert_close(image_features(network, images, side=32), found)


@pytest.mark.packages
def test_the_packaged_networks(tmp_path):
    """They tell things apart that they should: a picture is nearest to the same thing in another
    design, a text to one that means the same."""
    pytest.importorskip("transformers"), pytest.importorskip("resvg_py")
    wanted = ("minilm", "efficientnet-lite0", "noto", "twemoji", "fluent-emoji-flat", "emojibase")
    folder = packages.cache_folder()
    missing = [k for k in wanted if not (folder / packages.PACKAGES[k].archive).exists()]
    if missing:
        pytest.skip(f"no archive of {', '.join(missing)} in {folder} (T2I_CACHE)")
    features = load_features()
    a = features.texts(["a cat", "a kitten", "a truck"])
    torch.testing.assert_close(a.norm(dim=1), torch.ones(3))
    # As transformers' own tokenizer and model give for these texts.
    torch.testing.assert_close((a @ a.T)[0, 1:], torch.tensor([0.7663, 0.3229]), atol=1e-3, rtol=0)
    # Padding does not leak: alone and beside a longer text.
    b = features.texts(["a cat", "a cat that sits on a very long sofa in the sun"])
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=0)

    from t2i.data.emoji import draw_svg, emoji_entries

    keys = ("noto", "fluent-emoji-flat", "fluent-emoji", "twemoji", "emojibase")
    files = {key: packages.fetch(key) for key in keys}
    entries = emoji_entries(files, tones=False)
    by_style = {style: {} for style in ("noto", "twemoji")}
    for entry in entries:
        by_style.get(entry.pair["style"], {})[entry.pair["label"]] = entry.source
    labels = sorted(by_style["noto"].keys() & by_style["twemoji"].keys())[::40]
    noto, twemoji = (
        features.images(np.stack([np.asarray(draw_svg(by_style[s][x], 64)) for x in labels]))
        for s in ("noto", "twemoji")
    )
    center = torch.cat([noto, twemoji]).mean(dim=0)
    similarity = F.normalize(noto - center, dim=1) @ F.normalize(twemoji - center, dim=1).T
    found = (similarity.argmax(dim=1) == torch.arange(len(labels))).double().mean()
    assert len(labels) > 30 and found > 0.5  # by chance one
