"""nvcc without a build: PTX and machine code of csrc/cuda, made once for every state of it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc/cuda"
CACHE = ROOT / "build/nvcc"
FLAGS = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}"]
KINDS = {"ptx": "compute", "cubin": "sm"}


class Missing(Exception):
    """Why there is no nvcc."""


@lru_cache(None)
def find() -> Path:
    """nvcc, where setup.py finds it. Raises Missing."""
    spec = importlib.util.spec_from_file_location("t2i_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(setup)
        return setup.find_nvcc()
    except (ImportError, setup.Unavailable) as reason:
        raise Missing(str(reason)) from None


def missing() -> str | None:
    """None where there is nvcc, else why not."""
    try:
        find()
    except Missing as reason:
        return str(reason)
    return None


@lru_cache(None)
def version() -> str:
    done = subprocess.run([find(), "--version"], check=True, capture_output=True, text=True)
    return re.search(r"release .*V([\d.]+)", done.stdout)[1]


@lru_cache(None)
def _digest() -> str:
    digest = hashlib.sha256(repr((version(), FLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile(source: str, kind: str, architecture: str) -> Path:
    """``source`` of csrc/cuda as "ptx" or "cubin" for "80", "90a", …"""
    target = CACHE / _digest() / f"{source}.{architecture}.{kind}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{os.getpid()}.{target.name}")
        arch = f"-arch={KINDS[kind]}_{architecture}"
        command = [find(), *FLAGS, f"-{kind}", arch, *["-lineinfo"] * (kind == "ptx"),
                   SOURCES / source, "-o", part]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # ptxas only warns where it makes wgmma wait for each other, or ignores setmaxnreg.
        if done.returncode or re.search("wgmma|setmaxnreg", done.stdout):
            raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout[:4000]}")
        os.replace(part, target)
    return target
