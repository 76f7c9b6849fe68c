// What the launchers of flash_attention take. No CUDA header: whoever calls needs none.
#pragma once

#include "tensor.h"

namespace t2i::cuda {

// What forward and backward share. q [batch, length_q, heads, head_dim], k and v [batch, length_k,
// heads / group, …]. Packed: batch 1, and sequence i has the rows cu_q[i] to cu_q[i + 1]. Rows are
// 16-byte aligned, so sizes and strides are multiples of 8 elements.
struct FlashAttention {
  Element element;
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  const int32_t *cu_q, *cu_k;  // null unless packed
  int32_t sequences;           // of packed tensors, else 1
  int32_t batch, heads, group, length_q, length_k;
  int32_t dim, value_dim;
  int32_t window_left, window_right;  // keys before and behind a query's own; -1 is all
  float softcap;  // 0 is none
  float scale;    // of the scores, above 0 unless there is a softcap
};

// out as q, lse [batch, heads, length_q] contiguous.
struct FlashForward : FlashAttention {
  void* out;
  float* lse;
  Strides out_strides;
};

// Gradients dq, dk and dv of ones for out and lse, which are what forward gave. dlse, as lse, may be
// null; log2_sum and minus_delta are scratch memory of lse's shape.
struct FlashBackward : FlashAttention {
  const void *dout, *out;
  const float *lse, *dlse;
  float *log2_sum, *minus_delta;
  void *dq, *dk, *dv;
  Strides dout_strides, out_strides, dq_strides, dk_strides, dv_strides;
};

// Raise std::invalid_argument, or std::runtime_error with what CUDA said. ``stream``: cudaStream_t.
void flash_forward(const FlashForward& call, void* stream);
void flash_backward(const FlashBackward& call, void* stream);

// Each instantiation is a source file of its own.
template <Element kElement, int kDim>
void launch_flash_forward(const FlashForward& call, void* stream);
template <Element kElement, int kDim>
void launch_flash_forward_sm90(const FlashForward& call, void* stream);
template <Element kElement, int kDim>
void launch_flash_backward(const FlashBackward& call, void* stream);

}  // namespace t2i::cuda
