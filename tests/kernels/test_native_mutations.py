"""Plants bugs in the native kernels: their tests must catch each of them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import t2i_kernels
from t2i_kernels import native

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "vq_nearest": ROOT / "tests/kernels/test_vq_nearest_native.py",
    "flash_attention": ROOT / "tests/kernels/test_flash_attention_native.py",
    "decode_attention": ROOT / "tests/kernels/test_decode_attention_native.py",
    "linear": ROOT / "tests/kernels/test_linear.py",
    "norm": ROOT / "tests/kernels/test_decode_step.py",
    "decode_step": ROOT / "tests/kernels/test_decode_step.py",
    "draw": ROOT / "tests/kernels/test_draw.py",
    "draw_tokens": ROOT / "tests/kernels/test_draw_tokens.py",
}

FILES = {  # what is compiled, and what that includes
    "vq_nearest": ["csrc/cpu/vq_nearest.cpp", "csrc/cpu/vq_coarse.h"],
    "flash_attention": [
        "csrc/cpu/flash_attention.cpp",
        "csrc/cpu/attention_rows.h",
        "csrc/cpu/vec.h",
    ],
    "decode_attention": ["csrc/cpu/decode_attention.cpp"],
    "linear": ["csrc/cpu/linear.cpp", "csrc/cpu/vec.h"],
    "norm": ["csrc/cpu/norm.cpp"],
    "decode_step": ["csrc/bindings/decode_step_cpu.cpp", "csrc/bindings/decode_plan.h"],
    "draw": ["csrc/cpu/draw.cpp"],
    "draw_tokens": ["csrc/bindings/decode_step_cpu.cpp", "csrc/bindings/draw.h"],
}

# name -> (text, its replacement, the tests that must notice, the instruction set unless DEFAULT)
NEAREST = {
    "none": ("", "", "oracle or ties or panel or layouts or finite or equally"),
    "no error bound": ("? nu / (1 - nu) :", "? 0 * nu :", "oracle"),
    "error bound without the query": ("gamma * radius + unit_error", "unit_error", "oracle"),
    "fp64 trusted": ("return double(dim + 4) * 0x1p-51", "return 0 * dim", "equally"),
    "tie broken high": ("k < nearest.code)", "k > nearest.code)", "ties"),
    "center off": ("scaled = (point[j] - codebook.center[j]) *", "scaled = point[j] *", "oracle"),
    "zero vector ignored": ("norm2 += scale * scale", "norm2 += 0", "oracle"),
    "first candidate taken": (
        "lanes; lanes &= lanes - 1) {\n      const int64_t place",
        "lanes; lanes = 0) {\n      const int64_t place",
        "oracle",
    ),
    "last block dropped": (
        "b < end; ++b) {\n      Vec lowest",
        "b < end - 1; ++b) {\n      Vec lowest",
        "oracle",
    ),
    "last panel dropped": ("panel < codebook.num_blocks;", "panel < kPanel;", "panel"),
    "first dimensions dropped": (
        "depth == 0 ? Vec(half_norm[k])",
        "true ? Vec(half_norm[k])",
        "deep",
    ),
    "bf16 as if it had a bit more": ("0x1p-7 * 1.01", "0x1p-8 * 1.01", "bf16", "AMX"),
    "low parts swapped": ("query ? high : low", "query ? low : high", "oracle", "AMX"),
    "last of a pair of blocks dropped": ("min_of(b + 2, end)", "b + 1", "oracle", "AMX"),
    "children of the wrong group": (
        "_mm512_set1_epi32(int32_t(first))",
        "_mm512_set1_epi32(0)",
        "panel",
        "AVX512",
    ),
    "overflow unguarded": ("if (norm2 <= 0x1p120)", "if (true)", "oracle"),
    "NaN let through": ("query.finite = is_finite(row, dim)", "query.finite = true", "finite"),
    "next row read": ("(first + q) * dim, tile", "(first + q / 2) * dim, tile", "oracle"),
    "radius too small": ("+ 2 * query.upper;", "+ 1.9f * query.upper;", "oracle"),
    "radius shrinks too far": (
        "radius2 = radius2_of(tree, query);\n            near",
        "radius2 /= 2;\n            near",
        "oracle",
    ),
    "last group of leaves dropped": (
        "boxes[tree.num_levels - 1];\n",
        "boxes[tree.num_levels - 1];\n    --count;\n",
        "oracle",
    ),
}
ATTENTION = {
    "none": ("", "", "oracle or packed or threads or huge"),
    "scale off": (": a.scale;\n}", ": 1;\n}", "oracle"),
    "causal sees one less": ("(distance <= right)", "(distance < right)", "oracle"),
    "window off by one": ("(distance >= left)", "(distance > left)", "oracle"),
    "a tile sees too little": (
        "a.right + 1},\n                      {0, s.k_length});\n}\n\n// The keys that all",
        "a.right},\n                      {0, s.k_length});\n}\n\n// The keys that all",
        "oracle",
    ),
    "sum not rescaled": (
        "(sum + r * kLanes), factor[r],",
        "(sum + r * kLanes), Vec(1.f),",
        "oracle",
    ),
    "output not rescaled": ("r * kLanes) * factor[r]; }", "r * kLanes); }", "oracle"),
    "one head for all": (
        "r / a.groups, kv_head * a.groups + r % a.groups)",
        "r / a.groups, kv_head * a.groups)",
        "oracle",
    ),
    "parts not weighted": ("= std::exp(partials[i].logsumexp[r] - shift)", "= 1", "oracle"),
    "softcap's derivative off": ("(Vec(1.f) - tanh * tanh)", "Vec(1.f)", "oracle"),
    "dlse dropped": ("(g.dlogsumexp ? g.dlogsumexp[at] : 0)", "0", "oracle"),
    "delta dropped": ("space.delta[r] = sum -", "space.delta[r] = 0 * sum -", "oracle"),
    "mask off in backward": ("gradient = Vec::blendv(Vec(0.f), gradient, seen)", "", "oracle"),
    "dk of too few rows": ("a.right - offset, ", "a.right - offset + 1, ", "oracle"),
    "last part of dq dropped": ("i < count; ++i) sum +", "i + 1 < count; ++i) sum +", "oracle"),
    "blocks follow the task's rows": (
        "key + (range.begin - key) / block * block",
        "range.begin",
        "threads and window",
    ),
    "part of a tile takes all": ("space.k + (keys.begin - block.begin)", "space.k + 0", "oracle"),
    "part of a tile misplaced": (
        "space.out + tile * a.v_dim + lane",
        "space.out + tile * a.v_dim",
        "oracle",
        "AVX512",
    ),
    "difference after the product": (
        "(score - from) * Vec(kLog2e)",
        "score * Vec(kLog2e) - from * Vec(1.4426f)",
        "huge",
    ),
}
DECODE = {
    "none": ("", "", "contract or caches or others"),
    "append skipped": (
        "store_row(x, step.dim, float_type(step.cache_type), to.data, at);",
        "",
        "steps",
    ),
    "the first four queries again": ("space.q + r * width, k", "space.q + 0 * r, k", "contract"),
    "own slot unseen": ("own + 1 - task.slot", "own - task.slot", "steps"),
    "window off by one": ("own - step.window - task", "own - step.window - 1 - task", "caches"),
    "values in front of a window read": ("seen, count,", "0, count,", "in_front"),
    "position not from start": ("max_of(slot - start, 0)", "max_of(slot, 0)", "padding"),
    "softcap off": ("tanh(score) * Vec(softcap)", "score", "steps"),
    "scale off": (": step.scale;", ": 1;", "steps"),
    "parts not weighted": (
        "std::exp(partials[i].largest[r] - shift);\n      const",
        "1;\n      const",
        "caches",
    ),
    "sums of parts not weighted": ("weight * partials[i].sum", "partials[i].sum", "caches"),
    "last channels dropped": ("if (d < width) weigh", "if (false) weigh", "contract"),
    "keys not scaled": ("scale_slots(task, step.k_scale, scores)", "(void)0", "caches"),
    "int8 cut off": ("std::nearbyint(x[d] / divisor)", "x[d] / divisor", "int8"),
}
LINEAR = {
    "none": ("", "", "product or depend or finite or tiny"),
    "offset of bytes left in": ("ints(-bias * x.sums[at])", "ints(0)", "product"),
    "scale of the other group": ("scales[half][v] * scale", "scales[0][v] * scale", "product"),
    "first inputs forgotten": ("begin == 0 ? Vec(0.f)", "true ? Vec(0.f)", "product"),
    "odd input dropped": ("if (whole == end) return;", "return;", "product"),
    "high halves for low ones": ("high, word(m, line + kLines)", "high, word(m, line)", "product"),
    "one stream read by all": (": r * apart);", ": 0 * apart);", "product"),
    "last panels dropped": ("if (rest < end) multiply", "if (false) multiply", "product"),
    "last rows dropped": ("first + row, rows - row,", "first + row, 0 * row,", "product"),
    "row 193 written to row 1": ("out.out + first * out.stride, out)", "out.out, out)", "product"),
    "NaN taken for a number": ("= std::numeric_limits<float>::quiet_NaN()", "= 0", "finite"),
    "half of a group unseen": (
        "bits = at::vec::maximum(bits, at::vec::cast<int32_t>(Vec::loadu(x + k).abs()))",
        "bits = at::vec::cast<int32_t>(Vec::loadu(x + k).abs())",
        "product",
    ),
}
NORM = {
    "eps off": ("+ norm.eps)", ")", "kinds"),
    "mean off": ("mean = sum_of(sum) / float(channels)", "mean = 0", "kinds"),
    "last channels dropped": ("squares += (x[i] - mean) * (x[i] - mean)", "squares += 0", "kinds"),
    "bias off": ("if (norm.bias) y = y", "if (false) y = y", "kinds"),
}
STEP = {
    "none": ("", "", "types or kinds or caches or positions or depend or padding"),
    "another norm": ("rows_, dim, &layer.ffn_norm", "rows_, dim, &layer.attention_norm", "types"),
    "append skipped": ("task.slot_end == step.seqlens[task.row] + 1", "false", "types"),
    "one cache for all layers": ("+ index * layer_stride_ * bytes", "", "types"),
    "one layer's scales": ("scales->data += index * scale_stride_", "scales->data += 0", "caches"),
    "first part alone": ("&partials[first], last - first)", "&partials[first], 1)", "caches"),
    "a row of many not prepared": (": member.share(rows);", ": member.share(rows - 1);", "depend"),
    "another token scored": ("(row / last + 1) * skipped", "skipped", "types"),
    "k normalised as q": ("which ? layer.k_norm : layer.q_norm", "layer.q_norm", "kinds"),
    "not added to the residual": (
        "{residual_, dim, Epilogue::add});\n    member.wait();\n  }\n\n  void normalise",
        "{residual_, dim, Epilogue::store});\n    member.wait();\n  }\n\n  void normalise",
        "types",
    ),
}
DRAW = {
    "none": ("", "", "reference or guidance or ties or large"),
    "noise of the next position": ("uint64_t(d.position)", "uint64_t(d.position + 1)", "reference"),
    "a winner passed over": ("- 1e-3f - 1e-6f", "+ 0.3f - 1e-6f", "reference"),
    "rounding of large scores": ("- 1e-6f * std::fabs(float(best))", "", "large"),
    "one more than k": ("target = k - 1;", "target = k < count ? k : k - 1;", "reference"),
    "nucleus too small": ("before + mass[step] < p", "before + 2 * mass[step] < p", "reference"),
    "temperature off": ("= score / divisor", "= score", "reference"),
    "guidance off": ("d.guidance * (x - base[i])", "(x - base[i])", "guidance"),
    "last block passed over": (
        "first < codes; first += kBlock",
        "first + kBlock < codes; first += kBlock",
        "reference",
    ),
    "inf let through": ("if (!finite || top == -kInf)", "if (top == -kInf)", "undefined or ties"),
}
DRAW_TOKENS = {
    "none": ("", "", "turns or caches"),
    "the first code again": ("drawn[image * count + i - 1]", "drawn[image * count]", "turns"),
    "a cache that does not grow": ("for (int32_t& length : lengths) ++length;", "", "turns"),
    "unconditional rows of one image": (
        "const int64_t image = row % images;",
        "const int64_t image = row < images ? row : 0;",
        "turns",
    ),
    "scales of the first code": ("scales[at]", "scales[image * count]", "turns"),
    "noise of the first code": ("position[image] + token", "position[image]", "turns"),
}
MUTATIONS = [
    pytest.param(op, *mutation[:3], *(mutation[3:] or ("DEFAULT",)), id=f"{op}: {name}")
    for op, mutations in (
        ("vq_nearest", NEAREST),
        ("flash_attention", ATTENTION),
        ("decode_attention", DECODE),
        ("linear", LINEAR),
        ("norm", NORM),
        ("decode_step", STEP),
        ("draw", DRAW),
        ("draw_tokens", DRAW_TOKENS),
    )
    for name, mutation in mutations.items()
]


def load_setup():
    spec = importlib.util.spec_from_file_location("t2i_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(toolchain, object files by unit) of the unchanged sources."""
    setup = load_setup()
    try:
        toolchain = setup.Toolchain(ROOT)
    except setup.Unavailable as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("objects")
    return toolchain, {unit: toolchain.compile(*unit, folder) for unit in toolchain.units()}


# DEFAULT is what every machine has, without fused multiply-adds.
@pytest.mark.parametrize(("op", "text", "replacement", "tests", "capability"), MUTATIONS)
def test_mutation_is_caught(build, tmp_path, op, text, replacement, tests, capability):
    if capability not in native.cpu_capabilities():
        pytest.skip(f"this machine has no {capability}")
    toolchain, objects = build
    source_file = FILES[op][0]

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    if text:
        (file,) = [tmp_path / f for f in FILES[op] if text in (tmp_path / f).read_text()]
        source = file.read_text()
        assert source.count(text) == 1, "the mutation no longer fits the source"
        file.write_text(source.replace(text, replacement))
    toolchain.root = tmp_path
    # Bindings are compiled once for all instruction sets.
    unit = source_file, capability if "csrc/cpu" in source_file else None
    mutant = toolchain.compile(*unit, tmp_path)

    package = tmp_path / "t2i_kernels"
    ignore = shutil.ignore_patterns("__pycache__", native.LIBRARY.name)
    shutil.copytree(Path(t2i_kernels.__file__).parent, package, ignore=ignore)
    linked = [mutant if u == unit else objects[u] for u in objects]
    toolchain.link(linked, package / native.LIBRARY.name)

    # The copy comes first on the path, so that the tests import it.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(TESTS[op])]
        + ["-k", f"({tests}) and {capability}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    expected = 1 if text else 0  # pytest's exit status for failed tests, not for errors around them
    assert done.returncode == expected, done.stdout + done.stderr
