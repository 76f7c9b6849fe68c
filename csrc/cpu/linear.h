// x W^T for a matrix W that was packed once, at the speed at which memory gives it. Free of torch; all
// memory is the caller's.
//
// Packed, W [outputs, inputs] is a row of panels of 16 outputs. A panel holds its inputs one after
// the other, and beside each other what 16 outputs have for them: a vector of outputs is summed up in
// the order of the inputs, in one accumulator. So a row's result is the same to the bit however many
// rows are computed with it, and a panel is one stream of memory; up to four are read at once.
//
//   f32   of each input, 16 floats
//   bf16  of each two inputs, 16 pairs
//   int8  of each 64 inputs, 16 pairs of scales in bf16, one of each 32 inputs; then of each 4 inputs
//         16 times 4 bytes w + 128
//   int4  the same scales; then of each 32 inputs four lines of 16 times 4 bytes, whose low halves are
//         w + 8 of the first 16 inputs and whose high halves are those of the other 16
//
// The inputs of a panel are filled up with zeros, as are the outputs of the last one.
#pragma once

#include <cstdint>

#include "cpu/capability.h"

namespace t2i::cpu {

enum class WeightType { f32, bf16, int8, int4 };

constexpr int64_t kPanelOutputs = 16, kGroupInputs = 32, kBlockInputs = 64;

struct PackedMatrix {
  WeightType type;
  int64_t outputs, inputs;
  const uint8_t* data;  // at the start of a cache line

  bool quantized() const { return type == WeightType::int8 || type == WeightType::int4; }
  int64_t panels() const { return (outputs + kPanelOutputs - 1) / kPanelOutputs; }
  int64_t blocks() const { return (inputs + kBlockInputs - 1) / kBlockInputs; }
  int64_t panel_bytes() const {
    switch (type) {
      case WeightType::f32: return inputs * 64;
      case WeightType::bf16: return (inputs + 1) / 2 * 64;
      case WeightType::int8: return blocks() * 17 * 64;
      case WeightType::int4: return blocks() * 9 * 64;
    }
    return 0;
  }
};

// Rows of inputs in groups of 32, the last block of 64 filled up with zeros: x = scale * value.
struct Quantized {
  int8_t* values;  // [rows, 64 * blocks]
  float* scales;   // [rows, 2 * blocks]
  int32_t* sums;   // of the values of a group
};

// x [rows, inputs], and the same quantised where the weights are.
struct LinearInputs {
  int64_t rows;
  const float* x;
  int64_t stride;
  Quantized quantized;
};

enum class Epilogue {
  store,   // out = x W^T
  add,     // out += x W^T
  swiglu,  // W is [gate; up]: out = silu(x gate^T) * (x up^T), half as many panels
};

struct LinearOutputs {
  float* out;  // [rows, outputs]
  int64_t stride;
  Epilogue epilogue;
};

constexpr int64_t kLinearRows = 192;  // at once
constexpr int64_t kLinearPanels = 4;  // at once, at most
constexpr int64_t kLinearWorkspace = kLinearRows * kLinearPanels * kPanelOutputs;  // floats: sums

struct LinearKernels {
  // One row of inputs. A group that is not finite gives NaN.
  void (*quantize)(const float* x, int64_t inputs, const Quantized& row);

  // The outputs of the panels [begin, end), of the gate where the epilogue is swiglu.
  void (*multiply)(const PackedMatrix& weights, const LinearInputs& in, int64_t begin, int64_t end,
                   const LinearOutputs& out, float* workspace);
};

namespace DEFAULT {
extern const LinearKernels linear_kernels;
}
#if defined(__x86_64__)
namespace AVX2 {
extern const LinearKernels linear_kernels;
}
namespace AVX512 {
extern const LinearKernels linear_kernels;
}
namespace AVX512_VNNI {  // dot products of bytes
extern const LinearKernels linear_kernels;
}
#endif

inline const LinearKernels& linear_kernels() {
#if defined(__x86_64__)
  if (capability() >= Capability::AVX512_VNNI) return AVX512_VNNI::linear_kernels;
  if (capability() == Capability::AVX512) return AVX512::linear_kernels;
  if (capability() == Capability::AVX2) return AVX2::linear_kernels;
#endif
  return DEFAULT::linear_kernels;
}

}  // namespace t2i::cpu
