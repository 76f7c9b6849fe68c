// What a source file that holds one instantiation of flash_backward includes.
#pragma once

#include <type_traits>

#include "flash_backward.cuh"
#include "launch.cuh"

namespace t2i::cuda {

template <class Element, int kDim, bool kSoftcap>
void start_flash_backward(const FlashBackward& call, void* stream) {
  auto start = [&](auto kernel, int tiles, int heads, int threads, int shared_bytes, auto... more) {
    launch("flash_backward", kernel, dim3{unsigned(tiles), unsigned(heads), unsigned(call.batch)},
           dim3{unsigned(threads), 1, 1}, shared_bytes, stream, call, more...);
  };
  using Rows = FlashBackwardRows<Element, kDim>;
  using Keys = FlashBackwardKeys<Element, kDim, kSoftcap>;
  using Queries = FlashBackwardQueries<Element, kDim, kSoftcap>;
  const int sequences = call.cu_q ? call.sequences : 1;
  const Scale scale(call);
  if (call.length_q > 0) {
    start(flash_backward_rows_kernel<Rows>, (call.length_q - 1) / Rows::kRows + 1, call.heads,
          Rows::kThreads, 0);
    start(flash_backward_queries_kernel<Queries>, call.length_q / Queries::kQueries + sequences,
          call.heads, Queries::kThreads, Queries::kSharedBytes, scale);
  }
  if (call.length_k > 0) {
    start(flash_backward_keys_kernel<Keys>, call.length_k / Keys::kKeys + sequences,
          call.heads / call.group, Keys::kThreads, Keys::kSharedBytes, scale);
  }
}

template <Element kElement, int kDim>
void launch_flash_backward(const FlashBackward& call, void* stream) {
  using Type = std::conditional_t<kElement == Element::bf16, ptx::Bf16, ptx::Fp16>;
  if (call.softcap > 0) {
    start_flash_backward<Type, kDim, true>(call, stream);
  } else {
    start_flash_backward<Type, kDim, false>(call, stream);
  }
}

}  // namespace t2i::cuda
