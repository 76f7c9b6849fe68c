"""The package as built and installed: what goes in, what T2I_BUILD does, who imports what."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from t2i_kernels import cuda_backend, native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "csrc", "kernels", "t2i"]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, with what an editable install left in them."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "pretrained")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(code, cwd, **env):
    """Run Python code; variables that are None are taken out of the environment."""
    merged = {**os.environ, "T2I_BUILD": None, "CXX": None, **env}
    merged = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True)


def build_wheel(tree, **env):
    """(file name of the wheel, its unpacked folder)"""
    done = run(BUILD, tree, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree / "unpacked")
    return wheel.name, tree / "unpacked"


def build_info(unpacked):
    return json.loads((unpacked / "t2i_kernels" / native.BUILD_INFO.name).read_text())


@pytest.fixture
def setup_module():
    spec = importlib.util.spec_from_file_location("t2i_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- Wheels -------------------------------------------------------------------------------------

FALLBACK = """
import torch, t2i_kernels
from t2i_kernels import native
print(t2i_kernels.__file__)
print(native.reason())
print(t2i_kernels.explain("vq_nearest").chosen)
print(t2i_kernels.vq_nearest(torch.eye(3), torch.eye(3), "l2").tolist())
"""


def test_pure_python_wheel_falls_back_with_a_reason(tree):
    weights = tree / "t2i/pretrained/model/lm.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    name, unpacked = build_wheel(tree, T2I_BUILD="0")
    assert name.endswith("-py3-none-any.whl")
    assert not list(unpacked.rglob("*.so"))
    assert (unpacked / "t2i/__init__.py").is_file()
    assert (unpacked / "t2i/pretrained/model/lm.safetensors").is_file()
    assert not (unpacked / "kernels").exists()
    done = run(FALLBACK, tree / "dist", PYTHONPATH=str(unpacked))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(unpacked / "t2i_kernels/__init__.py"),
        "it was built with T2I_BUILD=0",
        "reference",
        "[0, 1, 2]",
    ]


def test_without_a_compiler_the_wheel_is_pure_python(tree):
    name, unpacked = build_wheel(tree, CXX="/nonexistent/c++")
    assert name.endswith("-py3-none-any.whl")
    assert "no C++ compiler was found: CXX='/nonexistent/c++'" in build_info(unpacked)["reason"]


def test_a_compiler_that_fails_leaves_its_message(tree):
    """A newer torch may break the build: that is a reason too, kept for ``t2i doctor``."""
    (tree / "csrc/cpu/vq_nearest.cpp").write_text("#error this does not compile\n")
    _, unpacked = build_wheel(tree)
    assert not list(unpacked.rglob("*.so"))
    assert "this does not compile" in build_info(unpacked)["reason"]
    done = run(BUILD, tree, T2I_BUILD="cpu")
    assert done.returncode != 0 and "this does not compile" in done.stderr


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
def test_native_wheel_serves_every_python(tree):
    name, unpacked = build_wheel(tree, T2I_BUILD="cpu")
    assert re.search(r"-py3-none-linux_\w+\.whl$", name)
    info = build_info(unpacked)
    assert info["backend"] == "cpu" and info["reason"] is None and "DEFAULT" in info["capabilities"]
    done = run(FALLBACK, tree / "dist", PYTHONPATH=str(unpacked))
    assert done.stdout.splitlines()[1:] == ["None", "cpu", "[0, 1, 2]"], done.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"T2I_BUILD": "gpu"}, "T2I_BUILD='gpu': expected 'cpu', 'cuda', '0', or unset"),
        (
            {"T2I_BUILD": "cuda", "NVCC": "/nonexistent/nvcc"},
            "T2I_BUILD='cuda': nvcc was not found: NVCC='/nonexistent/nvcc'",
        ),
        ({"T2I_BUILD": "cpu", "CXX": "/nonexistent/c++"}, "T2I_BUILD='cpu': no C++ compiler"),
    ],
)
def test_what_cannot_be_built_is_an_error(tree, env, message):
    done = run(BUILD, tree, **env)
    assert done.returncode != 0
    assert message in done.stderr


def nvcc_or_skip(setup_module):
    """The toolchain for CUDA kernels."""
    try:
        return setup_module.CudaToolchain()
    except setup_module.Unavailable as reason:
        pytest.skip(str(reason))


CUDA = """
import torch
from t2i_kernels import cuda_backend
print(cuda_backend.loaded(), torch.version.cuda)
print(torch._C._dispatch_has_kernel_for_dispatch_key("t2i::vq_nearest_cuda", "CUDA"))
"""


def test_cuda_kernels_build_without_a_gpu(tree, setup_module):
    """They load on a torch that is built for the CPU, too, and see its stable ABI alone."""
    toolchain = nvcc_or_skip(setup_module)
    toolchain.root, toolchain.architectures = tree, ["80"]
    for source, _ in toolchain.units():  # one operator is enough
        if not Path(source).name.startswith("vq_nearest"):
            (tree / source).unlink()
    library = tree / "kernels/t2i_kernels/libt2i_kernels_cuda.so"
    toolchain.build(library)
    assert setup_module.describe(toolchain)["capabilities"] == ["sm_80"]
    done = run(CUDA, tree, PYTHONPATH=str(tree / "kernels"))
    assert done.stdout.split() == ["True", str(torch.version.cuda), "True"], done.stderr
    assert_stable_abi(library)


def test_instructions_of_sm_90a_are_compiled_for_nothing_else(setup_module, monkeypatch):
    toolchain, calls = nvcc_or_skip(setup_module), []
    toolchain.architectures = ["80", "100a"]
    monkeypatch.setattr(toolchain, "run_nvcc", lambda *words: calls.append(words))
    for name in ("flash_forward_bf16_64", "flash_forward_sm90_bf16_64"):
        toolchain.compile(f"csrc/cuda/{name}.cu", None, Path("folder"))
    codes = [[word for word in call if str(word).startswith("arch=")] for call in calls]
    assert codes[1] == ["arch=compute_90a,code=sm_90a"]
    assert codes[0] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_100a,code=sm_100a",
        "arch=compute_80,code=compute_80",
    ]


def test_a_source_archive_has_what_a_build_needs(tree):
    done = run("from setuptools import build_meta; build_meta.build_sdist('dist')", tree)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    sources = {str(p.relative_to(tree)) for p in (tree / "csrc").rglob("*") if p.is_file()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "NOTICE", *sources} <= names


# ---- The library of this installation -----------------------------------------------------------


def test_a_library_that_was_built_loads():
    if native.build_info()["backend"] is None:
        pytest.skip(native.build_info()["reason"])
    assert native.reason() is None


def assert_stable_abi(library):
    """It sees nothing else of torch, which may change with its next version."""
    if shutil.which("nm") is None:
        pytest.skip("there is no nm to read libraries with")
    listing = subprocess.run(
        ["nm", "--demangle", "--dynamic", "--undefined-only", str(library)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "aoti_torch_" in listing
    assert [line for line in listing.splitlines() if re.search(r"\b(at|c10|torch)::", line)] == []


@pytest.mark.parametrize("module", [native, cuda_backend])
def test_the_libraries_see_torch_through_its_stable_abi_alone(module):
    if not module.LIBRARY.is_file():
        pytest.skip(module.build_info()["reason"] or f"{module.LIBRARY} is missing")
    assert_stable_abi(module.LIBRARY)


# ---- setup.py's view of the machine -------------------------------------------------------------


def test_torch_is_found_from_an_isolated_build(setup_module, monkeypatch):
    """pip hides the environment's packages from ``sys.path`` while it builds."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folder, version = setup_module.find_torch()
    assert folder == Path(torch.__file__).parent and version == torch.__version__


def test_nvcc_is_found(setup_module, monkeypatch, tmp_path):
    """NVCC, PATH, CUDA_HOME, and pip's packages, in this order."""
    places = {name: tmp_path / name / "bin/nvcc" for name in ("asked", "path", "home", "pip")}
    places["pip"] = tmp_path / "pip/nvidia/cu13/bin/nvcc"
    for program in places.values():
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)
    monkeypatch.setattr(setup_module, "site_packages", lambda: [tmp_path / "pip"])
    monkeypatch.setenv("NVCC", str(places["asked"]))
    monkeypatch.setenv("PATH", str(places["path"].parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    for name in ("asked", "path", "home", "pip"):
        assert setup_module.find_nvcc() == places[name]
        places[name].unlink()
        monkeypatch.delenv("NVCC", raising=False)
    with pytest.raises(setup_module.Unavailable, match="nvcc was not found: neither on PATH"):
        setup_module.find_nvcc()


@pytest.mark.parametrize("asked", ["80;90a", "8.0", "sm_80"])
def test_architectures_are_named_as_nvcc_names_them(setup_module, monkeypatch, asked):
    toolchain = nvcc_or_skip(setup_module)
    monkeypatch.setenv("T2I_CUDA_ARCHITECTURES", asked)
    with pytest.raises(setup_module.Unavailable, match=re.escape(f"{asked!r}: expected names")):
        toolchain.choose_architectures()
    monkeypatch.delenv("T2I_CUDA_ARCHITECTURES")
    monkeypatch.setattr(toolchain, "run_nvcc", lambda *args: "sm_80\nsm_90\n")
    assert toolchain.choose_architectures() == ["80", "90a"]


def test_jobs_are_bounded_by_cores_memory_and_choice(setup_module, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    monkeypatch.setattr(Path, "read_text", lambda self: "MemAvailable:    5242880 kB\n")
    assert setup_module.compile_jobs() == 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(2))
    assert setup_module.compile_jobs() == 2
    monkeypatch.setattr(Path, "read_text", lambda self: "MemAvailable:    1024 kB\n")
    assert setup_module.compile_jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_module.compile_jobs() == 3


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm to read object files with")
def test_kernels_define_nothing_that_another_instruction_set_could_take(setup_module, tmp_path):
    """The linker keeps one copy of an inline function: if AVX-512's, older machines crash."""
    try:
        toolchain = setup_module.Toolchain()
    except setup_module.Unavailable as reason:
        pytest.skip(str(reason))
    for source in setup_module.KERNEL_SOURCES:
        for capability in toolchain.capabilities:
            compiled = toolchain.compile(source, capability, tmp_path)
            listing = subprocess.run(
                ["nm", "--demangle", "--defined-only", "--extern-only", str(compiled)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            symbols = [line.split(maxsplit=2)[2] for line in listing.splitlines()]
            assert symbols
            assert [s for s in symbols if not s.startswith(f"t2i::cpu::{capability}::")] == []


# ---- Imports ------------------------------------------------------------------------------------


def test_kernels_is_a_folder_and_never_a_package():
    """transformers imports a package named ``kernels`` if there is one."""
    assert not (ROOT / "kernels/__init__.py").exists()
    pattern = re.compile(r"^\s*(import kernels|from kernels)\b", re.MULTILINE)
    files = [path for name in ("kernels", "t2i", "tests") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 10
    assert [path for path in files if pattern.search(path.read_text())] == []


def test_transformers_imports_from_the_root_of_the_repository():
    pytest.importorskip("transformers")
    done = run("from transformers import LlamaForCausalLM", ROOT, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_t2i_kernels_needs_torch_alone():
    code = """
import sys, torch
before = set(sys.modules)
import t2i_kernels
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    done = run(code, ROOT / "tests")
    assert done.returncode == 0, done.stderr
    imported = set(ast.literal_eval(done.stdout))
    assert imported - set(sys.stdlib_module_names) - {"torch"} == {"t2i_kernels"}
