// One decoding step of attention: rotate and append new tokens to a cache, and attend from them to
// all of it. Free of torch; all memory is the caller's.
//
// A task is a block of tokens for one key head of one row of the batch, whose query heads share what
// is read, and a part of their slots. Parts begin at fixed places, so that a token's result depends on
// its row alone, to the bit, whatever is computed beside it and by how many threads. Slots outside
// [start, seqlens + tokens) are never read.
#pragma once

#include <cstdint>

#include "cpu/capability.h"
#include "cpu/float_type.h"

namespace t2i::cpu {

enum class CacheType { f32, bf16, f16, int8 };

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
  bool positions_from_start;       // position of a slot: slot - start, else the slot
  int64_t pairs;
  bool interleaved;
  int64_t window;  // keys before its own that a token sees; unbounded: longer than any cache
  float softcap;   // 0: none
  float scale;
};

// Slots of a task at most, whose parts begin at multiples of it from start. Long enough that memory
// runs at its speed, which it loses where keys end and values begin; short enough that few heads keep
// all threads busy.
constexpr int64_t kDecodeSlots = 128;

// Tokens of a task at most.
inline int64_t decode_tokens(const DecodeStep& step) {
  const int64_t most = step.groups < 64 ? 64 / step.groups : 1;
  return step.tokens < most ? step.tokens : most;
}

// Which tokens of a row and key head, and which slots.
struct DecodeTask {
  int64_t row, head, token, token_end, slot, slot_end;
};

// What a task gives: [groups * tokens, dim] and [groups * tokens].
struct DecodePartial {
  float *out, *largest, *sum;
};

struct DecodeKernels {
  // Writes the new tokens of a row and key head into the cache.
  void (*append)(const DecodeStep&, int64_t row, int64_t head, float* workspace);

  // partial.out is not divided by the sum.
  void (*attend)(const DecodeStep&, const DecodeTask& task, const DecodePartial& partial,
                 float* workspace);

  // Writes the output of a task's tokens from the partials of all their slots, the first of which
  // is overwritten.
  void (*finish)(const DecodeStep&, const DecodeTask& task, const DecodePartial* partials,
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
