"""Reads machine code for NVIDIA GPUs: resources, and what the main loops are made of.

    python benchmarks/sass.py KERNEL.cubin [ARCHITECTURE]

Works on what Triton and nvcc compile. Needs cuobjdump, of the CUDA toolkit or of the triton
package. Counts say what work a loop is, not how long it takes: the two bounds on the use of the
matrix units come from a model, see ``Loop.bounds``.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

MATRIX = ("HMMA", "IMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
FMA = ("FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2", "HFMA2", "HADD2", "HMUL2")
ALU = ("FMNMX", "FMNMX3", "F2FP", "IADD3", "LOP3", "SEL", "FSEL", "ISETP", "FSETP", "PRMT", "SHF",
       "LEA", "IMAD", "MOV", "VIADD", "IABS", "PLOP3")  # fmt: skip


@dataclass(frozen=True)
class Pipes:
    """Clocks that a warp's instruction keeps a pipe of its quarter of a multiprocessor busy, and
    what a multiprocessor holds (CUDA C++ Programming Guide, compute capabilities)."""

    mma: float  # m16n8k16 of 16-bit inputs; wgmma is counted by its size
    fma: float
    alu: float = 2
    mufu: float = 8
    shared: int = 0  # bytes
    registers: int = 65536
    warps: int = 64


# Dense 16-bit throughput per multiprocessor and clock is 2048, 4096 and 8192 operations; mma.sync
# reaches about 62 % of it on sm_90 (Luo et al., arXiv 2402.13499).
PIPES = {
    80: Pipes(mma=8, fma=2, shared=164 << 10),
    90: Pipes(mma=6.4, fma=1, shared=228 << 10),
    100: Pipes(mma=6.4, fma=1, shared=228 << 10),
    120: Pipes(mma=8, fma=1, shared=100 << 10, warps=48),
}


@dataclass
class Loop:
    """A loop with matrix instructions, for one iteration of one warp; loops inside run once."""

    counts: Counter  # of whole mnemonics
    skipped: Counter  # those that a branch inside the loop may jump over
    # Of these, what is in a branch and in no other inside it.
    branched: Counter = field(default_factory=Counter)

    def count(self, *names: str, common: bool = False) -> int:
        """Instructions of these kinds; ``common``: where branches skip what they can."""
        counts = self.counts - self.skipped if common else self.counts
        return sum(n for op, n in counts.items() if op.startswith("MUFU.") and op in names
                   or op.split(".")[0] in names)  # fmt: skip

    def __add__(self, other: Loop) -> Loop:
        return Loop(self.counts + other.counts, self.skipped + other.skipped,
                    self.branched + other.branched)  # fmt: skip

    def of_teams(self) -> Loop:
        """The same where warps are two teams, each with branches of its own: what they go through
        on average, so that branches inside those are the ones that may be skipped."""
        half = Counter({op: n / 2 for op, n in self.branched.items()})
        counts = Counter({op: n - half[op] for op, n in self.counts.items()})
        return Loop(counts, self.skipped - self.branched)

    @property
    def size(self) -> int:
        return sum(self.counts.values())

    @property
    def matrix(self) -> int:
        return self.count(*MATRIX)

    @property
    def per_matrix(self) -> float:
        """Instructions on the common path for each that multiplies matrices."""
        return sum((self.counts - self.skipped).values()) / self.matrix

    def bounds(self, architecture: int) -> tuple[float, float] | None:
        """Use of the matrix units if nothing overlapped, and if everything did: modelled, from the
        clocks that each pipe is busy. None for tcgen05, whose mnemonics do not tell its shapes."""
        if any(op.startswith("UTC") for op in self.counts):
            return None
        pipes = PIPES[architecture]
        mma = sum(n * _matrix_clocks(op, pipes) for op, n in self.counts.items())
        others = (
            pipes.fma * self.count(*FMA, common=True),
            pipes.alu * self.count(*ALU, common=True),
            pipes.mufu * sum(n for op, n in self.counts.items() if op.startswith("MUFU")),
        )
        return mma / (mma + sum(others)), mma / max(mma, *others)


def _matrix_clocks(op: str, pipes: Pipes) -> float:
    name, *rest = op.split(".")
    if name not in MATRIX:
        return 0
    shape = next((part for part in rest if re.fullmatch(r"\d+x?\d*x?\d*", part)), "16816")
    if name == "HGMMA":  # 64×N×16 by four warps, each with its own matrix unit: 1024 a clock each
        m, n, k = map(int, shape.split("x"))
        return m * n * k * 2 / 4096 * (2 if k == 8 else 1)
    return pipes.mma * (0.5 if shape == "1688" and ".TF32" not in op else 1)


@dataclass
class Kernel:
    name: str
    registers: int
    stack: int  # bytes a thread
    spills: tuple[int, int]  # instructions that store to and load from the stack
    shared: int  # bytes that are known when compiling
    loops: list[Loop]  # the innermost ones
    outer: list[Loop]

    @property
    def main(self) -> Loop | None:
        return leanest(self.loops)

    def occupancy(self, architecture: int, warps: int, shared: int) -> int:
        """Warps of a multiprocessor that such blocks fill."""
        pipes = PIPES[architecture]
        rounded = -(-self.registers // 8) * 8 * 32
        blocks = min(pipes.registers // (rounded * warps), pipes.warps // warps,
                     pipes.shared // max(shared + 1024, 1))  # fmt: skip
        return blocks * warps


def leanest(loops: list[Loop]) -> Loop | None:
    """The leanest of those with most matrix instructions: the one that is not masked."""
    most = max((loop.matrix for loop in loops), default=0)
    return min((x for x in loops if x.matrix == most), key=lambda x: x.size, default=None)


def read(cubin: Path) -> list[Kernel]:
    """The kernels of a file."""
    usage = re.findall(
        r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)",
        _cuobjdump("--dump-resource-usage", cubin),
    )
    code = _cuobjdump("--dump-sass", cubin).split("Function : ")[1:]
    bodies = {text.split()[0]: text for text in code}
    return [
        _kernel(name, *map(int, numbers), bodies[name])
        for name, *numbers in usage
        if name in bodies
    ]


def _kernel(name: str, registers: int, stack: int, shared: int, text: str) -> Kernel:
    instructions = [
        (int(address, 16), *re.fullmatch(r"(@!?U?P\w+\s+)?(\S+)(.*)", body.strip(), re.S).groups())
        for address, body in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)
    ]
    place = {address: i for i, (address, *_) in enumerate(instructions)}
    jumps = []  # (from, to, on a condition)
    for i, (_, condition, op, rest) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if op.split(".")[0] == "BRA" and target and int(target[1], 16) in place:
            conditional = bool(condition) or bool(re.match(r"\s*!?U?P\d", rest))
            jumps.append((i, place[int(target[1], 16)], conditional))
    ops = [op for _, _, op, _ in instructions]
    conditions = [condition for _, condition, _, _ in instructions]

    def is_loop(first: int, last: int) -> bool:
        """With products, and entered at its head alone: code that was moved out of the way, of
        what waits, jumps back, too."""
        if not any(op.split(".")[0] in MATRIX for op in ops[first : last + 1]):
            return False
        follow: dict[int, list[int]] = {}
        for at, to, _ in jumps:
            follow.setdefault(at, []).append(to)
        always = {at for at, _, conditional in jumps if not conditional}
        always |= {i for i, op in enumerate(ops) if op == "EXIT" and not conditions[i]}
        found, todo = {first}, [0]
        while todo:
            at = todo.pop()
            if at not in found and at < len(ops):
                found.add(at)
                todo += follow.get(at, []) + [at + 1] * (at not in always)
        return last not in found

    back = sorted({(to, at) for at, to, _ in jumps if to <= at and is_loop(to, at)})

    def contain(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer[0] <= inner[0] and inner[1] <= outer[1] and inner != outer

    def loop(first: int, last: int) -> Loop:
        skipped: Counter = Counter()  # by how many branches
        for at, to, conditional in jumps:
            region = range(at + 1, to)
            # A prefetch or a product that may be skipped at the end of the loop is no exception.
            usual = {"LDGSTS", "LDSM", *MATRIX} & {ops[i].split(".")[0] for i in region}
            if conditional and first <= at < to <= last and not usual:
                skipped.update(region)
        branched = Counter(ops[i] for i, n in skipped.items() if n == 1)
        return Loop(Counter(ops[first : last + 1]), Counter(ops[i] for i in skipped), branched)

    inner = [x for x in back if not any(contain(x, y) for y in back)]
    outer = [x for x in back if not any(contain(y, x) for y in back)]
    loops, outer = ([x for x in (loop(*y) for y in z) if x.matrix] for z in (inner, outer))
    local = Counter(op.split(".")[0] for op in ops)
    return Kernel(name, registers, stack, (local["STL"], local["LDL"]), shared, loops, outer)


def _cuobjdump(option: str, file: Path) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        spec = importlib.util.find_spec("triton")
        tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else "cuobjdump"
    return subprocess.run([tool, option, file], check=True, capture_output=True, text=True).stdout


def read_bytes(cubin: bytes) -> Kernel:
    """The only kernel of a file that is in memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        (kernel,) = read(file)
    return kernel


def main(file: str, architecture: str = "80") -> None:
    for kernel in read(Path(file)):
        print(f"{kernel.name}: {kernel.registers} registers, {kernel.stack} B of stack, "
              f"{kernel.shared} B shared, spills {kernel.spills}")  # fmt: skip
        for loop in kernel.loops + [x for x in kernel.outer if x not in kernel.loops]:
            short = Counter()
            for op, n in loop.counts.items():
                short[op if op.startswith("MUFU") else op.split(".")[0]] += n
            bounds = " to ".join(f"{x:.0%}" for x in loop.bounds(int(architecture)) or ())
            print(f"  {loop.size} instructions, {loop.matrix} on matrices, {loop.per_matrix:.2f} "
                  f"for each; matrix units {bounds or 'not'} modelled")  # fmt: skip
            print("   ", ", ".join(f"{op} {n}" for op, n in short.most_common()))


if __name__ == "__main__":
    main(*sys.argv[1:])
