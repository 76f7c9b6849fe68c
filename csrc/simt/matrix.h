// Matrix instructions of PTX, at the level of fragments: which lane holds which element is as in the
// PTX manual ("Matrix fragments for mma.m16n8k16", "Warp-level matrix load instruction: ldmatrix").
#pragma once

#include "simt.h"

namespace simt {

struct Fp16 {
  static float widen(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  }
  static uint16_t round(float value) {
    const _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
};

struct Bf16 {
  static float widen(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
  static uint16_t round(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

// ``exact``, off by a fixed function of x that is as large as allowed, so that nothing relies on better.
SIMT_UNCHECKED inline float approximate(double exact, float x, double most) {
  uint32_t hash = std::bit_cast<uint32_t>(x) * 2654435761u;
  hash ^= hash >> 15;
  const double error = (double(hash & 0xffff) / 0x8000 - 1) * (most - 0x1p-24);  // less the rounding's
  const float result = float(exact * (1 + error));
  return std::fabs(result) < 0x1p-126f ? std::copysign(0.0f, result) : result;
}

// ex2.approx.ftz.f32 and rcp.approx.ftz.f32: within 2^-22 and 2^-23; exact where the result is a power
// of two; subnormals are zero.
SIMT_UNCHECKED inline float ex2(float x) {
  return approximate(std::exp2(double(x)), x, x == std::floor(x) ? 0x1p-24 : 0x1p-22);
}
SIMT_UNCHECKED inline float reciprocal(float x) {
  if (std::fabs(x) < 0x1p-126f) x = std::copysign(0.0f, x);
  return approximate(1 / double(x), x, std::bit_cast<uint32_t>(x) << 9 ? 0x1p-23 : 0x1p-24);
}

inline void check_whole_warp(uint32_t lanes) {
  if (lanes != 0xffffffffu) fail("divergent warp: only lanes %08x are there", lanes);
}

// ldmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16: lane 8 m + i passes the address of row i
// of matrix m; lane l receives elements 2 (l % 4) and the next of row l / 4, of each matrix.
struct LoadMatrix {
  uint32_t row;
  uint32_t* to;
  const void* instruction;
};

template <int kMatrices, bool kTransposed>
SIMT_UNCHECKED void load_matrices(void* const (&operands)[32], uint32_t lanes) {
  check_whole_warp(lanes);
  auto lane = [&](int l) { return static_cast<LoadMatrix*>(operands[l]); };
  uint32_t addresses[32];
  for (int m = 0; m < kMatrices; ++m) {
    uint16_t rows[8][8];
    for (int i = 0; i < 8; ++i) {
      const int l = m * 8 + i;
      addresses[l] = lane(l)->row;
      if (addresses[l] % 16 != 0) {
        fail("misaligned: lane %d's %s", l, shared_name(addresses[l]).c_str());
      }
      const void* row = shared_pointer(addresses[l], 16);
      touch(row, 16, Access::read, lane_of_warp(l), lane(l)->instruction);
      std::memcpy(rows[i], row, 16);
    }
    for (int l = 0; l < 32; ++l) {
      const int i = l / 4, j = l % 4 * 2;
      const uint32_t low = kTransposed ? rows[j][i] : rows[i][j];
      const uint32_t high = kTransposed ? rows[j + 1][i] : rows[i][j + 1];
      lane(l)->to[m] = low | high << 16;
    }
  }
  count_shared(lane(0)->instruction, addresses, 8 * kMatrices, 16);
}

template <int kMatrices, bool kTransposed>
SIMT_UNCHECKED __attribute__((noinline)) void ldmatrix(uint32_t* to, uint32_t row, Site site) {
  LoadMatrix mine{row, to, __builtin_return_address(0)};
  collective(site, "ldmatrix", 0xffffffffu, &mine, load_matrices<kMatrices, kTransposed>);
}

// movmatrix.sync.aligned.m8n8.trans.b16: lane l passes and receives elements 2 (l % 4) and the next of
// row l / 4.
SIMT_UNCHECKED inline void transpose_matrix(void* const (&operands)[32], uint32_t mask) {
  if (mask != 0xffffffffu) fail("movmatrix: mask %08x is not the whole warp", mask);
  uint16_t rows[8][8];
  for (int l = 0; l < 32; ++l) std::memcpy(&rows[l / 4][l % 4 * 2], operands[l], 4);
  for (int l = 0; l < 32; ++l) {
    const int i = l / 4, j = l % 4 * 2;
    *static_cast<uint32_t*>(operands[l]) = rows[j][i] | uint32_t(rows[j + 1][i]) << 16;
  }
}

SIMT_UNCHECKED inline uint32_t movmatrix(uint32_t x, Site site) {
  collective(site, "movmatrix", 0xffffffffu, &x, transpose_matrix);
  return x;
}

// mma.sync.aligned.m16n8k16.row.col.f32.{f16,bf16}: d = a b + c, sums in fp32 in the order of k. Real
// matrix units keep fewer bits of what they align; tests allow for that.
struct Multiply {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

template <class Element>
SIMT_UNCHECKED void multiply_16816(void* const (&operands)[32], uint32_t lanes) {
  check_whole_warp(lanes);
  float a[16][16], b[16][8], sums[16][8] = {};
  for (int l = 0; l < 32; ++l) {
    const auto* x = static_cast<const Multiply*>(operands[l]);
    const int row = l / 4, column = l % 4 * 2;
    for (int r = 0; r < 4; ++r) {
      for (int half = 0; half < 2; ++half) {
        const auto value = Element::widen(uint16_t(x->a[r] >> 16 * half));
        a[row + r % 2 * 8][column + r / 2 * 8 + half] = value;
      }
    }
    for (int r = 0; r < 2; ++r) {
      for (int half = 0; half < 2; ++half) {
        b[column + r * 8 + half][row] = Element::widen(uint16_t(x->b[r] >> 16 * half));
      }
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    auto* x = static_cast<Multiply*>(operands[l]);
    for (int r = 0; r < 4; ++r) x->d[r] = x->c[r] + sums[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
  }
}

template <class Element>
SIMT_UNCHECKED void mma_16816(float* d, const uint32_t* a, const uint32_t* b, const float* c,
                              Site site) {
  Multiply mine{d, a, b, c};
  collective(site, "mma.m16n8k16", 0xffffffffu, &mine, multiply_16816<Element>);
}

}  // namespace simt
