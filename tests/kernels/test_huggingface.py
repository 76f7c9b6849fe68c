"""attn_implementation="t2i": models of transformers compute what they do with eager attention."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

from t2i_kernels import use_backend  # noqa: E402
from t2i_kernels.huggingface import Sequences, attention  # noqa: E402

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral, window": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "gemma 2, window and softcap": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=8, sliding_window=5, attn_logit_softcapping=0.7, query_pre_attn_scalar=8
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=None, pad_token_id=0
    ),
}  # fmt: skip
LENGTH = 11


@pytest.fixture(params=CONFIGS)
def models(request):
    """A model with eager attention, and the same one with ours."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]()
    config._attn_implementation = "eager"
    eager = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in eager.parameters():  # small random models attend almost evenly
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    ours = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="t2i")
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == "t2i"
    return eager.eval(), ours.eval()


def inputs(padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 61, (3, LENGTH))
    if padding == "none":
        return {"input_ids": ids}
    if padding == "packed":
        positions = torch.tensor([*range(4), *range(1), *range(6)])
        return {"input_ids": ids[:1], "position_ids": positions[None]}
    lengths = torch.tensor([[LENGTH], [4], [1]])
    mask = (torch.arange(LENGTH) < lengths).long()
    if padding == "left":
        mask = mask.flip(-1)
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("padding", ["none", "left", "right", "packed"])
def test_logits_and_gradients_are_eager_s(models, padding):
    batch = inputs(padding)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    weight = torch.randn(*real.shape, 61) * real[..., None]
    results = []
    for model in models:
        logits = model(**batch, use_cache=False).logits
        (logits * weight).sum().backward()
        results.append((logits[real], [p.grad for p in model.parameters()]))
    (expected, expected_grads), (found, grads) = results
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for gradient, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_the_mask_matters(models):
    """The comparison above would notice a padding or a window that is ignored."""
    _, ours = models
    batch = inputs("left")
    with torch.no_grad():
        masked = ours(**batch).logits[1, -1]
        unmasked = ours(input_ids=batch["input_ids"]).logits[1, -1]
    assert not torch.allclose(masked, unmasked, atol=1e-2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generates_what_eager_does(models, padding, cache):
    batch = inputs(padding)
    options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache}
    options |= {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    expected, found = (model.generate(**batch, **options) for model in models)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, eagers in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, eagers, rtol=1e-4, atol=1e-4)


def test_runs_on_our_operator(models):
    calls = []
    with (
        use_backend("reference"),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        torch.no_grad(),
    ):
        models[1](**inputs("none"))
    calls = [event.key for event in profile.key_averages() if "t2i::flash_attention" in event.key]
    assert calls


def test_bidirectional_encoder_with_padding():
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    eager = transformers.BertModel(config).eval()
    ours = transformers.AutoModel.from_config(config, attn_implementation="t2i").eval()
    ours.load_state_dict(eager.state_dict())
    batch = inputs("right")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        eager.set_attn_implementation("eager")
        found, expected = (m(**batch).last_hidden_state[real] for m in (ours, eager))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def rebuilt(sequences: Sequences, shape: tuple[int, int, int]) -> torch.Tensor:
    """The mask that ``sequences`` stand for, read off the output: values are one-hot keys."""
    batch, q_length, k_length = shape
    q, k = torch.zeros(batch, q_length, 1, 4), torch.zeros(batch, k_length, 1, 4)
    v = torch.eye(k_length).expand(batch, -1, -1)[:, :, None]
    return sequences.attend(q, k, v)[:, :, 0] > 0


def some_masks():
    i, j = torch.arange(9)[:, None], torch.arange(9)
    causal = j <= i
    document = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3])
    same = document[:, None] == document
    padding = torch.arange(9) >= torch.tensor([[0], [3], [8]])
    yield "causal", causal[None]
    yield "full", torch.ones(2, 9, 9, dtype=torch.bool)
    yield "window", (causal & (i - j < 3))[None]
    yield "window of one", (i == j)[None]
    yield "packed", (causal & same)[None]
    yield "packed, window", (causal & same & (i - j < 2))[None]
    yield "packed, full", same[None]
    yield "left padding", causal & padding[:, None, :]
    yield "right padding", causal & padding.flip(-1)[:, None, :]
    yield "left padding, window", causal & (i - j < 4) & padding[:, None, :]
    yield "full, padding", (padding[:, None, :] & padding[:, :, None])
    yield "cache", torch.arange(9)[None, None] <= torch.tensor([5, 6])[None, :, None]
    yield "one query", (torch.arange(9) >= 4).expand(2, 1, 9)
    yield "nothing", torch.zeros(2, 3, 9, dtype=torch.bool)


@pytest.mark.parametrize("mask", [pytest.param(mask, id=name) for name, mask in some_masks()])
def test_sequences_stand_for_their_mask(mask):
    assert torch.equal(rebuilt(Sequences.of_mask(mask), mask.shape), mask)


def test_random_intervals_are_right_or_refused():
    generator = torch.Generator().manual_seed(0)
    accepted = 0
    for _ in range(300):
        ends = torch.randint(0, 6, (2, 2, 4), generator=generator)
        first, end = ends.amin(0)[..., None], ends.amax(0)[..., None]
        mask = (torch.arange(6) >= first) & (torch.arange(6) < end)
        try:
            found = Sequences.of_mask(mask)
        except ValueError:
            continue
        accepted += 1
        assert torch.equal(rebuilt(found, mask.shape), mask)
    assert accepted > 20


def test_a_mask_for_all_queries_is_not_causal():
    q = torch.randn(2, 2, 5, 4)
    module = torch.nn.Identity()
    for length in (5, 3):
        row = (torch.arange(5) < torch.tensor([[5], [length]]))[:, None, None]
        found, _ = attention(module, q, q, q, row)
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, row)
        torch.testing.assert_close(found, expected.transpose(1, 2))
        added = torch.zeros(2, 1, 1, 5).masked_fill(~row, torch.finfo(torch.float32).min)
        assert torch.equal(attention(module, q, q, q, added)[0], found)


def test_what_it_cannot_do_is_an_error():
    q = torch.randn(1, 2, 3, 4)
    module = torch.nn.Identity()
    with pytest.raises(ValueError, match="dropout=0.1"):
        attention(module, q, q, q, None, dropout=0.1)
    with pytest.raises(ValueError, match="attention sinks"):
        attention(module, q, q, q, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="scores are biased"):
        attention(module, q, q, q, torch.tensor([0.0, -1.0, 0.0]).expand(1, 1, 3, 3))
    with pytest.raises(ValueError, match="gaps"):
        attention(module, q, q, q, torch.tensor([True, False, True]).expand(1, 1, 3, 3))
    keys = torch.randn(2, 2, 4, 4)
    for shape in [(2, 1, 1, 3), (2, 1, 3, 4), (3, 1, 4, 4), (2, 2, 4, 4), (2, 4, 4)]:
        with pytest.raises(ValueError, match=r"expected \(2, 1, 4, 4\)"):
            attention(module, keys, keys, keys, torch.ones(shape).bool())
    with pytest.raises(ValueError, match="in no such way"):  # a prefix that all see, then causal
        prefix = torch.ones(64, 64).tril().bool() | (torch.arange(64) < 32)
        Sequences.of_mask(prefix[None])
    with pytest.raises(ValueError, match="windows differ in width"):
        Sequences.of_mask(torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]).bool()[None])
