// Launches, on a GPU or in csrc/simt.
#pragma once

#include <stdexcept>
#include <string>

#include "ptx.cuh"

namespace t2i::cuda {

#if defined(__CUDACC__)

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
            void* stream, const Arguments&... arguments) {
  if (shared_bytes > 48 << 10) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          name);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

#else

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
            void*, const Arguments&... arguments) {
  try {
    simt::launch(kernel, grid, block, shared_bytes, arguments...);
  } catch (const simt::Error& error) {
    throw simt::Error(std::string(name) + ": " + error.what());
  }
}

#endif

}  // namespace t2i::cuda
