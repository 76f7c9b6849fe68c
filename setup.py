"""Builds the native libraries of ``t2i_kernels``; everything else is in pyproject.toml.

Shared objects with no Python in them (``libt2i_kernels.so`` and ``libt2i_kernels_cuda.so``, beside
the package) register operators on torch's stable ABI: they serve every Python, and every torch from
2.13 on, built for CUDA or not. ``T2I_BUILD`` chooses:

    unset   native if torch's headers and a C++ compiler are there, else pure Python with a reason;
            with CUDA if nvcc is there and torch is built for CUDA
    cpu     native for the CPU, or an error
    cuda    native for the CPU and for NVIDIA GPUs, or an error; needs nvcc, but no GPU
    0       pure Python

``CXX``, ``CXXFLAGS`` and ``LDFLAGS`` mean what they always do. ``NVCC`` is nvcc, which else is
looked for on ``PATH``, under ``CUDA_HOME``, and among pip's packages (nvidia-cuda-nvcc).
``T2I_CUDA_ARCHITECTURES`` is what is compiled; by default, of "80 90a 100a 120a", what nvcc knows;
sources with _sm90 in their name always are for 90a.

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
CUDA_LIBRARY = "libt2i_kernels_cuda.so"
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
# What these sets do better than the one before.
VNNI_SOURCES = ["csrc/cpu/linear.cpp"]
AMX_SOURCES = ["csrc/cpu/flash_attention_amx.cpp", "csrc/cpu/vq_nearest.cpp"]
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

# sm_80 also as PTX: what is not in the list compiles that when it is loaded.
CUDA_ARCHITECTURES = ("80", "90a", "100a", "120a")
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]

WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
COMMON_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
PLAIN_FLAGS = ["-DTORCH_TARGET_VERSION=0x020d000000000000"]
# Uncontracted, what is computed in double is the same to the bit in every instruction set. Nothing
# throws, and tables for it would be symbols that instruction sets share.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-exceptions"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
VNNI_FLAGS = [*AVX512_FLAGS, "-mavx512vnni"]
AMX_FLAGS = [*VNNI_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
CAPABILITY_FLAGS = {
    "DEFAULT": [],
    "AVX2": AVX2_FLAGS,
    "AVX512": AVX512_FLAGS,
    "AVX512_VNNI": [*VNNI_FLAGS, "-DCPU_CAPABILITY_AVX512"],  # which is what at::vec knows
    "AMX": [*AMX_FLAGS, "-DCPU_CAPABILITY_AVX512"],
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


def find_nvcc() -> Path:
    """nvcc: ``NVCC``, on PATH, under CUDA_HOME, or in a package of pip's."""
    if os.environ.get("NVCC"):
        if program := shutil.which(os.environ["NVCC"]):
            return Path(program)
        raise Unavailable(f"nvcc was not found: NVCC={os.environ['NVCC']!r} is no program")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    packages = [str(p) for f in site_packages() for p in sorted(f.glob("nvidia/cu*/bin/nvcc"))]
    for name in ("nvcc", f"{home}/bin/nvcc", *packages):
        if program := shutil.which(name):
            return Path(program)
    raise Unavailable(f"nvcc was not found: neither on PATH, nor in {home}/bin, nor by pip")


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

    folders = ("csrc/cpu", "csrc/bindings")  # of sources

    def __init__(self, root: Path = ROOT):
        if not sys.platform.startswith("linux"):
            raise Unavailable(f"native kernels are built on Linux only, this is {sys.platform}")
        self.root = root
        self.compiler = find_compiler()
        self.torch, self.torch_version = find_torch()
        self.compiler_version = self.run("--version").splitlines()[0]
        x86 = platform.machine() in ("x86_64", "AMD64")
        self.capabilities = ["DEFAULT"]
        if x86:
            self.capabilities += ["AVX2", "AVX512", "AVX512_VNNI"]
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
            sources = {"AVX512_VNNI": VNNI_SOURCES, "AMX": AMX_SOURCES}.get(name, KERNEL_SOURCES)
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
            self.run("-shared", *extra_flags("LDFLAGS"), *files, *libraries, *self.libraries())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def libraries(self) -> list[str]:
        """What is linked besides torch."""
        return []

    def build(self, target: Path) -> None:
        """Compile every unit and link ``target``."""
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(compile_jobs()) as pool:
            objects = pool.map(lambda unit: self.compile(*unit, Path(folder)), self.units())
            self.link(list(objects), target)

    def key(self) -> str:
        """Changes with everything that the library is made of."""
        digest = hashlib.sha256()
        sources = [path for folder in self.folders for path in (self.root / folder).iterdir()]
        for path in [Path(__file__), *sorted(sources)]:
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        flags = extra_flags("CXXFLAGS"), extra_flags("LDFLAGS")
        made_by = (self.compiler, self.compiler_version, self.torch_version, *flags)
        digest.update(repr(made_by).encode())
        return digest.hexdigest()[:16]


class CudaToolchain(Toolchain):
    """The same with nvcc, for the other library."""

    folders = ("csrc/cuda", "csrc/bindings")

    def __init__(self, root: Path = ROOT):
        super().__init__(root)
        self.nvcc = find_nvcc()
        release = re.search(r"release [\d.]+, V([\d.]+)", self.run_nvcc("--version"))
        if not release:
            raise Unavailable(f"{self.nvcc} does not say its version")
        self.nvcc_version = release[1]
        self.architectures = self.choose_architectures()

    def choose_architectures(self) -> list[str]:
        asked = os.environ.get("T2I_CUDA_ARCHITECTURES", "")
        wrong = [name for name in asked.split() if not re.fullmatch(r"\d{2,3}[af]?", name)]
        if wrong:
            raise Unavailable(f"T2I_CUDA_ARCHITECTURES={asked!r}: expected names such as '80 90a'")
        known = self.run_nvcc("--list-gpu-code").split()
        default = [x for x in CUDA_ARCHITECTURES if f"sm_{x.rstrip('a')}" in known]
        return asked.split() or default

    def run_nvcc(self, *arguments: str | Path) -> str:
        """nvcc's output, or Unavailable with the first lines of it."""
        command = [str(self.nvcc), *map(str, arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            message = "\n".join(done.stdout.splitlines()[:20])
            raise Unavailable(f"nvcc failed: {shlex.join(command)}\n{message}")
        return done.stdout

    def units(self) -> list[tuple[str, str | None]]:
        cuda, bindings = self.root / "csrc/cuda", self.root / "csrc/bindings"
        sources = [*cuda.glob("*.cu"), *cuda.glob("*.cpp"), *bindings.glob("*_cuda.cpp")]
        return [(str(path.relative_to(self.root)), None) for path in sorted(sources)]

    def compile(self, source: str, capability: str | None, folder: Path) -> Path:
        if not source.endswith(".cu"):
            return super().compile(source, capability, folder)
        target = folder / f"{Path(source).stem}.cu.o"
        # Instructions of sm_90a are in no other's code.
        architectures = ["90a"] if "_sm90" in target.name else self.architectures
        codes = [f"arch=compute_{name},code=sm_{name}" for name in architectures]
        if "80" in architectures:
            codes.append("arch=compute_80,code=compute_80")
        generate = [word for code in codes for word in ("-gencode", code)]
        host = [word for word in self.compiler if not word.startswith("-")][-1]  # of "ccache g++"
        include = f"-I{self.root / 'csrc'}"
        files = ["-ccbin", host, "-c", self.root / source, "-o", target]
        self.run_nvcc(*NVCC_FLAGS, *generate, include, *files)
        return target

    def libraries(self) -> list[str]:
        plan = self.run_nvcc("--dryrun", "-x", "cu", os.devnull)
        folders = re.findall(r'"-L([^"]+)"', plan)
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        if top:  # pip's nvcc names folders that its packages do not have
            folders += [f"{top[1].strip()}/lib64", f"{top[1].strip()}/lib"]
        for folder in folders:
            if Path(folder, "libcudart_static.a").is_file():
                return [f"{folder}/libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
        raise Unavailable(f"libcudart_static.a was not found in {', '.join(folders)}")

    def key(self) -> str:
        made_by = super().key(), self.nvcc_version, self.architectures
        return hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]


@lru_cache(None)
def choose() -> tuple[Toolchain | None, str | None]:
    """(toolchain, None) to build natively, or (None, why not).

    Raises SetupError where ``T2I_BUILD`` asks for what is not possible.
    """
    asked = os.environ.get("T2I_BUILD", "")
    if asked not in ("", "cpu", "cuda", "0"):
        raise SetupError(f"T2I_BUILD={asked!r}: expected 'cpu', 'cuda', '0', or unset")
    if asked == "0":
        return None, "it was built with T2I_BUILD=0"
    try:
        return Toolchain(), None
    except Unavailable as reason:
        if asked in ("cpu", "cuda"):
            raise SetupError(f"T2I_BUILD={asked!r}: {reason}") from None
        return None, str(reason)


@lru_cache(None)
def choose_cuda() -> tuple[CudaToolchain | None, str | None]:
    """(toolchain, None) to build for NVIDIA GPUs, or (None, why not)."""
    asked = os.environ.get("T2I_BUILD", "")
    if asked in ("cpu", "0"):
        return None, f"it was built with T2I_BUILD={asked}"
    try:
        if asked != "cuda" and not built_for_cuda(find_torch()[0]):
            return None, "it was built beside a torch for the CPU: T2I_BUILD=cuda builds it anyway"
        return CudaToolchain(), None
    except Unavailable as reason:
        if asked == "cuda":
            raise SetupError(f"T2I_BUILD='cuda': {reason}") from None
        return None, str(reason)


def built_for_cuda(torch: Path) -> bool:
    version = re.search(r"^cuda.*= '[\d.]+'", (torch / "version.py").read_text(), re.MULTILINE)
    return version is not None


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
        record = package / BUILD_INFO
        before = json.loads(record.read_text()) if record.exists() else {}
        cpu, cuda = choose(), choose_cuda()  # what is asked for and missing is an error before work
        info = self.build(*cpu, package / LIBRARY, before)
        info["cuda"] = self.build(*cuda, package / CUDA_LIBRARY, before.get("cuda") or {})
        write_json(record, info)

    def build(self, toolchain: Toolchain | None, reason: str | None, library: Path,
              before: dict) -> dict:  # fmt: skip
        """Build unless it is up to date; returns what there is to know of it."""
        if toolchain:
            if library.exists() and before.get("key") == toolchain.key():
                return before
            try:
                toolchain.build(library)
                return describe(toolchain)
            except Unavailable as failure:
                if asked := os.environ.get("T2I_BUILD"):
                    raise SetupError(f"T2I_BUILD={asked!r}: {failure}") from None
                reason = str(failure)
        library.unlink(missing_ok=True)  # an earlier build's
        if library.name == LIBRARY:
            self.warn(f"no native kernels: {reason}")
        elif toolchain:
            self.warn(f"no CUDA kernels: {reason}")
        return {"backend": None, "reason": reason}

    # The rest of the protocol of setuptools.command.build.SubCommand.

    def get_source_files(self):
        files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        return [str(path.relative_to(ROOT)) for path in files]

    def files(self):
        return [LIBRARY, BUILD_INFO, *[CUDA_LIBRARY] * (choose_cuda()[0] is not None)]

    def get_outputs(self):
        return list(self.get_output_mapping()) or [
            str(Path(self.build_lib, PACKAGE, name)) for name in self.files()
        ]

    def get_output_mapping(self):
        """What an editable install finds in the source tree."""
        if not self.editable_mode:
            return {}
        files = [ROOT / "kernels" / PACKAGE / name for name in self.files()]
        return {str(Path(self.build_lib, PACKAGE, f.name)): str(f) for f in files if f.exists()}


def describe(toolchain: Toolchain) -> dict:
    info = {
        "backend": "cpu",
        "reason": None,
        "torch": toolchain.torch_version,
        "compiler": f"{shlex.join(toolchain.compiler)}: {toolchain.compiler_version}",
        "flags": shlex.join([*COMMON_FLAGS, *KERNEL_FLAGS, *extra_flags("CXXFLAGS")]),
        "capabilities": toolchain.capabilities,
        "key": toolchain.key(),
    }
    if isinstance(toolchain, CudaToolchain):
        info |= {
            "backend": "cuda",
            "compiler": f"{toolchain.nvcc}: {toolchain.nvcc_version}",
            "flags": shlex.join(NVCC_FLAGS),
            "capabilities": [f"sm_{name}" for name in toolchain.architectures],
        }
    return info


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
