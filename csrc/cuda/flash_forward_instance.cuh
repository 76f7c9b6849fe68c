// What a source file that holds one instantiation of flash_forward includes.
#pragma once

#include <type_traits>

#include "flash_forward.cuh"
#include "launch.cuh"

namespace t2i::cuda {

template <Element kElement, int kDim>
void launch_flash_forward(const FlashForward& call, void* stream) {
  auto start = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int tiles = call.length_q / Kernel::kQueries + (call.cu_q ? call.sequences : 1);
    launch("flash_forward", flash_forward_kernel<Kernel>,
           dim3{unsigned(tiles), unsigned(call.heads), unsigned(call.batch)},
           dim3{unsigned(Kernel::kThreads), 1, 1}, Kernel::kSharedBytes, stream, call);
  };
  if (call.softcap > 0) {
    start(FlashForwardKernel<std::conditional_t<kElement == Element::bf16, ptx::Bf16, ptx::Fp16>, kDim, true>());
  } else {
    start(FlashForwardKernel<std::conditional_t<kElement == Element::bf16, ptx::Bf16, ptx::Fp16>, kDim, false>());
  }
}

}  // namespace t2i::cuda
