// What a source file that holds one instantiation of flash_forward includes, after its kernel.
#pragma once

#include <type_traits>

#include "flash_problem.cuh"
#include "launch.cuh"

namespace t2i::cuda {

template <class Element, int kDim, bool kSoftcap>
struct FlashForwardKernel;
template <class Element, int kDim, bool kSoftcap>
struct FlashForwardSm90Kernel;

// grid: (tiles of queries, heads, batch)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads)
    flash_forward_kernel(const __grid_constant__ FlashForward call) {
  Problem problem;
  if (!find_queries_problem<Kernel::kQueries, Kernel::kKeys>(call, problem)) return;
  Kernel::run(call, problem);
}

template <template <class, int, bool> class Kernel, Element kElement, int kDim>
void launch_flash_forward_kernel(const FlashForward& call, void* stream) {
  auto start = [&](auto softcap) {
    using Type = std::conditional_t<kElement == Element::bf16, ptx::Bf16, ptx::Fp16>;
    using Chosen = Kernel<Type, kDim, softcap.value>;
    const int tiles = call.length_q / Chosen::kQueries + (call.cu_q ? call.sequences : 1);
    launch("flash_forward", flash_forward_kernel<Chosen>,
           dim3{unsigned(tiles), unsigned(call.heads), unsigned(call.batch)},
           dim3{unsigned(Chosen::kThreads), 1, 1}, Chosen::kSharedBytes, stream, call);
  };
  if (call.softcap > 0) {
    start(std::true_type{});
  } else {
    start(std::false_type{});
  }
}

template <Element kElement, int kDim>
void launch_flash_forward(const FlashForward& call, void* stream) {
  launch_flash_forward_kernel<FlashForwardKernel, kElement, kDim>(call, stream);
}

template <Element kElement, int kDim>
void launch_flash_forward_sm90(const FlashForward& call, void* stream) {
  launch_flash_forward_kernel<FlashForwardSm90Kernel, kElement, kDim>(call, stream);
}

}  // namespace t2i::cuda
