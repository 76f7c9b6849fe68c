"""The machine code of the shipped Triton kernels is no worse than the committed counts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from t2i_kernels import triton_backend

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(triton_backend.INTERPRETED, reason="TRITON_INTERPRET is 1")
@pytest.mark.parametrize("architecture", ["80", "90", "100", "120", "gfx942"])
def test_counts(architecture):
    command = [sys.executable, ROOT / "benchmarks/gpu_static.py", "--check", "--architectures"]
    done = subprocess.run([*command, architecture], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_kernel_fits():
    rows = json.loads((ROOT / "benchmarks/results/gpu_static.json").read_text())["rows"]
    assert [(r["architecture"], r["case"]) for r in rows if r["occupancy"] == 0] == []


def test_what_is_worse():
    import counts

    old = {"registers": 200, "spills": [2, 3], "shared": 100, "per_matrix": 3.0, "FMUL": 4}
    assert counts.worse(old, old) == []
    assert counts.worse(old | {"registers": 199, "spills": [0, 0]}, old) == []
    for change in ({"registers": 201}, {"spills": [3, 3]}, {"per_matrix": 3.01}, {"FMUL": 5}):
        (line,) = counts.worse(old | change, old)
        assert line.startswith(next(iter(change)))


LISTING = """
        Function : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/               @P1 BRA 0x60 ;
        /*0040*/                   FMUL R8, R8, R9 ;
        /*0050*/                   FMUL R9, R9, R9 ;
        /*0060*/                   MUFU.EX2 R3, R3 ;
        /*0070*/              @!P0 BRA 0x10 ;
        /*0080*/                   EXIT ;
"""


WAITING = """
        Function : kernel
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R4 ;
        /*0010*/              @!P0 BRA 0x0 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x8], R4 ;
        /*0040*/              @!P0 BRA 0x80 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/               @P1 BRA 0x0 ;
        /*0070*/                   EXIT ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x8], R4 ;
        /*0090*/              @!P0 BRA 0x80 ;
        /*00a0*/                   BRA 0x50 ;
"""


def test_reading_loops_that_wait():
    """Inside the loop, and moved behind it."""
    import sass

    kernel = sass._kernel("kernel", 168, 0, 0, WAITING)
    (loop,) = kernel.loops
    assert loop.size == 7 and loop.matrix == 1 and loop.per_matrix == 7


def test_reading():
    """A loop, its common path, and what lies outside."""
    import sass

    kernel = sass._kernel("kernel", 32, 0, 0, LISTING)
    (loop,) = kernel.loops
    assert loop.size == 7 and loop.matrix == 1
    assert loop.count("FMUL") == 2 and loop.count("FMUL", common=True) == 0
    assert loop.per_matrix == 5  # all but the products that may be skipped
    assert loop.count("MUFU.EX2") == loop.count("LDSM") == 1 and loop.count("MOV") == 0
    serial, overlap = loop.bounds(80)
    assert serial == 8 / (8 + 8) and overlap == 1.0


def test_teams():
    """Warps that each take one of two branches go through half of what both hold."""
    import sass

    (loop,) = sass._kernel("kernel", 32, 0, 0, LISTING).loops
    loop = (loop + loop).of_teams()
    assert loop.size == 12 and loop.matrix == 2
    assert loop.count("FMUL", common=True) == 2 and loop.per_matrix == 6
