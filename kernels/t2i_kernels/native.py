"""The native library of the package: loaded once, on import; a library that is not there is a reason, not an error.

``setup.py`` builds ``libt2i_kernels.so`` beside this file, with ``_build_info.json`` saying how, or why not. Loading it
registers the native implementations of the operators whose schemas the ``api.py`` files define.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libt2i_kernels.so")
BUILD_INFO = Path(__file__).with_name("_build_info.json")
CPU_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # csrc/cpu/capability.cpp
MINIMUM_TORCH = (2, 13)  # the stable ABI that the library is built for


def build_info() -> dict:
    """What ``setup.py`` recorded: ``backend`` ("cpu" or None), ``reason`` and, if built, compiler, flags and torch."""
    if not BUILD_INFO.is_file():
        return {"backend": None, "reason": "the package was not installed: run pip install . in its folder"}
    return json.loads(BUILD_INFO.read_text())


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(the library, None), or (None, the reason why there is none)."""
    if not LIBRARY.is_file():
        return None, build_info()["reason"] or f"{LIBRARY} is missing: install the package again"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        return None, f"torch {torch.__version__} is older than {'.'.join(map(str, MINIMUM_TORCH))}"
    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"{LIBRARY} does not load: {error}"
    library.t2i_cpu_capability.restype = ctypes.c_char_p
    library.t2i_set_cpu_capability.argtypes = [ctypes.c_char_p]
    forced = os.environ.get("T2I_CPU_CAPABILITY", "")
    if library.t2i_set_cpu_capability(forced.encode()) != 0:
        return None, f"T2I_CPU_CAPABILITY={forced!r}: this machine has {', '.join(_available(library))}"
    return library, None


def _available(library: ctypes.CDLL) -> list[str]:
    """The instruction sets that the build and the machine have, the best one last."""
    current = library.t2i_cpu_capability()
    names = [name for name in CPU_CAPABILITIES if library.t2i_set_cpu_capability(name.encode()) == 0]
    library.t2i_set_cpu_capability(current)
    return names


_library, _reason = _load()


def reason() -> str | None:
    """None if the native library is loaded, else why not."""
    return _reason


def cpu_capability() -> str | None:
    """The instruction set that native CPU kernels run with: "DEFAULT", "AVX2" or "AVX512"; None without the library."""
    return _library.t2i_cpu_capability().decode() if _library else None


def cpu_capabilities() -> list[str]:
    """The instruction sets to choose from on this machine, the best one last; empty without the library."""
    return _available(_library) if _library else []


@contextlib.contextmanager
def use_cpu_capability(name: str) -> Iterator[None]:
    """Run native CPU kernels with another instruction set, for tests and benchmarks. Process-wide, not thread-safe.

    Raises ValueError if this machine or this build does not have it. ``T2I_CPU_CAPABILITY`` does the same from outside.
    """
    if name not in cpu_capabilities():
        raise ValueError(f"instruction set {name!r}: expected one of {cpu_capabilities()}")
    before = _library.t2i_cpu_capability()
    _library.t2i_set_cpu_capability(name.encode())
    try:
        yield
    finally:
        _library.t2i_set_cpu_capability(before)


def info() -> dict:
    """How the library was built and what it runs with; ``reason`` is set where there is none."""
    return {
        **build_info(),
        "reason": reason(),
        "library": str(LIBRARY) if _library else None,
        "cpu_capability": cpu_capability(),
        "cpu_capabilities": cpu_capabilities(),
    }
