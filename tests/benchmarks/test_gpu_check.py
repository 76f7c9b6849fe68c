"""``make gpu-check`` as far as it goes without a GPU: up to every first launch, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[2]


def run(*options: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks/gpu_check.py", *options]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )


def test_dry_run():
    done = run("--dry-run", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    problems = [line for line in done.stdout.splitlines() if "'t2i': nan" in line]
    assert len(problems) == 4 and all("'t2i, triton': nan" in line for line in problems)


def test_without_a_gpu_it_says_so():
    done = run(CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0 and "no GPU that torch can use" in done.stderr
