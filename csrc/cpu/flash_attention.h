// Exact attention and its gradient without the matrix of scores. Free of torch; all memory is the
// caller's.
//
// Source: FlashAttention-2 (arXiv 2307.08691). The query heads that share a key head are stacked:
// row r of a key head is query r / G of head r % G among its G heads. Rows lie along the lanes of
// vectors, so that the scores of one key are vectors, maxima and sums over keys are vector
// operations, and every product is C += a B with a scalar `a` that is broadcast from packed keys
// or values. Scores live in a small block that never leaves the cache.
//
// Work is cut into tasks. Each has one writer and a fixed order of sums, which depends on the
// shapes and not on how rows are cut: results are equal to the bit for any number of threads.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/float_type.h"

namespace t2i::cpu {

// Of a call, the same for all sequences.
struct Attention {
  FloatType type;     // of every tensor but logsumexp
  int64_t kv_heads;   // Hkv
  int64_t groups;     // G: query heads a key head
  int64_t dim;        // of q and k
  int64_t v_dim;      // of v and out
  int64_t left;       // keys before a query's own that it sees, and behind it; unbounded ones
  int64_t right;      // are longer than any sequence
  float softcap;      // 0: none
  float scale;
};

// Rows of one sequence in a tensor [length, heads, dim] whose last dimension is contiguous.
// Strides count elements.
struct Rows {
  void* data;
  int64_t first;  // element of the sequence's first row
  int64_t row_stride;
  int64_t head_stride;
};

struct Sequence {
  int64_t q_length, k_length;
  Rows q, k, v, out;
  float* logsumexp;  // of the first row and head
  int64_t logsumexp_stride;  // of a head; rows are contiguous
};

struct SequenceGradients {
  Rows dout, dq, dk, dv;
  const float* dlogsumexp;  // laid out as logsumexp; null: zero
};

// The results of one range of keys, kept until those of the other ranges are there: an output and
// a logsumexp as if there were no other keys, [count, v_dim] and [count].
struct Partial {
  float* out;
  float* logsumexp;
};

constexpr int64_t kRows = 64;  // a task of the forward pass begins at a multiple of these

struct AttentionKernels {
  // Attention of the rows [row, row + count) of a key head, over the keys [key, key_end). Writes
  // out and logsumexp or, where there is one, the partial.
  void (*forward)(const Attention&, const Sequence&, int64_t kv_head, int64_t row, int64_t count,
                  int64_t key, int64_t key_end, const Partial* partial, float* workspace);
  int64_t (*forward_workspace)(const Attention&, int64_t count);  // in floats

  // Writes out and logsumexp of the same rows from the partials of all ranges.
  void (*combine)(const Attention&, const Sequence&, int64_t kv_head, int64_t row, int64_t count,
                  const Partial* partials, int64_t num_partials, float* workspace);

  // Gradients by the keys [key, key_end) of a key head: writes dk and dv, and dq or, where there
  // is a buffer, [G * q_length, dim] fp32 of what these keys add to it.
  void (*backward)(const Attention&, const Sequence&, const SequenceGradients&, int64_t kv_head,
                   int64_t key, int64_t key_end, float* dq, float* workspace);
  int64_t (*backward_workspace)(const Attention&, int64_t keys);  // in floats

  // Writes dq of the rows [row, row_end) as the sum of count buffers, stride floats apart.
  void (*sum_dq)(const Attention&, const Sequence&, const SequenceGradients&, int64_t kv_head,
                 int64_t row, int64_t row_end, const float* dq, int64_t count, int64_t stride,
                 float* workspace);
};

namespace DEFAULT {
extern const AttentionKernels attention_kernels;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const AttentionKernels attention_kernels;
}
namespace AVX512 {
extern const AttentionKernels attention_kernels;
}
#if defined(T2I_AMX)
namespace AMX {
extern const AttentionKernels attention_kernels;
}
#endif
#endif

inline const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
#if defined(T2I_AMX)
  if (capability() == Capability::AMX) return AMX::attention_kernels;
#endif
  if (capability() >= Capability::AVX512) return AVX512::attention_kernels;
  if (capability() == Capability::AVX2) return AVX2::attention_kernels;
#endif
  return DEFAULT::attention_kernels;
}

}  // namespace t2i::cpu
