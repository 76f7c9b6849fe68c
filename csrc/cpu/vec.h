// What the kernels share: a matrix product out of registers, exponentials, and rows of any type.
//
// For sources that are compiled once per instruction set, inside the namespace CPU_CAPABILITY.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/float_type.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
constexpr float kInf = std::numeric_limits<float>::infinity();

// A product is computed in tiles of tile_rows(R) broadcast rows by R vectors, up to kTileVecs, which
// leave registers for what is multiplied. Eight accumulators at least keep two FMA units with a
// latency of four cycles busy; more than that need fewer loads.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kTileVecs = 4;
constexpr int tile_rows(int vecs) { return vecs == 4 ? 6 : 8; }  // 24 of 32 registers at most
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kTileVecs = 2;
constexpr int tile_rows(int vecs) { return vecs == 2 ? 6 : 8; }  // 12 of 16
#else
constexpr int kTileVecs = 2;  // a vector takes two registers, of 16
constexpr int tile_rows(int vecs) { return 2; }
#endif
constexpr int64_t kTileLanes = kTileVecs * kLanes;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Keeps x in a register. Where those are few, GCC would load it again for each of its uses, and
// loads are what is scarce then.
inline void hold(Vec& x) {
#if defined(CPU_CAPABILITY_AVX2)
  __m256 value = x;
  asm("" : "+x"(value));
  x = value;
#endif
}

// ---- Products ----------------------------------------------------------------------------------

// The left factor A, whose elements are broadcast: by rows A(i, k) = a[i * stride + k], by columns
// A(i, k) = a[k * stride + i].
enum class By { rows, columns };

// One tile: C(i, n) = start(i, n) + sum_k A(i, k) B(k, n), handed to finish(i, n, vector) with n
// counted in vectors. B(k, n) is the n-th vector of b + k * b_stride.
template <By by, int M, int R, typename Start, typename Finish>
inline __attribute__((always_inline)) void tile_product(const float* a, int64_t a_stride,
                                                        const float* b, int64_t b_stride,
                                                        int64_t depth, Start start,
                                                        Finish finish) {
  Vec c[M][R];
  for (int i = 0; i < M; ++i) {
    for (int r = 0; r < R; ++r) c[i][r] = start(i, r);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[R];
    for (int r = 0; r < R; ++r) right[r] = Vec::loadu(b + k * b_stride + r * kLanes);
    for (int i = 0; i < M; ++i) {
      const Vec left(by == By::rows ? a[i * a_stride + k] : a[k * a_stride + i]);
      for (int r = 0; r < R; ++r) c[i][r] = at::vec::fmadd(left, right[r], c[i][r]);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int r = 0; r < R; ++r) finish(i, r, c[i][r]);
  }
}

// The rows [i, rows) of a product that is R vectors wide, where fewer than M + 1 are left.
template <By by, int M, int R, typename Start, typename Finish>
inline __attribute__((always_inline)) void last_rows(const float* a, int64_t a_stride,
                                                     const float* b, int64_t b_stride,
                                                     int64_t depth, int64_t left, Start start,
                                                     Finish finish) {
  if constexpr (M > 0) {
    if (left == M) {
      tile_product<by, M, R>(a, a_stride, b, b_stride, depth, start, finish);
    } else {
      last_rows<by, M - 1, R>(a, a_stride, b, b_stride, depth, left, start, finish);
    }
  }
}

// All rows of a product that is R vectors wide.
template <By by, int R, typename Start, typename Finish>
inline __attribute__((always_inline)) void panel_product(const float* a, int64_t a_stride,
                                                         const float* b, int64_t b_stride,
                                                         int64_t rows, int64_t depth, Start start,
                                                         Finish finish) {
  const int64_t step = by == By::rows ? a_stride : 1;
  int64_t i = 0;
  constexpr int M = tile_rows(R);
  for (; i + M <= rows; i += M) {
    tile_product<by, M, R>(
        a + i * step, a_stride, b, b_stride, depth, [&](int m, int r) { return start(i + m, r); },
        [&](int m, int r, const Vec& c) { finish(i + m, r, c); });
  }
  last_rows<by, M - 1, R>(
      a + i * step, a_stride, b, b_stride, depth, rows - i,
      [&](int m, int r) { return start(i + m, r); },
      [&](int m, int r, const Vec& c) { finish(i + m, r, c); });
}

// Calls f with the constant vecs, 1 ... kTileVecs.
template <int R = kTileVecs, typename F>
inline __attribute__((always_inline)) void with_vecs(int64_t vecs, F f) {
  if constexpr (R > 1) {
    if (vecs < R) return with_vecs<R - 1>(vecs, f);
  }
  f(std::integral_constant<int, R>());
}

// C += A B; C is [rows, width], width a multiple of kLanes.
template <By by>
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
              int64_t c_stride, int64_t rows, int64_t width, int64_t depth) {
  for (int64_t n = 0; n < width; n += kTileLanes) {
    with_vecs(min_of(width - n, kTileLanes) / kLanes, [&](auto vecs) {
      float* out = c + n;
      panel_product<by, vecs>(
          a, a_stride, b + n, b_stride, rows, depth,
          [&](int64_t i, int r) { return Vec::loadu(out + i * c_stride + r * kLanes); },
          [&](int64_t i, int r, const Vec& x) { x.store(out + i * c_stride + r * kLanes); });
    });
  }
}

// ---- Transposition -----------------------------------------------------------------------------

// out(j, i) = factor * in(i, j) of one block of kLanes by kLanes. Interleaving rows i and i + n / 2,
// for all i, rotates the bits of the element's address by one; after log2 n times row and column
// have changed places.
inline void transpose_block(const float* in, int64_t in_stride, float* out, int64_t out_stride,
                            float factor) {
  constexpr int n = int(kLanes), half = n / 2;
  Vec rows[2][n];
  for (int i = 0; i < n; ++i) rows[0][i] = Vec::loadu(in + i * in_stride) * Vec(factor);
  int side = 0;
#pragma GCC unroll 4  // as is what is within: all of it stays in registers
  for (int step = 1; step < n; step *= 2, side = 1 - side) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const auto pair = at::vec::interleave2(rows[side][i], rows[side][i + half]);
      rows[1 - side][2 * i] = pair.first;
      rows[1 - side][2 * i + 1] = pair.second;
    }
  }
  for (int i = 0; i < n; ++i) rows[side][i].store(out + i * out_stride);
}

// out(j, i) = factor * in(i, j) for in [rows, columns].
inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns,
                      float factor, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      if (i + kLanes <= rows && j + kLanes <= columns) {
        transpose_block(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride,
                        factor);
        continue;
      }
      for (int64_t r = i; r < min_of(i + kLanes, rows); ++r) {
        for (int64_t c = j; c < min_of(j + kLanes, columns); ++c) {
          out[c * out_stride + r] = factor * in[r * in_stride + c];
        }
      }
    }
  }
}

// ---- Across lanes ------------------------------------------------------------------------------

// The largest of all lanes, NaN where one is: each step compares lanes half a vector apart.
inline float largest_lane(Vec x) {
  for (int64_t step = 1; step < kLanes; step *= 2) {
    const auto pair = at::vec::interleave2(x, x);
    x = at::vec::maximum(pair.first, pair.second);
  }
  float lanes[kLanes];
  x.store(lanes);
  return lanes[0];
}

// The largest of floats that are not negative, given as their bits, which are in the same order; NaN
// where one is.
inline float largest_magnitude(at::vec::Vectorized<int32_t> bits) {
#if defined(CPU_CAPABILITY_AVX512)
  const int32_t most = _mm512_reduce_max_epi32(bits);
#else
  int32_t lanes[kLanes], most = 0;
  bits.store(lanes);
  for (int32_t lane : lanes) most = lane > most ? lane : most;
#endif
  float out;
  std::memcpy(&out, &most, sizeof(out));
  return out;
}

// ---- Exponentials ------------------------------------------------------------------------------

constexpr float kLog2e = 1.4426950408889634f;

// sum_i c[i] x^(i + 1), + 1.
template <int N>
inline __attribute__((always_inline)) Vec polynomial(const float (&c)[N], const Vec& x) {
  Vec p(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) p = at::vec::fmadd(p, x, Vec(c[i]));
  return at::vec::fmadd(p, x, Vec(1.f));
}

// 2^x within 1.5 ulp for x < 128, by a minimax polynomial of what is left of x after an integer, of
// relative error 2e-9; 1 at 0.
#if defined(CPU_CAPABILITY_AVX512)
// Two instructions do what takes eight elsewhere: x - floor(x), and p 2^floor(x).
inline Vec exp2(const Vec& x) {
  constexpr float kOnUnit[] = {6.931470633e-1f, 2.402293086e-1f, 5.548528209e-2f,
                               9.675452486e-3f, 1.246783999e-3f, 2.161294107e-4f};
  return _mm512_scalef_ps(polynomial(kOnUnit, Vec(_mm512_reduce_ps(x, 1))), x);
}
#else
// The power of two is added to the exponent's bits: at -127 those of 1 become 0, as is 2^x below.
inline Vec exp2(const Vec& x) {
  using Int = at::vec::Vectorized<int32_t>;
  constexpr float kAroundZero[] = {6.931471825e-1f, 2.402264774e-1f, 5.550332367e-2f,
                                   9.618436918e-3f, 1.339887618e-3f, 1.535336195e-4f};
  const Vec clamped = at::vec::clamp_min(x, Vec(-127.f));  // keeps NaN
  const Vec n = clamped.round();
  const Int exponent = at::vec::convert_to_int_of_same_size(n) << Int(23);
  const Vec p = polynomial(kAroundZero, clamped - n);
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
}
#endif

// e^(score - from). The difference first: where both are the same, this is 1 however large they are.
inline Vec exp_difference(const Vec& score, const Vec& from) {
  return exp2((score - from) * Vec(kLog2e));
}

// tanh within 4 ulp: an odd polynomial near 0, where 1 - 2 / (1 + e^2x) would cancel.
inline Vec tanh(const Vec& x) {
  const Vec square = x * x;
  Vec p(-5.895142443e-3f);
  p = at::vec::fmadd(p, square, Vec(2.079595812e-2f));
  p = at::vec::fmadd(p, square, Vec(-5.378382653e-2f));
  p = at::vec::fmadd(p, square, Vec(1.333192438e-1f));
  p = at::vec::fmadd(p, square, Vec(-3.333329856e-1f));
  const Vec near = at::vec::fmadd(p * square, x, x);
  const Vec two_log2e(2.885390082f);
  const Vec bounded = at::vec::clamp_max(at::vec::clamp_min(x, Vec(-16.f)), Vec(16.f));
  const Vec far = Vec(1.f) - Vec(2.f) / (Vec(1.f) + exp2(bounded * two_log2e));
  return Vec::blendv(far, near, square < Vec(0.36f));
}

// ---- Rows of any type --------------------------------------------------------------------------

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

inline uint16_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline float from_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = float_to_bits(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t bits =
      magnitude >= 0x7c00u ? special : (magnitude < 0x0400u ? subnormal : normal);
  return bits_to_float(bits | sign);
}

inline uint16_t to_f16(float x) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  // Adding 1/2 leaves the multiples of 2^-24 in the last bits, rounded by the addition itself.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65,520 and above
  half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
  return uint16_t(half | sign);
}

// out[0 ... count) from the elements [first, first + count) of data.
inline void load_row(const void* data, FloatType type, int64_t first, int64_t count, float* out) {
  if (count == 0) return;  // of a tensor without elements, data may be null
  if (type == FloatType::f32) {
    std::memcpy(out, static_cast<const float*>(data) + first, size_t(count) * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(data) + first;
  if (type == FloatType::bf16) {
    for (int64_t j = 0; j < count; ++j) out[j] = from_bf16(half[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) out[j] = from_f16(half[j]);
  }
}

inline void store_row(const float* x, int64_t count, FloatType type, void* data, int64_t first) {
  if (count == 0) return;
  if (type == FloatType::f32) {
    std::memcpy(static_cast<float*>(data) + first, x, size_t(count) * sizeof(float));
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(data) + first;
  if (type == FloatType::bf16) {
    for (int64_t j = 0; j < count; ++j) half[j] = to_bf16(x[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) half[j] = to_f16(x[j]);
  }
}

}  // namespace
}  // namespace t2i::cpu::CPU_CAPABILITY
