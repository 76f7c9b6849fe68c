"""The kernels' modules, built once a session; nothing here runs without a compiler and pybind11."""

import importlib.util
import shutil

import pytest

import build


@pytest.fixture(scope="session", autouse=True)
def _can_build():
    if shutil.which(build.COMPILER[0]) is None:
        pytest.skip(f"csrc/simt needs a C++ compiler: no {build.COMPILER[0]}")
    if shutil.which("addr2line") is None:
        pytest.skip("csrc/simt names source lines by addr2line, of binutils")
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("csrc/simt needs pybind11: pip install t2i[test]")


@pytest.fixture(scope="session")
def checked(_can_build):
    """csrc/cuda with the checker."""
    return build.build(checked=True)


@pytest.fixture(scope="session")
def fast(_can_build):
    """csrc/cuda without it."""
    return build.build(checked=False)


@pytest.fixture(scope="session")
def planted(_can_build):
    """The tests' own kernels, with the checker."""
    names = ["planted.cu", "features.cu", "instructions.cu", "planted.cpp"]
    return build.build(checked=True, sources=[build.ROOT / "tests/simt" / name for name in names])
