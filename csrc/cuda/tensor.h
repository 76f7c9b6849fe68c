// What is said of tensors to all launchers. No CUDA header.
#pragma once

#include <cstdint>

namespace t2i::cuda {

// Elements from one to the next.
struct Strides {
  int64_t batch, row, head;
};

enum class Element { fp16, bf16 };

}  // namespace t2i::cuda
