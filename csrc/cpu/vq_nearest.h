// Nearest code of each vector, exactly, without a matrix of distances. Free of torch; all memory is
// the caller's.
//
// Both metrics are one search: the nearest neighbour, by Euclidean distance, of *points*. The point
// of a vector is itself (l2) or its direction, on the unit sphere (cosine: |p - q|^2 = 2 - 2 cos).
//
// The search is a fast pass in fp32 that certifies, and a slow one in fp64 that decides:
//
//   1. Points are centred on the codebook's mean and scaled by a power of two. That keeps the order
//      of distances, and |c|^2/2 - z.c, which takes one multiply-add a dimension, no longer cancels
//      where all data is far from 0.
//   2. Codes are scored in blocks of 16, and the lowest score of each block is kept. With a bound
//      E(z, block) on the error of scores, the least lowest + E is an upper bound on the best.
//   3. A block with lowest - E above that cannot hold the nearest code. In the others, the codes
//      with score - E not above it are measured in fp64, and the nearest of these, the lowest index
//      first, is the answer. Usually there is one.
//
// In few dimensions most codes are ruled out before they are scored. The leaves of a tree of boxes
// (vq_tree.h) are the blocks then. The upper bound of a vector, from the leaf that it falls into, is
// a radius around it, and only leaves whose box is within it are scored; they lower the bound in
// turn. Vectors are searched for in the order of their leaves, so that each starts with the leaf
// where its neighbour ended.
//
// On AMX a pass in bf16, with its own and wider bound, comes before step 2 where all codes are
// searched (vq_coarse.h): fp32 scores only the blocks that it could not rule out.
//
// The bound (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1): with u = 2^-24,
// an fp32 sum of d products that starts from h is off by at most gamma_{d+1} (|h| + sum |z_i c_i|),
// gamma_n = n u / (1 - n u), fused or not and in any order. With |c| <= C in a block, h = |c|^2/2
// and Cauchy-Schwarz, that is gamma (C^2/2 + |z| C). The roundings of h, z and c, and of the bound
// itself, add a few u to gamma: see error_gamma(). E also covers what fp64 rounds: codes that it finds
// equally near are all measured, and the lowest index among them is the answer in every case.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/vq_tree.h"

namespace t2i::cpu {

enum class Metric { l2, cosine };

constexpr int64_t kBlock = 16;    // codes a block
constexpr int64_t kQueries = 96;  // vectors, the unit that search() is called with

// A codebook made ready for search.
struct VqCodebook {
  const float* codes;  // [num_codes, dim], contiguous
  int64_t num_codes;
  int64_t num_blocks;
  int64_t dim;
  Metric metric;
  const int32_t* order;  // [num_blocks, kBlock], the code at each place, -1 for none; null: in order

  double* center;      // [dim], the mean of the codes' points
  double scale = 1;    // a power of two
  float* packed;       // [num_blocks, dim, kBlock], -scale * (point - center)
  float* half_norm;    // [num_blocks, kBlock], of the packed point squared; inf without a code
  float* error_base;   // [num_blocks]: the error of a score is at most
  float* error_slope;  // [num_blocks]      error_base + |query| error_slope

  // Of a first pass in less than fp32; null where there is none. One block more is read.
  uint16_t* coarse;     // [num_blocks + 1, depth / 32, kBlock, 32], packed, in bf16
  float* coarse_base;   // [num_blocks], as error_*
  float* coarse_slope;  // [num_blocks]
};

struct VqKernels {
  // Finds center and scale. Returns the first code that holds NaN or inf, or -1.
  int64_t (*center)(VqCodebook& codebook);

  // Fills blocks [begin, end) of packed, half_norm, error_* and, if there is one, coarse with its
  // bounds. workspace: dim doubles.
  void (*pack)(const VqCodebook& codebook, int64_t begin, int64_t end, double* workspace);

  // Searches for the units [begin, end) of the n vectors z [n, dim]. Writes indices [n] and, unless
  // it is null, distance [n]. Returns the first vector of these units that holds NaN or inf, or -1.
  int64_t (*search)(const VqCodebook& codebook, const float* z, int64_t n, int64_t begin,
                    int64_t end, int64_t* indices, float* distance, double* workspace);

  // Size of search's workspace, in doubles.
  int64_t (*search_workspace)(const VqCodebook& codebook);

  // The leaf of each vector [begin, end): where it falls, whatever is nearest.
  void (*route)(const VqCodebook& codebook, const VqTree& tree, const float* z, int64_t begin,
                int64_t end, int32_t* leaves);

  // As search, for the vectors rows[begin ... end) whose leaves, in ascending order, are
  // leaves[begin ... end). Adds the scores that it computed to scored.
  int64_t (*search_tree)(const VqCodebook& codebook, const VqTree& tree, const float* z,
                         const int32_t* rows, const int32_t* leaves, int64_t begin, int64_t end,
                         int64_t* indices, float* distance, double* workspace, int64_t& scored);

  // Size of search_tree's workspace, in doubles.
  int64_t (*search_tree_workspace)(const VqCodebook& codebook);

  // Dimensions of a code in the first pass, 0 where there is none.
  int64_t (*coarse_depth)(int64_t dim);

  // When to prefer a tree: the share of all codes that it may have to score, and the values of
  // vectors that a thread must search for if it has yet to be built.
  double tree_share;
  int64_t tree_values;
};

namespace DEFAULT {
extern const VqKernels vq_kernels;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const VqKernels vq_kernels;
}
namespace AVX512 {
extern const VqKernels vq_kernels;
}
#if defined(T2I_AMX)
namespace AMX {
extern const VqKernels vq_kernels;
}
#endif
#endif

inline const VqKernels& vq_kernels() {
#if defined(__x86_64__)
#if defined(T2I_AMX)
  if (capability() == Capability::AMX) return AMX::vq_kernels;
#endif
  if (capability() >= Capability::AVX512) return AVX512::vq_kernels;
  if (capability() == Capability::AVX2) return AVX2::vq_kernels;
#endif
  return DEFAULT::vq_kernels;
}

}  // namespace t2i::cpu
