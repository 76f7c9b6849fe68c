"""Where the elements of matrix instructions are: PTX ISA 9.0, sections 9.7.14 (mma, ldmatrix) and
9.7.15 (wgmma). Registers are arrays [registers, threads]; g is a lane's group of four, t its place
in the group, e how many elements a 32-bit register holds.
"""

from __future__ import annotations

import numpy as np
from arithmetic import from_bf16

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4
SIZES = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp64 of bits in memory."""
    if kind == "bf16":
        found = from_bf16(bits.view(np.uint16))
    elif kind == "tf32":  # the lower bits are not looked at
        found = (bits.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        found = bits.view({"f16": np.float16, "s8": np.int8, "u8": np.uint8}[kind])
    return found.astype(np.float64)


def elements(registers: np.ndarray, kind: str) -> np.ndarray:
    """fp64 [registers, warps, g, t, e] of packed registers."""
    found = numbers(np.ascontiguousarray(registers).view(np.uint32), kind)
    return found.reshape(len(registers), -1, 8, 4, 4 // SIZES[kind])


def fragment_a(registers: np.ndarray, kind: str) -> np.ndarray:
    """[warps, 16, K]: register i holds row g + 8·(i % 2), columns e·t… + 4·e·(i // 2)."""
    x = elements(registers, kind)
    half, warps, e = len(x) // 2, x.shape[1], x.shape[-1]
    x = x.reshape(half, 2, warps, 8, 4, e).transpose(2, 1, 3, 0, 4, 5)
    return x.reshape(warps, 16, half * 4 * e)


def fragment_b(registers: np.ndarray, kind: str) -> np.ndarray:
    """[warps, K, 8]: register i holds rows e·t… + 4·e·i of column g."""
    x = elements(registers, kind)
    warps, e = x.shape[1], x.shape[-1]
    return x.transpose(1, 0, 3, 4, 2).reshape(warps, len(x) * 4 * e, 8)


def fragment_c(registers: np.ndarray) -> np.ndarray:
    """[warps, 16, 8·blocks]: of each four, register i holds row g + 8·(i // 2), column 2·t + i % 2
    of a block of 8 columns."""
    blocks = len(registers) // 4
    x = registers.reshape(blocks, 2, 2, -1, 8, 4)
    return x.transpose(3, 1, 4, 0, 5, 2).reshape(x.shape[3], 16, 8 * blocks)


def scatter_c(matrix: np.ndarray) -> np.ndarray:
    """The inverse of ``fragment_c``."""
    warps, blocks = len(matrix), matrix.shape[-1] // 8
    x = matrix.reshape(warps, 2, 8, blocks, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(x).reshape(blocks * 4, -1)


def unpack_c(registers: np.ndarray, kind: str) -> np.ndarray:
    """C as one number a register; fp16 accumulators are two a register."""
    if kind == "f16":
        pairs = np.ascontiguousarray(registers).view(np.float16).reshape(len(registers), -1, 2)
        return pairs.transpose(0, 2, 1).reshape(2 * len(registers), -1)
    return registers.view(np.int32 if kind == "s32" else np.float32)


def pack_c(numbers: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        pairs = numbers.astype(np.float16).reshape(len(numbers) // 2, 2, -1).transpose(0, 2, 1)
        return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]
    if kind == "s32":
        return numbers.astype(np.int64).astype(np.int32)
    return numbers.astype(np.float32)


def mma(a: np.ndarray, b: np.ndarray, c: np.ndarray, kinds: list[str]) -> np.ndarray:
    """D of registers; ``kinds`` of D, A, B, C. Exact, then rounded once: a GPU cuts off digits of
    each product, which no test may depend on."""
    product = fragment_a(a, kinds[1]) @ fragment_b(b, kinds[2])
    return pack_c(scatter_c(product + fragment_c(unpack_c(c, kinds[3]))), kinds[0])


def matrix_addresses(rows: np.ndarray, count: int, transposed: bool) -> list[list[np.ndarray]]:
    """ldmatrix and stmatrix: for each of ``count`` matrices the addresses of a thread's 32 bits,
    or, transposed, of its two times 16; matrix i has its rows where lanes 8·i… point. ``rows``:
    address of each thread."""
    rows, found = rows.reshape(-1, 32), []
    for i in range(count):
        if transposed:
            at = [rows[:, 8 * i + 2 * T + half] + 2 * G for half in (0, 1)]
        else:
            at = [rows[:, 8 * i + G] + 4 * T]
        found.append([x.reshape(-1) for x in at])
    return found


def transpose_fragment(register: np.ndarray) -> np.ndarray:
    """movmatrix: lane 4·i + j holds elements 2·j, 2·j + 1 of row i."""
    x = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
    return np.ascontiguousarray(x).view(np.uint32).reshape(-1)


def descriptor_addresses(
    descriptor: int, extent: int, depth: int, size: int, mn_major: bool
) -> np.ndarray:
    """Addresses [extent, depth] of a wgmma operand in shared memory, whose elements have ``size``
    bytes. Units are 16 bytes; a swizzled row of 8 has as many bytes as the mode says."""
    start, leading, stride = ((descriptor >> i & 0x3FFF) << 4 for i in (0, 16, 32))
    row = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    mn, k, per = np.arange(extent)[:, None], np.arange(depth)[None, :], 16 // size
    if mn_major:
        unit, inside = mn // per, mn % per * size
        if row == 16:
            at = unit * stride + k % 8 * 16 + k // 8 * leading
        else:
            units = row // 16
            at = unit % units * 16 + unit // units * leading + k % 8 * row + k // 8 * stride
    else:
        unit, inside = k // per, k % per * size
        at = mn % 8 * row + mn // 8 * stride + unit * (leading if row == 16 else 16)
    at = start + at + inside
    return at ^ ((at >> 7 & (row // 16 - 1)) << 4)
