#include "cpu/vq_tree.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/vq_nearest.h"

namespace t2i::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Place {
  float key;
  int32_t code;
};

struct Builder {
  const float* points;
  int64_t dim, depth;
  VqTreeMemory& memory;
  std::vector<Place> places;
  std::vector<float> boxes;  // [2^(depth + 1) - 1, 2, dim], in the order of a heap

  float* low(int64_t node) { return boxes.data() + node * 2 * dim; }
  float* high(int64_t node) { return low(node) + dim; }

  // The node'th box, of the codes at the places [begin, end), and everything below it.
  void split(int64_t node, int64_t level, int64_t begin, int64_t end) {
    std::fill(low(node), low(node) + dim, kInf);
    std::fill(high(node), high(node) + dim, -kInf);
    for (int64_t i = begin; i < end; ++i) {
      const float* point = points + places[i].code * dim;
      for (int64_t j = 0; j < dim; ++j) {
        low(node)[j] = std::min(low(node)[j], point[j]);
        high(node)[j] = std::max(high(node)[j], point[j]);
      }
    }
    if (level == depth) {
      const int64_t leaf = node - ((int64_t(1) << depth) - 1);
      // The first of equal codes is found first.
      std::sort(places.begin() + begin, places.begin() + end,
                [](const Place& a, const Place& b) { return a.code < b.code; });
      for (int64_t i = begin; i < end; ++i) {
        memory.order[leaf * kBlock + i - begin] = places[i].code;
      }
      return;
    }
    int64_t axis = 0;
    for (int64_t j = 1; j < dim; ++j) {
      if (high(node)[j] - low(node)[j] > high(node)[axis] - low(node)[axis]) axis = j;
    }
    for (int64_t i = begin; i < end; ++i) places[i].key = points[places[i].code * dim + axis];
    const int64_t middle = begin + (end - begin + 1) / 2;
    if (middle < end) {
      std::nth_element(places.begin() + begin, places.begin() + middle, places.begin() + end,
                       [](const Place& a, const Place& b) { return a.key < b.key; });
    }
    float left = -kInf, right = kInf;
    for (int64_t i = begin; i < middle; ++i) left = std::max(left, places[i].key);
    for (int64_t i = middle; i < end; ++i) right = std::min(right, places[i].key);
    memory.axis[node] = int32_t(axis);
    memory.split[node] = right == kInf ? kInf : left + (right - left) / 2;
    split(2 * node + 1, level + 1, begin, middle);
    split(2 * node + 2, level + 1, middle, end);
  }
};

}  // namespace

VqTree build_tree(const float* points, int64_t num_codes, int64_t dim, VqTreeMemory& memory) {
  VqTree tree;
  tree.depth = 0;
  while ((num_codes + (int64_t(1) << tree.depth) - 1) >> tree.depth > kBlock) ++tree.depth;
  const int64_t leaves = int64_t(1) << tree.depth;
  memory.order.assign(leaves * kBlock, -1);
  memory.axis.assign(leaves - 1, 0);
  memory.split.assign(leaves - 1, 0);
  Builder builder{points, dim, tree.depth, memory, {}, {}};
  builder.boxes.resize((2 * leaves - 1) * 2 * dim);
  builder.places.resize(num_codes);
  for (int64_t k = 0; k < num_codes; ++k) builder.places[k] = {0, int32_t(k)};
  builder.split(0, 0, 0, num_codes);

  double square = 0;
  for (int64_t j = 0; j < dim; ++j) {
    const double side = std::max(std::fabs(builder.low(0)[j]), std::fabs(builder.high(0)[j]));
    square += side * side;
  }
  tree.radius = float(std::sqrt(square) * (1 + 0x1p-20));

  // Levels of boxes from the leaves up.
  memory.boxes.clear();
  std::vector<int64_t> depths;
  for (int64_t depth = tree.depth; depth > 0; depth -= 4) depths.insert(depths.begin(), depth);
  tree.num_levels = int64_t(depths.size());
  for (int64_t l = 0; l < tree.num_levels; ++l) {
    const int64_t nodes = int64_t(1) << depths[l];
    tree.num_groups[l] = (nodes + kWide - 1) / kWide;
    // A box at infinity is never entered.
    AlignedFloats level(tree.num_groups[l] * 2 * dim * kWide, kInf);
    for (int64_t i = 0; i < nodes; ++i) {
      const int64_t node = nodes - 1 + i;
      for (int64_t j = 0; j < dim; ++j) {
        float* group = level.data() + i / kWide * 2 * dim * kWide + i % kWide;
        if (builder.low(node)[j] == kInf) continue;  // no code in it
        group[j * kWide] = builder.low(node)[j];
        group[(dim + j) * kWide] = builder.high(node)[j];
      }
    }
    memory.boxes.push_back(std::move(level));
  }
  tree.axis = memory.axis.data();
  tree.split = memory.split.data();
  for (int64_t l = 0; l < tree.num_levels; ++l) tree.boxes[l] = memory.boxes[l].data();
  return tree;
}

}  // namespace t2i::cpu
