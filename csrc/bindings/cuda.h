// What the bindings of CUDA kernels share.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "bindings/common.h"
#include "cuda/tensor.h"

namespace t2i {

// Makes a tensor's device the current one, as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device()),
        stream_(torch::stable::accelerator::getCurrentStream(tensor.get_device())) {}

  // cudaStream_t
  void* stream() const { return stream_.nativeHandle(); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
};

// Rows that kernels read 16 bytes at a time; what is not aligned so is copied.
inline Tensor with_aligned_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  bool aligned = tensor.stride(last) == 1 &&
                 reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && tensor.stride(i) % 8 == 0;
  return aligned ? tensor : torch::stable::clone(torch::stable::contiguous(tensor));
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return sizes;
}

// Of [batch, rows, heads, dim], or of packed [rows, heads, dim].
inline cuda::Strides strides_of(const Tensor& tensor) {
  const int64_t d = tensor.dim();
  return {d == 4 ? tensor.stride(0) : 0, tensor.stride(d - 3), tensor.stride(d - 2)};
}

inline cuda::Element element_of(const char* op, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(op, type == ScalarType::BFloat16 || type == ScalarType::Half,
        "expected bfloat16 or float16 tensors");
  return type == ScalarType::BFloat16 ? cuda::Element::bf16 : cuda::Element::fp16;
}

}  // namespace t2i
