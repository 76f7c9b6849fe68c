"""The interpreter against numpy, against tables of the PTX manual, and against planted faults."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import matrix
import numpy as np
import pytest
from interpreter import launch, wavefronts
from parse import PtxError

RNG = np.random.default_rng(0)
HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
POINTERS = "abcd"


def kernel(body: str, pointers: int = 1, declarations: str = "") -> str:
    """A kernel of pointers %a, %b …, with the thread in %t and four times that in %t4."""
    params = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    loads = "".join(
        f"ld.param.u64 %{POINTERS[i]}, [p{i}];" for i in range(pointers)
    )  # fmt: skip
    return f"""{HEAD}
.extern .shared .align 16 .b8 dynamic[];
{declarations}
.visible .entry k({params}) {{
.reg .b64 %a, %b, %c, %d, %x, %y, %z, %rd<30>;
.reg .b32 %t, %t4, %r<200>;
.reg .b16 %h<20>;
.reg .pred %p<10>;
{loads}
mov.u32 %t, %tid.x;
shl.b32 %t4, %t, 2;
{body}
ret;
}}
"""


def run(body: str, *arrays: np.ndarray, threads: int = 32, shared: int = 0, **options):
    text = kernel(body, len(arrays), options.pop("declarations", ""))
    return launch(text, "k", (1,), (threads,), arrays, shared)


def bf16(x):
    """(bits, what they mean), cut off."""
    bits = (np.ascontiguousarray(x).astype("f4").view("u4") >> 16).astype("u2")
    return bits, (bits.astype("u4") << 16).view("f4")


AT = "cvt.u64.u32 %x, %t; mad.lo.u64 %{0}, %x, {1}, %{0};"  # a pointer to the thread's element


def evaluate(instruction: str, result: str, *operands: tuple[np.ndarray, str]) -> np.ndarray:
    """What an instruction gives; %i is its i-th operand, %0 its result."""
    n = len(operands[0][0])
    width = {
        x: int(x.lstrip("busf")) if x[0] != "p" else 32 for x in (result, *(k for _, k in operands))
    }
    out = np.zeros(n, f"u{width[result] // 8}")
    lines = [f".reg .b{width[k]} %v{i};" for i, k in enumerate((result, *(k for _, k in operands)))]
    for i, (_, kind) in enumerate(operands):
        size = width[kind] // 8
        lines.append(AT.format(POINTERS[i + 1], size))
        lines.append(f"ld.global.b{width[kind]} %v{i + 1}, [%{POINTERS[i + 1]}];")
    for i in range(len(operands) + 1):
        instruction = instruction.replace(f"%{i}", f"%v{i}")
    lines += [instruction + ";", AT.format("a", width[result] // 8)]
    lines.append(f"st.global.b{width[result]} [%a], %v0;")
    run("\n".join(lines), out, *(x for x, _ in operands), threads=n)
    return out


def integers(kind: str, n: int = 64) -> np.ndarray:
    dtype = np.dtype(kind.replace("s", "i")[0] + str(int(kind[1:]) // 8))
    info = np.iinfo(dtype)
    edges = np.array([info.min, info.max, 0, 1, info.max // 2], dtype)
    return np.concatenate([edges, RNG.integers(info.min, info.max, n - 5, dtype)])


def big(x):
    return [int(v) for v in x]


INTEGER = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
    "min": min, "max": max, "and": lambda a, b: a & b,
    "div": lambda a, b: (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1),
    "rem": lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integers(kind):
    a, b = integers(kind), RNG.permutation(integers(kind))
    b[b == 0] = 3
    bits = int(kind[1:])
    for name, function in INTEGER.items():
        full = f"{name}.{'b' + kind[1:] if name == 'and' else kind}"
        got = evaluate(f"{full} %0, %1, %2", kind, (a, kind), (b, kind))
        assert big(got) == [
            function(x, y) % 2**bits for x, y in zip(big(a), big(b), strict=True)
        ], name
    got = evaluate(f"mul.hi.{kind} %0, %1, %2", kind, (a, kind), (b, kind))
    assert big(got) == [(x * y >> bits) % 2**bits for x, y in zip(big(a), big(b), strict=True)]
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        c = integers(wide)
        got = evaluate(f"mad.wide.{kind} %0, %1, %2, %3", wide, (a, kind), (b, kind), (c, wide))
        assert big(got) == [
            (x * y + z) % 4**bits for x, y, z in zip(big(a), big(b), big(c), strict=True)
        ]


def test_shifts_clamp():
    a, s = integers("u32"), np.resize(np.array([0, 1, 5, 31, 32, 33, 200], np.uint32), 64)
    pairs = list(zip(big(a), big(s), strict=True))
    for name, expected in {
        "shl.b32": [x << y for x, y in pairs], "shr.u32": [x >> y for x, y in pairs],
        "shr.s32": [(x - (x >> 31 << 32)) >> min(y, 31) for x, y in pairs],
    }.items():  # fmt: skip
        got = evaluate(f"{name} %0, %1, %2", "u32", (a, "u32"), (s, "u32"))
        assert big(got) == [x % 2**32 for x in expected], name
    b = integers("u32")[::-1].copy()
    for name, function in {
        "shf.l.wrap.b32": lambda lo, hi, n: ((hi << 32 | lo) << (n & 31)) >> 32,
        "shf.r.wrap.b32": lambda lo, hi, n: (hi << 32 | lo) >> (n & 31),
        "shf.r.clamp.b32": lambda lo, hi, n: (hi << 32 | lo) >> min(n, 32),
    }.items():
        got = evaluate(f"{name} %0, %1, %2, %3", "u32", (a, "u32"), (b, "u32"), (s, "u32"))
        expected = [function(*x) % 2**32 for x in zip(big(a), big(b), big(s), strict=True)]
        assert big(got) == expected, name


def test_bit_fields():
    def field(x, position, length, signed, width=32):
        """The loop of the manual."""
        last = width - 1
        sign = x >> min(position + length - 1, last) & 1 if signed and length else 0
        return sum(
            (x >> position + i & 1 if i < length and position + i <= last else sign) << i
            for i in range(width)
        )

    a = integers("u32")
    p, n = (RNG.integers(0, 40, 64).astype(np.uint32) for _ in range(2))
    for name in ("bfe.u32", "bfe.s32"):
        got = evaluate(f"{name} %0, %1, %2, %3", "u32", (a, "u32"), (p, "u32"), (n, "u32"))
        expected = [
            field(x, y, z, "s" in name) for x, y, z in zip(*map(big, (a, p, n)), strict=True)
        ]
        assert big(got) == expected, name
    b = RNG.permutation(a)
    got = evaluate("bfi.b32 %0, %1, %2, 5, 9", "u32", (a, "u32"), (b, "u32"))
    mask = 511 << 5
    assert big(got) == [(x << 5 & mask) | (y & ~mask) for x, y in zip(big(a), big(b), strict=True)]


def test_bits():
    a, b, c = (RNG.permutation(integers("u32")) for _ in range(3))
    names = zip(big(a), big(b), big(c), strict=True)
    got = evaluate("lop3.b32 %0, %1, %2, %3, 0xE8", "u32", (a, "u32"), (b, "u32"), (c, "u32"))
    assert big(got) == [x & y | y & z | x & z for x, y, z in names]
    for name, function in {
        "popc.b32": lambda x: bin(x).count("1"), "clz.b32": lambda x: 32 - x.bit_length(),
        "brev.b32": lambda x: int(f"{x:032b}"[::-1], 2), "not.b32": lambda x: ~x % 2**32,
        "bfind.u32": lambda x: (x.bit_length() - 1) % 2**32,
    }.items():  # fmt: skip
        assert big(evaluate(f"{name} %0, %1", "u32", (a, "u32"))) == [
            function(x) for x in big(a)
        ], name
    s = integers("u32")
    got = evaluate("prmt.b32 %0, %1, %2, %3", "u32", (a, "u32"), (b, "u32"), (s, "u32"))
    for x, y, z, r in zip(*map(big, (a, b, s, got)), strict=True):
        pool = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        picks = [z >> 4 * i & 15 for i in range(4)]
        found = [(255 if pool[k & 7] & 128 else 0) if k & 8 else pool[k & 7] for k in picks]
        assert r.to_bytes(4, "little") == bytes(found)
    got = evaluate("dp4a.s32.u32 %0, %1, %2, %3", "s32", (a, "u32"), (b, "u32"), (c, "u32"))
    product = (a.view("i1").astype(int) * b.view("u1")).reshape(-1, 4).sum(1) + c.view("i4")
    assert (got == product.astype("i4").view("u4")).all()


def floats(n=64):
    edges = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 65504, 1e38], np.float32)
    return np.concatenate([edges, RNG.standard_normal(n - 8).astype(np.float32) * 3])


def test_floats():
    a, b, c = (RNG.permutation(floats()) for _ in range(3))
    with np.errstate(all="ignore"):
        expected = {
            "add.rn.f32 %0, %1, %2": a + b, "sub.f32 %0, %1, %2": a - b,
            "mul.f32 %0, %1, %2": a * b, "div.rn.f32 %0, %1, %2": a / b,
            "min.f32 %0, %1, %2": np.fmin(a, b),
            "max.NaN.f32 %0, %1, %2": np.maximum(a, b), "abs.f32 %0, %1": abs(a),
            "neg.f32 %0, %1": -a, "sqrt.rn.f32 %0, %1": np.sqrt(a), "rcp.rn.f32 %0, %1": 1 / a,
            "ex2.approx.ftz.f32 %0, %1": np.exp2(a), "mov.b32 %0, 0f3F800000": np.ones_like(a),
            "fma.rn.f32 %0, %1, %2, %3": (a.astype(float) * b + c).astype(np.float32),
            "copysign.f32 %0, %1, %2": np.copysign(b, a),
        }  # fmt: skip
    for instruction, value in expected.items():
        got = evaluate(instruction, "f32", (a, "f32"), (b, "f32"), (c, "f32")).view(np.float32)
        np.testing.assert_allclose(got, value, rtol=1e-6, err_msg=instruction, atol=1e-38)


def test_fma_f64_rounds_once():
    a = 1 + RNG.integers(0, 2**52, 64) / 2**52
    got = evaluate("fma.rn.f64 %0, %1, %1, %2", "f64", (a, "f64"), (-(a * a), "f64"))
    from fractions import Fraction

    expected = [float(Fraction(x) ** 2 - Fraction(x * x)) for x in a.tolist()]
    assert got.view(float).tolist() == expected


def test_conversions():
    a = floats()
    with np.errstate(all="ignore"):
        half = a.astype(np.float16)
    assert (evaluate("cvt.rn.f16.f32 %0, %1", "b16", (a, "f32")) == half.view("u2"))[
        ~np.isnan(a)
    ].all()
    rounded = evaluate("cvt.rn.bf16.f32 %0, %1", "b16", (a, "f32"))
    import torch

    exact = torch.from_numpy(a).bfloat16().view(torch.int16).numpy().view("u2")
    assert (rounded == exact)[~np.isnan(a)].all()
    both = evaluate("cvt.rn.bf16x2.f32 %0, %1, %2", "b32", (a, "f32"), (a[::-1].copy(), "f32"))
    assert (both >> 16 == rounded).all() and (both & 0xFFFF == rounded[::-1]).all()
    for instruction, dtype, function in [
        ("cvt.rni.s32.f32", "i4", np.rint), ("cvt.rzi.s32.f32", "i4", np.trunc),
        ("cvt.rmi.s32.f32", "i4", np.floor), ("cvt.rpi.u32.f32", "u4", np.ceil),
    ]:  # fmt: skip
        info = np.iinfo(dtype)
        value = np.nan_to_num(function(a.astype(float)), nan=0.0)
        expected = np.clip(value, info.min, info.max).astype(dtype)
        got = evaluate(f"{instruction} %0, %1", "b32", (a, "f32")).view(dtype)
        assert (got == expected).all(), instruction
    words = integers("u32")
    assert (evaluate("cvt.s32.s8 %0, %1", "s32", (words, "b32")).view("i4")
            == words.astype("u1").view("i1")).all()  # fmt: skip
    assert (evaluate("cvt.rn.f32.u32 %0, %1", "f32", (words, "u32")).view("f4")
            == words.astype("f4")).all()  # fmt: skip
    got = evaluate("cvt.rna.tf32.f32 %0, %1", "b32", (a, "f32")).view("f4")
    got, a = (x[np.isfinite(a)] for x in (got, a))
    assert (abs(got - a) <= abs(a) * 2.0**-11 + 1e-41).all() and not (got.view("u4") & 8191).any()


def test_packed_halves():
    import torch

    a, b, c = (torch.randn(64, 2, dtype=torch.float64) for _ in range(3))
    for kind, dtype in (("f16x2", torch.float16), ("bf16x2", torch.bfloat16)):
        x, y, z = (t.to(dtype) for t in (a, b, c))
        words = [t.view(torch.int16).numpy().view("u4")[:, 0].copy() for t in (x, y, z)]
        got = evaluate(f"fma.rn.{kind} %0, %1, %2, %3", "b32", *((w, "b32") for w in words))
        expected = (x.double() * y.double() + z.double()).to(dtype).view(torch.int16).numpy()
        assert (got == expected.view("u4")[:, 0]).all()
        got = evaluate(f"max.{kind} %0, %1, %2", "b32", *((w, "b32") for w in words[:2]))
        assert (got == torch.maximum(x, y).view(torch.int16).numpy().view("u4")[:, 0]).all()


def test_comparisons_and_nan():
    a, b = floats(), RNG.permutation(floats())
    unordered = np.isnan(a) | np.isnan(b)
    for name, expected in {
        "eq": a == b, "ne": (a != b) & ~unordered, "lt": a < b, "neu": a != b, "geu": ~(a < b),
        "num": ~unordered, "nan": unordered, "equ": (a == b) | unordered,
    }.items():  # fmt: skip
        code = f".reg .pred q; setp.{name}.f32 q, %1, %2; selp.u32 %0, 1, 0, q"
        assert (evaluate(code, "u32", (a, "f32"), (b, "f32")) == expected).all(), name
    code = ".reg .pred q, r, s; setp.gt.f32 s, %1, 0f00000000; setp.lt.and.f32 q|r, %1, %2, s; "
    for result, expected in (("q", (a < b) & (a > 0)), ("r", ~(a < b) & (a > 0))):
        got = evaluate(code + f"selp.u32 %0, 1, 0, {result}", "u32", (a, "f32"), (b, "f32"))
        assert (got == expected).all()


# ---- Control, warps -----------------------------------------------------------------------------


def test_divergent_loop_meets_again():
    out = np.zeros(64, np.uint32)
    run("""mov.u32 %r1, 0; mov.u32 %r2, 0;
L: setp.ge.u32 %p1, %r1, %t; @%p1 bra E; add.u32 %r1, %r1, 1; add.u32 %r2, %r2, %r1; bra L;
E: bar.sync 0; cvt.u64.u32 %x, %t4; add.u64 %a, %a, %x; st.global.u32 [%a], %r2;""",
        out, threads=64)  # fmt: skip
    assert out.tolist() == [i * (i + 1) // 2 for i in range(64)]


def test_labels_and_registers_of_inline_assembly():
    """The same text twice: names are of its scope."""
    block = """{ .reg .pred q; .reg .u32 i; mov.u32 i, 0;
AGAIN: setp.ge.u32 q, i, %t; @q bra DONE; add.u32 i, i, 1; add.u32 %r1, %r1, 1; bra AGAIN;
DONE: }"""
    out = np.zeros(32, np.uint32)
    run(f"""mov.u32 %r1, 0; {block} {block}
cvt.u64.u32 %x, %t4; add.u64 %a, %a, %x; st.global.u32 [%a], %r1;""", out)  # fmt: skip
    assert out.tolist() == [2 * i for i in range(32)]


def shuffled(mode, b, c):
    out = np.zeros(64, np.uint32)
    run(f"""shfl.sync.{mode}.b32 %r1|%p1, %t, {b}, {c}, -1; selp.u32 %r2, 100, 0, %p1;
add.u32 %r1, %r1, %r2; cvt.u64.u32 %x, %t4; add.u64 %a, %a, %x; st.global.u32 [%a], %r1;""",
        out, threads=64)  # fmt: skip
    return out.tolist()


def test_shuffles():
    lanes = range(64)
    assert shuffled("bfly", 5, 31) == [100 + (i ^ 5) for i in lanes]
    assert shuffled("idx", 7, 31) == [100 + i // 32 * 32 + 7 for i in lanes]
    assert shuffled("up", 3, 0) == [97 + i if i % 32 >= 3 else i for i in lanes]
    assert shuffled("down", 3, 31) == [103 + i if i % 32 < 29 else i for i in lanes]
    # Segments of 8: the upper byte of c holds which bits of the lane stay.
    assert shuffled("down", 3, 24 << 8 | 31) == [103 + i if i % 8 < 5 else i for i in lanes]


def test_votes_and_reductions():
    out = np.zeros((6, 32), np.uint32)
    run("""setp.lt.u32 %p1, %t, 5;
vote.sync.ballot.b32 %r1, %p1, -1; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
selp.u32 %r2, 1, 0, %p2; selp.u32 %r3, 1, 0, %p3; redux.sync.add.s32 %r4, %t, -1;
and.b32 %r5, %t, 3; match.any.sync.b32 %r6, %r5, -1; mov.u32 %r7, %lanemask_lt;
cvt.u64.u32 %x, %t4; add.u64 %a, %a, %x; st.global.u32 [%a], %r1; st.global.u32 [%a+128], %r2;
st.global.u32 [%a+256], %r3; st.global.u32 [%a+384], %r4; st.global.u32 [%a+512], %r6;
st.global.u32 [%a+640], %r7;""", out)  # fmt: skip
    assert (out[0] == 31).all() and (out[1] == 1).all() and (out[2] == 0).all()
    assert (out[3] == 496).all() and out[4].tolist() == [0x11111111 << i % 4 for i in range(32)]
    assert out[5].tolist() == [2**i - 1 for i in range(32)]


def test_atomics_across_blocks():
    out = np.zeros(4, np.uint32)
    body = """atom.global.add.u32 %r1, [%a], 1; red.global.max.u32 [%a+4], %r1;
atom.global.inc.u32 %r2, [%a+8], 6;"""
    launch(kernel(body), "k", (3,), (64,), [out])
    assert out.tolist() == [192, 191, 192 % 7, 0]


def test_barrier_with_a_count_and_reductions():
    out = np.zeros(1, np.uint32)
    run("""setp.lt.u32 %p1, %t, 32; @%p1 bra A; bar.sync 1, 64; bra B;
A: bar.arrive 1, 64; B: setp.lt.u32 %p2, %t, 7; bar.red.popc.u32 %r1, 0, %p2;
st.global.u32 [%a], %r1;""",
        out, threads=64)  # fmt: skip
    assert out[0] == 7


# ---- Fragments, as the manual's tables have them ------------------------------------------------


def table_a(size, e):
    """(row, column) of element i of A for a lane, by the manual: groupID, threadID_in_group."""
    for lane, i in itertools.product(range(32), range(size)):
        group, place = lane >> 2, lane % 4
        row = group if (i // e) % 2 == 0 else group + 8
        yield lane, i, row, place * e + i % e + (4 * e if i >= 2 * e else 0)


def table_b(size, e):
    for lane, i in itertools.product(range(32), range(size)):
        yield lane, i, (lane % 4) * e + i % e + (4 * e if i >= e else 0), lane >> 2


def table_c():
    for lane, i in itertools.product(range(32), range(4)):
        yield lane, i, (lane >> 2) + 8 * (i // 2), (lane % 4) * 2 + i % 2


@pytest.mark.parametrize(
    ("shape", "kind", "e", "accumulator"),
    [("m16n8k16", "f16", 2, "f32"), ("m16n8k16", "bf16", 2, "f32"), ("m16n8k8", "bf16", 2, "f32"),
     ("m16n8k8", "tf32", 1, "f32"), ("m16n8k4", "tf32", 1, "f32"), ("m16n8k32", "s8", 4, "s32"),
     ("m16n8k16", "f16", 2, "f16")],
)  # fmt: skip
def test_mma_fragments(shape, kind, e, accumulator):
    depth = int(shape[6:])
    size_a, size_b = 16 * depth // 32, 8 * depth // 32
    a, b = RNG.integers(-8, 8, (16, depth)), RNG.integers(-8, 8, (depth, 8))
    c = RNG.integers(-100, 100, (16, 8))
    lanes_a, lanes_b, lanes_c = (np.zeros((32, n)) for n in (size_a, size_b, 4))
    for lane, i, row, column in table_a(size_a, e):
        lanes_a[lane, i] = a[row, column]
    for lane, i, row, column in table_b(size_b, e):
        lanes_b[lane, i] = b[row, column]
    for lane, i, row, column in table_c():
        lanes_c[lane, i] = c[row, column]

    def bits(x, kind):
        if kind == "bf16":
            return bf16(x)[0].view("u4")
        return x.astype(
            {"f16": "f2", "tf32": "f4", "f32": "f4", "s8": "i1", "s32": "i4"}[kind]
        ).view("u4")

    out = np.zeros((32, 4 if accumulator != "f16" else 2), np.uint32)
    arrays = (
        out,
        *(bits(x, k) for x, k in ((lanes_a, kind), (lanes_b, kind), (lanes_c, accumulator))),
    )
    counts = [x.shape[1] for x in arrays]
    names = [[f"%r{50 * j + i}" for i in range(n)] for j, n in enumerate(counts)]
    text = "".join(AT.format(POINTERS[j], 4 * n) for j, n in enumerate(counts))
    for j in (1, 2, 3):
        text += "".join(
            f"ld.global.b32 {r}, [%{POINTERS[j]}+{4 * i}];" for i, r in enumerate(names[j])
        )
    d, *rest = ("{" + ", ".join(x) + "}" for x in names)
    text += f"mma.sync.aligned.{shape}.row.col.{accumulator}.{kind}.{kind}.{accumulator} {d}, "
    text += ", ".join(rest) + ";"
    text += "".join(f"st.global.b32 [%a+{4 * i}], {r};" for i, r in enumerate(names[0]))
    run(text, *arrays)
    product, got = a @ b + c, out.view({"f32": "f4", "s32": "i4", "f16": "f2"}[accumulator])
    for lane, i, row, column in table_c():
        assert got[lane, i] == product[row, column]


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed):
    """Matrix i, rows given by lanes 8·i…: a lane gets elements 2·(lane % 4)… of row lane / 4."""
    cells, out = np.arange(256, dtype=np.uint16), np.zeros((32, 8), np.uint16)
    again = np.zeros(256, np.uint16)
    trans = ".trans" if transposed else ""
    report = run(f"""mov.u32 %r9, dynamic; shl.b32 %r1, %t, 4; add.u32 %r2, %r9, %r1;
cvt.u64.u32 %x, %r1; add.u64 %b, %b, %x; add.u64 %a, %a, %x; add.u64 %c, %c, %x;
ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%b]; st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}};
bar.sync 0; ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r2];
st.global.v4.b32 [%a], {{%r3, %r4, %r5, %r6}};
stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2+512], {{%r3, %r4, %r5, %r6}};
ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2+512];
st.global.v4.b32 [%c], {{%r3, %r4, %r5, %r6}};""",
        out, cells, again, shared=1024)  # fmt: skip
    for lane, i, j in itertools.product(range(32), range(4), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + j
        row, column = (column, row) if transposed else (row, column)
        assert out[lane, 2 * i + j] == 64 * i + 8 * row + column
    assert (again == cells).all()
    assert report.ratio() == 1


@pytest.mark.parametrize("swizzle", [128, 64, 32, 16])
@pytest.mark.parametrize("mn_major", [False, True])
def test_wgmma_descriptors(swizzle, mn_major):
    """Each byte of an operand is in one place, and rows of a swizzled tile are where the XOR of
    their address says."""
    extent, depth, mode = 64, 16, {16: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    unit = 8 * swizzle  # bytes of 8 rows
    descriptor = 2048 >> 4 | (unit * 8 >> 4) << 16 | (unit >> 4) << 32 | mode << 62
    at = matrix.descriptor_addresses(descriptor, extent, depth, 2, mn_major)
    assert len(np.unique(at)) == at.size and (at % 2 == 0).all() and at.min() >= 2048
    if not mn_major and swizzle > 16:
        row, k = 13, 9
        linear = 2048 + row // 8 * unit + row % 8 * swizzle + 2 * k
        assert at[row, k] == linear ^ ((linear >> 7 & (swizzle // 16 - 1)) << 4)


WGMMA = """mov.u32 %r9, dynamic; shl.b32 %r1, %t, 4; cvt.u64.u32 %x, %r1;
add.u64 %a, %a, %x; add.u64 %b, %b, %x; add.u64 %c, %c, %x;
ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%b]; add.u32 %r2, %r9, %r1;
ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%c]; st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};
setp.lt.u32 %p1, %t, 16; @%p1 ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%c+2048];
@%p1 st.shared.v4.b32 [%r2+2048], {%r3, %r4, %r5, %r6}; fence.proxy.async; bar.sync 0;
shr.u32 %r7, %r9, 4; cvt.u64.u32 %y, %r7; or.b64 %y, %y, 0x0000001000080000; add.u64 %z, %y, 128;
mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0; wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
{%r20, %r21, %r22, %r23}, SOURCE, %z, FLAGS;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
st.global.v4.b32 [%a], {%r20, %r21, %r22, %r23};"""


def multiply(a, b, body=WGMMA, in_registers=False, threads=128):
    """A [64, 16] Bᵀ [16, 8] in bf16, as the lanes hold it; operands in shared memory are core
    matrices, not swizzled."""

    def cores(x):  # [rows / 8][k / 8][8][8]
        return bf16(x.reshape(len(x) // 8, 8, 2, 8).transpose(0, 2, 1, 3))[0]

    registers = np.zeros((128, 4, 2))
    for warp in range(4):
        for lane, i, row, column in table_a(8, 2):
            registers[32 * warp + lane, i // 2, i % 2] = a[16 * warp + row, column]
    tile = np.concatenate([cores(a).ravel(), cores(b).ravel()]).view("u4")
    source = "{%r10, %r11, %r12, %r13}" if in_registers else "%y"
    body = body.replace("SOURCE", source)
    body = body.replace("FLAGS", "1, 1, 1, 0" if in_registers else "1, 1, 1, 0, 0")
    out = np.zeros((128, 4), np.float32)
    run(body, out, bf16(registers)[0], tile, threads=threads, shared=4096)
    return out


@pytest.mark.parametrize("in_registers", [False, True])
def test_wgmma(in_registers):
    a, b = (RNG.integers(-8, 8, x) for x in ((64, 16), (8, 16)))
    out = multiply(a, b, in_registers=in_registers)
    alone = "setp.ge.u32 %p5, %t, 128; @%p5 exit;" + WGMMA  # one warpgroup of two
    assert (multiply(a, b, alone, in_registers, 256) == out).all()
    for warp in range(4):
        for lane, i, row, column in table_c():
            assert out[32 * warp + lane, i] == (a @ b.T)[16 * warp + row, column]


def test_wgmma_is_asynchronous():
    a, b = np.ones((64, 16)), np.ones((8, 16))
    wait = "wgmma.wait_group.sync.aligned 0;\n"
    early = WGMMA.replace(wait, "mov.b32 %r3, %r20;\n" + wait).replace("{%r20, %r21", "{%r3, %r21")
    early = early.replace("bf16\n{%r3", "bf16\n{%r20")
    out = multiply(a, b, early)
    assert np.isnan(out[:, 0]).all() and (out[:, 1:] == 16).all()
    for body, message in [
        (WGMMA.replace(wait, ""), "wgmma was never waited for"),
        (WGMMA.replace("bar.sync 0;", ""), "race"),
        (WGMMA.replace("fence.proxy.async;", ""), "no fence.proxy.async after it"),
        (WGMMA.replace(wait, "st.shared.u32 [%r2], %r3; " + wait), "while a wgmma reads it"),
    ]:
        with pytest.raises(PtxError, match=message):
            multiply(a, b, body)


# ---- Asynchronous copies ------------------------------------------------------------------------

COPY = """mov.u32 %r9, dynamic; shl.b32 %r1, %t, 4; add.u32 %r2, %r9, %r1; cvt.u64.u32 %x, %r1;
add.u64 %b, %b, %x; add.u64 %a, %a, %x;
cp.async.cg.shared.global [%r2], [%b], 16, SIZE; cp.async.commit_group;
WAIT
ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2]; st.global.v4.b32 [%a], {%r3, %r4, %r5, %r6};"""


def test_cp_async_fills_with_zeros():
    source, out = RNG.integers(0, 256, 512).astype(np.uint8), np.ones(512, np.uint8)
    run(
        COPY.replace("SIZE", "8").replace("WAIT", "cp.async.wait_group 0;"), out, source, shared=512
    )
    assert (out.reshape(32, 16)[:, :8] == source.reshape(32, 16)[:, :8]).all()
    assert (out.reshape(32, 16)[:, 8:] == 0).all()


BULK = """mov.u32 %r9, dynamic; add.u32 %r8, %r9, 1024; setp.eq.u32 %p1, %t, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r8], 1; bar.sync 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 %y, [%r8], 128;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%b], 128, [%r8];
WAIT
add.u32 %r2, %r9, %t4; ld.shared.b32 %r3, [%r2]; cvt.u64.u32 %x, %t4; add.u64 %a, %a, %x;
st.global.b32 [%a], %r3;"""
WAIT = "L: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r8], 0; @!%p2 bra L;"


def test_bulk_copy():
    source, out = RNG.integers(0, 2**31, 32).astype(np.uint32), np.zeros(32, np.uint32)
    run(BULK.replace("WAIT", WAIT), out, source, shared=2048)
    assert (out == source).all()


# ---- Planted faults -----------------------------------------------------------------------------

OUT = "cvt.u64.u32 %x, %t4; add.u64 %a, %a, %x; "
FAULTS = {
    "out of bounds: 4 bytes at offset 128 of p0, which has 128 bytes": (
        OUT + "ld.global.u32 %r1, [%a+4];", {}),
    "out of bounds: 4 bytes at offset -4": (OUT + "st.global.u32 [%a+-4], %t;", {}),
    "misaligned: 8 bytes at offset 4 of p0": (OUT + "ld.global.b64 %x, [%a];", {}),
    "of no buffer": ("mov.u64 %x, 0; st.global.u32 [%x], %t;", {}),
    "out of bounds: 4 bytes at shared address": (
        "mov.u32 %r1, dynamic; ld.shared.u32 %r2, [%r1+64];", dict(shared=64)),
    "uninitialised: 4 bytes at shared": (
        "mov.u32 %r1, dynamic; setp.lt.u32 %p1, %t, 31; add.u32 %r1, %r1, %t4; "
        "@%p1 st.shared.u32 [%r1], %t; bar.sync 0; ld.shared.u32 %r2, [%r1];", dict(shared=128)),
    "threads of the same warp never arrive in `@%p1 bar.sync": (
        "setp.lt.u32 %p1, %t, 40; @%p1 bar.sync 0;", dict(threads=64)),
    "race: no barrier is between this read of shared": (
        "mov.u32 %r1, dynamic; add.u32 %r2, %r1, %t4; st.shared.u32 [%r2], %t; "
        "xor.b32 %r3, %t4, 128; add.u32 %r2, %r1, %r3; ld.shared.u32 %r4, [%r2];",
        dict(threads=64, shared=256)),
    "race: no barrier is between this write of shared": (
        "mov.u32 %r1, dynamic; add.u32 %r2, %r1, %t4; st.shared.u32 [%r2], %t; bar.sync 0; "
        "xor.b32 %r3, %t4, 128; add.u32 %r3, %r1, %r3; ld.shared.u32 %r4, [%r3]; "
        "st.shared.u32 [%r2], %r4;", dict(threads=64, shared=256)),
    "divergent barrier: others wait elsewhere": (
        "setp.lt.u32 %p1, %t, 32; @%p1 bra A; bar.sync 0; bra E; A: bar.sync 0; E: ",
        dict(threads=64)),
    "deadlock: 32 threads wait at barrier 1": (
        "setp.lt.u32 %p1, %t, 32; @%p1 bar.sync 1, 64;", dict(threads=64)),
    "threads of the same warp never arrive in `@%p1 shfl": (
        "setp.lt.u32 %p1, %t, 9; @%p1 shfl.sync.bfly.b32 %r1, %t, 1, 31, -1; bar.sync 0;", {}),
    "shfl reads a thread that does not take part": (
        "setp.lt.u32 %p1, %t, 3; @%p1 shfl.sync.bfly.b32 %r1, %t, 1, 31, 7;", {}),
    "not in its own member mask": ("shfl.sync.bfly.b32 %r1, %t, 1, 31, 0x7fffffff;", {}),
    "%r7 is read before it was written": ("add.u32 %r1, %r7, 1;", {}),
    "no mbarrier was initialised": (
        "mov.u32 %r1, dynamic; mbarrier.arrive.shared.b64 %x, [%r1];", dict(shared=64)),
    "the mbarrier's phase never ends": (
        "mov.u32 %r1, dynamic; mbarrier.init.shared.b64 [%r1], 33; "
        "mbarrier.arrive.shared.b64 _, [%r1]; "
        "L: mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0; @!%p1 bra L;", dict(shared=64)),
    "no end after": ("L: bra L;", {}),
    "trap": ("setp.eq.u32 %p1, %t, 5; @%p1 trap;", {}),
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 is not implemented": (
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", {}),
    "%clock is not known": ("mov.u32 %r1, %clock;", {}),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_faults(message, monkeypatch):
    monkeypatch.setattr("interpreter.TURNS", 10**4)
    body, options = FAULTS[message]
    with pytest.raises(PtxError) as error:
        run(body, np.zeros(32, np.uint32), **options)
    assert message in str(error.value), error.value
    assert "line " in str(error.value)


def test_a_fault_says_where():
    body = f"""mov.u32 %r1, %tid.y; mov.u32 %r2, %ctaid.x; mad.lo.u32 %t4, %r1, 64, %t4;
mad.lo.u32 %t4, %r2, 16, %t4;
.loc 1 12 3
{OUT} ld.global.u32 %r1, [%a];"""
    text = kernel(body).replace(HEAD, HEAD + '.file 1 "some/kernel.cu"\n')
    where = r"kernel.cu:12.*ld.global.u32.*block \(1, 0, 0\), thread \(12, 1, 0\)"
    with pytest.raises(PtxError, match=where):
        launch(text, "k", (3,), (16, 2), [np.zeros(32, np.uint32)])


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_copies_in_flight_are_not_read(wait):
    source, out = np.zeros(512, np.uint8), np.zeros(512, np.uint8)
    with pytest.raises(PtxError, match="still in flight"):
        run(COPY.replace("SIZE", "16").replace("WAIT", wait), out, source, shared=512)
    with pytest.raises(PtxError, match="still in flight"):
        run(BULK.replace("WAIT", ""), out[:128].view("u4"), source[:128], shared=2048)


def test_a_copy_is_waited_for_by_its_own_thread():
    body = COPY.replace("SIZE", "16").replace("WAIT", "setp.lt.u32 %p1, %t, 32; @%p1 bra A; "
                                              "cp.async.wait_all; A: bar.sync 0;")  # fmt: skip
    with pytest.raises(PtxError, match="still in flight.*thread \\(0, 0, 0\\)"):
        run(body, np.zeros(1024, np.uint8), np.zeros(1024, np.uint8), threads=64, shared=1024)


def test_a_copy_that_nobody_waits_for():
    body = COPY.split("WAIT")[0].replace("SIZE", "16")
    with pytest.raises(PtxError, match="never waited for"):
        run(body, np.zeros(512, np.uint8), np.zeros(512, np.uint8), shared=512)


def test_gaps_between_rows_are_nobodys():
    rows = np.zeros((4, 16), np.uint32)
    run("ld.global.u32 %r1, [%a];", rows[:, :8])
    with pytest.raises(PtxError, match="out of bounds"):
        run("ld.global.u32 %r1, [%a+32];", rows[:, :8])


# ---- Counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "width", "expected"),
    [(4, 4, 1), (8, 4, 2), (128, 4, 32), (0, 4, 1), (132, 4, 1), (8, 8, 2), (16, 8, 4), (16, 16, 4),
     (128, 16, 32), (144, 16, 4), (2, 2, 1), (1, 1, 1)],
)  # fmt: skip
def test_wavefronts(stride, width, expected):
    lanes = 32 if width <= 4 else 128 // width
    assert wavefronts(np.arange(32) * stride, lanes, width) == expected


def test_counts_are_by_line():
    out = np.zeros(32 * 8, np.uint32)
    report = run("""mov.u32 %r9, dynamic; shl.b32 %r1, %t, 5; add.u32 %r2, %r9, %r1;
st.shared.u32 [%r2], %t; cvt.u64.u32 %x, %r1; add.u64 %a, %a, %x; st.global.u32 [%a], %t;""",
                 out, shared=1024)  # fmt: skip
    assert report.ratio() == 8 and report.ratio("sectors") == 8
    assert report.bytes_written == 128 and report.bytes_read == 0
    assert report.opcodes["st.shared.u32"] == 1
    assert "8 wavefronts for 1" in report.offenders() and "st.shared.u32" in report.offenders()
    assert "32 sectors for 4" in report.offenders("sectors")


# ---- nvcc ---------------------------------------------------------------------------------------

CUDA = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
struct Scale { float by; int shift; };
__constant__ float table[3] = {1.0f, 2.0f, 4.0f};

extern "C" __global__ void elementwise(const __nv_bfloat16* a, float* out, float* sum, int n,
                                       Scale s) {
  __shared__ float partial[8];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float local[4];
  for (int k = 0; k < 4; k++) local[(k + i) & 3] = k * s.by;
  float x = i < n ? __bfloat162float(a[i]) : 0.f, y = x;
  if (i < n) out[i] = local[i & 3] + table[i % 3] * __expf(x) + (i / 7) % 5 + rsqrtf(x * x + 1.f);
  for (int k = 16; k; k /= 2) y += __shfl_xor_sync(0xffffffffu, y, k);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = y;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < blockDim.x / 32; w++) total += partial[w];
    atomicAdd(sum, total);
  }
}

// C [16·warps, 8] = A [16·warps, 64] B [8, 64]ᵀ: cp.async into swizzled rows, ldmatrix, mma.
extern "C" __global__ void product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c,
                                   int swizzle) {
  extern __shared__ __align__(128) char shared[];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = blockDim.x / 2;
  uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
  auto at = [&](int row, int unit) {
    return base + row * 128 + ((unit ^ (swizzle ? row & 7 : 0)) << 4);
  };
  for (int i = threadIdx.x; i < (rows + 8) * 8; i += blockDim.x) {
    int row = i / 8, unit = i % 8;
    const __nv_bfloat16* from = row < rows ? a + row * 64 : b + (row - rows) * 64;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
        ::"r"(at(row, unit)), "l"(from + unit * 8));
  }
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  float d[4] = {};
  for (int k = 0; k < 4; k++) {
    uint32_t x[4], y[2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
        : "r"(at(warp * 16 + lane % 16, 2 * k + lane / 16)));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
        : "=r"(y[0]), "=r"(y[1]) : "r"(at(rows + lane % 8, 2 * k + lane / 8 % 2)));
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  }
  float* to = c + (warp * 16 + lane / 4) * 8 + lane % 4 * 2;
  to[0] = d[0], to[1] = d[1], to[64] = d[2], to[65] = d[3];
}

#if __CUDA_ARCH_FEAT_SM90_ALL
// C [64, 8] = A [64, 16] B [8, 16]ᵀ, tiles of core matrices one behind the other: bulk copy, wgmma.
extern "C" __global__ void hopper(const __nv_bfloat16* tiles, float* c) {
  __shared__ __align__(128) char tile[2304];
  __shared__ uint64_t full;
  uint32_t base = (uint32_t)__cvta_generic_to_shared(tile);
  uint32_t barrier = (uint32_t)__cvta_generic_to_shared(&full);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], 2304; }"
        ::"r"(barrier));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1], 2304, [%2];" ::"r"(base), "l"(tiles), "r"(barrier) : "memory");
  }
  __syncthreads();
  asm volatile("{ .reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n"
      "@p bra DONE; bra AGAIN;\nDONE: }" ::"r"(barrier) : "memory");
  auto descriptor = [](uint32_t at) { return at >> 4 | 8ull << 16 | 16ull << 32; };
  float d[4];
  asm volatile("wgmma.fence.sync.aligned;\n{ .reg .pred p; setp.ne.b32 p, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;\n}"
      "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "l"(descriptor(base)), "l"(descriptor(base + 2048)), "r"(0) : "memory");
  int lane = threadIdx.x % 32;
  float* to = c + (threadIdx.x / 32 * 16 + lane / 4) * 8 + lane % 4 * 2;
  to[0] = d[0], to[1] = d[1], to[64] = d[2], to[65] = d[3];
}
#endif
"""


@pytest.fixture(scope="module", params=["compute_80", "compute_90a"])
def cuda(request, tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "k.cu").write_text(CUDA)
    command = ["nvcc", "-ptx", "-lineinfo", f"-arch={request.param}", "-std=c++17", "k.cu"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "k.ptx").read_text()


def test_nvcc_elementwise(cuda):
    bits, x = bf16(RNG.standard_normal(300))
    out, total = np.zeros(300, np.float32), np.zeros(1, np.float32)
    scale = np.array([0.5], "f4").tobytes() + np.array([3], "i4").tobytes()
    launch(cuda, "elementwise", (3,), (128,), [bits, out, total, 300, scale])
    i = np.arange(300)
    expected = (((i & 3) - i) & 3) * 0.5 + 2.0 ** (i % 3) * np.exp(x) + i // 7 % 5
    np.testing.assert_allclose(out, expected + 1 / np.sqrt(x * x + 1), rtol=1e-5)
    np.testing.assert_allclose(total[0], x.sum(), rtol=1e-4, atol=1e-4)


def test_nvcc_matrix_product_and_its_bank_conflicts(cuda):
    (a, x), (b, y) = (bf16(RNG.standard_normal((rows, 64))) for rows in (64, 8))
    ratios = []
    for swizzle in (1, 0):
        c = np.zeros((64, 8), np.float32)
        report = launch(cuda, "product", (1,), (128,), [a, b, c, swizzle], shared_bytes=72 * 128)
        np.testing.assert_allclose(c, x @ y.T, rtol=1e-4, atol=1e-4)
        ratios.append(report.ratio())
    assert ratios[0] == 1 and ratios[1] > 4
    assert "k.cu:" in report.offenders()


def test_nvcc_wgmma_of_a_bulk_copy(cuda):
    if ".entry hopper" not in cuda:
        pytest.skip("of sm_90a alone")
    (a, x), (b, y) = (bf16(RNG.standard_normal((rows, 16))) for rows in (64, 8))
    tiles = [t.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3).ravel() for t in (a, b)]
    c = np.zeros((64, 8), np.float32)
    launch(cuda, "hopper", (1,), (128,), [np.concatenate(tiles), c])
    np.testing.assert_allclose(c, x @ y.T, rtol=1e-5, atol=1e-5)
