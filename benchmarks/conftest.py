"""What every record has: threads, versions, and the machine's peaks, measured in the same run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from t2i_kernels import native

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
PEERS = ("torch", "faiss-cpu", "scikit-learn", "scipy", "pykdtree", "transformers")


@pytest.fixture(autouse=True)
def threads() -> int:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return THREADS


@pytest.fixture(scope="session")
def peaks(tmp_path_factory) -> dict[str, float]:
    """``gflops`` and ``gigabytes_per_second`` of this machine with these threads."""
    program = tmp_path_factory.mktemp("machine") / "machine"
    kind = {"AVX2": ["-mavx2", "-mfma"]}.get(native.cpu_capability(), ["-march=native"])
    flags = ["-O3", *kind, "-ffp-contract=fast", "-std=c++17", "-pthread"]
    source = Path(__file__).with_name("machine.cpp")
    subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", program], check=True)
    return json.loads(subprocess.check_output([program, str(THREADS)]))


def versions() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    output_json["t2i"] = {
        "threads": THREADS,
        "instruction_set": native.cpu_capability(),
        "versions": versions(),
        "command": os.environ.get("BENCH_COMMAND", "make bench"),
    }
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
