"""Plants bugs in the references, one at a time: the checks of the operators must catch each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest
import test_decode_attention
import test_flash_attention
import test_vq_nearest

from t2i_kernels import checks
from t2i_kernels import vector_quantizer as quantizer
from t2i_kernels.decode_attention import api as decode_api
from t2i_kernels.decode_attention import cache
from t2i_kernels.decode_attention import reference as decode
from t2i_kernels.flash_attention import reference as flash
from t2i_kernels.vq_nearest import api as nearest_api
from t2i_kernels.vq_nearest import reference as nearest

# name -> (module, text, its replacement)
FLASH = {
    "scale off": (flash, "(q * scale) @ k.mT", "q @ k.mT"),
    "scale off in dk": (flash, "scale * (ds.mT @ qh)", "ds.mT @ qh"),
    "default scale": (checks, "1 / math.sqrt(q.shape[-1])", "1 / q.shape[-1]"),
    "causal sees one more": (flash, "right = 0 if causal", "right = 1 if causal"),
    "causal sees one less": (flash, "offset <= right", "offset < right"),
    "causal aligned top-left": (flash, "arange(lk - lq, lk,", "arange(0, lq,"),
    "causal widened by window": (flash, "= 0 if causal", "= max(0, right) if causal"),
    "window off by one": (flash, "offset >= -left", "offset >= -left - 1"),
    "window of 0 ignored": (flash, "if left >= 0:", "if left > 0:"),
    "right side of window ignored": (flash, "offset <= right", "offset <= lk"),
    "mask off in backward": (flash, "p = torch.where(mask, p, 0)", "pass"),
    "softcap off": (flash, "if softcap > 0 else scores", "if softcap < 0 else scores"),
    "softcap not scaled back": (flash, "return softcap * (scores", "return 1.0 * (scores"),
    "softcap's derivative off": (flash, "ds *= 1 - (scores / softcap).square()", "pass"),
    "heads grouped in turns": (
        flash,
        "unflatten(1, (kv_heads, -1))",
        "unflatten(1, (-1, kv_heads)).transpose(1, 2)",
    ),
    "logsumexp in log2": (flash, "p.amax(dim=-1).log()", "p.amax(dim=-1).log2()"),
    "logsumexp without its maximum": (flash, "= largest - p", "= 0 * largest - p"),
    "dlse dropped": (flash, "sum(dim=-1) - dlse", "sum(dim=-1)"),
    "dlse's sign": (flash, "sum(dim=-1) - dlse", "sum(dim=-1) + dlse"),
    "delta dropped": (flash, "(do * o).sum(dim=-1) - dlse", "-dlse"),
    "last key dropped": (flash, "return p @ v, log", "return p[..., :-1] @ v[..., :-1, :], log"),
    "NaN in rows that see nothing": (flash, "if unseeing.any():", "if False:"),
    "NaN from dlse of such rows": (
        flash,
        "lse, dlse = (torch.where(unseeing, 0, t) for t in (lse, dlse))",
        "lse = torch.where(unseeing, 0, lse)",
    ),
    "NaN from dout of such rows": (flash, "do = torch.where(unseeing[..., None], 0, do)", "pass"),
    "NaN swallowed": (flash, "return p @ v, log", "return (p @ v).nan_to_num(), log"),
    "sums in the inputs' type": (flash, "torch.float64 else torch.float32", "0 else x.dtype"),
    "last sequence dropped": (flash, "(x[:-1], x[1:], strict", "(x[:-2], x[1:-1], strict"),
    "packed logsumexp not written": (flash, "out[rows], logsumexp[:, rows] =", "out[rows], _ ="),
    "packed gradients added up": (flash, "grad[0]\n", "grad[0] + 1\n"),
}
DECODE = {
    "append skipped": (decode, "cache[row, slots] = new.to(cache.dtype)", "pass"),
    "append off by one": (decode, "[:, None] + torch.arange", "[:, None] + 1 + torch.arange"),
    "position off by one": (
        decode,
        "positions = (slots - first)",
        "positions = (slots + 1 - first)",
    ),
    "position of the slot": (decode, "positions = (slots - first)", "positions = slots"),
    "position of the token": (
        decode,
        "positions = (slots - first)",
        "positions = slots - slots[:, :1]",
    ),
    "padding seen": (decode, "& (slot >= first[..., None])", ""),
    "own key unseen": (decode, "(slot <= slots[..., None])", "(slot < slots[..., None])"),
    "later tokens seen": (
        decode,
        "(slot <= slots[..., None])",
        "(slot <= slots[:, -1:, None].expand(*slots.shape, 1))",
    ),
    "window off by one": (decode, "slots[..., None] - window", "slots[..., None] - window + 1"),
    "window of 0 ignored": (decode, "if window >= 0", "if window > 0"),
    "NaN of unused slots": (
        decode,
        "v = torch.where(seen.any(dim=1)[..., None, None], v, 0)",
        "pass",
    ),
    "rows cut to the shortest": (decode, "int(slots.max()) + 1", "int(slots.min()) + 1"),
    "rotated backwards": (
        decode,
        "a * cos - b * sin, a * sin + b * cos",
        "a * cos + b * sin, b * cos - a * sin",
    ),
    "wrong pairs rotated": (decode, "unflatten(-1, (-1, 2)).unbind(-1)", "chunk(2, dim=-1)"),
    "pairs always interleaved": (decode, "if interleaved:", "if True:"),
    "query not rotated": (
        decode,
        "q, k_new = (rotate(x, cos, sin, rotary_interleaved) for x in (q, k_new))",
        "k_new = rotate(k_new, cos, sin, rotary_interleaved)",
    ),
    "last channels rotated": (decode, "[turned.to(x.dtype), rest]", "[rest, turned.to(x.dtype)]"),
    "int8 truncated": (decode, ".round(), scale", ".trunc(), scale"),
    "int8 clipped early": (decode, "amax(dim=-1) / 127", "amax(dim=-1) / 100"),
    "int8 scale of the token": (
        decode,
        "x.abs().amax(dim=-1)",
        "x.abs().amax(dim=(-2, -1))[..., None].expand(x.shape[:-1])",
    ),
    "int8 read without scale": (
        decode,
        "(cache.float() * scale[..., None])",
        "(cache.float() / 127)",
    ),
    "int8 scale not kept": (decode, "new, scales[row, slots] =", "new, _ ="),
    "lengths advanced": (decode, "    out, _ = attend(", "    seqlens += tokens; out, _ = attend("),
    "full cache unnoticed": (decode, "or high >= max_seqlen", "or high > max_seqlen"),
    "negative slot unnoticed": (decode, "if low < 0 or", "if"),
    "negative start unnoticed": (decode, "if int(first.min()) < 0", "if False"),
    "position beyond the table": (decode, "last >= len(rotary)", "last > len(rotary)"),
    "history kept": (decode_api, "q.detach(), k_new.detach(), v_new.detach()", "q, k_new, v_new"),
    "advance by one": (cache, "self.seqlens += tokens", "self.seqlens += 1"),
    "scale off": (flash, "(q * scale) @ k.mT", "q @ k.mT"),
    "softcap off": (flash, "if softcap > 0 else scores", "if softcap < 0 else scores"),
    "heads grouped in turns": FLASH["heads grouped in turns"],
}
NEAREST = {
    "tie broken high": (
        nearest,
        'len(codes))\n    lowest.scatter_reduce_(0, row[best], code[best], "amin")',
        '-1)\n    lowest.scatter_reduce_(0, row[best], code[best], "amax")',
    ),
    "last code dropped": (nearest, "alpha=-2)", "alpha=-2); scores[:, -1] += 1e300"),
    "norms dropped": (nearest, "offset = norms if metric ==", "offset = 0 * norms if metric =="),
    "factor of the product": (nearest, "alpha=-2)", "alpha=-1)"),
    "vectors in fp32": (
        nearest,
        "z.shape[-1]).double()",
        "z.shape[-1]).float().double() * (1 + 1e-7)",
    ),
    "codes in bf16": (nearest, "codebook.double()", "codebook.bfloat16().double()"),
    "no second look": (nearest, "4 * bound", "0 * bound"),
    "first candidate taken": (nearest, "best = exact == distance[row]", "best = exact == exact"),
    "cosine of lengths": (nearest, "_unit(vectors), _unit(codes)", "_unit(vectors), codes"),
    "cosine below 0": (nearest, "exact = exact.clamp_min(0)", "exact = exact - 1e-9"),
    "cosine distance halved": (nearest, "else 2 - 2 *", "else 1 - 1 *"),
    "tiny vectors are zero": (nearest, "largest > 0, largest, 1)", "largest > 1e-200, largest, 1)"),
    "distance not squared": (nearest, ".float().view(", ".sqrt().float().view("),
    "codes counted once": (nearest, "torch.bincount(indices,", "torch.bincount(indices.unique(),"),
    "NaN let through": (nearest, "if not finite.all():", "if False:"),
    "NaN in another row": (nearest, "finite.int().argmin()", "finite.int().argmax()"),
    "gradient pretended": (nearest_api, "z.detach(), codebook.detach()", "z, codebook"),
    "counts always returned": (nearest_api, "counts if return_counts else None", "counts"),
}
QUANTIZER = {
    "beta on the wrong term": (
        quantizer, "codebook + self.beta * commitment", "self.beta * codebook + commitment"
    ),
    "legacy beta ignored": (
        quantizer, "commitment + self.beta * codebook", "self.beta * commitment + codebook"
    ),
    "commitment not weighted": (
        quantizer, "return self.beta * commitment", "return 1.0 * commitment"
    ),
    "commitment pulls the codes": (
        quantizer, "F.mse_loss(vectors, quantized.detach())", "F.mse_loss(vectors, quantized)"
    ),
    "codes pull the vectors": (
        quantizer, "F.mse_loss(quantized, vectors.detach())", "F.mse_loss(quantized, vectors)"
    ),
    "no gradient through": (
        quantizer, "(carrier - carrier.detach())", "(carrier - carrier).detach()"
    ),
    "rotation without its scale": (quantizer, "turned = scale * (z", "turned = (z"),
    "rotation turned back": (quantizer, "+ 2 * q_unit * along_z", "- 2 * q_unit * along_z"),
    "opposites rotated": (quantizer, "& (r_norm > 1e-6)", ""),
    "sums not decayed": (quantizer, "lerp_(sums, 1 - self", "lerp_(sums, self"),
    "counts not decayed": (quantizer, "dtype), 1 - self.ema_decay)", "dtype), self.ema_decay)"),
    "means not normalised": (quantizer, "self._normalize(means)", "means"),
    "unused codes die": (quantizer, "alive = self.ema_counts > 1e-20", "alive = counts >= 0"),
    "restart keeps its sums": (
        quantizer,
        "self.ema_sums.copy_(torch.where(dead[:, None], seeds, self.ema_sums))",
        "pass",
    ),
    "restart keeps its counts": (quantizer, "self.ema_counts.masked_fill_(dead, 1)", "pass"),
    "restart one batch late": (quantizer, "stale >= self.restart", "stale > self.restart"),
    "use forgotten": (quantizer, "torch.where(counts > 0, 0, self.stale + 1)", "self.stale + 1"),
    "restarted codes stay stale": (quantizer, "self.stale.masked_fill_(dead, 0)", "pass"),
    "learns while evaluating": (quantizer, "if self.training:", "if True:"),
    "window of one half": (
        quantizer, "torch.where(full, self.window_counts[0], self.window_counts[1])", "0"
    ),
}  # fmt: skip
SUITES = {
    "flash_attention": (FLASH, test_flash_attention.CHECKS),
    "decode_attention": (DECODE, test_decode_attention.CHECKS),
    "vq_nearest": (NEAREST, test_vq_nearest.CHECKS),
}


def plant(monkeypatch, module: ModuleType, text: str, replacement: str) -> None:
    """Change the code of the functions of ``module``, which whoever holds them then runs."""
    source = inspect.getsource(module)
    assert source.count(text) == 1, "the mutation no longer fits the source"
    mutant = dict(codes_of(compile(source.replace(text, replacement), module.__file__, "exec")))
    for name, function in functions_of(module):
        monkeypatch.setattr(function, "__code__", mutant[name])


def codes_of(code: CodeType, prefix: str = "") -> Iterator[tuple[str, CodeType]]:
    """The functions that a compiled module or class defines, by name."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield prefix + constant.co_name, constant
            yield from codes_of(constant, f"{prefix}{constant.co_name}.")


def functions_of(owner, prefix: str = "") -> Iterator[tuple[str, FunctionType]]:
    for name, value in vars(owner).items():
        value = getattr(value, "__func__", value)  # of a class method
        if isinstance(value, FunctionType):
            value = inspect.unwrap(value)  # of torch.no_grad
        if (
            isinstance(value, type)
            and inspect.ismodule(owner)
            and value.__module__ == owner.__name__
        ):
            yield from functions_of(value, f"{name}.")
        elif isinstance(value, FunctionType) and value.__code__.co_filename == inspect.getfile(
            owner
        ):
            yield prefix + name, value


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, (mutations, _) in SUITES.items() for name in mutations]
)
def test_planted_bug_is_caught(op, name, monkeypatch):
    mutations, op_checks = SUITES[op]
    plant(monkeypatch, *mutations[name])
    for check in op_checks:
        try:
            check("reference")
        except (AssertionError, pytest.fail.Exception):
            return
    pytest.fail("no check noticed")


@pytest.mark.parametrize("name", QUANTIZER)
def test_planted_bug_in_the_quantizer_is_caught(name, monkeypatch):
    plant(monkeypatch, *QUANTIZER[name])
    path = Path(__file__).with_name("test_vector_quantizer.py")
    slow = "not compiles and not two_processes"
    arguments = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-k", slow, str(path)]
    assert pytest.main(arguments) == pytest.ExitCode.TESTS_FAILED
