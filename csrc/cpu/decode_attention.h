// One decoding step of attention: rotate and append new tokens to a cache, and attend from them to
// all of it. Free of torch; all memory is the caller's.
//
// A task is one key head of one row of the batch, all of whose query heads and tokens share what is
// read, or a part of its slots: parts are of a fixed length, so that a row's result depends on that
// row alone, to the bit, whatever is computed beside it and by how many threads. Slots outside
// [start, seqlens + tokens) are never read.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/float_type.h"

namespace t2i::cpu {

enum class CacheType { same, int8 };  // "same" as the tokens

// A tensor [batch, tokens or slots, heads, head_dim] whose last dimension is contiguous; strides
// count elements.
struct Tokens {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// Scales of an int8 cache, [batch, slots, heads].
struct Scales {
  float* data;
  int64_t batch_stride, slot_stride, head_stride;
};

struct DecodeStep {
  FloatType type;
  CacheType cache_type;
  int64_t tokens, kv_heads, groups, dim;
  Tokens q, k_new, v_new, k, v, out;
  Scales k_scale, v_scale;
  const int32_t *seqlens, *start;  // of each row of the batch
  const float *cos, *sin;          // [positions, pairs]; null: no rotation
  int64_t pairs;
  bool interleaved;
  int64_t window;  // keys before its own that a token sees; unbounded: longer than any cache
  float softcap;   // 0: none
  float scale;
};

// What one part of the slots gives: [groups * tokens, dim] and [groups * tokens].
struct DecodePartial {
  float *out, *largest, *sum;
};

struct DecodeKernels {
  // Writes the new tokens of a row and key head into the cache.
  void (*append)(const DecodeStep&, int64_t row, int64_t head, float* workspace);

  // Attends to the slots [slot, slot_end); partial.out is not divided by the sum.
  void (*attend)(const DecodeStep&, int64_t row, int64_t head, int64_t slot, int64_t slot_end,
                 const DecodePartial& partial, float* workspace);

  // Writes the output from the partials of all parts, the first of which is overwritten.
  void (*finish)(const DecodeStep&, int64_t row, int64_t head, const DecodePartial* partials,
                 int64_t count);

  int64_t (*workspace)(const DecodeStep&);  // of append and attend, in floats
};

namespace DEFAULT {
extern const DecodeKernels decode_kernels;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const DecodeKernels decode_kernels;
}
namespace AVX512 {
extern const DecodeKernels decode_kernels;
}
#endif

inline const DecodeKernels& decode_kernels() {
#if defined(__x86_64__)
  if (capability() >= Capability::AVX512) return AVX512::decode_kernels;
  if (capability() == Capability::AVX2) return AVX2::decode_kernels;
#endif
  return DEFAULT::decode_kernels;
}

}  // namespace t2i::cpu
