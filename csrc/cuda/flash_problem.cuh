// What a block of a kernel of flash_attention works on.
#pragma once

#include "flash_attention.h"
#include "tile.cuh"

namespace t2i::cuda {

// A tile of queries, or of keys, of one head of one sequence.
struct Problem {
  int first;               // query or key
  int length_q, length_k;  // of this sequence
  int shift;               // query i stands at key i + shift
  int left, right;         // keys it sees before and behind that
  int q_row, k_row;        // where the sequence begins in the tensors
  int kv_head;
  int begin, end;  // of the queries that see one of a tile's keys
};

// The same in shared memory, while tiles go by: all registers are taken.
struct Kept {
  static constexpr uint32_t kBytes = 44;
  uint32_t address;

  T2I_DEVICE void write(const Problem& problem) const {
    const int fields[] = {problem.first, problem.length_q, problem.length_k, problem.shift,
                          problem.left,  problem.right,    problem.q_row,    problem.k_row,
                          problem.kv_head, problem.begin, problem.end};
    T2I_UNROLL for (int i = 0; i < 11; ++i) ptx::store_shared(address + 4 * i, uint32_t(fields[i]));
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
  T2I_DEVICE int kv_head() const { return read(8); }
  T2I_DEVICE int begin() const { return read(9); }
  T2I_DEVICE int end() const { return read(10); }
};

// Where a row of a head of this block's batch begins.
T2I_DEVICE const char* rows_of(const void* tensor, const Strides& strides, int row, int head) {
  return static_cast<const char*>(tensor) +
         2 * (int(blockIdx.z) * strides.batch + row * strides.row + head * strides.head);
}

// The i-th tile of all sequences: (sequence, its tile), or sequence -1.
template <int kRows>
T2I_DEVICE void find_tile(const int32_t* ends, int sequences, int tile, int& sequence, int& first) {
  int before = 0;
  for (sequence = 0; sequence < sequences; ++sequence) {
    const int tiles = max(ends[sequence + 1] - ends[sequence] + kRows - 1, 0) / kRows;
    if (tile < before + tiles) {
      first = (tile - before) * kRows;
      return;
    }
    before += tiles;
  }
  sequence = -1;
}

// The ``tile``-th problem, of kRows queries or keys, but for its head; false if there is none.
template <int kRows, bool kByKeys>
T2I_DEVICE bool find_problem(const FlashAttention& call, int tile, Problem& problem) {
  problem.q_row = problem.k_row = problem.begin = problem.end = 0;
  problem.first = tile * kRows;
  problem.length_q = call.length_q;
  problem.length_k = call.length_k;
  if (call.cu_q) {
    int sequence;
    find_tile<kRows>(kByKeys ? call.cu_k : call.cu_q, call.sequences, tile, sequence, problem.first);
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

}  // namespace t2i::cuda
