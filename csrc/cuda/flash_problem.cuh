// What a block of a kernel of flash_attention works on.
#pragma once

#include "flash_attention.h"
#include "tile.cuh"

namespace t2i::cuda {

// Of a lane's sum over a tile of keys, for there to be no overflow in fp16.
constexpr float kMostInLane = 8192;
// The base where no key was seen: that of any key is above, and -inf minus it is no NaN.
constexpr float kNoKey = -3e38f;

// A tile of queries, or of keys, of one head of one sequence, and what it needs of the others: a range
// of keys, or of queries, whose tiles go by.
struct Problem {
  int first;               // query or key
  int length_q, length_k;  // of this sequence
  int shift;               // query i stands at key i + shift
  int left, right;         // keys it sees before and behind that
  int q_row, k_row;        // where the sequence begins in the tensors
  // A tile of queries needs tiles of keys from begin to end, and sees all of those from full to partial.
  // A tile of keys needs queries from begin to end; those from full to partial see all of it.
  int begin, full, partial, end;
  const char* passing[2];  // rows of the head: of keys and values, or of queries and gradients

  template <int kQueries, int kKeys>
  T2I_DEVICE void find_keys() {
    const int last = min(first + kQueries, length_q) - 1;
    const int at_first = first + shift, at_last = last + shift;
    const int seen = max(min(at_last + right + 1, length_k), 0);
    const int seen_by_all = max(min(at_first + right + 1, length_k), 0);
    begin = max(at_first - left, 0) / kKeys;
    end = (seen + kKeys - 1) / kKeys;
    full = min((max(at_last - left, 0) + kKeys - 1) / kKeys, end);
    partial = max(min(seen_by_all / kKeys, end), full);
  }

  template <int kKeys>
  T2I_DEVICE void find_queries() {
    const int last = min(first + kKeys, length_k) - 1;
    begin = max(first - right - shift, 0);
    end = min(last + left - shift + 1, length_q);
    full = first + kKeys - 1 - right - shift;
    partial = first + left - shift + 1;
  }
};

// The same in shared memory, while tiles go by: all registers are taken.
struct Kept {
  static constexpr uint32_t kBytes = 64;
  uint32_t address;

  T2I_DEVICE void write(const Problem& problem) const {
    const int fields[] = {problem.first, problem.length_q, problem.length_k, problem.shift,
                          problem.left,  problem.right,    problem.q_row,    problem.k_row,
                          problem.begin, problem.full,     problem.partial,  problem.end};
    T2I_UNROLL for (int i = 0; i < 12; ++i) ptx::store_shared(address + 4 * i, uint32_t(fields[i]));
    T2I_UNROLL for (int i = 0; i < 2; ++i) {
      ptx::store_shared_8(address + 48 + 8 * i, reinterpret_cast<uint64_t>(problem.passing[i]));
    }
  }
  T2I_DEVICE int read(int i) const { return int(ptx::load_shared(address + 4 * i)); }
  T2I_DEVICE int first() const { return read(0); }
  T2I_DEVICE int length_q() const { return read(1); }
  T2I_DEVICE int length_k() const { return read(2); }
  T2I_DEVICE int shift() const { return read(3); }
  T2I_DEVICE int left() const { return read(4); }
  T2I_DEVICE int right() const { return read(5); }
  T2I_DEVICE int q_row() const { return read(6); }
  T2I_DEVICE int k_row() const { return read(7); }
  T2I_DEVICE int begin() const { return read(8); }
  T2I_DEVICE int full() const { return read(9); }
  T2I_DEVICE int partial() const { return read(10); }
  T2I_DEVICE int end() const { return read(11); }
  T2I_DEVICE const char* passing(int i) const {
    return reinterpret_cast<const char*>(ptx::load_shared_8(address + 48 + 8 * i));
  }
  // Whether tiles from … to need a mask.
  T2I_DEVICE bool masked(int from, int to) const { return (from < full()) | (to > partial()); }
};

// ``value`` for keys that their query does not see, of scores as mma leaves them: element(r, n, e) is
// that of this lane's r-th query, row_of(r) of its tile, and of the n-th 8 keys from first_key on the
// e-th of two.
template <int kRows, int kKeys, class RowOf, class Scores>
T2I_DEVICE void mask_keys(int first_key, Kept problem, RowOf row_of, float value, Scores element) {
  const int first_of_lane = first_key + threadIdx.x % 4 * 2;
  const int first_at = problem.first() + problem.shift() - first_of_lane;
  const int length_k = problem.length_k() - first_of_lane;
  T2I_UNROLL for (int r = 0; r < kRows; ++r) {
    const int at = first_at + row_of(r);
    const int begin = at - problem.left(), end = min(at + problem.right() + 1, length_k);
    T2I_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
      T2I_UNROLL for (int e = 0; e < 2; ++e) {
        const int key = n * 8 + e;
        if (key < begin || key >= end) element(r, n, e) = value;
      }
    }
  }
}

// Where a row of a head of this block's batch begins.
T2I_DEVICE const char* rows_of(const void* tensor, const Strides& strides, int row, int head) {
  return static_cast<const char*>(tensor) +
         2 * (int(blockIdx.z) * strides.batch + row * strides.row + head * strides.head);
}

// Of the tile-th tile of all sequences its first row; the result is its sequence, or -1. A warp looks
// at 32 sequences at once.
template <int kRows>
T2I_DEVICE int find_tile(const int32_t* ends, int sequences, int tile, int& first) {
  const int lane = threadIdx.x % kWarp;
  for (int before = 0, next = 0; next < sequences; next += kWarp) {
    const int i = next + lane;
    const int tiles = i < sequences ? max(ends[i + 1] - ends[i] + kRows - 1, 0) / kRows : 0;
    int end = before + tiles;
    T2I_UNROLL for (int n = 1; n < kWarp; n *= 2) {
      const int of_lower = __shfl_up_sync(0xffffffffu, end - before, n);
      if (lane >= n) end += of_lower;
    }
    const uint32_t beyond = __ballot_sync(0xffffffffu, tile < end);
    if (beyond) {
      const int found = __ffs(int(beyond)) - 1;
      first = (tile - __shfl_sync(0xffffffffu, end - tiles, found)) * kRows;
      return next + found;
    }
    before = __shfl_sync(0xffffffffu, end, kWarp - 1);
  }
  return -1;
}

// The ``tile``-th problem, of kRows queries or keys, but for what it needs; false if there is none.
template <int kRows, bool kByKeys>
T2I_DEVICE bool find_problem(const FlashAttention& call, int tile, Problem& problem) {
  problem.q_row = problem.k_row = 0;
  problem.first = tile * kRows;
  problem.length_q = call.length_q;
  problem.length_k = call.length_k;
  if (call.cu_q) {
    const int32_t* ends = kByKeys ? call.cu_k : call.cu_q;
    const int sequence = find_tile<kRows>(ends, call.sequences, tile, problem.first);
    if (sequence < 0) return false;
    // Ends that are no such thing are brought inside the tensors: nothing else is read.
    const int q_row = min(max(call.cu_q[sequence], 0), call.length_q);
    const int k_row = min(max(call.cu_k[sequence], 0), call.length_k);
    problem.q_row = q_row;
    problem.k_row = k_row;
    problem.length_q = min(max(call.cu_q[sequence + 1], q_row), call.length_q) - q_row;
    problem.length_k = min(max(call.cu_k[sequence + 1], k_row), call.length_k) - k_row;
  }
  constexpr int kAll = 1 << 30;
  problem.shift = problem.length_k - problem.length_q;
  problem.left = call.window_left < 0 ? kAll : call.window_left;
  problem.right = call.window_right < 0 ? kAll : call.window_right;
  return problem.first < (kByKeys ? problem.length_k : problem.length_q);
}

// A tile of queries of a head, and the keys that it needs.
template <int kQueries, int kKeys>
T2I_DEVICE bool find_queries_problem(const FlashAttention& call, Problem& problem) {
  // The last queries of a causal problem see most keys, so theirs come first.
  const int tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y / call.group;
  if (!find_problem<kQueries, false>(call, tile, problem)) return false;
  problem.passing[0] = rows_of(call.k, call.k_strides, problem.k_row, kv_head);
  problem.passing[1] = rows_of(call.v, call.v_strides, problem.k_row, kv_head);
  problem.find_keys<kQueries, kKeys>();
  return true;
}

}  // namespace t2i::cuda
