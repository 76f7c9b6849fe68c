// What a source file that holds one instantiation of decode_attention includes.
#pragma once

#include "decode_attention.cuh"
#include "launch.cuh"

namespace t2i::cuda {

template <Element kElement, int kDim, bool kInt8>
void launch_decode_attention(const DecodeAttention& call, void* stream) {
  using Type = std::conditional_t<kElement == Element::bf16, ptx::Bf16, ptx::Fp16>;
  const int queries = call.tokens * (call.heads / call.kv_heads);
  auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int tiles = (queries + Kernel::kQueries - 1) / Kernel::kQueries;
    const int splits = (call.slots + Kernel::kSplit - 1) / Kernel::kSplit;
    launch("decode_attention", decode_attention_kernel<Kernel>,
           dim3{unsigned(call.batch * call.kv_heads), unsigned(tiles), unsigned(splits)},
           dim3{unsigned(Kernel::kThreads), 1, 1}, Kernel::kSharedBytes, stream, call);
  };
  if (decode_queries(queries) == 8) {
    start(DecodeAttentionKernel<Type, kDim, kInt8, 1>());
  } else {
    start(DecodeAttentionKernel<Type, kDim, kInt8, 2>());
  }
}

}  // namespace t2i::cuda
