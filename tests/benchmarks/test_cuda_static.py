"""The machine code of the CUDA kernels is no worse than the committed counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_static  # noqa: E402
import nvcc  # noqa: E402


@pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))
@pytest.mark.parametrize(
    ("architecture", "sources"),
    [("80", ["*_bf16_*.cu", "vq_nearest_[48].cu"]), ("90a", ["flash_forward_sm90_bf16_*.cu"])],
)
def test_counts(architecture, sources):
    command = [sys.executable, ROOT / "benchmarks/cuda_static.py", "--check"]
    options = ["--architectures", architecture, "--sources", *sources]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_page_is_of_the_record():
    record = json.loads(cuda_static.RESULT.read_text())
    assert cuda_static.RESULT.with_suffix(".md").read_text() == cuda_static.page(record)


def test_every_kernel_fits_every_gpu():
    """sm_120 has least shared memory, as much as sm_86 and sm_89."""
    rows = json.loads(cuda_static.RESULT.read_text())["rows"]
    assert {row["architecture"] for row in rows} == {"80", "90a", "100a", "120a"}
    assert [row["kernel"] for row in rows if row["occupancy"] == 0] == []


def test_every_bound_that_does_not_hold_has_its_reason():
    rows = json.loads(cuda_static.RESULT.read_text())["rows"]
    used = set()
    for target, row, met in cuda_static.verdicts(rows):
        reasons = {(name, kernel, what) for name, kernel, what in cuda_static.MISSED
                   if name == target.name and re.fullmatch(kernel, row["kernel"])
                   and re.fullmatch(what, target.what)}  # fmt: skip
        assert met or reasons, (target.name, row["kernel"], target.what)
        used |= set() if met else reasons
    assert used == cuda_static.MISSED.keys()


NAME = (
    "_ZN3t2i4cuda20flash_forward_kernelINS0_18FlashForwardKernelINS_3ptx4Bf16ELi64ELb1EEEEEvNS0_"
    "12FlashForwardE"
)


def test_names():
    parsed = cuda_static.parse(NAME)
    assert str(parsed) == "flash_forward<bf16, 64, true>"
    assert parsed.shape.blocks == {"queries": 128, "keys": 128}


def test_targets():
    row = {"kernel": "flash_forward<bf16, 128, false>", "architecture": "80", "spills": [0, 0],
           "per_matrix": 3.0, "FMUL": 4, "LDSM": 80, "matrix": 256, "bounds": [0.7, 1]}  # fmt: skip
    assert all(met for _, _, met in cuda_static.verdicts([row]))
    for change in ({"spills": [0, 1]}, {"per_matrix": 3.2}, {"LDSM": 81}, {"bounds": [0.6, 1]}):
        assert [met for _, _, met in cuda_static.verdicts([row | change])].count(False) == 1
