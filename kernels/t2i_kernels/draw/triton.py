"""draw in Triton: one program draws one token, in one launch.

Nothing is sorted. What top-k and top-p leave is all at or above some score, which is found by
bisection over the floats: 32 halvings of their bits, each a count, or a sum of probabilities, over
a row that is held in registers if it fits and read again if not. The sums are fp32 and give a code
near the border; fp64 sums then say whether it is the border or which neighbour is.

Noise in fp64 would cost a GPU more than all the rest. So scores get fp32 noise first, whose error
is bounded, and one that leads by more than the bound has won. Where two are closer, as they are
once in thousands of draws or where scores are large, fp64 decides among the tiles they are in.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .. import tuning
from ..triton_language import INTERPRETED, LN2, LOG2E, is_hip, rows_contiguous

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64, as in the reference
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


# ---- Scores -------------------------------------------------------------------------------------


@triton.jit
def _logits(row, at, GUIDED: tl.constexpr):
    """fp32 logits with guidance, −inf behind the last; where s is 1 the unconditional ones are not
    looked at."""
    logits, unconditional, s, _, codes = row
    x = tl.load(logits + at, mask=at < codes, other=float("-inf")).to(tl.float32)
    if GUIDED:
        guided = at < tl.where(s == 1, 0, codes)
        base = tl.load(unconditional + at, mask=guided, other=0.0).to(tl.float32)
        x = tl.where(guided, base + (x - base) * s, x)
    return x


@triton.jit
def _scores(row, at, GUIDED: tl.constexpr, DIVIDED: tl.constexpr):
    """Logits / temperature, rounded as IEEE has it: a code on the border depends on it."""
    x = _logits(row, at, GUIDED)
    if DIVIDED:
        x = tl.div_rn(x, row[3])
    return x


# ---- The likely codes ---------------------------------------------------------------------------


@triton.jit
def _float(image):
    """The float of an int32 image; images are in the order of their floats."""
    return tl.where(image >= 0, image, image ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _weights(x, least, top, MASS: tl.constexpr):
    """What a code counts: 1, or where MASS e^(x − top) of those at or above ``least``."""
    w = tl.full(x.shape, 1.0, tl.float32)
    if MASS:
        w = tl.where(x >= least, tl.exp2((x - top) * LOG2E), 0.0)
    return w


@triton.jit
def _below(row, held, weights, t, least, top, MASS: tl.constexpr, HELD: tl.constexpr,
           BLOCK: tl.constexpr, GUIDED: tl.constexpr, DIVIDED: tl.constexpr):  # fmt: skip
    """The weight of all codes that score below t."""
    if HELD:
        below = tl.where(held < t, weights, 0.0)
    else:
        below = tl.zeros([BLOCK], tl.float32)
        for first in range(0, row[4], BLOCK):
            x = _scores(row, first + tl.arange(0, BLOCK), GUIDED, DIVIDED)
            below += tl.where(x < t, _weights(x, least, top, MASS), 0.0)
    return tl.sum(below)


@triton.jit
def _border(row, held, spare, least, top, MASS: tl.constexpr, HELD: tl.constexpr,
            BLOCK: tl.constexpr, GUIDED: tl.constexpr, DIVIDED: tl.constexpr):  # fmt: skip
    """The largest t with no more than ``spare`` codes below it, or a share of their probability;
    if exactly so many, one that leaves the same."""
    weights = _weights(held, least, top, MASS)
    if MASS:
        spare = spare * _below(
            row, held, weights, float("inf"), least, top, MASS, HELD, BLOCK, GUIDED, DIVIDED
        )
    low, high = -0x7F800000, 0x7F800000  # −max is the lowest image but one; inf
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, whose double may not fit
        below = _below(
            row, held, weights, _float(middle), least, top, MASS, HELD, BLOCK, GUIDED, DIVIDED
        )
        low = tl.where(below <= spare, middle, low)
        high = tl.where(below < spare, high, tl.where(below == spare, middle + 1, middle))
    return _float(low)


@triton.jit
def _nucleus(row, v, least, top, p, TILE: tl.constexpr, GUIDED: tl.constexpr,
             DIVIDED: tl.constexpr):  # fmt: skip
    """The lowest score whose betters have less than p of the probability, in fp64; v is near it.

    What fp32 left out is the lighter tail. Its heaviest code has at least 1/65536 of it, more than
    the sum may be off: so v is right, or its neighbour is.
    """
    step = 1  # up or down; never up again after down: sums of another order must not go in circles
    while step != 0:
        over = tl.zeros([TILE], tl.float64)
        same, under = over, over
        up = tl.full([TILE], float("inf"), tl.float32)
        down = tl.full([TILE], float("-inf"), tl.float32)
        for first in range(0, row[4], TILE):
            x = _scores(row, first + tl.arange(0, TILE), GUIDED, DIVIDED)
            x = tl.where(x >= least, x, float("-inf"))
            mass = tl.exp(x.to(tl.float64) - top)
            over += tl.where(x > v, mass, 0.0)
            same += tl.where(x == v, mass, 0.0)
            under += tl.where(x < v, mass, 0.0)
            up = tl.minimum(up, tl.where(x > v, x, float("inf")))
            down = tl.maximum(down, tl.where(x < v, x, float("-inf")))
        above, reached = tl.sum(over), tl.sum(over) + tl.sum(same)
        wanted = (reached + tl.sum(under)) * p
        rise = (step > 0) & (above >= wanted)
        fall = (reached < wanted) & (rise == 0)
        v = tl.where(rise, tl.min(up), tl.where(fall, tl.max(down), v))
        step = tl.where(rise, 1, tl.where(fall, -1, 0))
    return v


# ---- Noise --------------------------------------------------------------------------------------


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _bits(state, at):
    """52 random bits for each code."""
    return _mix(state + (at + 1).to(tl.uint64) * GOLDEN) >> 12


@triton.jit
def _log2(x):
    """At most 2⁻²² off, of the result where x is not from 1/2 to 2 (CUDA programming guide)."""
    if INTERPRETED or is_hip():
        y = tl.log2(x)
    else:
        y = libdevice.fast_log2f(x)
    return y


@triton.jit
def _noise(bits):
    """−log(−log u) in fp32, at most 2⁻¹⁵ off, of u = (bits + 1/2) / 2⁵².

    With E = −log u, what counts is the relative error of E. y is u or, where u ≥ 7/8, 1 − u; being
    made of its own bits it is as exact near 0 as elsewhere, to 2⁻²³. There E is the series
    y + y²/2 + …, and what follows y⁶/6 is less than 8/7 · y⁶/7 < 2⁻²⁰ of it: 2⁻¹⁹ with roundings.
    Elsewhere E ≥ 0.133, so that an error of 2⁻²² in log2 u, and that of y, are at most 2⁻¹⁸ of it.
    |log2 E| ≤ 53 is off by 2⁻²² of itself: with roundings, 2⁻¹⁸ + 37 · 2⁻²² + 37 · 2⁻²³ < 2⁻¹⁵.
    """
    upper = bits >= (7 << 49)
    y = (tl.where(upper, bits ^ ((1 << 52) - 1), bits).to(tl.float32) + 0.5) * (2.0**-52)
    series = tl.fma(y, tl.fma(y, tl.fma(y, y * (1 / 6) + 0.2, 0.25), 1 / 3), 0.5)
    series = tl.fma(y, series, 1.0) * y
    return _log2(tl.where(upper, series, _log2(y) * -LN2)) * -LN2


@triton.jit
def _exact(row, state, least, limit, TILE: tl.constexpr, GUIDED: tl.constexpr,
           DIVIDED: tl.constexpr):  # fmt: skip
    """The best code in fp64, of tiles with a score of at least ``limit`` in fp32."""
    best = tl.full([TILE], float("-inf"), tl.float64)
    code = tl.zeros([TILE], tl.int32)
    for first in range(0, row[4], TILE):
        at = first + tl.arange(0, TILE)
        x, bits = _scores(row, at, GUIDED, DIVIDED), _bits(state, at)
        if tl.max(tl.where(x >= least, x + _noise(bits), float("-inf"))) >= limit:
            u = (bits.to(tl.float64) + 0.5) * (2.0**-52)
            y = tl.where(x >= least, x.to(tl.float64) - tl.log(-tl.log(u)), float("-inf"))
            code = tl.where(y > best, at, code)
            best = tl.maximum(best, y)
    return tl.min(tl.where(best == tl.max(best), code, row[4]))


# ---- The draw -----------------------------------------------------------------------------------


@triton.jit
def draw_kernel(
    logits, seeds, positions, guidance, drawn,
    stride_row, stride_token, stride_seed, stride_position, stride_gn, stride_gt,
    images, tokens, codes, temperature, spare_codes, spare_mass, top_p,
    GUIDED: tl.constexpr, GREEDY: tl.constexpr, DIVIDED: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """−1 where a logit is NaN or inf, or all are −inf."""
    program = tl.program_id(0)
    n, t = program // tokens, program % tokens
    logits += t.to(tl.int64) * stride_token
    s = 1.0
    if GUIDED:
        s = tl.load(guidance + n.to(tl.int64) * stride_gn + t.to(tl.int64) * stride_gt)
    row = (logits + n.to(tl.int64) * stride_row, logits + (n + images).to(tl.int64) * stride_row,
           s, temperature, codes)  # fmt: skip

    least = -LARGEST  # −inf is never drawn
    if TOP_K or TOP_P:
        held = _scores(row, tl.arange(0, BLOCK), GUIDED, DIVIDED)
        if not HELD:
            for first in range(BLOCK, codes, BLOCK):
                at = first + tl.arange(0, BLOCK)
                held = tl.maximum(held, _scores(row, at, GUIDED, DIVIDED))
        top = tl.max(held)
        if TOP_K:
            least = _border(row, held, spare_codes, least, top, False, HELD, BLOCK, GUIDED, DIVIDED)
        if TOP_P:
            v = _border(row, held, spare_mass, least, top, True, HELD, BLOCK, GUIDED, DIVIDED)
            p = top_p.to(tl.float64, bitcast=True)
            least = _nucleus(row, v, least, top, p, TILE, GUIDED, DIVIDED)

    seed = tl.load(seeds + n.to(tl.int64) * stride_seed).to(tl.uint64)
    position = tl.load(positions + n.to(tl.int64) * stride_position) + t
    state = _mix(_mix(seed) + position.to(tl.uint64))
    best = tl.full([TILE], float("-inf"), tl.float32)
    second = best  # of each lane, as is best
    code = tl.zeros([TILE], tl.int32)
    undefined = tl.zeros([TILE], tl.int32)
    for first in range(0, codes, TILE):
        at = first + tl.arange(0, TILE)
        x = _logits(row, at, GUIDED)
        undefined = tl.where(x < float("inf"), undefined, 1)
        if DIVIDED:
            x = tl.div_rn(x, temperature)
        if not GREEDY:
            x = tl.where(x >= least, x + _noise(_bits(state, at)), float("-inf"))
            second = tl.maximum(second, tl.minimum(x, best))
        code = tl.where(x > best, at, code)
        best = tl.maximum(best, x)
    top = tl.max(best)
    if GREEDY:
        chosen = tl.min(tl.where(best == top, code, codes))
    else:
        # Both scores may be off by the noise's 2⁻¹⁵ and by the rounding of the sum, 2⁻²⁴ of it.
        limit = tl.minimum(top, LARGEST)
        limit -= 2.0**-14 + tl.abs(limit) * (2.0**-22)
        leading = (best >= limit).to(tl.int32)
        if tl.sum(leading + (second >= limit).to(tl.int32)) == 1:
            chosen = tl.max(code * leading)
        else:
            chosen = _exact(row, state, least, limit, TILE, GUIDED, DIVIDED)
    defined = (top > float("-inf")) & (tl.max(undefined) == 0)
    tl.store(drawn + program, tl.where(defined, chosen, -1))


def draw(
    logits: Tensor, seeds: Tensor, positions: Tensor, guidance: Tensor | None, temperature: float,
    top_k: int, top_p: float,
) -> Tensor:  # fmt: skip
    logits = rows_contiguous(logits)
    _, tokens, codes = logits.shape
    drawn = seeds.new_empty(len(seeds), tokens)
    by_k, by_p = temperature > 0 and 0 < top_k < codes, temperature > 0 and top_p < 1
    config = dict(tuning.choose("draw", logits, 4 * triton.next_power_of_2(codes)))
    # Registers for the row; for top-p its probabilities are held beside it.
    fits = config.pop("HELD") // (2 if by_p else 1)
    block = triton.next_power_of_2(codes)
    held = block <= fits
    block = block if held else config["TILE"]
    draw_kernel[(drawn.numel(),)](
        logits, seeds, positions, guidance, drawn, logits.stride(0), logits.stride(1),
        seeds.stride(0), positions.stride(0), *((0, 0) if guidance is None else guidance.stride()),
        images=len(seeds), tokens=tokens, codes=codes, temperature=temperature,
        # Lanes behind the last code are below all others, and counted.
        spare_codes=float(triton.cdiv(codes, block) * block - top_k), spare_mass=1 - top_p,
        # As an integer: floats are passed in fp32.
        top_p=struct.unpack("q", struct.pack("d", max(top_p, 1e-300)))[0],
        GUIDED=guidance is not None, GREEDY=temperature == 0, DIVIDED=temperature not in (0, 1),
        TOP_K=by_k, TOP_P=by_p, HELD=held, BLOCK=block, enable_fp_fusion=False, **config,
    )  # fmt: skip
    defined = (drawn >= 0).all()
    message = "draw: logits: expected numbers, got NaN or inf, or -inf alone"
    if not drawn.is_cpu:
        torch._assert_async(defined, message)
    elif not defined:
        raise ValueError(message)
    return drawn
