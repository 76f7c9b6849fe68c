"""Plants bugs in the Triton kernels, one at a time: the checks of the operators must catch each.

Needs TRITON_INTERPRET=1, as all that runs Triton kernels without a GPU does.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import test_decode_attention
import test_draw
import test_flash_attention
import test_linear_cross_entropy
import test_rms_norm
import test_rotary
import test_swiglu
import test_vq_nearest

import t2i_kernels
from t2i_kernels import triton_backend

pytestmark = pytest.mark.skipif(
    triton_backend.reason() is not None or not triton_backend.INTERPRETED,
    reason=triton_backend.reason() or "TRITON_INTERPRET is not 1",
)
ROOT = Path(t2i_kernels.__file__).parent
# name -> (text, its replacement, the check that must notice)
FLASH = {
    "scale of the maximum": ("tl.exp2(largest * c - base)", "tl.exp2(largest - base)", "lengths"),
    "sums not rescaled": ("acc * factor[:, None], total *", "acc, total *", "lengths"),
    "raised too late": ("= tl.constexpr(8.0)", "= tl.constexpr(200.0)", "rising_scores"),
    "negative scale ignored": ("x.to(tl.float32) * sign", "x.to(tl.float32)", "options"),
    "causal sees one more": ("positions + right)", "positions + right + 1)", "means"),
    "window off by one": ("positions - left)", "positions - left - 1)", "means"),
    "keys behind the last": ("seen = keys < Lk", "seen = keys < Lk + 1", "lengths"),
    "last tile of keys dropped": (
        "acc, total, largest, x, k, v, stride_kt, stride_vt, positions, partial, stop,",
        "acc, total, largest, x, k, v, stride_kt, stride_vt, positions, partial, partial,", "means",
    ),
    "first tile of keys dropped": (
        "acc, total, largest, x, k, v, stride_kt, stride_vt, positions, start, full,",
        "acc, total, largest, x, k, v, stride_kt, stride_vt, positions, full, full,", "lengths",
    ),
    "full tiles from too early": (
        "tl.cdiv(tl.maximum(last - left, 0), BLOCK)", "(tl.maximum(last - left, 0) // BLOCK)",
        "lengths",
    ),
    "full tiles to too late": (
        "partial = Lk // BLOCK * BLOCK", "partial = tl.cdiv(Lk, BLOCK) * BLOCK", "lengths"
    ),
    "softcap's sign": ("tl.where(s * capped < 0, -t, t)", "t", "options"),
    "softcap's derivative off": ("ds = ds * (1 - s * s)", "ds = ds", "options"),
    "logsumexp in log2": ("- lost) * LN2", "- lost)", "means"),
    "logsumexp without its maximum": ("logsumexp = largest * unit +", "logsumexp =", "options"),
    "rows that see nothing": (
        'tl.where(unseeing, float("-inf"), logsumexp)', "logsumexp", "rows_that_see_nothing"
    ),
    "their gradient": (
        'tl.where(l2 == float("inf"), Lq, rows)', "rows", "rows_that_see_nothing"
    ),
    "their probabilities": (
        'tl.where(unseeing, float("inf"), l2 * LOG2E)', "l2 * LOG2E", "rows_that_see_nothing"
    ),
    "dlse dropped": ("d -= tl.load(dlse + at", "d -= 0 * tl.load(dlse + at", "options"),
    "delta dropped": ("ds = p * (dp - delta)", "ds = p * dp", "options"),
    "mask off in backward": ("p = tl.where(seen, p, 0.0)", "p = p", "options"),
    "last queries dropped": (
        "partial, stop, Lq, Lk, left, right, c", "partial, partial, Lq, Lk, left, right, c",
        "options",
    ),
    "one head of a group": ("for g in range(0, group)", "for g in range(0, 1)", "heads"),
    "heads grouped in turns": (
        "h // group * stride_vh + k0.to(tl.int64) * stride_vt\n    out +=",
        "h % (heads // group) * stride_vh + k0.to(tl.int64) * stride_vt\n    out +=", "heads",
    ),
    "scale off in dk": ("dkx * scale, D", "dkx, D", "options"),
    "last sequence dropped": ("low, high = 0, sequences", "low, high = 0, sequences - 1", "packed"),
    "tile of another sequence": (
        "tile - (tl.load(ends + low) // BLOCK + low)", "tile - (tl.load(ends + low) // BLOCK)",
        "packed",
    ),
}  # fmt: skip
NEAREST = {
    "no bound": ("tl.load(squares + rows)\n    nearest", "tl.load(squares + rows)\n    least = best"
                 "\n    nearest", "data"),
    "second tile never measured": ("wanted = inside & (second >= least)", "wanted = inside & False",
                                   "ties"),
    "third tile never measured": ("unsure = inside & (third >= least)", "unsure = inside & False",
                                  "ties"),
    "tie broken high": ("(first < index))", "(first > index))", "ties"),
    "lowest of a chunk not taken": ("first = tl.min(tl.where(there & (total == least[:, None]), "
                                    "codes, num_codes), 1)",
                                    "first = tl.max(tl.where(there & (total == least[:, None]), "
                                    "codes, -1), 1)", "ties"),
    "last tile dropped": ("= best_tile\n    for tile in range(0, tl.cdiv(num_codes, TILE)",
                          "= best_tile\n    for tile in range(0, (num_codes // TILE)", "data"),
    "norms dropped": ("half = tl.where(inside, -half, LOWEST)", "half = tl.where(inside, 0.0, "
                      "LOWEST)", "data"),
    "padding scores 0": ("half = tl.where(inside, -half, LOWEST)", "half = tl.where(inside, -half, "
                         "0.0)", "data"),
    "low parts swapped": ("(1 if CODES else 2)", "(1 if CODES else 1)", "data"),
    "low parts of codes dropped": ("low = (value - high.to(tl.float32)).to(tl.float16)",
                                   "low = (value * 0).to(tl.float16)", "data"),
    "not scaled": ("return 1.0 / tl.where(x > 0, x, 1.0)", "return tl.where(x > 0, 1.0, 1.0)",
                   "data"),
    "cosine of lengths": ("* _inverse(tl.sqrt(norms))", "", "data"),
    "codes counted once": ("tl.full([BLOCK_N], 1, tl.int64)", "tl.full([BLOCK_N], 2, tl.int64)",
                           "data"),
}  # fmt: skip
DECODE = {
    "append skipped": ("kept, mask=mask)", "kept, mask=mask & (columns < 0)[None, :])", "steps"),
    "position off by one": ("tl.maximum(used + token - first, 0)",
                            "tl.maximum(used + token + 1 - first, 0)", "rotary"),
    "position of the slot": ("tl.maximum(new - first, 0)", "new", "padding"),
    "padding seen": ("low, left = first, first", "low, left = first * 0, first * 0",
                     "padding_may_hold_anything"),
    "own key unseen": ("(key <= query)", "(key < query)", "steps"),
    "softcap off": ("s = squash(s, 1.0) * cap", "s = s * cap", "steps"),
    "sums not rescaled": ("v, acc * tl.expand_dims(keep, -1))", "v, acc)", "steps"),
    "sums in another unit": ("keep *= tl.expand_dims(change, -1)", "", "int8_of_any_scale"),
    "sums left in their unit": ("acc * unit, odd * unit", "acc, odd", "int8"),
    "splits not weighed": ("rows * tl.exp2(above - base)", "rows", "long_cache"),
    "last split dropped": ("inside = splits <= last", "inside = splits < last", "one_by_one"),
    "rotated backwards": ("tl.where(first[None, :], -s, s)", "tl.where(first[None, :], s, -s)",
                          "rotary"),
    "pairs always interleaved": (
        "if INTERLEAVED:\n            first", "if True:\n            first", "rotary"
    ),
    "int8 clipped early": ("tl.div_rn(largest, 127.0)", "tl.div_rn(largest, 100.0)", "int8"),
    "int8 scale not kept": ("tl.store(scales + slots * stride_scale, scale, mask=inside)", "pass",
                            "int8"),
    "int8 channels swapped": ("(low & 0xFF) | (high << 8)", "(high & 0xFF) | (low << 8)", "int8"),
}  # fmt: skip
DRAW = {
    "guidance off": ("base + (x - base) * s", "x", "guidance"),
    "temperature off": ("x = tl.div_rn(x, temperature)", "x = x", "as_the_reference"),
    "top-k keeps one more": ("* block - top_k)", "* block - top_k - 1)", "as_the_reference"),
    "top-p of less": ("tl.sum(under)) * p", "tl.sum(under)) * p * 0.9", "borders_of_the_nucleus"),
    "noise of the next code": ("(at + 1).to(tl.uint64)", "(at + 2).to(tl.uint64)", "guidance"),
    "noise of the first token": ("stride_position) + t", "stride_position)", "guidance"),
    "fp64 never asked": ("(second >= limit).to(tl.int32)) == 1", "(second >= limit).to(tl.int32)) "
                         ">= 1", "close_scores"),
    "ties broken high": ("tl.min(tl.where(best == top, code, codes))",
                         "tl.max(tl.where(best == top, code, -1))", "ties_and_what_is_out"),
    "NaN let through": ('tl.where(x < float("inf"), undefined, 1)', "undefined",
                        "undefined_logits"),
}  # fmt: skip
RMS_NORM = {
    "eps dropped": ("/ D + eps)", "/ D)", "eps"),
    "weight dropped": ("normed * w[None, :], out", "normed, out", "shapes"),
    "gradient through the mean dropped": ("(dnormed - normed * shared[:, None])", "dnormed",
                                          "shapes"),
    "weight's gradient of some rows": ("dw += tl.where(inside", "dw = tl.where(inside", "sizes"),
}  # fmt: skip
SWIGLU = {
    "sigmoid alone": ("g / (1 + tl.exp2(g * -LOG2E)) * u", "1 / (1 + tl.exp2(g * -LOG2E)) * u",
                      "shapes"),
    "gradient of the sigmoid dropped": ("(1 + g * (1 - sigmoid))", "1.0", "shapes"),
    "gate's gradient as up's": ("d * g * sigmoid)", "d * u * sigmoid)", "shapes"),
}  # fmt: skip
ROTARY = {
    "backward turns on": ("if INVERSE:", "if False:", "sizes"),
    "rest not copied": ("if D > 2 * PAIRS:", "if False:", "sizes"),
    "positions ignored": ("if INDEXED:", "if False:", "positions"),
    "pairs turned the other way": ("p * s + q * c, out", "q * c - p * s, out", "sizes"),
}  # fmt: skip
CROSS_ENTROPY = {
    "ignored rows counted": ("tl.where(ignored, 0.0, above - logit + log)", "above - logit + log",
                             "ignored"),
    "ignored rows have gradients": ("d = tl.where(target == ignore_index, 0.0, d)", "d = d",
                                    "ignored"),
    "one-hot dropped": ("- tl.where(hit, d[:, None], 0.0)", "", "sizes"),
    "last class dropped": ("stop = tl.minimum(start + SPLIT, V)",
                           "stop = tl.minimum(start + SPLIT, V - 1)", "sizes"),
    "columns behind the last": ('s = tl.where(columns[None, :] < V, s, float("-inf"))', "s = s",
                                "sizes"),
    "parts not added up": ("if START:", "if False:", "sizes"),
    "logsumexp's gradient dropped": ("if DLSE:", "if False:", "sizes"),
}  # fmt: skip
SUITES = {
    "flash_attention": (FLASH, test_flash_attention),
    "vq_nearest": (NEAREST, test_vq_nearest),
    "decode_attention": (DECODE, test_decode_attention),
    "draw": (DRAW, test_draw),
    "rms_norm": (RMS_NORM, test_rms_norm),
    "swiglu": (SWIGLU, test_swiglu),
    "rotary": (ROTARY, test_rotary),
    "linear_cross_entropy": (CROSS_ENTROPY, test_linear_cross_entropy),
}
ARGUMENTS = {"as_the_reference": (64, 20.0), "guidance": (3,)}  # of tests that are no checks


def plant(monkeypatch, folder, op: str, text: str, replacement: str) -> None:
    """Put a changed copy of an operator's module, or of what it shares, in its place."""
    names = f"{op}/triton.py", "triton_language.py"
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    (changed,) = (name for name, source in sources.items() if source.count(text) == 1)
    for name in dict.fromkeys((changed, names[0])):
        module = "t2i_kernels." + name.removesuffix(".py").replace("/", ".")
        copy = folder / f"{module}.py"  # the interpreter reads the file again
        source = sources[name].replace(text, replacement) if name == changed else sources[name]
        copy.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(module, copy)
        mutant = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module, mutant)
        spec.loader.exec_module(mutant)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, (mutations, _) in SUITES.items() for name in mutations]
)
def test_planted_bug_is_caught(op, name, monkeypatch, tmp_path):
    mutations, suite = SUITES[op]
    text, replacement, check = mutations[name]
    plant(monkeypatch, tmp_path, op, text, replacement)
    run = getattr(suite, f"check_{check}", None) or getattr(suite, f"test_{check}")
    try:
        run("triton", *ARGUMENTS.get(check, ()))
    except (AssertionError, pytest.fail.Exception):
        return
    pytest.fail("no check noticed")


def test_nothing_planted_passes(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "flash_attention", "RAISE = tl.constexpr(8.0)", "RAISE = "
          "tl.constexpr(8.0)")  # fmt: skip
    test_flash_attention.check_means("triton")
