// A tree of boxes over the points of a codebook, for vq_nearest.h.
//
// Codes are halved at the median along the widest side of their box, again and again, until
// kBlock or fewer are left. The 2^depth leaves are the blocks of the packed codebook. A search
// goes down by the boxes of every fourth level alone, kWide children at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/aligned.h"

namespace t2i::cpu {

constexpr int64_t kWide = 16;
constexpr int64_t kMaxTreeDim = 16;
constexpr int64_t kMaxTreeLevels = 8;

struct VqTree {
  int64_t depth;
  float radius;  // no point is longer
  // Of the inner nodes of the halving, in the order of a heap: a point whose coordinate along axis
  // is above split belongs to the right half.
  const int32_t* axis;  // [2^depth - 1]
  const float* split;   // [2^depth - 1]
  // boxes[l] are of the nodes at one depth, [nodes / kWide, 2 (low, high), dim, kWide]; those of a
  // group are the children of one node of boxes[l - 1], and the last ones are the leaves.
  int64_t num_levels;
  const float* boxes[kMaxTreeLevels];
  int64_t num_groups[kMaxTreeLevels];
};

// What the arrays of a tree point into.
struct VqTreeMemory {
  std::vector<int32_t> order, axis;
  std::vector<float> split;
  std::vector<AlignedFloats> boxes;
};

// The tree of num_codes points, at least 2, [num_codes, dim], which are finite. memory.order is what
// VqCodebook::order wants.
VqTree build_tree(const float* points, int64_t num_codes, int64_t dim, VqTreeMemory& memory);

}  // namespace t2i::cpu
