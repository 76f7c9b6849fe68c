"""``t2i doctor``: facts of this machine, and a remedy for each thing that is missing."""

from __future__ import annotations

import io
import json
import platform
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from t2i import doctor
from t2i_kernels import cuda_backend, explain, native
from t2i_kernels.registry import ops


def report() -> str:
    console = Console(file=io.StringIO(), width=400)
    doctor.doctor(console)
    return console.file.getvalue()


def test_reports_versions_and_every_backend_with_its_reason():
    text = report()
    assert platform.python_version() in text and torch.__version__ in text
    for op in ops():
        assert op in text
        for row in explain(op):
            assert row.reason is None or row.reason in text
        assert f"> {explain(op).chosen}" in text


def test_reports_the_library_or_why_there_is_none():
    text = report()
    if native.reason() is None:
        assert str(native.LIBRARY) in text and native.cpu_capability() in text
    else:
        assert native.reason() in text


def test_reports_the_cuda_kernels_or_why_there_are_none(monkeypatch):
    section = report().split("CUDA kernels", 1)[1]
    if cuda_backend.loaded():
        assert str(cuda_backend.LIBRARY) in section
    else:
        assert cuda_backend.reason() in section
    built = {"capabilities": ["sm_80", "sm_90a"], "compiler": "/cuda/bin/nvcc: 13.0.88"}
    monkeypatch.setattr(cuda_backend, "_reason", None)
    monkeypatch.setattr(cuda_backend, "build_info", lambda: built)
    monkeypatch.setattr(torch.version, "cuda", None)
    rows = dict(doctor.cuda_kernels())
    assert rows["compiled for"] == "sm_80, sm_90a" and rows["nvcc"] == "/cuda/bin/nvcc: 13.0.88"
    assert rows["used"] == "compiled, but this torch is built for the CPU"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dict(doctor.cuda_kernels())["used"] == "no device: torch finds no GPU"


@pytest.mark.parametrize(
    ("asked", "strict", "marked"),
    [(None, "", "cpu"), ("cuda", "", None), ("cpu", "", "cpu"), (None, "true", "cpu")],
)
def test_marks_no_backend_without_its_device(monkeypatch, asked, strict, marked):
    """Where torch is the CUDA build on a machine without a GPU."""
    if native.reason() is not None:
        pytest.skip(native.reason())
    rows = [("cuda", None), ("triton", None), ("cpu", None), ("reference", None)]
    choices = [SimpleNamespace(backend=name, reason=reason) for name, reason in rows]

    class Found(list):
        chosen = asked or "cuda"

    monkeypatch.setattr(doctor, "explain", lambda op: Found(choices))
    monkeypatch.setattr(
        doctor, "no_device", lambda name: "none" if name in ("cuda", "triton") else None
    )
    monkeypatch.setenv("T2I_BACKEND", asked or "")
    monkeypatch.setenv("T2I_STRICT", strict)
    found = [name[2:] for name, _ in doctor.backends("vq_nearest") if name.startswith(">")]
    assert found == ([marked] if marked else [])


def missing(monkeypatch, reason, programs=()) -> dict[str, str]:
    monkeypatch.setattr(native, "reason", lambda: reason)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
    return dict(doctor.remedies())


def test_nothing_is_missing_where_all_is_there(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert missing(monkeypatch, None, ["g++"]) == {}


@pytest.mark.parametrize(
    ("reason", "programs", "expected"),
    [
        ("no C++ compiler was found", [], {"C++ compiler": "g++", "native CPU kernels": "pip"}),
        ("torch was not installed", ["c++"], {"native CPU kernels": "T2I_BUILD=cpu"}),
        ("T2I_CPU_CAPABILITY='SSE9'", ["c++"], {"native CPU kernels": "unset T2I_CPU_CAPABILITY"}),
        (None, ["nvidia-smi"], {"GPU support": "install the CUDA build of torch"}),
    ],
)
def test_remedies(monkeypatch, reason, programs, expected):
    monkeypatch.setattr(torch.version, "cuda", None)
    rows = missing(monkeypatch, reason, programs)
    assert rows.keys() == expected.keys()
    assert all(expected[name] in rows[name] for name in expected)


def test_a_driver_that_torch_does_not_reach(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "installed", lambda name: "3.9")
    assert "update the NVIDIA driver" in missing(monkeypatch, None, ["nvidia-smi"])["GPU support"]


@pytest.mark.parametrize("editable", [True, False])
def test_a_rebuild_keeps_the_kind_of_installation(monkeypatch, editable):
    origin = json.dumps({"url": "file:///t2i", "dir_info": {"editable": editable}})
    distribution = SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr(doctor.metadata, "distribution", lambda name: distribution)
    expected = "--editable ." if editable else "--force-reinstall ."
    assert doctor.rebuild().endswith(f"{sys.executable} -m pip install --no-deps {expected}")


def test_optional_packages_that_are_not_there_say_how_to_get_them(monkeypatch):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "gguf" else real(name))
    assert dict(doctor.optional_packages())["gguf"] == 'not installed: pip install "t2i[hf]"'
