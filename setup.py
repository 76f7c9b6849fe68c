"""Builds the native library of ``t2i_kernels``; everything else is in pyproject.toml.

One shared object with no Python in it (``libt2i_kernels.so``, beside the package) registers
operators on torch's stable ABI: it serves every Python, and every torch from 2.13 on.
``T2I_BUILD`` chooses:

    unset   native if torch's headers and a C++ compiler are there, else pure Python with a reason
    cpu     native for the CPU, or an error
    cuda    an error: this version has no CUDA sources
    0       pure Python

``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` mean what they always do.

The choice depends on the tools present, never on the devices visible. ``_build_info.json``, beside
the library, says what was built, how, or why not; ``t2i doctor`` shows it.
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
import site
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
GIGABYTES_PER_JOB = 1.0  # a compiler takes 0.3 GB with these sources

# Kernels are free of torch but for the header-only at::vec, which TORCH_TARGET_VERSION would
# disable; the rest sees torch through its stable ABI alone.
KERNEL_SOURCES = [
    "csrc/cpu/vq_nearest.cpp",
    "csrc/cpu/flash_attention.cpp",
    "csrc/cpu/decode_attention.cpp",
    "csrc/cpu/linear.cpp",
    "csrc/cpu/norm.cpp",
    "csrc/cpu/draw.cpp",
]
AMX_SOURCES = [
    "csrc/cpu/flash_attention_amx.cpp",
    "csrc/cpu/vq_nearest.cpp",
    "csrc/cpu/linear.cpp",
]
PLAIN_SOURCES = [
    "csrc/cpu/capability.cpp",
    "csrc/cpu/bandwidth.cpp",
    "csrc/cpu/vq_tree.cpp",
    "csrc/bindings/vq_nearest_cpu.cpp",
    "csrc/bindings/flash_attention_cpu.cpp",
    "csrc/bindings/decode_attention_cpu.cpp",
    "csrc/bindings/linear_cpu.cpp",
    "csrc/bindings/decode_step_cpu.cpp",
    "csrc/bindings/draw_cpu.cpp",
]

WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
PLAIN_FLAGS = ["-DTORCH_TARGET_VERSION=0x020d000000000000"]
# Uncontracted, what is computed in double is the same to the bit in every instruction set. Nothing
# throws, and tables for it would be symbols that instruction sets share.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-exceptions"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AMX_FLAGS = [*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"]
CAPABILITY_FLAGS = {
    "DEFAULT": [],
    "AVX2": AVX2_FLAGS,
    "AVX512": AVX512_FLAGS,
    "AMX": [*AMX_FLAGS, "-DCPU_CAPABILITY_AVX512"],  # which is what at::vec knows
}


class Unavailable(Exception):
    """Why the native library cannot be built here."""


# ---- What is there ------------------------------------------------------------------------------


def site_packages() -> list[Path]:
    """Where the environment that is installed *into* keeps its packages.

    pip builds in a process whose ``sys.path`` lacks that environment, but whose interpreter is the
    environment's own, so that ``sys.prefix`` still names it.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += site.getsitepackages([sys.prefix])
    config = Path(sys.prefix, "pyvenv.cfg")
    isolated = config.exists() and not re.search(
        r"include-system-site-packages\s*=\s*true", config.read_text(), re.IGNORECASE
    )
    if not isolated:
        folders += [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]
    return [Path(folder) for folder in folders]


def find_torch() -> tuple[Path, str]:
    """(folder, version) of the installed torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [folder / "torch" for folder in site_packages()]
    for folder in candidates:
        if (folder / "version.py").is_file():
            break
    else:
        raise Unavailable(
            "torch was not installed when this package was built, or the build was kept from "
            "seeing it: pip install --no-build-isolation"
        )
    text = (folder / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text).group(1)
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        raise Unavailable(f"torch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}")
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise Unavailable(f"torch {version} in {folder} came without its C++ headers")
    return folder, version


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``CXX`` if it is set, else the first of c++, g++ and clang++."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise Unavailable(f"no C++ compiler was found: CXX={os.environ['CXX']!r} is no program")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise Unavailable("no C++ compiler was found: none of c++, g++, clang++ is on PATH")


def extra_flags(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def compile_jobs() -> int:
    """How many compilers run at once: ``MAX_JOBS``, or what cores and free memory allow."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    gigabytes = int(available.group(1)) / 2**20 if available else 0
    return max(1, min(len(os.sched_getaffinity(0)), int(gigabytes / GIGABYTES_PER_JOB)))


# ---- Building -----------------------------------------------------------------------------------


class Toolchain:
    """A compiler, and a torch to build against. Raises Unavailable where one is missing."""

    def __init__(self, root: Path = ROOT):
        if not sys.platform.startswith("linux"):
            raise Unavailable(f"native kernels are built on Linux only, this is {sys.platform}")
        self.root = root
        self.compiler = find_compiler()
        self.torch, self.torch_version = find_torch()
        self.compiler_version = self.run("--version").splitlines()[0]
        x86 = platform.machine() in ("x86_64", "AMD64")
        self.capabilities = ["DEFAULT", "AVX2", "AVX512"] if x86 else ["DEFAULT"]
        if x86 and self.has_amx():
            self.capabilities.append("AMX")

    def run(self, *arguments: str) -> str:
        """Run the compiler; its output, or Unavailable with the first lines of it."""
        command = [*self.compiler, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            message = "\n".join(done.stdout.splitlines()[:20])
            raise Unavailable(f"the compiler failed: {shlex.join(command)}\n{message}")
        return done.stdout

    def has_amx(self) -> bool:
        """Whether compiler and assembler know it, which old ones do not."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "amx.cpp")
            source.write_text("#include <immintrin.h>\nvoid f() { _tile_dpbf16ps(0, 1, 2); }\n")
            try:
                self.run(*AMX_FLAGS, "-c", str(source), "-o", str(source.with_suffix(".o")))
            except Unavailable:
                return False
        return True

    def units(self) -> list[tuple[str, str | None]]:
        """(source, instruction set or None) of every compilation."""
        units = [(source, None) for source in PLAIN_SOURCES]
        for name in self.capabilities:
            sources = AMX_SOURCES if name == "AMX" else KERNEL_SOURCES
            units += [(source, name) for source in sources]
        return units

    def compile(self, source: str, capability: str | None, folder: Path) -> Path:
        """Compile one unit; returns the object file."""
        target = folder / f"{Path(source).stem}.{capability or 'plain'}.o"
        common = [*COMMON_FLAGS, *["-DT2I_AMX"] * ("AMX" in self.capabilities)]
        flags = PLAIN_FLAGS
        if capability:
            name = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
            flags = [*KERNEL_FLAGS, *name, *CAPABILITY_FLAGS[capability]]
        include = [f"-I{self.root / 'csrc'}", "-isystem", str(self.torch / "include")]
        files = ["-c", str(self.root / source), "-o", str(target)]
        self.run(*common, *flags, *extra_flags("CXXFLAGS"), *include, *files)
        return target

    def link(self, objects: list[Path], target: Path) -> None:
        """Link the shared object, which appears whole or not at all.

        torch's library is found by its name alone, since torch is loaded first: no path is kept.
        """
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        libraries = [f"-L{self.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,-z,defs"]
        try:
            files = [*map(str, objects), "-o", str(partial)]
            self.run("-shared", *extra_flags("LDFLAGS"), *files, *libraries)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def build(self, target: Path) -> None:
        """Compile every unit and link ``target``."""
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(compile_jobs()) as pool:
            objects = pool.map(lambda unit: self.compile(*unit, Path(folder)), self.units())
            self.link(list(objects), target)

    def key(self) -> str:
        """Changes with everything that the library is made of."""
        digest = hashlib.sha256()
        for path in [Path(__file__), *sorted((self.root / "csrc").rglob("*"))]:
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        flags = extra_flags("CXXFLAGS"), extra_flags("LDFLAGS")
        made_by = (self.compiler, self.compiler_version, self.torch_version, *flags)
        digest.update(repr(made_by).encode())
        return digest.hexdigest()[:16]


@lru_cache(None)
def choose() -> tuple[Toolchain | None, str | None]:
    """(toolchain, None) to build natively, or (None, why not).

    Raises SetupError where ``T2I_BUILD`` asks for what is not possible.
    """
    asked = os.environ.get("T2I_BUILD", "")
    if asked not in ("", "cpu", "cuda", "0"):
        raise SetupError(f"T2I_BUILD={asked!r}: expected 'cpu', 'cuda', '0', or unset")
    if asked == "cuda":
        raise SetupError("T2I_BUILD='cuda': this version has no CUDA sources; use 'cpu' or '0'")
    if asked == "0":
        return None, "it was built with T2I_BUILD=0"
    try:
        return Toolchain(), None
    except Unavailable as reason:
        if asked == "cpu":
            raise SetupError(f"T2I_BUILD='cpu': {reason}") from None
        return None, str(reason)


class build_native(Command):  # noqa: N801 - setuptools names commands so
    """Build the library into the package that is being packed or, if editable, the source tree."""

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        package = Path(self.build_lib, PACKAGE)
        if self.editable_mode:
            package = ROOT / "kernels" / PACKAGE
        package.mkdir(parents=True, exist_ok=True)
        toolchain, reason = choose()
        if toolchain:
            reason = self.build(toolchain, package)
        if reason:
            (package / LIBRARY).unlink(missing_ok=True)  # an earlier build's
            write_json(package / BUILD_INFO, {"backend": None, "reason": reason})
            self.warn(f"no native kernels: {reason}")

    def build(self, toolchain: Toolchain, package: Path) -> str | None:
        """Build unless it is up to date. Returns why it could not be built."""
        library, record = package / LIBRARY, package / BUILD_INFO
        key = toolchain.key()
        if library.exists() and record.exists():
            if json.loads(record.read_text()).get("key") == key:
                return None
        try:
            toolchain.build(library)
        except Unavailable as failure:
            if os.environ.get("T2I_BUILD") == "cpu":
                raise SetupError(f"T2I_BUILD='cpu': {failure}") from None
            return str(failure)
        info = {
            "backend": "cpu",
            "reason": None,
            "torch": toolchain.torch_version,
            "compiler": f"{shlex.join(toolchain.compiler)}: {toolchain.compiler_version}",
            "flags": shlex.join([*COMMON_FLAGS, *KERNEL_FLAGS, *extra_flags("CXXFLAGS")]),
            "capabilities": toolchain.capabilities,
            "key": key,
        }
        write_json(record, info)
        return None

    # The rest of the protocol of setuptools.command.build.SubCommand.

    def get_source_files(self):
        files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        return [str(path.relative_to(ROOT)) for path in files]

    def get_outputs(self):
        return list(self.get_output_mapping()) or [
            str(Path(self.build_lib, PACKAGE, name)) for name in (LIBRARY, BUILD_INFO)
        ]

    def get_output_mapping(self):
        """What an editable install finds in the source tree."""
        if not self.editable_mode:
            return {}
        files = [ROOT / "kernels" / PACKAGE / name for name in (LIBRARY, BUILD_INFO)]
        return {str(Path(self.build_lib, PACKAGE, f.name)): str(f) for f in files if f.exists()}


def write_json(path: Path, value: dict) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


class build(_build):  # noqa: N801
    sub_commands = [*_build.sub_commands, ("build_native", None)]


class bdist_wheel(_bdist_wheel):  # noqa: N801
    def get_tag(self):
        """Any Python: the library holds nothing of one."""
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        """Marks the wheel as this platform's where a library goes into it."""
        return choose()[0] is not None


if __name__ == "__main__":
    setup(
        distclass=NativeDistribution,
        cmdclass={"build": build, "build_native": build_native, "bdist_wheel": bdist_wheel},
    )
