"""Builds the native library of ``t2i_kernels``; everything else is in pyproject.toml.

One shared object without any Python in it (``libt2i_kernels.so``, beside the package) that registers operators on torch's
stable ABI: it serves every Python and every torch from 2.13 on. ``T2I_BUILD`` chooses:

    unset   native if torch's headers and a C++ compiler are there, else pure Python, and the reason is kept
    cpu     native for the CPU, or an error
    cuda    an error: this version has no CUDA sources
    0       pure Python

The choice depends on the tools present, never on the devices visible. ``_build_info.json``, written beside the library,
says what was built, how, or why not; ``t2i doctor`` shows it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build import build as _build
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE = "t2i_kernels"
LIBRARY = "libt2i_kernels.so"
BUILD_INFO = "_build_info.json"

MINIMUM_TORCH = (2, 13)
GIGABYTES_A_JOB = 1.5  # the binding, with all of the stable ABI's headers, peaks below 1 GB

# Kernels are free of torch but for the header-only at::vec, and are compiled once per instruction set.
KERNEL_SOURCES = ["csrc/cpu/vq_nearest.cpp"]
PLAIN_SOURCES = [
    "csrc/cpu/capability.cpp",
    "csrc/bindings/vq_nearest_cpu.cpp",
]
COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
# No contraction: what is computed in double is then the same to the bit in every instruction set.
KERNEL_FLAGS = ["-ffp-contract=off"]
# at::vec is disabled under TORCH_TARGET_VERSION, so only the bindings, which include no at::vec, define it.
PLAIN_FLAGS = ["-DTORCH_TARGET_VERSION=0x020d000000000000"]
CAPABILITY_FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


class Unavailable(Exception):
    """Why the native library cannot be built here."""


# ---- What is there ---------------------------------------------------------------------------------------------------


def site_packages() -> list[str]:
    """Folders in which the environment that is installed *into* keeps its packages.

    pip builds in an isolated process whose ``sys.path`` lacks that environment, but the interpreter is still its own, so
    sysconfig names the folder.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    if config.exists() and re.search(r"include-system-site-packages\s*=\s*true", config.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path("purelib", vars=base)]
        folders += [sysconfig.get_path("purelib", "posix_user" if os.name == "posix" else None)]
    return folders


def find_torch() -> tuple[Path, str]:
    """The folder and the version of the installed torch, found without importing it (1-2 s, and not in an isolated build)."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(folder, "torch") for folder in site_packages()]
    for folder in candidates:
        if (folder / "version.py").is_file():
            break
    else:
        raise Unavailable(
            "torch was not installed where this package is built: install torch first, then this package again"
        )
    version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text()).group(1)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_TORCH:
        raise Unavailable(f"torch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}")
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise Unavailable(f"torch {version} in {folder} came without its C++ headers")
    return folder, version


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``CXX`` if set, else the first found of c++, g++, clang++."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise Unavailable(f"there is no C++ compiler: CXX={os.environ['CXX']} is not a program")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise Unavailable(
        "there is no C++ compiler: none of c++, g++, clang++ is on PATH (on Debian or Ubuntu: apt-get install g++)"
    )


def compile_jobs() -> int:
    """Compilers to run at once: as many as cores and free memory allow, or ``MAX_JOBS``."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0))
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    gigabytes = int(available.group(1)) / 2**20 if available else 0
    return max(1, min(cores, int(gigabytes / GIGABYTES_A_JOB)))


# ---- Building --------------------------------------------------------------------------------------------------------


class Toolchain:
    """A compiler and a torch to build against, and the key that says when a library has to be built anew."""

    def __init__(self):
        if not sys.platform.startswith("linux"):
            raise Unavailable(f"native kernels are built on Linux only, this is {sys.platform}")
        self.compiler = find_compiler()
        self.torch, self.torch_version = find_torch()
        self.compiler_version = self.output([*self.compiler, "--version"]).splitlines()[0]
        x86 = platform.machine() in ("x86_64", "AMD64")
        self.capabilities = list(CAPABILITY_FLAGS) if x86 else ["DEFAULT"]

    @staticmethod
    def output(command: list[str]) -> str:
        """What a command printed; raises Unavailable with its message if it failed."""
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            tail = "\n".join(done.stdout.splitlines()[:20])
            raise Unavailable(f"the compiler failed: {shlex.join(command)}\n{tail}")
        return done.stdout

    def units(self) -> list[tuple[str, str, list[str]]]:
        """(object name, source, flags) of every compilation."""
        units = []
        for source in PLAIN_SOURCES:
            units.append((source.replace("/", "_") + ".o", source, PLAIN_FLAGS))
        for source in KERNEL_SOURCES:
            for name in self.capabilities:
                flags = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *CAPABILITY_FLAGS[name]]
                object_name = f"{source.replace('/', '_')}.{name}.o"
                units.append((object_name, source, KERNEL_FLAGS + flags))
        return units

    def key(self) -> str:
        """Changes with anything that the library is made of."""
        digest = hashlib.sha256()
        for path in [Path(__file__), *sorted((ROOT / "csrc").rglob("*"))]:
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        digest.update(repr((self.compiler, self.compiler_version, self.torch_version)).encode())
        return digest.hexdigest()[:16]

    def build(self, target: Path) -> None:
        """Compile and link ``target``, which appears whole or not at all."""
        include = [f"-I{ROOT / 'csrc'}", "-isystem", str(self.torch / "include")]

        def compile_one(unit):
            object_name, source, flags = unit
            self.output(
                [*self.compiler, *COMMON_FLAGS, *flags, *include]
                + ["-c", str(ROOT / source), "-o", str(Path(folder, object_name))]
            )
            return str(Path(folder, object_name))

        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(compile_jobs()) as pool:
            objects = list(pool.map(compile_one, self.units()))
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                # torch is loaded before this library, so its libraries are found by name: no path is recorded.
                self.output(
                    [*self.compiler, "-shared", *objects, "-o", str(partial), f"-L{self.torch / 'lib'}"]
                    + ["-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,-z,defs"]
                )
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)


@lru_cache(None)
def choose() -> tuple[Toolchain | None, str | None]:
    """(toolchain, None) to build natively, or (None, why not). Raises where ``T2I_BUILD`` asks for what is impossible."""
    asked = os.environ.get("T2I_BUILD", "")
    if asked not in ("", "cpu", "cuda", "0"):
        raise SetupError(f"T2I_BUILD={asked!r}: expected cpu, cuda, 0, or unset to build what the tools here allow")
    if asked == "cuda":
        raise SetupError(
            "T2I_BUILD=cuda: this version has no CUDA sources; leave T2I_BUILD unset, or set it to cpu or 0"
        )
    if asked == "0":
        return None, "built with T2I_BUILD=0"
    try:
        return Toolchain(), None
    except Unavailable as reason:
        if asked == "cpu":
            raise SetupError(f"T2I_BUILD=cpu: {reason}") from None
        return None, str(reason)


class build_native(Command):  # noqa: N801 - setuptools names commands so
    """Build the library into the package: the copy being packed, or the source tree for an editable install."""

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        package = ROOT / "kernels" / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
        package.mkdir(parents=True, exist_ok=True)
        library, record = package / LIBRARY, package / BUILD_INFO
        toolchain, reason = choose()
        info = {"backend": None, "reason": reason}
        if toolchain:
            key = toolchain.key()
            if library.exists() and record.exists() and json.loads(record.read_text()).get("key") == key:
                self.announce(f"{library} is up to date", level=2)
                return
            self.announce(f"building {LIBRARY} with {compile_jobs()} compiler jobs at once", level=2)
            try:
                toolchain.build(library)
                info = {
                    "backend": "cpu",
                    "reason": None,
                    "torch": toolchain.torch_version,
                    "compiler": f"{shlex.join(toolchain.compiler)} ({toolchain.compiler_version})",
                    "flags": shlex.join(COMMON_FLAGS + KERNEL_FLAGS),
                    "capabilities": toolchain.capabilities,
                    "key": key,
                }
            except Unavailable as failure:
                if os.environ.get("T2I_BUILD") == "cpu":
                    raise SetupError(f"T2I_BUILD=cpu: {failure}") from None
                info["reason"] = str(failure)
        if info["backend"] is None:
            library.unlink(missing_ok=True)  # of an earlier build in the same folder
            self.warn(f"no native kernels: {info['reason']}")
        partial = record.with_name(f".{record.name}.{os.getpid()}")
        partial.write_text(json.dumps(info, indent=2) + "\n")
        os.replace(partial, record)

    # The protocol of setuptools.command.build.SubCommand.
    def get_source_files(self):
        files = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
        return [str(p.relative_to(ROOT)) for p in files]

    def get_outputs(self):
        return [str(Path(self.build_lib, PACKAGE, name)) for name in (LIBRARY, BUILD_INFO)]

    def get_output_mapping(self):
        return {}


class build(_build):  # noqa: N801
    sub_commands = [*_build.sub_commands, ("build_native", None)]


class bdist_wheel(_bdist_wheel):  # noqa: N801
    def get_tag(self):
        """Not tied to a Python: the library holds no Python ABI."""
        _, _, platform_tag = super().get_tag()
        return ("py3", "none", platform_tag)


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        """Makes the wheel one of this platform where a library goes into it."""
        return choose()[0] is not None


setup(
    distclass=NativeDistribution,
    cmdclass={"build": build, "build_native": build_native, "bdist_wheel": bdist_wheel},
)
