"""The decoder: cached and uncached passes agree, gradients flow, vocabularies grow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import t2i.lm.model as model_module
from t2i.lm import LM_CONFIGS, LMConfig, TransformerLM
from t2i_kernels import linear_cross_entropy, use_backend

TINY = LMConfig(
    dim=32,
    num_layers=2,
    num_heads=4,
    ffn_dim=48,
    text_vocab_size=20,
    image_vocab_size=30,
    max_positions=40,
)
CLASS_GRID = dict(
    prefix="class", prefix_dim=7, prefix_length=1, image_grid=(3, 4), rotary="interleaved"
)
CAPTION_GRID = {**CLASS_GRID, "prefix": "caption", "prefix_dim": 6, "prefix_length": 5}
VARIANTS = {
    "llama": {},
    "grouped heads": dict(num_kv_heads=2),
    "one key head": dict(num_kv_heads=1, tied=True),
    "interleaved": dict(rotary="interleaved"),
    "no positions": dict(rotary="none"),
    "open_lm": dict(norm="layernorm", norm_bias=True, qk_norm="full"),
    "gain-only norm": dict(norm="layernorm", rotary="head"),
    "qk norm by head": dict(qk_norm="head", num_kv_heads=2),
    "class prefix, 2-D": CLASS_GRID,
    "class prefix, 2-D in halves": {**CLASS_GRID, "rotary": "half"},
    "caption prefix, 2-D": CAPTION_GRID,
    "caption prefix, LlamaGen": {**CAPTION_GRID, "prefix_rotary": "zero"},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def model(**changes) -> TransformerLM:
    """A tiny model whose norms and biases are not their neutral start."""
    lm = TransformerLM(TINY.replace(**changes)).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return lm


def inputs(lm: TransformerLM, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    config = lm.config
    tokens = torch.randint(config.vocab_size, (batch, length))
    if config.prefix == "none":
        return tokens, None
    if config.prefix == "class":
        return tokens, torch.randint(config.prefix_dim + 1, (batch,))
    return tokens, torch.randn(batch, config.prefix_length, config.prefix_dim)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_steps_equal_the_full_pass(variant):
    lm = model(**VARIANTS[variant])
    tokens, prefix = inputs(lm, batch=3, length=12)
    full = lm(tokens, prefix=prefix)
    cache = lm.allocate_cache(3, full.shape[1])
    steps = [lm(tokens[:, :4], prefix=prefix, cache=cache)]
    steps.append(lm(tokens[:, 4:6], cache=cache))  # several tokens at once
    steps += [lm(tokens[:, i : i + 1], cache=cache) for i in range(6, 12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "prefix" not in v])
@torch.no_grad()
def test_left_padding_changes_nothing(variant):
    lm = model(**VARIANTS[variant])
    long, short = torch.randint(50, (1, 9)), torch.randint(50, (1, 6))
    padded = torch.cat([torch.full((1, 3), 49), short], dim=1)
    cache = lm.allocate_cache(2, 12, start=torch.tensor([0, 3], dtype=torch.int32))
    first = lm(torch.cat([long, padded]), cache=cache)
    more = torch.randint(50, (2, 3))
    second = torch.cat([lm(more[:, i : i + 1], cache=cache) for i in range(3)], dim=1)
    got = torch.cat([first, second], dim=1)
    assert torch.isfinite(got).all()  # padding attends to nothing, and that is not NaN
    expected_long = lm(torch.cat([long, more[:1]], dim=1))[0]
    expected_short = lm(torch.cat([short, more[1:]], dim=1))[0]
    torch.testing.assert_close(got[0], expected_long, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1, 3:], expected_short, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_documents_equal_separate_ones():
    lm = model(num_kv_heads=2)
    documents = [torch.randint(50, (1, length)) for length in (5, 1, 38, 9)]
    cu_seqlens = torch.tensor([0, 5, 6, 44, 53], dtype=torch.int32)
    packed = lm(torch.cat(documents, dim=1), cu_seqlens=cu_seqlens)  # longer than max_positions
    separate = torch.cat([lm(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_token_sees_only_what_stands_before_it():
    lm = model()
    tokens = torch.randint(50, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    before, after = lm(tokens), lm(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6:], after[:, 6:]).all(dim=-1).any()


@torch.no_grad()
def test_positions_matter_unless_there_are_none():
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    swapped = torch.tensor([[2, 1, 3, 4, 5, 6]])  # the last token sees the same set
    for rotary, equal in [("half", False), ("interleaved", False), ("head", True), ("none", True)]:
        lm = model(rotary=rotary, num_layers=1)
        assert torch.allclose(lm(tokens)[:, -1], lm(swapped)[:, -1], atol=1e-5) is equal, rotary


@torch.no_grad()
def test_rows_and_columns_turn_different_channels():
    """A 2-D table equals the 1-D tables of its row and its column, side by side."""
    from t2i.lm.model import rotary_tables

    cos, sin = rotary_tables(TINY.replace(**CAPTION_GRID))
    line_cos, line_sin = rotary_tables(TINY.replace(head_dim=4, max_positions=99))
    for row in range(3):
        for column in range(4):
            index = 5 + 4 * row + column
            for table, line in ((cos, line_cos), (sin, line_sin)):
                assert torch.equal(table[index], torch.cat([line[5 + row], line[5 + column]]))
    assert torch.equal(cos[:5], torch.cat([line_cos[:5], line_cos[:5]], dim=1))
    zero_cos, zero_sin = rotary_tables(TINY.replace(**CAPTION_GRID, prefix_rotary="zero"))
    assert not zero_cos[:5].any() and not zero_sin[:5].any()
    assert torch.equal(zero_cos[5 + 4 * 2 + 3], torch.cat([line_cos[2], line_cos[3]]))


@torch.no_grad()
def test_a_slice_of_logits_equals_those_rows():
    lm = model()
    tokens = torch.randint(50, (2, 5))
    image = lm(tokens, logits=lm.config.image_tokens)
    assert image.shape == (2, 5, 30)
    torch.testing.assert_close(image, lm(tokens)[..., 20:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    lm = model(**VARIANTS[variant]).train()
    tokens, prefix = inputs(lm, batch=2, length=8)
    length = lm.config.prefix_length
    logits = lm(tokens, prefix=prefix)[:, length:]
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_operators_for_gpus_change_nothing(variant, monkeypatch):
    """Losses and gradients with them, here by their references, are those of PyTorch's own."""
    lm = model(**VARIANTS[variant])
    tokens, prefix = inputs(lm, batch=2, length=8)

    def run() -> list[torch.Tensor]:
        lm.zero_grad()
        features = lm.features(tokens, prefix=prefix)[:, -8:-1].flatten(0, 1)
        smoothed, nll = lm.cross_entropy(features, tokens[:, 1:].flatten(), 0.1)
        smoothed.sum().backward()
        if prefix is None:
            packed = lm.features(tokens[:1], cu_seqlens=torch.tensor([0, 3, 8]).int())
            packed.square().sum().backward()
        return [smoothed.detach(), nll.detach(), *(p.grad.clone() for p in lm.parameters())]

    with use_backend("reference"):
        expected, called = run(), set()
        for name in ("linear_cross_entropy", "rms_norm", "rotary", "swiglu"):
            function = getattr(model_module, name)

            def noted(*call, name=name, function=function, **options):
                called.add(name)
                return function(*call, **options)

            monkeypatch.setattr(model_module, name, noted)
        monkeypatch.setattr(model_module, "fused", lambda op, *call: True)
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    config = lm.config
    assert called == {
        "linear_cross_entropy", "swiglu", *["rms_norm"] * (config.norm == "rmsnorm"),
        *["rotary"] * (lm.rotary_tables is not None),
    }  # fmt: skip


def test_the_loss_under_autocast(monkeypatch):
    """Of bf16 features and weights; without logits, and with."""
    lm, x, targets = model(), torch.randn(6, 32), torch.randint(50, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        expected = lm.cross_entropy(x, targets, 0.1)
    seen = []

    def loss(x, weight, *rest, **options):
        seen.append((x.dtype, weight.dtype))
        with torch.autocast("cpu", enabled=False):
            return linear_cross_entropy(x, weight, *rest, **options)

    monkeypatch.setattr(model_module, "fused", lambda op, *call: True)
    monkeypatch.setattr(model_module, "linear_cross_entropy", loss)
    with torch.autocast("cpu", torch.bfloat16):
        got = lm.cross_entropy(x, targets, 0.1)
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def test_dropout_acts_in_training_alone():
    lm = model(dropout=0.5)
    tokens = torch.randint(50, (1, 6))
    assert torch.equal(lm(tokens), lm(tokens))
    lm.train()
    assert not torch.equal(lm(tokens), lm(tokens))


def test_open_lm_starts_as_published():
    """1/sqrt(fan_in) cut at three std; what is added to the residual stream shrinks with depth."""
    lm = TransformerLM(LM_CONFIGS["open_lm_160m"].replace(num_layers=3, text_vocab_size=1000))
    cut = 0.98658  # std of a standard normal cut at ±3

    def check(weight, std):
        assert weight.std().item() == pytest.approx(cut * std, rel=0.02)
        assert weight.abs().max() <= 3 * std

    for depth, layer in enumerate(lm.layers):
        shrink = math.sqrt(2 * (depth + 1))
        check(layer.attention.qkv.weight, 768**-0.5)
        check(layer.attention.out.weight, 768**-0.5 / shrink)
        check(layer.feed_forward.gate_up.weight, 768**-0.5)
        check(layer.feed_forward.down.weight, 2048**-0.5 / shrink)
    check(lm.tok_embeddings.weight, 768**-0.5)
    check(lm.output.weight, 768**-0.5)
    assert lm.norm.weight.eq(1).all() and lm.norm.bias.eq(0).all()


def test_llamagen_starts_with_uniform_predictions():
    lm = TransformerLM(LM_CONFIGS["llamagen-b"].replace(num_layers=1, image_vocab_size=50))
    assert lm.layers[0].feed_forward.down.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not lm.output.weight.any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["random", "mean"])
@torch.no_grad()
def test_extending_the_vocabulary(tied, init):
    lm = model(image_vocab_size=0, tied=tied, dim=64, head_dim=16)
    tokens = torch.randint(20, (2, 6))
    before = lm(tokens)
    text = [w.clone() for w in (lm.tok_embeddings.weight, lm.output.weight)]
    lm.extend_vocabulary(300, init)
    assert (lm.config.text_vocab_size, lm.config.image_vocab_size) == (20, 300)
    assert (lm.output.weight is lm.tok_embeddings.weight) is tied
    torch.testing.assert_close(lm(tokens)[..., :20], before)
    for weight, old in zip((lm.tok_embeddings.weight, lm.output.weight), text, strict=True):
        assert torch.equal(weight[:20], old)
        if init == "mean":
            assert torch.allclose(weight[20:], old.mean(dim=0).expand(300, -1))
        else:
            assert weight[20:].std().item() == pytest.approx(0.98658 / 8, rel=0.03)
    assert lm(tokens + 20).shape == (2, 6, 320)
    assert lm.tok_embeddings.weight.requires_grad and lm.output.weight.requires_grad


@torch.no_grad()
def test_extending_adds_text_rows_where_the_tokenizer_needs_them():
    lm = model(image_vocab_size=0)
    lm.extend_vocabulary(10, text_vocab=22)
    assert lm.config.image_tokens == slice(22, 32) and lm.output.weight.shape[0] == 32
    spare = model(image_vocab_size=0)
    spare.extend_vocabulary(10, text_vocab=15)  # the model has rows to spare: they stay
    assert spare.config.image_tokens == slice(20, 30)


def test_extending_wrongly_is_an_error():
    with pytest.raises(ValueError, match="30 image tokens already"):
        model().extend_vocabulary(10)
    with pytest.raises(ValueError, match="init='zeros'"):
        model(image_vocab_size=0).extend_vocabulary(10, "zeros")
    with pytest.raises(ValueError, match="image_vocab=0"):
        model(image_vocab_size=0).extend_vocabulary(0)


def test_bad_input_is_named():
    lm = model()
    with pytest.raises(ValueError, match=r"tokens: expected int64 \[B, L\].*int32"):
        lm(torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"tokens: expected int64 \[B, L\].*\(3,\)"):
        lm(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="41 positions exceeds max_positions=40"):
        lm(torch.zeros(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match="41 positions exceeds max_positions=40"):
        lm(torch.zeros(1, 43, dtype=torch.int64), cu_seqlens=torch.tensor([0, 2, 43]).int())
    with pytest.raises(ValueError, match="14 positions exceeds max_positions=13"):
        grid = model(**CLASS_GRID)  # behind the image there is nothing
        grid(torch.zeros(1, 13, dtype=torch.int64), prefix=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="prefix: expected the class of each row, got None"):
        model(**CLASS_GRID)(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="prefix is given"):
        lm(torch.zeros(1, 3, dtype=torch.int64), prefix=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="both None"):
        lm(None)
    with pytest.raises(ValueError, match="cu_seqlens packs one row"):
        lm(torch.zeros(2, 3, dtype=torch.int64), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"features \[B, 5, 6\], got \(2, 5, 7\)"):
        model(**CAPTION_GRID)(None, prefix=torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"int64 \[B\] classes"):
        model(**CLASS_GRID)(None, prefix=torch.zeros(2, 1))


@torch.no_grad()
def test_casting_the_weights_keeps_the_positions_exact():
    lm = model(max_positions=2000)
    before = [table.clone() for table in lm.rotary_tables]
    lm.to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(before, lm.rotary_tables, strict=True))
    logits = lm(torch.randint(50, (1, 7)))
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
