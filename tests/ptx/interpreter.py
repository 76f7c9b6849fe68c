"""Runs PTX on the CPU, a block at a time, in numpy: see README.md.

A register is an array over the threads of a block. The threads at the lowest program counter go
first, so that branches meet again as early as they can; where threads wait for others (barriers,
warp-wide instructions, mbarriers), they stand aside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matrix
import numpy as np
from arithmetic import DTYPES, HALVES, comparison, conversion, elementwise, halves, to_halves
from parse import (
    WIDTHS,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Pair,
    PtxError,
    Register,
    Symbol,
    Variable,
    Vector,
    immediate_bits,
    parse,
)

GLOBAL, SHARED, LOCAL = 1 << 40, 1 << 44, 1 << 45  # where generic addresses begin
SHARED_START = 1024  # an address of 0 is nobody's
GAP = 512  # bytes between buffers
WRITTEN, IN_FLIGHT = 1, 2  # of a byte of shared memory
EVERYONE = 0xFFFFFFFF
TURNS = 10**6  # of the scheduler, in a block
# What a register holds in threads that did not write it: NaN, and no address. NaN in halves too.
POISON = {1: np.bool_(False), 8: np.uint8(0xFD), 16: np.uint16(0xFFFD), 32: np.uint32(0xFFFDFFFD),
          64: np.uint64(0xFFFDFFFDFFFDFFFD)}  # fmt: skip
IGNORED = {"membar", "griddepcontrol", "prefetch", "prefetchu", "nanosleep", "setmaxnreg",
           "discard", "applypriority"}  # fmt: skip


class Fault(Exception):
    """What went wrong in a thread; where is added by ``Machine.run``."""

    def __init__(self, message: str, thread: int | None = None) -> None:
        super().__init__(message)
        self.thread = thread


class Unwritten:
    """Stands for a register that no thread has written."""

    def __init__(self, register: Register) -> None:
        self.register = register

    def view(self, _):
        raise Fault(f"{self.register.name} is read before it was written")

    __and__ = __rand__ = __invert__ = lambda self, *_: self.view(None)


@dataclass
class Struct:
    """A parameter passed by value: ``record``, of a structured dtype that C lays out the same
    (``align=True``), whose fields named in ``pointers`` point to these arrays."""

    record: np.ndarray
    pointers: dict[str, np.ndarray]

    def at(self, addresses: dict[str, int]) -> bytes:
        record = self.record.copy()
        for name, address in addresses.items():
            record[name] = address
        return record.tobytes()


# ---- What is counted ----------------------------------------------------------------------------


@dataclass
class Line:
    """Counts of an instruction: of warps that executed it, 128-byte passes over shared memory and
    32-byte sectors of global memory, and how many of each were needed."""

    instruction: Instruction
    executed: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0
    sectors: int = 0
    ideal_sectors: int = 0


@dataclass
class Report:
    lines: list[Line]
    bytes_read: int = 0
    bytes_written: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)

    def total(self, what: str) -> int:
        return sum(getattr(line, what) for line in self.lines)

    def ratio(self, what: str = "wavefronts") -> float:
        """Actual by needed, of ``wavefronts`` or ``sectors``; 1 where nothing was."""
        ideal = self.total(f"ideal_{what}")
        return self.total(what) / ideal if ideal else 1.0

    def offenders(self, what: str = "wavefronts", count: int = 5) -> str:
        """The lines that waste most."""

        def excess(line):
            return getattr(line, what) - getattr(line, f"ideal_{what}")

        worst = sorted((x for x in self.lines if excess(x)), key=excess, reverse=True)[:count]
        return "\n".join(
            f"{getattr(x, what)} {what} for {getattr(x, f'ideal_{what}')}: line "
            f"{x.instruction.line} ({x.instruction.source}): {x.instruction.text}"
            for x in worst
        )


_conflicts: dict[tuple, int] = {}
_sectors: dict[tuple, tuple[int, int]] = {}


def wavefronts(addresses: np.ndarray, lanes: int, width: int) -> int:
    """Passes over shared memory of accesses [phases · lanes] of ``width`` bytes, negative ones
    inactive: in each phase, the largest number of different words that one of 32 banks is asked
    for."""
    active = addresses >= 0
    low = int(addresses[active].min()) & ~127
    relative = np.where(active, addresses - low, -1)
    key = lanes, width, relative.tobytes()
    if key not in _conflicts:
        words = relative.reshape(-1, lanes, 1) // 4 + np.arange(max(1, width // 4))
        words[~active.reshape(-1, lanes)] = -1
        words = np.sort(words.reshape(len(words), -1), 1)
        first = np.ones(words.shape, bool)
        first[:, 1:] = words[:, 1:] != words[:, :-1]
        first &= words >= 0
        banks = np.arange(len(words))[:, None] * 32 + words % 32
        counts = np.bincount(banks[first], minlength=32 * len(words)).reshape(-1, 32)
        _conflicts[key] = int(counts.max(1).sum())
    return _conflicts[key]


def count_sectors(offsets: np.ndarray, threads: np.ndarray, width: int) -> tuple[int, int]:
    """(32-byte sectors that warps touch, as many as their bytes need)."""
    relative = offsets - (int(offsets.min()) & ~31)
    key = width, threads.tobytes(), relative.tobytes()
    if key not in _sectors:
        warps = threads // 32
        touched = len(np.unique(warps << 48 | relative // 32))
        distinct = np.unique(warps << 48 | relative)
        bytes_ = np.bincount(distinct >> 48) * width
        _sectors[key] = touched, int((-(-bytes_ // 32)).sum())
    return _sectors[key]


# ---- Global memory ------------------------------------------------------------------------------


class GlobalMemory:
    """Buffers with gaps between them, in one array of bytes; ``valid``: those that are somebody's.

    An array is valid where its elements are: gaps between rows of a view are not.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[int, int, str]] = []  # (start, size, name)
        self.size = GAP
        self.arrays: list[tuple[np.ndarray, int]] = []

    def reserve(self, name: str, size: int, phase: int = 0) -> int:
        start = -(-self.size // 256) * 256 + phase
        self.buffers.append((start, size, name))
        self.size = start + size + GAP
        return start

    def place(self, arrays: dict[str, np.ndarray]) -> dict[str, int]:
        """Arrays that overlap, as views of one do, share a buffer."""
        spans = []
        for name, array in arrays.items():
            low = array.__array_interface__["data"][0]
            reach = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True))
            spans.append((low, low + (reach + array.itemsize if array.size else 0), name))
        starts, high, base = {}, -1, 0
        spans.sort()
        for i, (low, _, name) in enumerate(spans):
            if low >= high:
                high = low
                names = []
                for l2, h2, n2 in spans[i:]:
                    if names and l2 >= high:
                        break
                    high = max(high, h2)
                    names.append(n2)
                base = self.reserve(" / ".join(names), high - low, low % 64) - low
            starts[name] = base + low
            self.arrays.append((arrays[name], base + low))
        return starts

    def build(self) -> None:
        size = -(-self.size // 256) * 256
        self.bytes, self.valid = np.zeros(size, np.uint8), np.zeros(size, bool)
        for array, start in self.arrays:
            self._view(array, start)[...] = array
            shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
            np.ndarray(shape, bool, self.valid, start, strides)[...] = True

    def put(self, start: int, data: bytes) -> None:
        self.bytes[start : start + len(data)] = np.frombuffer(data, np.uint8)
        self.valid[start : start + len(data)] = True

    def collect(self) -> None:
        for array, start in self.arrays:
            if array.flags.writeable and array.size:
                array[...] = self._view(array, start)

    def _view(self, array: np.ndarray, start: int) -> np.ndarray:
        return np.ndarray(array.shape, array.dtype, self.bytes, start, array.strides)

    def describe(self, offset: int) -> str:
        start, size, name = min(
            self.buffers, key=lambda b: max(b[0] - offset, offset - (b[0] + b[1]) + 1, 0)
        )
        if not -GAP * 64 <= offset - start < size + GAP * 64:
            return f"address {offset + GLOBAL:#x}, which is of no buffer"
        return f"offset {offset - start} of {name}, which has {size} bytes"


# ---- A block ------------------------------------------------------------------------------------


@dataclass
class Barrier:
    count: int | None
    # (pc, only arrives): (mask, what to do once complete)
    waiting: dict[tuple[int, bool], tuple] = field(default_factory=dict)


@dataclass
class Flight:
    """Bytes on their way to shared memory: ``data`` [threads, width] to offsets of threads."""

    threads: np.ndarray
    offsets: np.ndarray
    data: np.ndarray
    group: np.ndarray
    generic: bool = True  # written as by a store; bulk copies are of the async proxy


@dataclass
class Product:
    """A wgmma that nobody has waited for: the registers it will write, what it reads meanwhile."""

    threads: np.ndarray
    group: int
    results: dict[int, np.ndarray]  # by register
    reads: np.ndarray


class Order:
    """Which accesses of shared memory come after which: vector clocks of warps, by 4-byte words.

    A warp knows of what others did before a barrier that both came to, or before they arrived at an
    mbarrier that it waited for. What it does not know of may come before or after.
    """

    def __init__(self, warps: int, size: int) -> None:
        self.clock = np.eye(warps, dtype=np.int64)
        self.writer, self.written = np.zeros(size // 4, np.int64), np.zeros(size // 4, np.int64)
        self.read = np.zeros((size // 4, warps), np.int64)

    def access(self, offsets: np.ndarray, width: int, threads: np.ndarray, write: bool,
               remember: bool = True) -> None:  # fmt: skip
        if width < 4:  # a word may be of several threads
            return
        words = (offsets[:, None] + np.arange(0, width, 4)) // 4
        warps = np.repeat(threads // 32, words.shape[1])
        words = words.reshape(-1)
        known, each = self.clock[warps], np.arange(len(warps))
        unknown = self.written[words] > known[each, self.writer[words]]
        if write:
            unknown |= (self.read[words] > known).any(1)
        if unknown.any():
            bad = int(unknown.argmax())
            kind = "write" if write else "read"
            raise Fault(f"race: no barrier is between this {kind} of shared "
                        f"address {words[bad] * 4} and another warp's access",
                        threads[bad * len(threads) // len(words)])  # fmt: skip
        if write:
            self.writer[words], self.written[words] = warps, known[each, warps]
        elif remember:
            self.read[words, warps] = known[each, warps]

    def meet(self, warps: np.ndarray, waiting: np.ndarray) -> None:
        """At a barrier: all of ``warps`` tell what they know, ``waiting`` learn it."""
        self.clock[waiting] = self.clock[warps].max(0)
        self.clock[warps, warps] += 1

    def tell(self, warp: int, known: np.ndarray) -> None:
        np.maximum(known, self.clock[warp], out=known)
        self.clock[warp, warp] += 1


@dataclass
class Mbarrier:
    expected: int
    pending: int
    known: np.ndarray  # clocks of those who arrived
    bytes: int = 0
    phase: int = 0


class Machine:
    """A kernel decoded for a size of block. An instruction is a function of the registers and of
    the mask of threads that execute it (None: all of them), and gives None or, where it moves the
    program counter, a list of (program counter, mask)."""

    def __init__(self, kernel: Kernel, variables: list[Variable], block, grid, memory: GlobalMemory,
                 symbols: dict[str, int], dynamic_shared: int) -> None:  # fmt: skip
        self.kernel, self.block, self.grid, self.memory = kernel, block, grid, memory
        count = block[0] * block[1] * block[2]
        self.n = -(-count // 32) * 32
        self.all = np.ones(self.n, bool)
        self.threads, self.born = np.arange(self.n), np.arange(self.n) < count
        self.lane = (self.threads % 32).astype(np.uint32)
        self.symbols = dict(symbols)
        self.local_size = 0
        top = SHARED_START
        for v in variables:
            if v.space == "local":
                self.local_size = -(-self.local_size // v.align) * v.align
                self.symbols[v.name] = LOCAL + self.local_size
                self.local_size += v.size
            else:
                top = -(-top // v.align) * v.align
                self.symbols[v.name] = top
                top += v.size
        self.dynamic = -(-top // 1024) * 1024 if dynamic_shared else top
        self.shared_end = self.dynamic + dynamic_shared
        self.symbols |= {v.name: self.dynamic for v in variables if not v.size}
        self.lines = [Line(i) for i in kernel.instructions]
        self.bytes_read = self.bytes_written = 0
        self.constants: dict = {}
        self.everyone = self._constant(EVERYONE, "u32")
        self.code = [self._decode(pc, i) for pc, i in enumerate(kernel.instructions)]

    # -- Running

    def run(self, index: tuple[int, int, int]) -> None:
        self.index, self.pc = index, 0
        self.registers = [Unwritten(r) for r in self.kernel.registers]
        size = -(-self.shared_end // 16) * 16
        self.shared, self.state = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
        self.local = np.zeros(self.n * self.local_size, np.uint8)
        self.exited = ~self.born
        self.parked: dict[int, np.ndarray] = {}
        self.asleep: dict[int, tuple[np.ndarray, int]] = {}
        self.barriers: dict[int, Barrier] = {}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.events: dict[int, list[Callable]] = {}  # of mbarriers: what arrives when waited for
        self.progress = 0
        self.flights: list[Flight] = []
        self.committed = np.zeros(self.n, np.int64)
        self.order = Order(self.n // 32, size)
        self.products: list[Product] = []
        self.product_group = np.zeros(self.n, np.int64)
        self.reading = np.zeros(size, np.int32)  # by how many products
        self.unfenced = np.zeros(size, np.int32)  # 1 + whose store awaits a fence
        try:
            with np.errstate(all="ignore"):
                self._schedule()
        except Fault as fault:
            i = self.kernel.instructions[min(self.pc, len(self.kernel.instructions) - 1)]
            thread = "" if fault.thread is None else f", thread {self._coordinates(fault.thread)}"
            where = f" ({i.source})" if i.source else ""
            raise PtxError(
                f"{self.kernel.name}, line {i.line}{where}: {fault} in `{i.text}`, block "
                f"{index}{thread}"
            ) from fault

    def _coordinates(self, thread: int) -> tuple[int, int, int]:
        x, y, _ = self.block
        return int(thread) % x, int(thread) // x % y, int(thread) // (x * y)

    def _schedule(self) -> None:
        ready = {0: self.born}
        code, lines, registers = self.code, self.lines, self.registers
        for _ in range(TURNS):
            if not ready:
                ready = self._resume()
                if not ready:
                    break
            pc = min(ready)
            mask = ready.pop(pc)
            if pc in self.parked:
                mask = mask | self.parked.pop(pc)
            limit = min((p for p in itertools.chain(ready, self.parked) if p > pc), default=1 << 60)
            everyone = bool(mask.all())
            m = None if everyone else mask
            warps = int(mask.reshape(-1, 32).any(1).sum())
            while True:
                self.pc = pc
                lines[pc].executed += warps
                moved = code[pc](registers, m)
                if moved is None:
                    pc += 1
                    if pc < limit:
                        continue
                    moved = [(pc, mask)]
                for target, group in moved:
                    group = self.all if group is None else group
                    ready[target] = ready[target] | group if target in ready else group
                break
        else:
            raise Fault(f"no end after {TURNS} jumps")
        if self.flights:
            raise Fault("cp.async was never waited for", self.flights[0].threads[0])
        if self.products:
            raise Fault("wgmma was never waited for", self.products[0].threads[0])

    def _resume(self) -> dict[int, np.ndarray]:
        """Those who can go on when nobody else can; nobody at the end."""
        ready: dict[int, np.ndarray] = {}
        for name in list(self.barriers):
            for pc, mask in self._complete(name):
                ready[pc] = ready.get(pc, False) | mask
        for pc, (mask, seen) in list(self.asleep.items()):
            if self.progress > seen:
                ready[pc] = ready.get(pc, False) | mask
                del self.asleep[pc]
        if ready:
            return ready
        if self.parked:
            self.pc, mask = next(iter(self.parked.items()))
            raise Fault("divergence: threads of the same warp never arrive", mask.argmax())
        for name, barrier in self.barriers.items():
            (self.pc, _), (mask, _) = next(iter(barrier.waiting.items()))
            arrived = sum(int(m.sum()) for m, _ in barrier.waiting.values())
            raise Fault(f"deadlock: {arrived} threads wait at barrier {name} for others, which "
                        "never arrive", mask.argmax())  # fmt: skip
        for pc, (mask, _) in self.asleep.items():
            self.pc = pc
            raise Fault("deadlock: the mbarrier's phase never ends", mask.argmax())
        return ready

    # -- Operands

    def _constant(self, bits: int, kind: str) -> np.ndarray:
        if (bits, kind) not in self.constants:
            if kind == "pred":
                made = np.full(self.n, bits & 1, bool)
            else:
                made = np.full(self.n, bits, f"u{WIDTHS[kind] // 8}").view(DTYPES[kind])
            self.constants[bits, kind] = made
        return self.constants[bits, kind]

    def _special(self, name: str) -> Callable | None:
        """Special registers that are there."""
        base, _, axis = name.partition(".")
        axis = "xyz".find(axis) if axis else 0
        lane = self.lane.astype(np.uint64)
        bit = np.uint64(1) << lane
        x, y, _ = self.block
        tid = [self.threads % x, self.threads // x % y, self.threads // (x * y)]
        fixed = {
            "%tid": tid[axis], "%laneid": lane, "%warpid": self.threads // 32,
            "%ntid": np.full(self.n, self.block[axis]), "WARP_SZ": np.full(self.n, 32),
            "%nctaid": np.full(self.n, self.grid[axis]), "%nwarpid": np.full(self.n, self.n // 32),
            "%lanemask_eq": bit, "%lanemask_lt": bit - np.uint64(1),
            "%lanemask_le": 2 * bit - np.uint64(1), "%lanemask_gt": EVERYONE - (2 * bit - 1),
            "%lanemask_ge": EVERYONE - (bit - 1),
            "%dynamic_smem_size": np.full(self.n, self.shared_end - self.dynamic),
            "%total_smem_size": np.full(self.n, self.shared_end),
            "%cluster_ctarank": np.zeros(self.n), "%cluster_nctarank": np.ones(self.n),
            "%cluster_ctaid": np.zeros(self.n), "%cluster_nctaid": np.ones(self.n),
        }  # fmt: skip
        if base == "%ctaid":
            return lambda: self._constant(self.index[axis], "u32")
        if base in fixed:
            value = fixed[base].astype(np.uint32)
            return lambda: value
        return None

    def _get(self, operand, kind: str) -> Callable:
        """Reads an operand as an array of a type."""
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            i, width = operand.index, operand.width
            if kind == "pred":
                return (lambda R: ~R[i]) if operand.negated else (lambda R: R[i] & True)
            if width == WIDTHS[kind]:
                return lambda R: R[i].view(dtype)
            if width < WIDTHS[kind]:
                raise PtxError(f"{operand.name} has {width} bits, {kind} more")
            held, narrow = f"u{width // 8}", f"u{WIDTHS[kind] // 8}"
            return lambda R: R[i].view(held).astype(narrow).view(dtype)
        if isinstance(operand, Immediate):
            value = self._constant(immediate_bits(operand.text, kind), kind)
            return lambda R: value
        if isinstance(operand, (Symbol, Address)):
            offset = operand.offset if isinstance(operand, Address) else 0
            name = operand.base.name if isinstance(operand, Address) else operand.name
            special = self._special(name)
            if special is not None:
                return lambda R: special().astype(dtype)
            if name in self.symbols:
                value = self._constant(self.symbols[name] + offset, kind)
                return lambda R: value
            raise PtxError(f"{name} is not known")
        raise PtxError(f"cannot read {operand}")

    def _put(self, operand, kind: str) -> Callable:
        """Writes an array of a type, where the mask says so."""
        if operand == Symbol("_"):
            return lambda R, value, m: None
        if not isinstance(operand, Register):
            raise PtxError(f"cannot write {operand}")
        i, poison = operand.index, POISON[operand.width]
        bits, widened = WIDTHS[kind], None
        if operand.width > bits > 1:
            widened = f"{'i' if kind[0] == 's' else 'u'}{operand.width // 8}"
        elif operand.width < bits:
            raise PtxError(f"{operand.name} has {operand.width} bits, {kind} more")

        def put(R, value, m):
            if widened:
                value = value.astype(widened)
            if m is not None:
                old = R[i]
                old = np.full(len(m), poison) if type(old) is Unwritten else old
                value = np.where(m, value, old.view(value.dtype))
            R[i] = value

        return put

    def _address(self, operand: Address) -> Callable:
        base, offset = operand.base, operand.offset
        if isinstance(base, Register):
            get = self._get(base, f"u{base.width}")
            return lambda R: get(R).astype(np.int64) + offset
        if isinstance(base, Immediate):
            value = self._constant(immediate_bits(base.text, "u64") + offset, "s64")
        else:
            value = self._get(Address(base, offset), "s64")(None)
        return lambda R: value

    # -- Memory. Accesses are of the threads that are listed.

    def _active(self, m) -> np.ndarray:
        return self.threads if m is None else np.flatnonzero(m)

    def _locate(self, space: str, at: np.ndarray, threads: np.ndarray, width: int, align: int = 0):
        """(space, bytes, offsets, which of the threads) for each space that is accessed."""
        odd = at & ((align or width) - 1)
        if odd.any():
            bad = int(odd.argmax())
            where = self._describe(space, int(at[bad]))
            raise Fault(f"misaligned: {width} bytes at {where}", threads[bad])
        if space == "generic":
            which = np.digitize(at, [GLOBAL, SHARED, LOCAL])
            if which[0] == 0 or (which != which[0]).any():
                for i in np.unique(which):
                    part = which == i
                    name = ("", "global", "shared", "local")[i]
                    if not name:
                        bad = int(part.argmax())
                        raise Fault(f"address {at[bad]:#x} is of no memory", threads[bad])
                    yield from (
                        (*found[:3], np.flatnonzero(part)[found[3]])
                        for found in self._locate(name, at[part], threads[part], width, align)
                    )
                return
            space = ("", "global", "shared", "local")[which[0]]
        everyone = np.arange(len(at))
        if space == "shared":
            offsets = np.where(at >= SHARED, at - SHARED, at)
            outside = (offsets < SHARED_START) | (offsets > self.shared_end - width)
            memory = self.shared
        elif space == "local":
            offsets = at - LOCAL
            outside = (offsets < 0) | (offsets > self.local_size - width)
            offsets, memory = offsets + threads * self.local_size, self.local
        else:
            offsets, memory = at - GLOBAL, self.memory.bytes
            outside = (offsets < 0) | (offsets > len(memory) - width)
            if not outside.any():
                valid = self.memory.valid
                outside = ~(valid[offsets] & valid[offsets + (width - 1)])
        if outside.any():
            bad = int(outside.argmax())
            where = self._describe(space, int(at[bad]))
            raise Fault(f"out of bounds: {width} bytes at {where}", threads[bad])
        yield space, memory, offsets, everyone

    def _describe(self, space: str, at: int) -> str:
        if space == "shared" or space == "generic" and SHARED <= at < LOCAL:
            return (f"shared address {at % SHARED}; it is from {SHARED_START} to "
                    f"{self.shared_end}, dynamic from {self.dynamic}")  # fmt: skip
        if space == "local" or at >= LOCAL:
            return f"local offset {at - LOCAL} of {self.local_size}"
        return self.memory.describe(at - GLOBAL)

    def _check_state(self, offsets: np.ndarray, width: int, threads: np.ndarray, write=False):
        """Shared bytes must be there to be read, may not be awaited to be written, and in either
        case come before or after what other warps do to them."""
        self.order.access(offsets, width, threads, write)
        at = offsets[:, None] + np.arange(width)
        if write and self.products and self.reading[at].any():
            raise Fault("written while a wgmma reads it, which was not waited for", threads[0])
        self._check_written(self.state[at], width, offsets, threads, write)

    @staticmethod
    def _check_written(flags, width: int, offsets: np.ndarray, threads: np.ndarray, write=False):
        if (flags == WRITTEN).all():
            return
        wrong = flags == IN_FLIGHT if write else flags != WRITTEN
        if wrong.any():
            bad = int(wrong.any(1).argmax())
            late = (flags[bad] == IN_FLIGHT).any()
            what = "still in flight" if late else "uninitialised"
            raise Fault(f"{what}: {width} bytes at shared address {offsets[bad]}", threads[bad])

    def _count_shared(self, offsets: np.ndarray, threads: np.ndarray, width: int) -> None:
        lanes = 32 if width <= 4 else 128 // width
        at = np.full(self.n, -1, np.int64)
        at[threads] = offsets
        line = self.lines[self.pc]
        line.wavefronts += wavefronts(at, lanes, width)
        line.ideal_wavefronts += int((at >= 0).reshape(-1, lanes).any(1).sum())

    def _count_global(self, offsets: np.ndarray, threads: np.ndarray, width: int) -> None:
        line = self.lines[self.pc]
        touched, ideal = count_sectors(offsets, threads, width)
        line.sectors += touched
        line.ideal_sectors += ideal

    def load(self, space: str, at: np.ndarray, threads: np.ndarray, dtype, count: int = 1,
             align: int = 0):  # fmt: skip
        """[threads, count] of consecutive elements."""
        size = np.dtype(dtype).itemsize
        width = size * count
        found = np.empty((len(at), count), dtype)
        if len(at) == 0:
            return found
        for kind, memory, offsets, part in self._locate(space, at, threads, width, align):
            if kind == "shared":
                self._check_state(offsets, width, threads[part])
                self._count_shared(offsets, threads[part], width)
            elif kind == "global":
                self._count_global(offsets, threads[part], width)
                self.bytes_read += width * len(offsets)
            found[part] = memory.view(dtype)[(offsets // size)[:, None] + np.arange(count)]
        return found

    def store(self, space: str, at: np.ndarray, threads: np.ndarray, data: np.ndarray) -> None:
        """``data`` [threads, count]."""
        size = data.dtype.itemsize
        width = size * data.shape[1]
        if len(at) == 0:
            return
        for kind, memory, offsets, part in self._locate(space, at, threads, width):
            if kind == "shared":
                self._check_state(offsets, width, threads[part], write=True)
                self._count_shared(offsets, threads[part], width)
                self._mark_stored(offsets, width, threads[part])
            elif kind == "global":
                self._count_global(offsets, threads[part], width)
                self.bytes_written += width * len(offsets)
            memory.view(data.dtype)[(offsets // size)[:, None] + np.arange(data.shape[1])] = data[
                part
            ]

    def _mark(self, offsets: np.ndarray, width: int, state: int) -> None:
        self.state[offsets[:, None] + np.arange(width)] = state

    def _mark_stored(self, offsets: np.ndarray, width: int, threads: np.ndarray) -> None:
        at = offsets[:, None] + np.arange(width)
        self.state[at], self.unfenced[at] = WRITTEN, threads[:, None] + 1

    # -- Threads that wait for each other

    def _late(self, m, members: np.ndarray) -> np.ndarray | None:
        """Threads of the mask whose ``members`` (bits of their warp) are not all here."""
        if members is self.everyone and m is None:
            return None
        bit = np.uint32(1) << self.lane
        if m is None:
            if ((members & bit) == 0).any():
                raise Fault("a thread is not in its own member mask")
            return None
        here = np.repeat(np.where(m, bit, 0).reshape(-1, 32).sum(1, dtype=np.uint32), 32)
        gone = np.repeat(np.where(self.exited, bit, 0).reshape(-1, 32).sum(1, dtype=np.uint32), 32)
        alone = m & ((members & bit) == 0)
        if alone.any():
            raise Fault("a thread is not in its own member mask", alone.argmax())
        late = m & ((members & ~gone & ~here) != 0)
        return late if late.any() else None

    def _collective(self, pc: int, function: Callable, members: Callable) -> Callable:
        """Of threads that must execute an instruction together: those who are too early wait."""

        def run(R, m):
            late = self._late(m, members(R))
            if late is None:
                return function(R, m)
            go = (self.all if m is None else m) & ~late
            self.parked[pc] = self.parked.get(pc, False) | late
            if not go.any():
                return []
            function(R, go)
            return [(pc + 1, go)]

        return run

    def _complete(self, name: int) -> list[tuple[int, np.ndarray]]:
        """Those who go on, if all have come to a barrier."""
        barrier = self.barriers[name]
        arrived = sum(int(mask.sum()) for mask, _ in barrier.waiting.values())
        if arrived < (int((~self.exited).sum()) if barrier.count is None else barrier.count):
            return []
        del self.barriers[name]
        together, waiting = np.zeros((2, self.n), bool)
        for (_, arrives), (mask, _) in barrier.waiting.items():
            together |= mask
            waiting |= mask & (not arrives)
        self.order.meet(*(np.unique(np.flatnonzero(x) // 32) for x in (together, waiting)))
        for mask, finish in barrier.waiting.values():
            if finish is not None:
                finish(together, mask)
        return [
            (pc + 1, mask) for (pc, arrives), (mask, _) in barrier.waiting.items() if not arrives
        ]

    # -- Decoding

    def _decode(self, pc: int, i: Instruction) -> Callable:
        try:
            base = i.parts[0]
            decode = getattr(self, f"_op_{base}", None)
            if decode is not None:
                run = decode(pc, i)
            elif base in IGNORED:
                run = lambda R, m: None  # noqa: E731
            else:
                run = self._elementwise(i)
        except (PtxError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise PtxError(
                f"{self.kernel.name}, line {i.line}: cannot decode `{i.text}`: {error}"
            ) from error
        if i.guard is None:
            return run
        guard = self._get(i.guard, "pred")

        def guarded(R, m):
            taken = guard(R) if m is None else guard(R) & m
            count = np.count_nonzero(taken)
            if count == 0:
                return None
            moved = run(R, None if count == self.n else taken)
            if moved is not None and count < self.n:
                rest = ~taken if m is None else m & ~taken
                if rest.any():
                    moved = [*moved, (pc + 1, rest)]
            return moved

        return guarded

    def _elementwise(self, i: Instruction) -> Callable:
        found = elementwise(i.parts)
        if found is None:
            raise PtxError(f"{i.opcode} is not implemented")
        function, result, kinds = found
        target, *sources = i.operands
        second = None
        if isinstance(target, Pair):
            target, second = target.first, target.second
        put = self._put(target, result)
        gets = [self._get(x, k) for x, k in zip(sources, kinds, strict=True)]
        if second is not None:
            raise PtxError("two results are not implemented")
        if len(gets) == 1:
            (a,) = gets
            return lambda R, m: put(R, function(a(R)), m)
        if len(gets) == 2:
            a, b = gets
            return lambda R, m: put(R, function(a(R), b(R)), m)
        if len(gets) == 3:
            a, b, c = gets
            return lambda R, m: put(R, function(a(R), b(R), c(R)), m)
        return lambda R, m: put(R, function(*(g(R) for g in gets)), m)

    def _op_cvt(self, pc, i):
        function, result, kinds = conversion(i.parts)
        put = self._put(i.operands[0], result)
        gets = [self._get(x, k) for x, k in zip(i.operands[1:], kinds, strict=True)]
        return lambda R, m: put(R, function(*(g(R) for g in gets)), m)

    def _op_mov(self, pc, i):
        kind, (target, source) = i.parts[-1], i.operands
        if isinstance(source, Vector):
            width = WIDTHS[kind] // len(source.items)
            gets = [self._get(x, f"b{width}") for x in source.items]
            put, dtype = self._put(target, kind), DTYPES[kind]

            def pack(R, m):
                parts = np.stack([g(R) for g in gets], 1)
                put(R, np.ascontiguousarray(parts).view(dtype)[:, 0], m)

            return pack
        if isinstance(target, Vector):
            width = WIDTHS[kind] // len(target.items)
            puts = [self._put(x, f"b{width}") for x in target.items]
            get, dtype = self._get(source, kind), f"u{width // 8}"

            def unpack(R, m):
                parts = get(R).view(dtype).reshape(self.n, -1)
                for j, put in enumerate(puts):
                    put(R, parts[:, j].copy(), m)

            return unpack
        get, put = self._get(source, kind), self._put(target, kind)
        return lambda R, m: put(R, get(R), m)

    def _op_cvta(self, pc, i):
        kind = i.parts[-1]
        get, put = self._get(i.operands[1], kind), self._put(i.operands[0], kind)
        shift = (SHARED if "shared" in i.opcode else 0) * (-1 if "to" in i.parts else 1)
        return lambda R, m: put(R, (get(R).astype(np.int64) + shift).astype(DTYPES[kind]), m)

    def _op_isspacep(self, pc, i):
        get, put = self._get(i.operands[1], "u64"), self._put(i.operands[0], "pred")
        which = ("global", "shared", "local").index(i.parts[1].split("::")[0]) + 1
        return lambda R, m: put(R, np.digitize(get(R), [GLOBAL, SHARED, LOCAL]) == which, m)

    def _op_mapa(self, pc, i):  # a cluster has one block
        get, put = self._get(i.operands[1], i.parts[-1]), self._put(i.operands[0], i.parts[-1])
        return lambda R, m: put(R, get(R), m)

    def _op_createpolicy(self, pc, i):
        put = self._put(i.operands[0], "b64")
        return lambda R, m: put(R, self._constant(0, "b64"), m)

    def _op_setp(self, pc, i):
        kind, name = i.parts[-1], i.parts[1]
        compare = comparison(name, kind)
        target, *sources = i.operands
        a, b = (self._get(x, kind) for x in sources[:2])
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        join = combine.get(i.parts[2])
        other = self._get(sources[2], "pred") if join else None
        targets = (target.first, target.second) if isinstance(target, Pair) else (target,)
        puts = [self._put(x, "pred") for x in targets]

        def run(R, m):
            found = compare(a(R), b(R))
            if kind.endswith("x2"):  # a result for each half
                results = found[::2].copy(), found[1::2].copy()
            else:
                results = found, ~found
            for put, result in zip(puts, results, strict=False):
                put(R, join(result, other(R)) if join else result, m)

        return run

    def _op_set(self, pc, i):
        target, source = i.parts[-2:]
        compare = comparison(i.parts[1], source)
        a, b = (self._get(x, source) for x in i.operands[1:])
        put = self._put(i.operands[0], target)
        if target in HALVES:
            return lambda R, m: put(R, to_halves(compare(a(R), b(R)).astype(np.float64), target), m)
        yes = np.array(1 if "f" in target else -1).astype(DTYPES[target])
        return lambda R, m: put(R, np.where(compare(a(R), b(R)), yes, yes.dtype.type(0)), m)

    # -- Control

    def _op_bra(self, pc, i):
        target = self.kernel.labels[i.operands[0].name]
        return lambda R, m: [(target, m)]

    def _op_brx(self, pc, i):
        index = self._get(i.operands[0], "u32")
        targets = [self.kernel.labels[x] for x in self.kernel.tables[i.operands[1].name]]

        def run(R, m):
            at, mask = index(R), self.all if m is None else m
            return [
                (t, mask & (at == j)) for j, t in enumerate(targets) if (mask & (at == j)).any()
            ]

        return run

    def _op_ret(self, pc, i):
        def run(R, m):
            self.exited = self.exited | (self.all if m is None else m)
            return []

        return run

    _op_exit = _op_ret

    def _op_trap(self, pc, i):
        def run(R, m):
            raise Fault("trap", self._active(m)[0])

        return run

    _op_brkpt = _op_trap

    def _op_call(self, pc, i):
        names = [x.name for x in i.operands if isinstance(x, Symbol)]
        arguments = [x for x in i.operands if isinstance(x, tuple)]

        def run(R, m):
            if names != ["__assertfail"]:
                raise Fault(f"{names[0]} is not implemented")
            thread = self._active(m)[0]
            at = int(R[arguments[0][0].index].view(np.uint64)[thread]) - GLOBAL
            message = bytes(self.memory.bytes[at : at + 500]).split(b"\0")[0].decode()
            raise Fault(f"assertion: {message}", thread)

        return run

    # -- Barriers and warps

    def _op_bar(self, pc, i):
        parts = [p for p in i.parts if p != "cta"]
        aligned = parts[0] == "bar" or "aligned" in parts
        if parts[1] == "warp":
            members = self._get(i.operands[0], "b32")
            return self._collective(pc, lambda R, m: None, members)
        operands, finish, arrives = list(i.operands), None, parts[1] == "arrive"
        if parts[1] == "cluster":
            raise PtxError("clusters are not implemented")
        if parts[1] == "red":
            target, value = operands.pop(0), operands.pop()
            get, put = self._get(value, "pred"), self._put(target, parts[-1])

            def finish(together, mask):
                R = self.registers
                found = get(R) & together
                result = {"popc": lambda: found.sum(), "or": lambda: found.any(),
                          "and": lambda: found[together].all()}[parts[2]]()  # fmt: skip
                put(R, np.full(self.n, result).astype(DTYPES[parts[-1]]), mask)

        name = self._get(operands[0], "u32")
        count = self._get(operands[1], "u32") if len(operands) > 1 else None

        def run(R, m):
            mask = self.all if m is None else m
            if aligned:
                whole = mask.reshape(-1, 32) | ~self.born.reshape(-1, 32)
                partial = np.repeat(whole.any(1) & ~whole.all(1), 32) & mask
                if partial.any():
                    self.parked[pc] = self.parked.get(pc, False) | partial
                    mask = mask & ~partial
            moved, names = [], name(R)
            for key in np.unique(names[mask]).tolist():
                group = mask & (names == key)
                wanted = None if count is None else int(count(R)[group.argmax()])
                barrier = self.barriers.setdefault(key, Barrier(wanted))
                if barrier.count != wanted or (
                    wanted is None and any(p != pc for p, _ in barrier.waiting)
                ):
                    raise Fault("divergent barrier: others wait elsewhere", group.argmax())
                before = barrier.waiting.get((pc, arrives), (False,))[0]
                barrier.waiting[pc, arrives] = before | group, finish
                moved += self._complete(key)
            if arrives and mask.any():
                moved.append((pc + 1, mask))
            return moved

        return run

    _op_barrier = _op_bar

    def _op_shfl(self, pc, i):
        mode = i.parts[2]
        target, a, b, c, members = i.operands
        puts = [self._put(target.first, "b32"), self._put(target.second, "pred")] if isinstance(
            target, Pair) else [self._put(target, "b32")]  # fmt: skip
        value, b, c, members = (self._get(x, "b32") for x in (a, b, c, members))
        lane = self.lane.astype(np.int64)
        warp = self.threads - lane

        def run(R, m):
            by, clamp = (b(R) & 31).astype(np.int64), c(R).astype(np.int64)
            segment = clamp >> 8 & 31
            last = (lane & segment) | (clamp & 31 & ~segment)
            source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by,
                      "idx": (lane & segment) | (by & ~segment)}[mode]  # fmt: skip
            inside = source >= last if mode == "up" else source <= last
            source = warp + np.where(inside, source, lane)
            if m is not None and not m[source][m].all():
                raise Fault("shfl reads a thread that does not take part",
                            (m & ~m[source]).argmax())  # fmt: skip
            results = value(R)[source], inside
            for put, result in zip(puts, results, strict=False):
                put(R, result, m)

        return self._collective(pc, run, members)

    def _groups(self, m, members: np.ndarray):
        """Lists of threads that take part together."""
        mask = self.all if m is None else m
        key = np.where(mask, (self.threads // 32) << 32 | members.astype(np.int64), -1)
        for k in np.unique(key[mask]):
            yield np.flatnonzero(key == k)

    def _by_group(self, pc, i, source_kind: str, result_kind: str, function: Callable) -> Callable:
        """A warp-wide instruction: ``function`` of the values of a group and their lanes."""
        target, source, *_, members = i.operands
        second = target.second if isinstance(target, Pair) else None
        target = target.first if isinstance(target, Pair) else target
        put = self._put(target, result_kind)
        put_second = self._put(second, "pred") if second is not None else None
        get, members = self._get(source, source_kind), self._get(members, "b32")

        def run(R, m):
            values, result = get(R), np.zeros(self.n, DTYPES[result_kind])
            flags = np.zeros(self.n, bool)
            for group in self._groups(m, members(R)):
                found = function(values[group], self.lane[group])
                found, flags[group] = found if isinstance(found, tuple) else (found, False)
                result[group] = found
            put(R, result, m)
            if put_second is not None:
                put_second(R, flags, m)

        return self._collective(pc, run, members)

    def _op_vote(self, pc, i):
        mode = i.parts[2]
        function = {
            "all": lambda v, _: v.all(), "any": lambda v, _: v.any(),
            "uni": lambda v, _: v.all() or not v.any(),
            "ballot": lambda v, lane: (np.uint32(1) << lane[v]).sum(dtype=np.uint32),
        }[mode]  # fmt: skip
        return self._by_group(pc, i, "pred", "b32" if mode == "ballot" else "pred", function)

    def _op_redux(self, pc, i):
        reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
                  "or": np.bitwise_or, "xor": np.bitwise_xor}[i.parts[2]]  # fmt: skip
        kind = i.parts[-1]
        if kind not in ("u32", "s32", "b32"):
            raise PtxError(f"{i.opcode} is not implemented")
        return self._by_group(pc, i, kind, kind, lambda v, _: reduce.reduce(v, dtype=v.dtype))

    def _op_match(self, pc, i):
        def anyone(v, lane):
            same = v[:, None] == v
            return (same * (np.uint32(1) << lane)).sum(1, dtype=np.uint32)

        def everyone(v, lane):
            same = bool((v == v[0]).all())
            return (np.uint32(1) << lane).sum(dtype=np.uint32) if same else np.uint32(0), same

        return self._by_group(
            pc, i, i.parts[-1], "b32", {"any": anyone, "all": everyone}[i.parts[1]]
        )

    def _op_activemask(self, pc, i):
        put = self._put(i.operands[0], "b32")

        def run(R, m):
            bits = np.where(self.all if m is None else m, np.uint32(1) << self.lane, 0)
            warps = bits.reshape(-1, 32).sum(1, dtype=np.uint32)
            put(R, np.repeat(warps, 32), m)

        return run

    def _op_elect(self, pc, i):
        target, members = i.operands
        put, flag = self._put(target.first, "b32"), self._put(target.second, "pred")
        members = self._get(members, "b32")

        def run(R, m):
            leader, chosen = np.zeros(self.n, np.uint32), np.zeros(self.n, bool)
            for group in self._groups(m, members(R)):
                leader[group], chosen[group[0]] = self.lane[group[0]], True
            put(R, leader, m)
            flag(R, chosen, m)

        return self._collective(pc, run, members)

    # -- Loads, stores, atomics

    @staticmethod
    def _space(parts: list[str]) -> str:
        for part in parts[1:]:
            space = part.split("::")[0]
            if space in ("global", "shared", "local", "param"):
                return space
            if space == "const":
                return "global"
        return "generic"

    def _op_ld(self, pc, i):
        space, kind = self._space(i.parts), i.parts[-1]
        target, address = i.operands[:2]
        targets = target.items if isinstance(target, Vector) else (target,)
        puts = [self._put(x, kind) for x in targets]
        dtype, count = DTYPES[kind], len(targets)
        if space == "param":
            if isinstance(address.base, Symbol) and address.base.name in self.symbols:
                start = self.symbols[address.base.name] - GLOBAL + address.offset
                size = np.dtype(dtype).itemsize * count
                values = np.frombuffer(self.memory.bytes[start : start + size].tobytes(), dtype)
                full = [np.full(self.n, v, dtype) for v in values]

                def parameter(R, m):
                    for put, value in zip(puts, full, strict=True):
                        put(R, value, m)

                return parameter
            space = "global"
        at = self._address(address)

        def run(R, m):
            threads = self._active(m)
            addresses = at(R) if m is None else at(R)[threads]
            found = self.load(space, addresses, threads, dtype, count)
            for j, put in enumerate(puts):
                value = found[:, j].copy()
                if m is not None:
                    value = np.zeros(self.n, dtype)
                    value[threads] = found[:, j]
                put(R, value, m)

        return run

    _op_ldu = _op_ld

    def _op_st(self, pc, i):
        space, kind = self._space(i.parts), i.parts[-1]
        address, source = i.operands[:2]
        sources = source.items if isinstance(source, Vector) else (source,)
        gets = [self._get(x, kind) for x in sources]
        if space == "param":  # of a call
            put = self._put(address.base, kind)
            return lambda R, m: put(R, gets[0](R), m)
        at = self._address(address)

        def run(R, m):
            threads, addresses = self._active(m), at(R)
            data = np.stack([g(R) for g in gets], 1)
            if m is not None:
                addresses, data = addresses[threads], data[threads]
            self.store(space, addresses, threads, data)

        return run

    def _op_atom(self, pc, i):
        space, kind = self._space(i.parts), i.parts[-1]
        returns = i.parts[0] == "atom"
        put = self._put(i.operands[0], kind) if returns else None
        address, *sources = i.operands[1:] if returns else i.operands
        at = self._address(address)
        dtype = DTYPES[kind]
        size = np.dtype(dtype).itemsize
        one = np.dtype(dtype).type(1)

        def add(old, x):
            if kind in HALVES:
                both = np.array([old]), np.array([x])
                return to_halves(halves(both[0], kind) + halves(both[1], kind), kind)[0]
            return old + x

        operations = {
            "add": add, "min": min, "max": max, "and": lambda o, x: o & x, "or": lambda o, x: o | x,
            "xor": lambda o, x: o ^ x, "exch": lambda o, x: x,
            "inc": lambda o, x: o * 0 if o >= x else o + one,
            "dec": lambda o, x: x if o == 0 or o > x else o - one,
            "cas": lambda o, x, y: y if o == x else o,
        }  # fmt: skip
        (name,) = (p for p in i.parts if p in operations)
        combine = operations[name]
        gets = [self._get(x, kind) for x in sources[: 2 if name == "cas" else 1]]

        def run(R, m):
            threads = self._active(m)
            addresses, values = at(R)[threads], [g(R) for g in gets]
            olds = np.zeros(self.n, dtype)
            for where, memory, offsets, part in self._locate(space, addresses, threads, size):
                if where == "shared":
                    flags = self.state[offsets[:, None]]
                    self._check_written(flags, size, offsets, threads[part])
                else:
                    self._count_global(offsets, threads[part], size)
                    self.bytes_read += size * len(offsets)
                    self.bytes_written += size * len(offsets)
                cells = memory.view(dtype)
                for thread, offset in zip(threads[part], offsets // size, strict=True):
                    olds[thread] = cells[offset]
                    cells[offset] = combine(cells[offset], *(v[thread] for v in values))
            if put is not None:
                put(R, olds, m)

        return run

    _op_red = _op_atom

    # -- Asynchronous copies

    def _op_cp(self, pc, i):
        parts = i.parts
        if parts[1] != "async":
            raise PtxError(f"{i.opcode} is not implemented")
        if parts[2] == "bulk":
            return self._bulk(pc, i)
        if parts[2] == "commit_group":

            def commit(R, m):
                self.committed[self._active(m)] += 1

            return commit
        if parts[2] in ("wait_group", "wait_all"):
            kept = 0 if parts[2] == "wait_all" else int(i.operands[0].text)

            def wait(R, m):
                if parts[2] == "wait_all":
                    self.committed[self._active(m)] += 1
                self._land(m, self.committed - kept)

            return wait
        if parts[2] == "mbarrier":
            at, counted = self._address(i.operands[0]), "noinc" not in parts

            def arrive(R, m):
                threads = self._active(m)
                mine, self.flights = self.flights, []
                taken = []
                for flight in mine:
                    inside = np.isin(flight.threads, threads)
                    for part, into in ((inside, taken), (~inside, self.flights)):
                        if part.any():
                            into.append(Flight(*(getattr(flight, n)[part] for n in (
                                "threads", "offsets", "data", "group"))))  # fmt: skip
                addresses = (at(R)[threads] % SHARED).tolist()
                for address in addresses:
                    barrier = self._mbarrier(address)
                    barrier.pending += counted
                    self.events.setdefault(address, []).append(
                        lambda a=address, t=threads[0]: self._arrive(a, 1, thread=t)
                    )
                    self.progress += 1
                for flight in taken:
                    self.events[addresses[0]].insert(0, lambda f=flight: self._arrived(f))

            return arrive
        destination, source = (self._address(x) for x in i.operands[:2])
        size = int(i.operands[2].text, 0)
        given = i.operands[3] if len(i.operands) > 3 else None
        if isinstance(given, Register) and given.width == 1:
            ignore = self._get(given, "pred")
            length = lambda R: np.where(ignore(R), 0, size)  # noqa: E731
        elif given is not None and "cache_hint" not in i.opcode or len(i.operands) > 4:
            length = self._get(given, "u32")
        else:
            length = None

        def copy(R, m):
            threads = self._active(m)
            to, of = destination(R)[threads], source(R)[threads]
            data = np.zeros((len(threads), size), np.uint8)
            lengths = np.full(len(threads), size) if length is None else length(R)[threads]
            if (lengths > size).any():
                raise Fault("src-size is above cp-size", threads[(lengths > size).argmax()])
            for amount in np.unique(lengths).tolist():
                if amount:
                    part = lengths == amount
                    data[part, :amount] = self.load("global", of[part], threads[part], np.uint8,
                                                    amount, align=size)  # fmt: skip
            ((_, _, offsets, _),) = self._locate("shared", to, threads, size)
            self._check_state(offsets, size, threads, write=True)
            self._count_shared(offsets, threads, size)
            self._mark(offsets, size, IN_FLIGHT)
            self.flights.append(Flight(threads, offsets, data, self.committed[threads]))

        return copy

    def _arrived(self, flight: Flight) -> None:
        width = flight.data.shape[1]
        self.order.access(flight.offsets, width, flight.threads, True)
        self.shared[flight.offsets[:, None] + np.arange(width)] = flight.data
        if flight.generic:
            self._mark_stored(flight.offsets, width, flight.threads)
        else:
            self._mark(flight.offsets, width, WRITTEN)

    def _land(self, m, limit: np.ndarray) -> None:
        """What the threads of the mask copied in groups below ``limit`` arrives."""
        mask, kept = self.all if m is None else m, []
        for flight in self.flights:
            done = mask[flight.threads] & (flight.group < limit[flight.threads])
            for part, arrives in ((done, True), (~done, False)):
                if part.any():
                    piece = Flight(flight.threads[part], flight.offsets[part], flight.data[part],
                                   flight.group[part])  # fmt: skip
                    if arrives:
                        self._arrived(piece)
                    else:
                        kept.append(piece)
        self.flights = kept

    def _bulk(self, pc, i):
        if "commit_group" in i.parts or "wait_group" in i.parts:
            return lambda R, m: None  # out of shared memory nothing waits
        if "tensor" in i.parts or "prefetch" in i.parts:
            raise PtxError(f"{i.opcode} is not implemented")
        destination, source = (self._address(x) for x in i.operands[:2])
        size = self._get(i.operands[2], "u32")
        inwards = i.parts[3].startswith("shared")
        barrier = self._address(i.operands[3]) if inwards else None

        def run(R, m):
            for thread in self._active(m):
                one, amount = np.array([thread]), int(size(R)[thread])
                to, of = destination(R)[one], source(R)[one]
                if amount % 16 or (to % 16).any() or (of % 16).any():
                    raise Fault("misaligned: a bulk copy is of 16-byte units", thread)
                steps = np.arange(0, amount, 16)
                who = np.full(len(steps), thread)
                data = self.load("global" if inwards else "shared", of + steps, who, np.uint64, 2)
                if not inwards:
                    self._check_fenced((of + steps)[:, None] % SHARED + np.arange(16), who)
                    self.store("global", to + steps, who, data)
                    continue
                offsets = np.concatenate([
                    o for _, _, o, _ in self._locate("shared", to + steps, who, 16)])  # fmt: skip
                self._check_state(offsets, 16, who, write=True)
                self._mark(offsets, 16, IN_FLIGHT)
                at = int(barrier(R)[thread]) % SHARED
                self._mbarrier(at)
                flight = Flight(who, offsets, data.view(np.uint8), who, generic=False)

                def land(flight=flight, at=at, amount=amount):
                    self._arrived(flight)
                    self._arrive(at, 0, -amount, thread=flight.threads[0])

                self.events.setdefault(at, []).append(land)
                self.progress += 1

        return run

    # -- mbarriers

    def _mbarrier(self, at: int) -> Mbarrier:
        if at not in self.mbarriers:
            raise Fault(f"no mbarrier was initialised at shared address {at}")
        return self.mbarriers[at]

    def _arrive(self, at: int, count: int, more: int = 0, *, thread: int) -> None:
        barrier = self._mbarrier(at)
        self.order.tell(thread // 32, barrier.known)
        barrier.pending -= count
        barrier.bytes += more
        self.progress += 1
        if barrier.pending < 0:
            raise Fault("more arrivals than the mbarrier expects")
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected

    def _op_mbarrier(self, pc, i):
        what = i.parts[1]
        if what in ("test_wait", "try_wait"):
            return self._mbarrier_wait(pc, i)
        operands = list(i.operands)
        put = None
        if what.startswith("arrive") and not isinstance(operands[0], Address):
            put = self._put(operands.pop(0), "b64")
        at = self._address(operands[0])
        count = self._get(operands[1], "u32") if len(operands) > 1 else None

        def run(R, m):
            tokens = np.zeros(self.n, np.uint64)
            for thread in self._active(m):
                address = int(at(R)[thread])
                address = address - SHARED if address >= SHARED else address
                amount = 1 if count is None else int(count(R)[thread])
                if what == "init":
                    offsets = np.array([address])
                    ((_, _, offsets, _),) = self._locate("shared", offsets, [thread], 8)
                    known = np.zeros(self.n // 32, np.int64)
                    self.mbarriers[address] = Mbarrier(amount, amount, known)
                    continue
                tokens[thread] = self._mbarrier(address).phase
                if what == "inval":
                    del self.mbarriers[address]
                elif what == "expect_tx":
                    self._arrive(address, 0, amount, thread=thread)
                elif what == "complete_tx":
                    self._arrive(address, 0, -amount, thread=thread)
                elif what == "arrive" and "expect_tx" in i.parts:
                    self._mbarrier(address).bytes += amount
                    self._arrive(address, 1, thread=thread)
                elif what == "arrive":
                    self._arrive(address, amount, thread=thread)
                else:
                    raise Fault(f"{i.opcode} is not implemented")
            if put is not None:
                put(R, tokens, m)

        return run

    def _mbarrier_wait(self, pc, i):
        """Never false: those whose phase is not over sleep until something arrives."""
        put, at = self._put(i.operands[0], "pred"), self._address(i.operands[1])
        parity = "parity" in i.parts
        get = self._get(i.operands[2], "u32" if parity else "b64")

        def run(R, m):
            mask, addresses, wanted = self.all if m is None else m, at(R) % SHARED, get(R)
            over = np.zeros(self.n, bool)
            for address in np.unique(addresses[mask]).tolist():
                for event in self.events.pop(address, ()):
                    event()
                phase = self._mbarrier(address).phase
                here = mask & (addresses == address)
                now = here & ((wanted & 1) != phase % 2 if parity else wanted < phase)
                for warp in np.unique(np.flatnonzero(now) // 32):
                    clock = self.order.clock[warp]
                    np.maximum(clock, self._mbarrier(address).known, out=clock)
                over |= now
            put(R, over, over)
            rest = mask & ~over
            if not rest.any():
                return None
            before = self.asleep.get(pc, (np.zeros(self.n, bool),))[0]
            self.asleep[pc] = before | rest, self.progress
            return [(pc + 1, over)] if over.any() else []

        return run

    # -- Matrices

    def _aligned(self, pc: int, function: Callable) -> Callable:
        return self._collective(pc, function, lambda R: self.everyone)

    def _op_mma(self, pc, i):
        shape, kinds = next(p for p in i.parts if p.startswith("m16n8k")), i.parts[-4:]
        if "row" not in i.parts or "sp" in i.parts or kinds[1] not in matrix.SIZES:
            raise PtxError(f"{i.opcode} is not implemented")
        d, a, b, c = (x.items for x in i.operands[:4])
        depth = len(b) * 16 // matrix.SIZES[kinds[2]]
        if int(shape[6:]) != depth or len(a) != 2 * len(b):
            raise PtxError(f"{shape} with {len(a)} registers of A and {len(b)} of B")
        gets = [[self._get(x, "b32") for x in y] for y in (a, b, c)]
        result = {"f16": "b32"}.get(kinds[0], kinds[0])
        puts = [self._put(x, result) for x in d]

        def run(R, m):
            operands = (np.stack([g(R) for g in y]) for y in gets)
            for put, value in zip(puts, matrix.mma(*operands, kinds), strict=True):
                put(R, value, m)

        return self._aligned(pc, run)

    def _matrix_rows(self, i, address, m, R):
        """Addresses of rows by thread, counted: 8 rows a phase."""
        count = {"x1": 1, "x2": 2, "x4": 4}[next(p for p in i.parts if p in ("x1", "x2", "x4"))]
        used = (self.lane < 8 * count) & (self.all if m is None else m)
        rows, threads = address(R), np.flatnonzero(used)
        ((_, _, offsets, _),) = self._locate("shared", rows[threads], threads, 16)
        self._count_shared(offsets, threads, 16)
        rows = np.zeros(self.n, np.int64)
        rows[threads] = offsets
        return rows, count, threads

    def _op_ldmatrix(self, pc, i):
        targets = i.operands[0].items
        puts, address = [self._put(x, "b32") for x in targets], self._address(i.operands[1])
        transposed = "trans" in i.parts
        if "m8n8" not in i.parts:
            raise PtxError(f"{i.opcode} is not implemented")
        size = 2 if transposed else 4

        def run(R, m):
            rows, count, threads = self._matrix_rows(i, address, m, R)
            self._check_state(rows[threads], 16, threads)
            cells = self.shared.view(f"u{size}")
            for put, at in zip(puts, matrix.matrix_addresses(rows, count, transposed), strict=True):
                found = np.stack([cells[x // size] for x in at], 1)
                put(R, np.ascontiguousarray(found).view(np.uint32)[:, 0], m)

        return self._aligned(pc, run)

    def _op_stmatrix(self, pc, i):
        address, sources = self._address(i.operands[0]), i.operands[1].items
        gets, transposed = [self._get(x, "b32") for x in sources], "trans" in i.parts
        if "m8n8" not in i.parts:
            raise PtxError(f"{i.opcode} is not implemented")
        size = 2 if transposed else 4

        def run(R, m):
            rows, count, threads = self._matrix_rows(i, address, m, R)
            self._check_state(rows[threads], 16, threads, write=True)
            self._mark_stored(rows[threads], 16, threads)
            cells, mask = self.shared.view(f"u{size}"), self.all if m is None else m
            for get, at in zip(gets, matrix.matrix_addresses(rows, count, transposed), strict=True):
                parts = get(R).view(f"u{size}").reshape(self.n, -1)
                for j, x in enumerate(at):
                    cells[x[mask] // size] = parts[mask, j]

        return self._aligned(pc, run)

    def _op_movmatrix(self, pc, i):
        put, get = self._put(i.operands[0], "b32"), self._get(i.operands[1], "b32")
        return self._aligned(pc, lambda R, m: put(R, matrix.transpose_fragment(get(R)), m))

    def _op_wgmma(self, pc, i):
        """Computed where it is issued; until it is waited for, its registers hold NaN and what it
        reads of shared memory may not be written. It may read what stores and cp.async wrote once
        a fence followed."""
        if i.parts[1] == "fence":
            return lambda R, m: None
        if i.parts[1] == "commit_group":

            def commit(R, m):
                self.product_group[self._active(m)] += 1

            return commit
        if i.parts[1] == "wait_group":
            left = int(i.operands[0].text)
            return lambda R, m: self._finish(R, m, left)
        shape, kinds = next(p for p in i.parts if p.startswith("m64n")), i.parts[-3:]
        columns, depth = (int(x) for x in shape[4:].split("k"))
        size = matrix.SIZES[kinds[1]]
        if "sp" in i.parts or depth * size != 32 or kinds[0] not in ("f32", "s32"):
            raise PtxError(f"{i.opcode} is not implemented")
        target, a, b, scale, *flags = i.operands
        puts = [self._put(x, kinds[0]) for x in target.items]
        in_registers = isinstance(a, Vector)
        get_a = [self._get(x, "b32") for x in a.items] if in_registers else self._get(a, "b64")
        get_b, scale_d = self._get(b, "b64"), self._get(scale, "pred")
        flags = [int(x.text) for x in flags]
        signs = flags[:2] or [1, 1]
        transposed = flags[2:] or [0, 0]
        transposed = [0, *transposed] if len(transposed) == 1 else transposed

        def operand(descriptors, extent, mn_major, kind):
            found = []
            for group, descriptor in enumerate(descriptors.tolist()):
                at = matrix.descriptor_addresses(descriptor, extent, depth, size, mn_major)
                flat = at.reshape(-1)
                who = np.full(len(flat), self._active(self.mask)[128 * group])
                ((_, _, offsets, _),) = self._locate("shared", flat, who, size)
                self._check_written(self.state[offsets[:, None]], size, offsets, who)
                self._check_fenced(offsets, who)
                words = np.unique(offsets & ~3)
                for warp in range(4):  # until it is waited for, nobody may write: see Product
                    reader = np.full(len(words), who[0] // 128 * 128 + 32 * warp)
                    self.order.access(words, 4, reader, write=False, remember=False)
                self.reads[group].append(offsets)
                bits = self.shared.view(f"u{size}")[offsets // size]
                found.append(matrix.numbers(bits, kind).reshape(at.shape))
            return np.stack(found)

        def run(R, m):
            self.mask, threads = m, self._active(m)
            if len(threads) % 128 or (threads[::128] % 128 != 0).any():
                raise Fault("divergence: not all of a warpgroup", threads[0])
            self.reads: list[list[np.ndarray]] = [[] for _ in threads[::128]]
            kept, old = scale_d(R)[threads[::32], None, None], 0
            if kept.any():  # else the accumulators need not have been written
                old = np.stack([self._accumulator(R, x.index, threads) for x in target.items])
                old = matrix.fragment_c(matrix.unpack_c(old, kinds[0])).astype(np.float64)
                old = np.where(kept, old, 0)
            if in_registers:
                left = matrix.fragment_a(np.stack([g(R)[threads] for g in get_a]), kinds[1])
                left = left.reshape(-1, 64, depth)
            else:
                left = operand(get_a(R)[threads[::128]], 64, bool(transposed[0]), kinds[1])
            right = operand(get_b(R)[threads[::128]], columns, bool(transposed[1]), kinds[2])
            product = left * signs[0] @ (right * signs[1]).transpose(0, 2, 1)
            total = matrix.scatter_c(product.reshape(-1, 16, columns) + old)
            for put in puts:
                put(R, self._constant(int(POISON[32]), "b32"), m)
            registers = [x.index for x in target.items]
            packed = matrix.pack_c(total, kinds[0])
            for group, reads in enumerate(self.reads):
                these = slice(128 * group, 128 * group + 128)
                results = {r: x[these] for r, x in zip(registers, packed, strict=True)}
                warpgroup = threads[these]
                for earlier in self.products:
                    if earlier.threads[0] == warpgroup[0]:
                        earlier.results = {
                            r: x for r, x in earlier.results.items() if r not in results
                        }
                reads = np.unique(np.concatenate(reads)[:, None] + np.arange(size))
                self.reading[reads] += 1
                number = int(self.product_group[warpgroup[0]])
                self.products.append(Product(warpgroup, number, results, reads))

        return run

    def _accumulator(self, R, register: int, threads: np.ndarray) -> np.ndarray:
        """A register of wgmma, which may be of one that was not waited for."""
        found = R[register].view(np.uint32)[threads]
        for product in self.products:
            if register in product.results and product.threads[0] in threads:
                at = np.searchsorted(threads, product.threads)
                found[at] = product.results[register].view(np.uint32)
        return found

    def _finish(self, R, m, left: int) -> None:
        mask, kept = self.all if m is None else m, []
        for product in self.products:
            threads = product.threads
            if not mask[threads].all() or product.group >= self.product_group[threads[0]] - left:
                kept.append(product)
                continue
            self.reading[product.reads] -= 1
            for register, value in product.results.items():
                full = R[register].view(np.uint32).copy()
                full[threads] = value.view(np.uint32)
                R[register] = full
        self.products = kept

    def _check_fenced(self, offsets: np.ndarray, threads: np.ndarray) -> None:
        unfenced = self.unfenced[offsets]
        if unfenced.any():
            writer = self._coordinates(unfenced.max() - 1)
            raise Fault(f"the async proxy reads what thread {writer} stored, with no "
                        "fence.proxy.async after it", threads[0])  # fmt: skip

    def _op_fence(self, pc, i):
        if i.parts[1:3] != ["proxy", "async"]:
            return lambda R, m: None

        def run(R, m):
            mask = np.concatenate([[False], self.all if m is None else m])
            self.unfenced[mask[self.unfenced]] = 0

        return run


# ---- Launching ----------------------------------------------------------------------------------


def launch(text: str, entry: str | None, grid: Sequence[int], block: Sequence[int], args: Sequence,
           shared_bytes: int = 0, names: Sequence[str] | None = None) -> Report:  # fmt: skip
    """Run a kernel. ``args``: arrays are pointers to their first element and are written to;
    numbers are as wide as the parameter; bytes and Structs are structs; None is a null pointer.
    ``names`` are for messages. Raises PtxError."""
    _conflicts.clear()
    _sectors.clear()
    module = parse(text)
    if entry is None:
        (entry,) = module.kernels
    kernel = module.kernels[entry]
    grid, block = ((*x, 1, 1)[:3] for x in (grid, block))
    if len(args) != len(kernel.params):
        raise PtxError(f"{entry} has {len(kernel.params)} parameters, {len(args)} were given")
    names = names or [p.name for p in kernel.params]
    memory = GlobalMemory()
    arrays = {n: a for n, a in zip(names, args, strict=True) if isinstance(a, np.ndarray)}
    for name, value in zip(names, args, strict=True):
        if isinstance(value, Struct):
            arrays |= {f"{name}.{field}": array for field, array in value.pointers.items()}
    placed = memory.place(arrays)
    symbols, parameters = {}, []
    for name, value, param in zip(names, args, kernel.params, strict=True):
        start = memory.reserve(param.name, param.size)
        symbols[param.name] = GLOBAL + start
        if isinstance(value, np.ndarray):
            value = GLOBAL + placed[name]
        elif isinstance(value, Struct):
            value = value.at({f: GLOBAL + placed[f"{name}.{f}"] for f in value.pointers})
        if isinstance(value, bytes) and len(value) != param.size:
            raise PtxError(f"{entry}: {name} is {len(value)} bytes, expected {param.size}")
        parameters.append((start, _bits(value, param.size)))
    variables = [v for v in module.variables if v.space in ("global", "const")]
    for v in variables:
        symbols[v.name] = GLOBAL + memory.reserve(v.name, v.size)
    memory.build()
    for start, data in parameters:
        memory.put(start, data)
    for v in variables:
        memory.put(symbols[v.name] - GLOBAL, v.data.ljust(v.size, b"\0"))
    shared = [*kernel.variables, *(v for v in module.variables if v.space == "shared")]
    machine = Machine(kernel, shared, block, grid, memory, symbols, shared_bytes)
    for z, y, x in itertools.product(*(range(n) for n in reversed(grid))):
        machine.run((x, y, z))
    memory.collect()
    report = Report(machine.lines, machine.bytes_read, machine.bytes_written)
    for line in machine.lines:
        opcode = line.instruction.opcode
        report.opcodes[opcode] = report.opcodes.get(opcode, 0) + line.executed
    return report


def _bits(value, size: int) -> bytes:
    if value is None:
        return bytes(size)
    if isinstance(value, np.generic):
        value = value.tobytes()
    if isinstance(value, bytes):
        return value.ljust(size, b"\0")
    if isinstance(value, float):
        return np.array(value, f"f{size}").tobytes()
    return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
