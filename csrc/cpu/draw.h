// Draws one code from its logits. Free of torch.
//
// The code is the argmax of logits / temperature + g over the likely ones, where the Gumbel noise g is
// a function of (seed, position, code); kernels/t2i_kernels/draw/api.py defines all of it.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace t2i::cpu {

struct Draw {
  const float* logits;         // [codes]
  const float* unconditional;  // null: no guidance
  float guidance;              // s: unconditional + s (logits - unconditional); 1: off
  int64_t codes;
  int64_t seed, position;
  float temperature;  // 0: the most likely code
  int64_t top_k;      // 0: all
  double top_p;       // 1: all
};

inline int64_t draw_workspace(int64_t codes) { return 2 * (codes + 64); }  // floats

// Returns a code, or -1 where a logit is NaN, or none is above -inf, or one is inf.
using DrawCode = int64_t (*)(const Draw& draw, float* workspace);

namespace DEFAULT {
extern const DrawCode draw_code;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const DrawCode draw_code;
}
namespace AVX512 {
extern const DrawCode draw_code;
}
#endif

inline DrawCode draw_code() {
#if defined(__x86_64__)
  if (capability() >= Capability::AVX512) return AVX512::draw_code;
  if (capability() == Capability::AVX2) return AVX2::draw_code;
#endif
  return DEFAULT::draw_code;
}

}  // namespace t2i::cpu
