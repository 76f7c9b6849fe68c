"""The instructions that work on each thread alone, as functions of arrays over the threads.

``elementwise(parts)`` gives (function, type of the result, types of the operands). Approximate
instructions (ex2.approx, rcp.approx …) are computed as exactly as their type allows.
"""

from __future__ import annotations

import functools

import numpy as np
from parse import WIDTHS, PtxError

DTYPES = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16,
    "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32,
}  # fmt: skip
for _size in (8, 16, 32, 64):
    DTYPES |= {f"{kind}{_size}": np.dtype(f"u{_size // 8}").type for kind in "bu"}
    DTYPES[f"s{_size}"] = np.dtype(f"i{_size // 8}").type
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
REVERSED = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)
SET_BITS = np.array([bin(i).count("1") for i in range(256)], np.uint8)


# ---- Formats --------------------------------------------------------------------------------


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest even, of fp32 or fp64, as bits."""
    bits = _odd(x).view(np.uint32) if x.dtype == np.float64 else x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _odd(x: np.ndarray) -> np.ndarray:
    """fp64 to fp32 with the last bit set where digits are lost, so that rounding once more rounds
    as if once."""
    near = x.astype(np.float32)
    bits = near.view(np.uint32)
    lost = (near != x) & np.isfinite(near) & (bits & np.uint32(1) == 0)
    step = np.where(np.abs(near.astype(np.float64)) < np.abs(x), np.uint32(1), ~np.uint32(0))
    return np.where(lost, bits + step, bits).view(np.float32)


def to_tf32(x: np.ndarray, away: bool) -> np.ndarray:
    bits = x.view(np.uint32)
    half = (
        np.uint32(0x1000) if away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    )
    return np.where(np.isfinite(x), (bits + half) & np.uint32(0xFFFFE000), bits)


def halves(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp64 numbers of registers with one or two of them; a register's are beside each other."""
    if kind.startswith("bf16"):
        return from_bf16(bits.view(np.uint16)).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def to_halves(x: np.ndarray, kind: str) -> np.ndarray:
    x = to_bf16(x) if kind.startswith("bf16") else x.astype(np.float16)
    return x.view(np.uint32) if kind.endswith("x2") else x


def flush(x: np.ndarray) -> np.ndarray:
    """.ftz: zeros, with their sign, for subnormal fp32."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


# ---- Integers -------------------------------------------------------------------------------


def shl(a, count):
    width = a.dtype.itemsize * 8
    there = count < width
    shift = np.where(there, count, 0).astype(a.dtype)
    return np.where(there, a << shift, a.dtype.type(0))


def shr(a, count):
    width = a.dtype.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(count, width - 1).astype(a.dtype)
    there = count < width
    return np.where(there, a >> np.where(there, count, 0).astype(a.dtype), a.dtype.type(0))


def _divide(a, b):
    """Towards zero; what division by zero gives is left open, and compilers speculate it."""
    divisor = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // divisor
    if a.dtype.kind == "i":
        quotient += ((a % divisor != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)
    return np.where(b == 0, ~b.dtype.type(0), quotient)


def _remainder(a, b):
    return np.where(b == 0, a, a - _divide(a, b) * b)


def _high(a, b):
    """The upper half of a product."""
    size = a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}").type
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    x, y, low = a.view(np.uint64), b.view(np.uint64), np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    cross = (x >> half) * (y & low) + (((x & low) * (y & low)) >> half)
    other = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def _wide(a, b):
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}").type
    return a.astype(wide) * b.astype(wide)


def _ones(count, dtype):
    """That many lower bits set."""
    return ~shl(np.full(count.shape, ~dtype(0), dtype), count)


def _extract(a, position, length):
    width = a.dtype.itemsize * 8
    bits, unsigned = a.view(f"u{a.dtype.itemsize}"), np.dtype(f"u{a.dtype.itemsize}").type
    position, length = position & np.uint32(255), length & np.uint32(255)
    found = shr(bits, position) & _ones(length, unsigned)
    if a.dtype.kind == "i":
        # Bits beyond the field, or beyond the register, are copies of its last one.
        last = np.minimum(position + length - np.uint32(1), np.uint32(width - 1))
        negative = (shr(bits, last) & unsigned(1)).astype(bool) & (length > 0)
        there = np.minimum(length, np.maximum(width - position.astype(np.int64), 0))
        found = np.where(negative, found | ~_ones(there, unsigned), found)
    return found


def _insert(a, b, position, length):
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = shl(_ones(length, a.dtype.type), position)
    return (shl(a, position) & mask) | (b & ~mask)


def _bytes(x):
    return np.ascontiguousarray(x).view(np.uint8).reshape(len(x), x.dtype.itemsize)


def _permute(a, b, selector):
    pool = np.concatenate([_bytes(a), _bytes(b)], 1)
    nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    found = np.take_along_axis(pool, (nibbles & 7).astype(np.int64), 1)
    sign = np.where(found & 0x80, np.uint8(0xFF), np.uint8(0))
    return np.ascontiguousarray(np.where(nibbles & 8, sign, found)).view(np.uint32)[:, 0]


def _logic(a, b, c, table):
    """lop3: the table says for which of the eight combinations a bit is set."""
    table, result = int(table[0]), np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def _funnel(left, wrap):
    def run(low, high, count):
        count = count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        if left:
            return ((both << count.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        return (both >> count.astype(np.uint64)).astype(np.uint32)

    return run


def _popc(a):
    return SET_BITS[_bytes(a)].sum(1, dtype=np.uint32)


def _length(a):
    """Bits up to the highest set one."""
    if a.dtype.itemsize == 8:
        high, low = (a >> np.uint64(32)).astype(np.uint32), a.astype(np.uint32)
        return np.where(high > 0, _length(high) + np.uint32(32), _length(low))
    return np.frexp(a.astype(np.float64))[1].astype(np.uint32)


def _find(a, shift):
    width = a.dtype.itemsize * 8
    bits = a.view(f"u{a.dtype.itemsize}")
    bits = np.where(a < 0, ~bits, bits) if a.dtype.kind == "i" else bits
    at = _length(bits) - np.uint32(1)
    return np.where(bits == 0, ~np.uint32(0), np.uint32(width - 1) - at if shift else at)


def _dot_bytes(kinds):
    def run(a, b, c):
        x, y = (_bytes(v).view("i1" if k == "s32" else "u1").astype(np.int64)
                for v, k in zip((a, b), kinds, strict=True))  # fmt: skip
        return ((x * y).sum(1) + c).astype(c.dtype)

    return run


# ---- Floats ---------------------------------------------------------------------------------


def fma(a, b, c):
    """Rounded once in fp64 (but for ties of the sum); of fp32 rounded from fp64."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    product = a * b
    splits = []
    for x in (a, b):  # Dekker's product: what rounding it loses
        t = x * 134217729.0
        high = t - (t - x)
        splits.append((high, x - high))
    (ah, al), (bh, bl) = splits
    lost = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    total = product + c
    back = total - product
    lost += (product - (total - back)) + (c - back)
    return np.where(np.isfinite(lost), total + lost, total)


def _high_word(f):
    """rcp.approx.ftz.f64 and its like give 20 bits of mantissa."""
    return lambda x: (f(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _copysign(a, b):
    return np.copysign(b, a)


def _classify(what):
    return {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
    }[what]  # fmt: skip


FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": fma, "mad": fma,
    "min": np.fmin, "max": np.fmax, "abs": np.abs, "neg": np.negative, "sqrt": np.sqrt,
    "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "copysign": _copysign,
}  # fmt: skip
INTEGERS = {
    "add": np.add, "sub": np.subtract, "div": _divide, "rem": _remainder, "min": np.minimum,
    "max": np.maximum, "abs": np.abs, "neg": np.negative,
}  # fmt: skip
BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
ARITY = {"abs": 1, "neg": 1, "not": 1, "sqrt": 1, "rcp": 1, "rsqrt": 1, "ex2": 1, "lg2": 1,
         "sin": 1, "cos": 1, "tanh": 1, "fma": 3, "mad": 3}  # fmt: skip
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal, "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
# Unordered: also true where either is NaN.
for _name, _opposite in (("equ", "ne"), ("neu", "eq"), ("ltu", "ge"), ("leu", "gt"), ("gtu", "le"),
                         ("geu", "lt")):  # fmt: skip
    COMPARISONS[_name] = {
        "ne": lambda a, b: (a == b) | np.isnan(a) | np.isnan(b),
        "eq": lambda a, b: a != b,
    }.get(_opposite) or (lambda a, b, f=COMPARISONS[_opposite]: ~f(a, b))
KNOWN = {"rn", "approx", "full", "ftz", "sat", "lo", "hi", "wide", "relu", "NaN"}


def comparison(name: str, kind: str):
    """Of operands of a type. PTX's ``ne`` is false for NaN, numpy's is true."""
    compare = COMPARISONS[name]
    if name == "ne" and "f" in kind:
        compare = lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)  # noqa: E731
    if kind in HALVES:
        return lambda a, b: compare(halves(a, kind), halves(b, kind))
    return compare


def _floating(base: str, modifiers: set[str], kind: str):
    function = FLOATS[base]
    if "NaN" in modifiers:
        function = {"min": np.minimum, "max": np.maximum}[base]
    if kind == "f64" and base in ("rcp", "rsqrt") and "approx" in modifiers:
        function = _high_word(function)
    if base in ("abs", "neg", "copysign") and kind in HALVES:  # of bits, NaN or not
        sign = np.uint16(0x8000)
        return {
            "abs": lambda a: (a.view(np.uint16) & ~sign).view(a.dtype),
            "neg": lambda a: (a.view(np.uint16) ^ sign).view(a.dtype),
        }[base]
    steps = [function]
    if "relu" in modifiers:
        steps.append(lambda x: np.where(x < 0, x.dtype.type(0), x))
    if "sat" in modifiers:
        steps.append(lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype))

    def plain(*operands):
        for step in steps:
            operands = (step(*operands),)
        return operands[0]

    if kind in HALVES:
        return lambda *x: to_halves(plain(*(halves(v, kind) for v in x)), kind)
    if "ftz" in modifiers and kind == "f32":
        return lambda *x: flush(plain(*map(flush, x)))
    return function if len(steps) == 1 else plain


def elementwise(parts: list[str]):
    """None for an opcode that is not of this kind."""
    base, *modifiers = parts
    kind = parts[-1]
    modifiers = set(modifiers[:-1])
    if base in BITS:
        return BITS[base], kind, [kind] * ARITY.get(base, 2)
    if base in ("shl", "shr"):
        return (shl if base == "shl" else shr), kind, [kind, "u32"]
    if base == "setp" or base == "cvt":
        return None
    if base in FLOATS and "f" in kind:
        if modifiers - KNOWN:
            raise PtxError(f"{'.'.join(parts)} is not implemented")
        return _floating(base, modifiers, kind), kind, [kind] * ARITY.get(base, 2)
    if base in ("mul", "mad"):
        form = (modifiers & {"lo", "hi", "wide"}).pop()
        product = {"lo": np.multiply, "hi": _high, "wide": _wide}[form]
        result = f"{kind[0]}{2 * WIDTHS[kind]}" if form == "wide" else kind
        if base == "mul":
            return product, result, [kind, kind]
        return (lambda a, b, c: product(a, b) + c), result, [kind, kind, result]
    if base in INTEGERS:
        function = INTEGERS[base]
        if modifiers == {"relu"}:
            return (lambda a, b: np.maximum(function(a, b), 0)), kind, [kind] * 2
        if modifiers:
            raise PtxError(f"{'.'.join(parts)} is not implemented")
        return function, kind, [kind] * ARITY.get(base, 2)
    if base == "selp":
        return (lambda a, b, p: np.where(p, a, b)), kind, [kind, kind, "pred"]
    if base == "slct":
        return (lambda a, b, c: np.where(c >= 0, a, b)), parts[-2], [parts[-2], parts[-2], kind]
    if base == "shf":
        return _funnel("l" in modifiers, "wrap" in modifiers), "b32", ["b32", "b32", "u32"]
    if base == "bfe":
        return _extract, f"u{WIDTHS[kind]}", [kind, "u32", "u32"]
    if base == "bfi":
        return _insert, kind, [kind, kind, "u32", "u32"]
    if base == "prmt" and kind == "b32":
        return _permute, "b32", ["b32", "b32", "b32"]
    if base == "lop3":
        return _logic, "b32", ["b32", "b32", "b32", "u32"]
    if base == "popc":
        return _popc, "u32", [kind]
    if base == "clz":
        return (lambda a: np.uint32(WIDTHS[kind]) - _length(a)), "u32", [kind]
    if base == "bfind":
        return functools.partial(_find, shift="shiftamt" in modifiers), "u32", [kind]
    if base == "brev":
        return (lambda a: REVERSED[_bytes(a.byteswap())].view(a.dtype)[:, 0]), kind, [kind]
    if base == "dp4a":
        kinds = [k[0] + "32" for k in parts[-2:]]
        signed = "s32" if "s32" in kinds else "u32"
        return _dot_bytes(kinds), signed, ["u32", "u32", signed]
    if base == "testp":
        return _classify(parts[1]), "pred", [kind]
    return None


# ---- Conversions ----------------------------------------------------------------------------

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _integral(x, target):
    """Of numbers that are whole: clamped, 0 for NaN."""
    info = np.iinfo(target)
    x = x.astype(np.float64)
    inside = (x >= float(info.min)) & (x < float(info.max) + (info.max < 2**53))
    found = np.where(inside, x, 0).astype(target)
    found = np.where(x < float(info.min), target(info.min), found)
    return np.where(~inside & (x > 0), target(info.max), found)


def conversion(parts: list[str]):
    """(function, type of the result, types of the operands) of cvt."""
    target, source = parts[-2:]
    modifiers = set(parts[1:-2])
    rounding = [r for r in ROUND if r in modifiers]
    unknown = modifiers - {"rn", "rna", "ftz", "sat", "relu", "satfinite", *ROUND}
    floats = [k in HALVES or k in ("f32", "f64", "tf32") for k in (target, source)]
    if unknown or target.startswith("e") or source.startswith("e"):
        raise PtxError(f"{'.'.join(parts)} is not implemented")
    if target == "tf32":
        return (lambda x: to_tf32(x, "rna" in modifiers)), "b32", ["f32"]
    if target in ("f16x2", "bf16x2"):  # the first operand is the upper half

        def pack(a, b):
            both = np.stack([b, a], 1).reshape(-1)
            if "relu" in modifiers:
                both = np.where(both < 0, both.dtype.type(0), both)
            return to_halves(both, target)

        return pack, target, ["f32", "f32"]
    dtype = DTYPES[target]
    if not floats[1] and not floats[0]:
        if "sat" in modifiers:
            info = np.iinfo(dtype)

            def saturate(x):
                low, high = (
                    max(info.min, np.iinfo(x.dtype).min),
                    min(info.max, np.iinfo(x.dtype).max),
                )
                return np.clip(x, low, high).astype(dtype)

            return saturate, target, [source]
        return (lambda x: x.astype(dtype)), target, [source]

    def convert(x):
        if source in HALVES:
            x = halves(x, source)
        elif source == "f32" and "ftz" in modifiers:
            x = flush(x)
        if rounding:
            x = ROUND[rounding[0]](x)
        if not floats[0]:
            return _integral(x, dtype)
        if "sat" in modifiers:
            x = np.where(np.isnan(x), 0, np.clip(x, 0, 1))
        if "relu" in modifiers:
            x = np.where(x < 0, 0, x).astype(x.dtype)
        if target == "bf16":
            return to_bf16(x if x.dtype == np.float32 else x.astype(np.float64))
        x = x.astype(dtype)
        return flush(x) if target == "f32" and "ftz" in modifiers else x

    return convert, target, [source]
