// Products of bf16 with sums in fp32 on AMX: tiles of 16 by 32 times 32 by 16.
//
// A tile of the right factor holds pairs of its rows interleaved: words (b(2k, n), b(2k + 1, n)).
// For sources that are compiled for it, inside the namespace CPU_CAPABILITY.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kSide = 16;       // rows, and words a row, of a tile
constexpr int64_t kTileDepth = 32;  // bf16 a row
static_assert(kLanes == kSide);

using Half = uint16_t;  // bf16
using Word = uint32_t;  // a pair of them

// Instructions on tiles say less than they do about the memory that they read and write (in GCC 12):
// nothing is to be moved across, or left out.
inline void memory_is_as_written() { asm volatile("" ::: "memory"); }

// All eight tiles of the thread, 16 rows of 64 bytes each, until the end of the scope.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};  // the palette
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = kSide;
    }
    asm volatile("" ::"r"(config) : "memory");
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// A factor of a product, in bytes: where its next tile of the same depth is, and the next depth.
struct Factor {
  const void* data;
  int64_t stride, next, step;

  const char* tile(int64_t i, int64_t k) const {
    return static_cast<const char*>(data) + i * next + k * step;
  }
};

// C += A B, or = A B, for C [2 rows, 2 columns] tiles of fp32; depth counts tiles.
inline void multiply_2x2(const Factor& a, int64_t i, const Factor& b, int64_t n, int64_t depth,
                         float* c, int64_t c_stride, bool add) {
  float *c0 = c, *c1 = c + kSide, *c2 = c + kSide * c_stride, *c3 = c2 + kSide;
  const int64_t stride = c_stride * 4;
  memory_is_as_written();
  if (add) {
    _tile_loadd(0, c0, stride);
    _tile_loadd(1, c1, stride);
    _tile_loadd(2, c2, stride);
    _tile_loadd(3, c3, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; ++k) {
    _tile_loadd(4, a.tile(i, k), a.stride);
    _tile_loadd(6, b.tile(n, k), b.stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b.tile(n + 1, k), b.stride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a.tile(i + 1, k), a.stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c0, stride);
  _tile_stored(1, c1, stride);
  _tile_stored(2, c2, stride);
  _tile_stored(3, c3, stride);
  memory_is_as_written();
}

// out(j, i) = in(i, j) for 16 by 16 words; see transpose_block in vec.h. Not as floats, which would
// change NaN.
inline void transpose_words(const Word* in, int64_t in_stride, Word* out, int64_t out_stride) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  __m512i rows[2][kSide];
  for (int i = 0; i < kSide; ++i) rows[0][i] = _mm512_loadu_si512(in + i * in_stride);
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < kSide / 2; ++i) {
      const __m512i a = rows[step % 2][i], b = rows[step % 2][i + kSide / 2];
      rows[1 - step % 2][2 * i] = _mm512_permutex2var_epi32(a, low, b);
      rows[1 - step % 2][2 * i + 1] = _mm512_permutex2var_epi32(a, high, b);
    }
  }
  for (int i = 0; i < kSide; ++i) _mm512_storeu_si512(out + i * out_stride, rows[0][i]);
}

// out[width / 2, 16]: words of 16 rows [16, width], width a multiple of 32, one row a column.
inline void pack_columns(const Half* rows, int64_t width, Word* out) {
  for (int64_t w = 0; w < width / 2; w += kSide) {
    transpose_words(reinterpret_cast<const Word*>(rows) + w, width / 2, out + w * kSide, kSide);
  }
}

}  // namespace
}  // namespace t2i::cpu::CPU_CAPABILITY
