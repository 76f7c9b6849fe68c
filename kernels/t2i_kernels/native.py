"""The native library of the package: loaded once, on import. Where it is not, there is a reason.

``setup.py`` builds ``libt2i_kernels.so`` beside this file, and ``_build_info.json`` that says how,
or why not. Loading it registers the native implementations of operators whose schemas are defined
in the ``api.py`` files. A library that is missing or does not load is never an error here.
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
CPU_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512", "AVX512_VNNI", "AMX")  # csrc/cpu/capability.cpp
MINIMUM_TORCH = (2, 13)  # the stable ABI that the library is built for


def build_info() -> dict:
    """What ``setup.py`` recorded: ``backend`` ("cpu" or None), ``reason`` (why there is none) and,
    of a library, ``compiler``, ``flags``, ``capabilities`` and ``torch``."""
    if not BUILD_INFO.is_file():
        return {"backend": None, "reason": "the package was imported without being installed"}
    try:
        return json.loads(BUILD_INFO.read_text())
    except ValueError:
        return {"backend": None, "reason": f"{BUILD_INFO} is damaged: install the package again"}


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """(the library, None), or (None, why not)."""
    if not LIBRARY.is_file():
        return None, build_info()["reason"] or f"{LIBRARY} is missing: install the package again"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MINIMUM_TORCH:
        return None, f"torch {torch.__version__} is older than {'.'.join(map(str, MINIMUM_TORCH))}"
    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
        library.t2i_cpu_capability.restype = ctypes.c_char_p
        library.t2i_set_cpu_capability.argtypes = [ctypes.c_char_p]
        library.t2i_read_bandwidth.argtypes = [ctypes.c_int, ctypes.c_int64]
        library.t2i_read_bandwidth.restype = ctypes.c_double
    except (OSError, AttributeError) as error:  # AttributeError: a library without these functions
        return None, f"{LIBRARY.name} does not load: {error}"
    forced = os.environ.get("T2I_CPU_CAPABILITY", "")
    if library.t2i_set_cpu_capability(forced.encode()) != 0:
        have = ", ".join(_available(library))
        return None, f"T2I_CPU_CAPABILITY={forced!r} was asked for, but there is {have}"
    return library, None


def _available(library: ctypes.CDLL) -> list[str]:
    before = library.t2i_cpu_capability()
    names = [n for n in CPU_CAPABILITIES if library.t2i_set_cpu_capability(n.encode()) == 0]
    library.t2i_set_cpu_capability(before)
    return names


_library, _reason = _load()


def reason() -> str | None:
    """None if the native library is loaded, else why not."""
    return _reason


def cpu_capability() -> str | None:
    """The instruction set of native CPU kernels, one of CPU_CAPABILITIES; None without them."""
    return _library.t2i_cpu_capability().decode() if _library else None


def cpu_capabilities() -> list[str]:
    """The instruction sets that this build and this machine have, the best one last."""
    return _available(_library) if _library else []


@contextlib.contextmanager
def use_cpu_capability(name: str) -> Iterator[None]:
    """Run native CPU kernels with another instruction set, for tests and benchmarks.

    Process-wide; ``T2I_CPU_CAPABILITY`` does the same from outside.

    Raises:
        ValueError: this build or this machine does not have it.
    """
    if name not in cpu_capabilities():
        raise ValueError(f"instruction set {name!r}: expected one of {cpu_capabilities()}")
    before = _library.t2i_cpu_capability()
    _library.t2i_set_cpu_capability(name.encode())
    try:
        yield
    finally:
        _library.t2i_set_cpu_capability(before)


def read_bandwidth(threads: int, size: int) -> float:
    """Bytes a second that so many threads read of ``size`` bytes, again and again, each in four
    streams: the best of some rounds, which take half a second or so. 0 without the library."""
    return _library.t2i_read_bandwidth(threads, size) if _library else 0.0


def info() -> dict:
    """``build_info`` with the ``reason`` of now, the library's path and its instruction sets."""
    return {
        **build_info(),
        "reason": reason(),
        "library": str(LIBRARY) if _library else None,
        "cpu_capability": cpu_capability(),
        "cpu_capabilities": cpu_capabilities(),
    }
