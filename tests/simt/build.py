"""Builds csrc/cuda with the host compiler, on csrc/simt: with the checker, or fast without it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build/simt"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
COMMON = ["-std=c++20", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
FAST = ["-O2", "-march=native"]
# Without calls merged, an address in the code names one source line.
CHECKED = ["-O1", "-g", "-fno-optimize-sibling-calls", "-fsanitize=thread"]


def build(
    checked: bool, sources: list[Path] | None = None, flags: tuple[str, ...] = ()
) -> ModuleType:
    """A module with the launchers; made once for every state of the sources."""
    cuda, simt, tests = ROOT / "csrc/cuda", ROOT / "csrc/simt", ROOT / "tests/simt"
    if sources is None:
        sources = [*sorted(cuda.glob("*.cu")), *sorted(cuda.glob("*.cpp")), tests / "kernels.cpp"]
    digest = hashlib.sha256(repr((checked, sources, flags, COMPILER, sys.version)).encode())
    headers = [path for folder in (cuda, simt, tests) for path in folder.glob("*.[ch]*")]
    for path in sorted([*headers, *sources, Path(__file__)]):
        digest.update(path.read_bytes())
    name = f"simt_{'checked' if checked else 'fast'}_{digest.hexdigest()[:16]}"
    target = CACHE / f"{name}.so"
    if not target.exists():
        _compile(name, target, checked, sources, flags)
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(name: str, target: Path, checked: bool, sources: list[Path], flags) -> None:
    import pybind11

    python = [pybind11.get_include(), sysconfig.get_path("include")]
    includes = [f"-I{ROOT / 'csrc'}", *(f"-I{path}" for path in python), f"-DMODULE={name}"]
    # Types of their own, so that a checked and a fast module can be loaded together.
    includes.append(f'-DPYBIND11_COMPILER_TYPE="{name}"')
    core = [ROOT / "csrc/simt/simt.cpp", *[ROOT / "csrc/simt/check.cpp"] * checked]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:

        def compile_one(source: Path) -> Path:
            out = Path(folder) / f"{source.name}.o"
            options = CHECKED if checked and source.suffix == ".cu" else FAST
            if source.parent == ROOT / "tests/simt" and source.suffix == ".cpp":
                options = ["-O0"]  # bindings, which take longest to compile
            command = [*COMPILER, *COMMON, *options, *flags, *includes]
            _run([*command, "-x", "c++", "-c", source, "-o", out])
            return out

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, [*core, *sources]))
        part = Path(folder) / "part.so"
        _run([*COMPILER, "-shared", *objects, "-o", part, "-ldl"])
        os.replace(part, target)


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[:4000]}")
