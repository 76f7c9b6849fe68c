// What the launcher of decode_attention takes. No CUDA header: whoever calls needs none.
#pragma once

#include "tensor.h"

namespace t2i::cuda {

// q and out [batch, tokens, heads, head_dim], k_new and v_new [batch, tokens, kv_heads, head_dim],
// in the type ``element``; k and v [batch, slots, kv_heads, head_dim] in the same, or int8 with
// k_scale and v_scale [batch, slots, kv_heads]. cos and sin [positions, rotary_pairs]; null:
// nothing is turned. Rows of k, v and out are 16-byte aligned.
//
// A row whose new tokens have no slots or no positions gets NaN, and its cache stays as it was.
struct DecodeAttention {
  Element element;
  bool int8;
  const void *q, *k_new, *v_new;
  void *k, *v;
  float *k_scale, *v_scale;
  const int32_t *seqlens, *start;
  const float *cos, *sin;
  void* out;
  float* partial;     // decode_attention_partials(call) of them, not initialised
  int32_t* counters;  // decode_attention_counters(call) zeros, which are zeros again afterwards
  Strides q_strides, k_new_strides, v_new_strides, k_strides, v_strides, out_strides;
  Strides k_scale_strides, v_scale_strides;
  int64_t seqlens_stride, start_stride, cos_stride, sin_stride;
  int32_t batch, tokens, heads, kv_heads, slots, dim;
  int32_t rotary_pairs, positions;
  bool interleaved;  // pairs are channels (2i, 2i + 1), else (i, i + rotary_pairs)
  int32_t window;    // keys before a token's own; -1 is all
  float softcap, scale;
};

constexpr int kMostNewTokens = 16;

// Queries of a block: all that share a key head, as far as they fit.
constexpr int decode_queries(int64_t rows) { return rows > 8 ? 16 : 8; }

// Slots of a block, by the bytes of a key: whatever the batch and the lengths are, so that a row's
// bits depend on neither.
constexpr int decode_split(int key_bytes) { return (64 << 10) / key_bytes; }

int64_t decode_attention_partials(const DecodeAttention& call);
int64_t decode_attention_counters(const DecodeAttention& call);

// Raises std::invalid_argument, or std::runtime_error with what CUDA said. ``stream``:
// cudaStream_t.
void decode_attention(const DecodeAttention& call, void* stream);

// Each instantiation is a source file of its own.
template <Element kElement, int kDim, bool kInt8>
void launch_decode_attention(const DecodeAttention& call, void* stream);

}  // namespace t2i::cuda
