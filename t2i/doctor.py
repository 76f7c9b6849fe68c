"""What this machine has, which backend each operator runs on, and how to get what is missing."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import sys
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from t2i_kernels import cuda_backend, explain, native, triton_backend
from t2i_kernels.registry import ops

LIBRARIES = ("t2i", "torch", "triton", "numpy", "pillow", "safetensors", "tokenizers")
VARIABLES = ("T2I_BACKEND", "T2I_STRICT", "T2I_CPU_CAPABILITY", "OMP_NUM_THREADS")


def doctor(console: Console | None = None) -> None:
    """Print versions, the machine, the native libraries, the operators' backends, and remedies."""
    console = console or Console()
    sections = {
        "Versions": versions(),
        "Machine": machine(),
        "Native library": native_library(),
        "CUDA kernels": cuda_kernels(),
        **{op: backends(op) for op in ops()},
        "Optional packages": optional_packages(),
        "Missing": remedies() or [("nothing", "that this machine could use")],
    }
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", title_style="bold")
        table.box, table.show_header, table.pad_edge = None, False, False
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        console.print(table, "")


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> list[tuple[str, str]]:
    rows = [("python", platform.python_version())]
    return rows + [(name, installed(name) or "not installed") for name in LIBRARIES]


def machine() -> list[tuple[str, str]]:
    rows = [
        ("system", platform.platform()),
        ("processor", f"{processor()}, {os.cpu_count()} cores"),
        ("threads", str(torch.get_num_threads())),
        ("instruction set", f"{torch.backends.cpu.get_cpu_capability()} in torch"),
    ]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{i}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"))
    if not torch.cuda.is_available():
        rows.append(("GPU", "none that torch can use"))
    return rows + [(name, os.environ[name]) for name in VARIABLES if os.environ.get(name)]


def processor() -> str:
    """Name of the CPU."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = re.search(r"^model name\s*: (.+)$", file.read(), re.MULTILINE)
        if name:
            return name.group(1)
    return platform.processor() or platform.machine()


def native_library() -> list[tuple[str, str]]:
    info = native.info()
    if info["reason"]:
        return [("not loaded", info["reason"])]
    chosen, built = info["cpu_capability"], ", ".join(info["capabilities"])
    return [
        ("loaded", info["library"]),
        ("instruction set", f"{chosen} (built for {built})"),
        ("compiler", info["compiler"]),
        ("flags", info["flags"]),
        ("built against", f"torch {info['torch']}"),
    ]


def cuda_kernels() -> list[tuple[str, str]]:
    if not cuda_backend.loaded():
        return [("not loaded", cuda_backend.reason())]
    info = cuda_backend.build_info()
    return [
        ("loaded", str(cuda_backend.LIBRARY)),
        ("compiled for", ", ".join(info.get("capabilities") or ["what no record says"])),
        ("nvcc", info.get("compiler") or "no record says"),
        ("used", cuda_backend.reason() or no_device("cuda") or "where an operator takes the call"),
    ]


def backends(op: str) -> list[tuple[str, str]]:
    """The backends of an operator in the order of choice, the chosen one marked."""
    found = explain(op)
    reasons = {row.backend: row.reason or no_device(row.backend) for row in found}
    chosen = found.chosen
    if chosen and reasons[chosen]:  # without a device
        asked = os.environ.get("T2I_BACKEND")
        usable = [name for name, reason in reasons.items() if reason is None and not asked]
        chosen = usable[0] if usable else None
        if chosen == "reference" and os.environ.get("T2I_STRICT", "0") not in ("", "0"):
            chosen = None
    return [(f"{'>' if name == chosen else ' '} {name}", reason or "available")
            for name, reason in reasons.items()]  # fmt: skip


def no_device(backend: str) -> str | None:
    """What the choice, which wakes no device, knows only once there is a tensor on one."""
    on_gpu = backend == "cuda" or (backend == "triton" and not triton_backend.INTERPRETED)
    return "no device: torch finds no GPU" if on_gpu and not torch.cuda.is_available() else None


def optional_packages() -> list[tuple[str, str]]:
    """The packages of the users' extras of pyproject.toml, as the installed metadata has them."""
    if installed("t2i") is None:
        return [("unknown", "t2i was imported without being installed")]
    rows = {}
    for requirement in metadata.requires("t2i") or ():
        extra = re.search(r"extra == [\"'](\w+)[\"']", requirement)
        if extra and extra.group(1) not in ("test", "dev"):
            package = re.match(r"[\w.-]+", requirement).group()
            get = f'not installed: pip install "t2i[{extra.group(1)}]"'
            rows.setdefault(package, installed(package) or get)
    return sorted(rows.items())


def rebuild() -> str:
    """The command that builds the native library into this installation, of the kind it is."""
    try:
        origin = metadata.distribution("t2i").read_text("direct_url.json") or "{}"
    except metadata.PackageNotFoundError:
        origin = "{}"
    editable = json.loads(origin).get("dir_info", {}).get("editable", False)
    what = "--editable ." if editable else "--force-reinstall ."
    return f"T2I_BUILD=cpu {shlex.quote(sys.executable)} -m pip install --no-deps {what}"


def remedies() -> list[tuple[str, str]]:
    """(what is missing, how to get it) of what this machine could use."""
    rows = []
    reason = native.reason()
    if reason and "T2I_CPU_CAPABILITY" in reason:
        rows.append(("native CPU kernels", "unset T2I_CPU_CAPABILITY, or set it to one of these"))
    elif reason and sys.platform.startswith("linux"):
        if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            get = "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora)"
            rows.append(("C++ compiler", get))
        rows.append(("native CPU kernels", f"in a clone of the repository: {rebuild()}"))
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        get = f"this torch, {torch.__version__}, is a CPU build: install the CUDA build of torch"
        rows.append(("GPU support", get))
    elif shutil.which("nvidia-smi") and not torch.cuda.is_available():
        get = f"torch for CUDA {torch.version.cuda} finds no device: update the NVIDIA driver"
        rows.append(("GPU support", get))
    if torch.version.cuda and installed("triton") is None:
        rows.append(("triton", "pip install triton"))
    return rows
