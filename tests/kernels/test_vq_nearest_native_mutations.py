"""Plants bugs in csrc/cpu/vq_nearest.cpp: the tests of the kernel must catch each of them."""

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
SOURCE = "csrc/cpu/vq_nearest.cpp"
TESTS = ROOT / "tests/kernels/test_vq_nearest_native.py"

INNER = "lanes; lanes &= lanes - 1) {\n      const int64_t k"
BLOCKS = "b < end; ++b) {\n        const Vec error"
# name -> (text, its replacement, the tests that must notice)
MUTATIONS = {
    "none": ("", "", "oracle or ties or panel or layouts or finite"),
    "no error bound": ("? nu / (1 - nu) :", "? 0 * nu :", "oracle"),
    "error bound without the query": ("gamma * radius + unit_error", "unit_error", "oracle"),
    "tie broken high": ("if (distance < tile", "if (distance <= tile", "ties"),
    "center off": ("- codebook.center[j]) * codebook.scale", ") * codebook.scale", "oracle"),
    "zero vector ignored": ("norm2 += scale * scale", "norm2 += 0", "oracle"),
    "first candidate taken": (INNER, INNER.replace("&= lanes - 1", "= 0"), "oracle"),
    "last block dropped": (BLOCKS, BLOCKS.replace("end;", "end - 1;"), "oracle"),
    "last panel dropped": ("begin < codebook.num_blocks; b", "begin < kPanel; b", "panel"),
    "overflow unguarded": ("if (largest <= 0x1p60)", "if (true)", "oracle"),
    "NaN let through": ("if (!is_finite(row, dim))", "if (false)", "finite"),
    "next row read": ("row = z + q * dim", "row = z + (q ? q - 1 : 0) * dim", "oracle"),
}


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


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(build, tmp_path, name):
    toolchain, objects = build
    text, replacement, tests = MUTATIONS[name]
    capability = "DEFAULT"  # the one that every machine has; without fused multiply-adds

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = (tmp_path / SOURCE).read_text()
    if text:
        assert source.count(text) == 1, "the mutation no longer fits the source"
        (tmp_path / SOURCE).write_text(source.replace(text, replacement))
    toolchain.root = tmp_path
    mutant = toolchain.compile(SOURCE, capability, tmp_path)

    package = tmp_path / "t2i_kernels"
    ignore = shutil.ignore_patterns("__pycache__", native.LIBRARY.name)
    shutil.copytree(Path(t2i_kernels.__file__).parent, package, ignore=ignore)
    linked = [mutant if unit == (SOURCE, capability) else objects[unit] for unit in objects]
    toolchain.link(linked, package / native.LIBRARY.name)

    # The copy comes first on the path, so that the tests import it.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(TESTS)]
        + ["-k", f"({tests}) and DEFAULT"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    expected = 1 if text else 0  # pytest's exit status for failed tests, not for errors around them
    assert done.returncode == expected, done.stdout + done.stderr
