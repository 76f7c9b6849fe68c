// What the bindings of packed weights share.
#pragma once

#include <string>

#include "bindings/common.h"
#include "cpu/linear.h"

namespace t2i {

inline cpu::WeightType weight_type(const char* op, const std::string& name) {
  using cpu::WeightType;
  if (name == "fp32") return WeightType::f32;
  if (name == "bf16") return WeightType::bf16;
  if (name == "int8") return WeightType::int8;
  check(op, name == "int4", "weight_type must be fp32, bf16, int8 or int4, got ", name);
  return WeightType::int4;
}

inline int64_t blocks_of(int64_t inputs) {
  return (inputs + cpu::kBlockInputs - 1) / cpu::kBlockInputs;
}

// Floats that the quantised rows take.
inline int64_t quantized_size(int64_t rows, int64_t inputs) {
  return rows * blocks_of(inputs) * (cpu::kBlockInputs / 4 + 4);
}

inline cpu::Quantized quantized_in(float* memory, int64_t rows, int64_t inputs) {
  const int64_t blocks = blocks_of(inputs);
  float* scales = memory + rows * blocks * (cpu::kBlockInputs / 4);
  return {reinterpret_cast<int8_t*>(memory), scales,
          reinterpret_cast<int32_t*>(scales + rows * blocks * 2)};
}

inline cpu::Quantized quantized_row(const cpu::Quantized& x, int64_t row, int64_t inputs) {
  const int64_t blocks = blocks_of(inputs);
  return {x.values + row * blocks * cpu::kBlockInputs, x.scales + row * blocks * 2,
          x.sums + row * blocks * 2};
}

}  // namespace t2i
