// RMSNorm and LayerNorm of one row in fp32. Free of torch.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace t2i::cpu {

struct Norm {
  const float* weight;
  const float* bias;  // null: none
  float eps;
  bool centered;  // LayerNorm: the mean is taken off
};

// out may be x.
using NormRow = void (*)(const float* x, int64_t channels, const Norm& norm, float* out);

namespace DEFAULT {
extern const NormRow norm_row;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const NormRow norm_row;
}
namespace AVX512 {
extern const NormRow norm_row;
}
#endif

inline NormRow norm_row() {
#if defined(__x86_64__)
  if (capability() >= Capability::AVX512) return AVX512::norm_row;
  if (capability() == Capability::AVX2) return AVX2::norm_row;
#endif
  return DEFAULT::norm_row;
}

}  // namespace t2i::cpu
