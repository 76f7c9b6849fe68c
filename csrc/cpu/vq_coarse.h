// A first pass of vq_nearest in bf16 on AMX, which rules out most blocks of codes; those that are
// left are scored in fp32. Part of vq_nearest.cpp.
//
// With x rounded to bf16 twice, x = hi + lo + e, |lo| <= 2^-8 |x| and |e| <= 2^-16 |x|:
//
//   z.c = hi(z).hi(c)                                    within 2^-7 (1 + 2^-8) |z| |c|
//       = hi(z).hi(c) + hi(z).lo(c) + lo(z).hi(c)        within 3 2^-16 (1 + 2^-7) |z| |c|
//
// The second costs nothing where all three fit into one tile of 32 dimensions. Products of bf16 are
// exact in fp32; their sum has the bound of vq_nearest.h for as many terms as there are.
#pragma once

#include "cpu/amx.h"
#include "cpu/vq_nearest.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kMaxCoarseDim = 1024;

constexpr int64_t coarse_terms(int64_t dim) { return 3 * dim <= kTileDepth ? 3 : 1; }

// Dimensions of a vector in bf16; 0 where there is no such pass.
constexpr int64_t coarse_depth(int64_t dim) {
  return dim > kMaxCoarseDim ? 0 : round_up(max_of(coarse_terms(dim) * dim, 1), kTileDepth);
}

// Of |z| |c|, what rounding to bf16 is off by.
constexpr double coarse_epsilon(int64_t dim) {
  return coarse_terms(dim) == 3 ? 3 * 0x1p-16 * 1.01 : 0x1p-7 * 1.01;
}

// out[depth]: x [dim] or, of a query, its terms in the other order.
inline void round_vector(const float* x, int64_t dim, bool query, Half* out) {
  const int64_t depth = coarse_depth(dim);
  for (int64_t j = 0; j < dim; ++j) out[j] = to_bf16(x[j]);
  int64_t used = dim;
  if (coarse_terms(dim) == 3) {
    for (int64_t j = 0; j < dim; ++j) {
      const Half high = out[j], low = to_bf16(x[j] - from_bf16(high));
      out[dim + j] = query ? high : low;
      out[2 * dim + j] = query ? low : high;
    }
    used = 3 * dim;
  }
  for (int64_t j = used; j < depth; ++j) out[j] = 0;
}

// out[depth / 32, 16, 32]: the codes of a block, whose coordinates are packed [dim, kBlock].
inline void pack_coarse(const float* packed, int64_t dim, Half* out) {
  const int64_t depth = coarse_depth(dim);
  float x[kMaxCoarseDim];
  Half rounded[kMaxCoarseDim];
  for (int64_t lane = 0; lane < kBlock; ++lane) {
    for (int64_t j = 0; j < dim; ++j) x[j] = packed[j * kBlock + lane];
    round_vector(x, dim, false, rounded);
    for (int64_t d = 0; d < depth; d += kTileDepth) {
      std::memcpy(out + d * kBlock + lane * kTileDepth, rounded + d, kTileDepth * sizeof(Half));
    }
  }
}

// out[depth / 2, 16] words: 16 queries [16, dim].
inline void load_coarse(const float* rows, int64_t dim, Word* out) {
  const int64_t depth = coarse_depth(dim);
  alignas(64) Half rounded[kSide * kMaxCoarseDim];
  for (int64_t i = 0; i < kSide; ++i) round_vector(rows + i * dim, dim, true, rounded + i * depth);
  pack_columns(rounded, depth, out);
}

// Lowers upper and writes the minima [end - begin, 32] of the blocks [begin, end), for 32 queries.
inline void score_coarse(const VqCodebook& codebook, int64_t begin, int64_t end,
                         const Word* queries, const float* norms, const float* slack, float* upper,
                         float* minima) {
  const int64_t depth = coarse_depth(codebook.dim), tile = kSide * kTileDepth * sizeof(Half);
  const Factor codes = {codebook.coarse, 64, depth / kTileDepth * tile, tile};
  const Factor query = {queries, 64, depth / kTileDepth * tile, tile};
  Vec norm[2], off[2], bound[2];
  for (int r = 0; r < 2; ++r) {
    norm[r] = Vec::loadu(norms + r * kLanes);
    off[r] = Vec::loadu(slack + r * kLanes);
    bound[r] = Vec::loadu(upper + r * kLanes);
  }
  const Tiles tiles;
  alignas(64) float products[2 * kBlock * 2 * kSide];
  for (int64_t b = begin; b < end; b += 2) {
    multiply_2x2(codes, b, query, 0, depth / kTileDepth, products, 2 * kSide, false);
    for (int64_t i = b; i < min_of(b + 2, end); ++i) {
      const float* half_norm = codebook.half_norm + i * kBlock;
      const Vec base(codebook.coarse_base[i]), slope(codebook.coarse_slope[i]);
      for (int r = 0; r < 2; ++r) {
        const float* product = products + (i - b) * kBlock * 2 * kSide + r * kSide;
        Vec lowest[2] = {Vec(kInf), Vec(kInf)};
#pragma GCC unroll 8
        for (int k = 0; k < kBlock; k += 2) {
          for (int j = 0; j < 2; ++j) {
            const Vec score = Vec::loadu(product + (k + j) * 2 * kSide) + Vec(half_norm[k + j]);
            lowest[j] = at::vec::clamp_max(score, lowest[j]);
          }
        }
        const Vec least = at::vec::clamp_max(lowest[0], lowest[1]);
        least.store(minima + (i - begin) * 2 * kLanes + r * kLanes);
        const Vec error = at::vec::fmadd(norm[r], slope, base) + off[r];
        bound[r] = at::vec::clamp_max(least + error, bound[r]);
      }
    }
  }
  for (int r = 0; r < 2; ++r) bound[r].store(upper + r * kLanes);
}

}  // namespace
}  // namespace t2i::cpu::CPU_CAPABILITY
