// What both implementations of flash_attention.h share: rows in and out of the caller's tensors, and
// which keys they see. For sources that are compiled once per instruction set.
#pragma once

#include "cpu/flash_attention.h"
#include "cpu/vec.h"

namespace t2i::cpu::CPU_CAPABILITY {
namespace {

// ---- Rows --------------------------------------------------------------------------------------

inline int64_t element(const Rows& rows, int64_t i, int64_t head) {
  return rows.first + i * rows.row_stride + head * rows.head_stride;
}

// Element of row r of a key head's stack.
inline int64_t stacked(const Attention& a, const Rows& rows, int64_t kv_head, int64_t r) {
  return element(rows, r / a.groups, kv_head * a.groups + r % a.groups);
}

// out[count, stride]: the rows [row, row + count) of the stack; 0 from width to stride.
inline void load_stacked(const Attention& a, const Rows& rows, int64_t kv_head, int64_t row,
                         int64_t count, int64_t width, int64_t stride, float* out) {
  for (int64_t r = 0; r < count; ++r, out += stride) {
    load_row(rows.data, a.type, stacked(a, rows, kv_head, row + r), width, out);
    for (int64_t d = width; d < stride; ++d) out[d] = 0;
  }
}

// out[width, kTileLanes] for each tile of lanes: the rows [row, row + count) of the stack, times
// factor; 0 behind them. scratch: kTileLanes * width floats.
inline void load_transposed(const Attention& a, const Rows& rows, int64_t kv_head, int64_t row,
                            int64_t count, int64_t width, float factor, float* out,
                            float* scratch) {
  for (int64_t first = 0; first < count; first += kTileLanes) {
    const int64_t here = min_of(kTileLanes, count - first), padded = round_up(here, kLanes);
    load_stacked(a, rows, kv_head, row + first, here, width, width, scratch);
    std::memset(scratch + here * width, 0, size_t((padded - here) * width) * sizeof(float));
    transpose(scratch, width, padded, width, factor, out + first * width, kTileLanes);
  }
}

// out[count, width]: the keys or values [key, key + count).
inline void load_keys(const Attention& a, const Rows& rows, int64_t kv_head, int64_t key,
                      int64_t count, int64_t width, float* out) {
  for (int64_t j = 0; j < count; ++j, out += width) {
    load_row(rows.data, a.type, element(rows, key + j, kv_head), width, out);
  }
}

// ---- What a row sees ---------------------------------------------------------------------------

struct Range {
  int64_t begin, end;
};

inline Range intersection(Range a, Range b) {
  const int64_t begin = max_of(a.begin, b.begin), end = min_of(a.end, b.end);
  return {begin, max_of(begin, end)};
}

// The last query stands at the last key.
inline int64_t position(const Attention& a, const Sequence& s, int64_t row) {
  return row / a.groups + s.k_length - s.q_length;
}

// The keys that at least one of the rows [row, row + count) sees.
inline Range seen_by_any(const Attention& a, const Sequence& s, int64_t row, int64_t count) {
  return intersection({position(a, s, row) - a.left, position(a, s, row + count - 1) + a.right + 1},
                      {0, s.k_length});
}

// The keys that all of them see.
inline Range seen_by_all(const Attention& a, const Sequence& s, int64_t row, int64_t count) {
  return intersection({position(a, s, row + count - 1) - a.left, position(a, s, row) + a.right + 1},
                      {0, s.k_length});
}

// Where the first block of keys begins that a range from key on needs: blocks are counted from key,
// whatever the range is.
inline int64_t first_block(int64_t key, Range range, int64_t block) {
  return key + (range.begin - key) / block * block;
}

// The rows of the stack that see at least one of the keys.
inline Range rows_that_see(const Attention& a, const Sequence& s, Range keys) {
  const int64_t offset = s.k_length - s.q_length;
  const Range queries = intersection(
      {keys.begin - a.right - offset, keys.end - 1 + a.left - offset + 1}, {0, s.q_length});
  return {queries.begin * a.groups, queries.end * a.groups};
}

// Masks of what one vector of rows sees. Positions count from that of its first row, which keeps
// them exact in fp32.
struct Sight {
  Vec place;
  int64_t first;
  Vec left, right;

  Sight(const Attention& a, const Sequence& s, int64_t row)
      : first(position(a, s, row)), left(-float(a.left)), right(float(a.right)) {
    float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = float(position(a, s, row + i) - first);
    place = Vec::loadu(lanes);
  }

  Vec of(int64_t key) const {
    const Vec distance = Vec(float(key - first)) - place;
    return (distance <= right) & (distance >= left);
  }
};

// Where the logsumexp of row r of a stack is, and its gradient.
inline int64_t statistic(const Attention& a, const Sequence& s, int64_t kv_head, int64_t r) {
  return (kv_head * a.groups + r % a.groups) * s.logsumexp_stride + r / a.groups;
}

// The result of row r of a stack: into the caller's tensors or, where there is one, place `at` of a
// partial.
inline void store_result(const Attention& a, const Sequence& s, int64_t kv_head, int64_t r,
                         const float* out, float logsumexp, const Partial* partial, int64_t at) {
  if (partial) {
    store_row(out, a.v_dim, FloatType::f32, partial->out, at * a.v_dim);
    partial->logsumexp[at] = logsumexp;
    return;
  }
  store_row(out, a.v_dim, a.type, s.out.data, stacked(a, s.out, kv_head, r));
  s.logsumexp[statistic(a, s, kv_head, r)] = logsumexp;
}

}  // namespace
}  // namespace t2i::cpu::CPU_CAPABILITY
